// Runs ONNX exports in transformers.js. Arguments: a JSON file with jobs, and the file for their results.
//
// A job has `model` (the folder), `texts` to encode, and `prompt` (ids) to continue greedily by `count` tokens. Its
// result has the `ids` of each text and the `continuation`.
import {readFileSync, writeFileSync} from "node:fs";
import {dirname, basename} from "node:path";
import {AutoModelForCausalLM, AutoTokenizer, Tensor, env} from "@huggingface/transformers";

const [jobsFile, resultsFile] = process.argv.slice(2);
env.allowRemoteModels = false;
const results = [];
for (const job of JSON.parse(readFileSync(jobsFile, "utf8"))) {
    env.localModelPath = dirname(job.model);
    const name = basename(job.model);
    const tokenizer = await AutoTokenizer.from_pretrained(name);
    const model = await AutoModelForCausalLM.from_pretrained(name, {dtype: "fp32"});
    const size = [1, job.prompt.length];
    const generated = await model.generate({
        input_ids: new Tensor("int64", BigInt64Array.from(job.prompt.map(BigInt)), size),
        attention_mask: new Tensor("int64", new BigInt64Array(job.prompt.length).fill(1n), size),
        max_new_tokens: job.count,
        do_sample: false,
    });
    results.push({
        ids: job.texts.map((text) => Array.from(tokenizer.encode(text, {add_special_tokens: false}))),
        continuation: Array.from(generated.data, Number).slice(job.prompt.length),
    });
    await model.dispose();
}
writeFileSync(resultsFile, JSON.stringify(results));
