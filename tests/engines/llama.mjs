// Runs GGUF files in llama.cpp. Arguments: a JSON file with jobs, and the file for their results.
//
// A job has `model` (the path), `texts` to encode, `prompt` (ids) to continue greedily by `count` tokens, and `rows` of
// ids; `exact` keeps the cache in float32, as in transformers. Its result has the `ids` of each text, the `texts` of
// these ids, the `continuation`, and for each row and position the log-probability of the row's next token (`next`),
// and of the likeliest one (`top`, its id `likeliest`).
import {readFileSync, writeFileSync} from "node:fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const [jobsFile, resultsFile] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const results = [];
for (const job of JSON.parse(readFileSync(jobsFile, "utf8"))) {
    const model = await llama.loadModel({modelPath: job.model});
    const result = {ids: job.texts.map((text) => model.tokenize(text, true)), continuation: [], rows: []};
    result.texts = result.ids.map((ids) => model.detokenize(ids, true));
    // One token more, or a full context is shifted. Several threads wait for each other actively, which takes seconds
    // on a busy machine. Flash attention rounds to float16.
    const options = {contextSize: model.trainContextSize + 1, threads: 1, flashAttention: false};
    if (job.exact) options.experimentalKvCacheKeyType = options.experimentalKvCacheValueType = "F32";
    const context = await model.createContext(options);
    const sequence = context.getSequence();
    for await (const token of sequence.evaluate(job.prompt, {temperature: 0})) {
        if (result.continuation.push(token) === job.count) break;
    }
    for (const row of job.rows) {
        await sequence.clearHistory();
        const wanted = {generateNext: {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}}};
        const outputs = await sequence.controlledEvaluate(row.map((token) => [token, wanted]));
        const found = {next: [], top: [], likeliest: []};
        outputs.forEach(({next: {probabilities}}, position) => {
            // Again a sum of 1: llama.cpp's sum in float32 loses small probabilities of a large vocabulary.
            let [likeliest, top, sum] = [-1, -1, 0];
            for (const [token, probability] of probabilities) {
                sum += probability;
                if (probability > top) [likeliest, top] = [token, probability];
            }
            found.likeliest.push(likeliest);
            found.top.push(Math.log(top / sum));
            if (position + 1 < row.length) found.next.push(Math.log(probabilities.get(row[position + 1]) / sum));
        });
        result.rows.push(found);
    }
    results.push(result);
    await context.dispose();
    await model.dispose();
}
writeFileSync(resultsFile, JSON.stringify(results));
process.exit(0);
