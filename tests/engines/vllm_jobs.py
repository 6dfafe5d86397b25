"""Runs models in vLLM, one after another in a process: reads a JSON file of jobs, and writes their results."""

import json
import os
import sys
import traceback

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a start takes seconds instead of a minute

from vllm import LLM, SamplingParams


def run(job: dict) -> list:
    """The class probabilities of texts, or the ids that continue prompts of ids; greedily, if the temperature is 0."""
    engine = LLM(job["model"], **job["options"])
    if "texts" in job:
        return [output.outputs.probs for output in engine.classify(job["texts"])]
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    sampling = SamplingParams(temperature=job["temperature"], max_tokens=job["count"], ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in engine.generate(prompts, sampling)]


def describe(job: dict) -> dict:
    try:
        return {"result": run(job)}
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":  # vLLM's other processes import this file
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    results = [describe(job) for job in jobs]
    with open(sys.argv[2], "w") as file:
        json.dump(results, file)
