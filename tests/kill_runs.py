"""Kills runs with SIGKILL at random moments, and resumes each on a random number of processes until it is finished.

Run by hand: `OMP_NUM_THREADS=1 python tests/kill_runs.py FOLDER --runs 100 --processes 1 2 4`. Every run must end with
the weights and the training log of a run that was not killed; on several processes, logged losses may differ in the
last digits, since each process logs the sum of its own batches.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

from rich.console import Console

from hfgpt.recipe import load_recipe
from hfgpt.runs import run as module
from hfgpt.saving import hash_file
from hfgpt.training import estimate

RECIPES = {
    "pretrain": """
task: pretrain
tokenizer: {kind: char}
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 32}
data: {path: "synthetic:stories", max_documents: 9, num_proc: 1, cache_dir: cache}
""",
    "classify": """
task: classify
tokenizer: {kind: char}
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}
data: {path: "synthetic:messages", max_rows: 30}
pretraining: {max_steps: 20, per_device_train_batch_size: 8, dropout: 0.1}
evaluation: {baseline: false}
""",
    "instruct": """
task: instruct
tokenizer: {kind: bpe, vocab_size: 300}
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 192}
data: {path: "synthetic:instructions", max_rows: 42}
evaluation: {max_answers: 2, max_new_tokens: 4}
""",
}
TRAINING = (
    "training: {global_batch_size: 8, per_device_train_batch_size: 2, max_steps: 60, learning_rate: 0.01, "
    "muon_learning_rate: 0.02, eval_strategy: steps, eval_steps: 20, save_steps: 5, logging_steps: 1, use_cpu: true, "
    "bf16: false}"
)


def train(task: str, folder: str):
    """Trains, or resumes what is in the folder, in this process."""
    resume = (Path(folder) / "run.json").exists()
    module.run(load_recipe(f"{task}.yaml", [f"--training.output_dir={folder}"]), resume, Console(quiet=True))


def fork(task: str, folder: str, processes: int) -> list[int]:
    """Starts the processes of a run; returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        status = 1
        try:
            os.setpgid(0, 0)
            if processes > 1:
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                os.environ |= {name: str(value) for name, value in places.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            train(task, folder)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return children


def train_and_kill(task: str, folder: str, choices: list[int], seconds: float, draws: random.Random) -> list[int]:
    """Trains until the run is finished, killing it at random moments; returns the number of processes of each try."""
    tries = []
    while not (Path(folder) / "README.md").exists():
        tries.append(draws.choice(choices))
        children = fork(task, folder, tries[-1])
        deadline = time.monotonic() + draws.uniform(0.2, seconds)
        ended = {}
        while len(ended) < len(children):
            if time.monotonic() > deadline:
                for child in children:
                    if child not in ended:
                        os.kill(child, signal.SIGKILL)
                deadline = float("inf")
            for child in children:
                if child not in ended and os.waitpid(child, os.WNOHANG)[0]:
                    ended[child] = True
            time.sleep(0.01)
        seconds *= 1.1  # each run ends at last
    return tries


def read(folder: str, exact: bool) -> tuple[str, list]:
    """The hash of the weights, and the log without times; losses rounded unless `exact`."""
    entries = [json.loads(line) for line in (Path(folder) / "training_log.jsonl").read_text().splitlines()]
    timed = re.compile("train_|.*_runtime")  # transformers' train_loss is that of the last try
    kept = [{name: value for name, value in entry.items() if not timed.match(name)} for entry in entries]
    if not exact:
        kept = [{name: float(f"{value:.4g}") for name, value in entry.items()} for entry in kept]
    return hash_file(Path(folder) / "model.safetensors"), kept


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.folder)
    probe = estimate.probe_tokens_per_second
    estimate.probe_tokens_per_second = lambda *args, **kwargs: probe(*args[:3], seconds=0.02)
    module.plot_loss = lambda *args: None
    draws, exact = random.Random(arguments.seed), arguments.processes == [1]
    expected, equal = {}, 0
    for task, recipe in RECIPES.items():
        Path(f"{task}.yaml").write_text(recipe + TRAINING)
        shutil.rmtree(f"whole-{task}", ignore_errors=True)
        start = time.monotonic()
        (child,) = fork(task, f"whole-{task}", 1)
        assert os.waitpid(child, 0)[1] == 0
        expected[task] = read(f"whole-{task}", exact), time.monotonic() - start
    for number in range(arguments.runs):
        task = list(RECIPES)[number % len(RECIPES)]
        wanted, seconds = expected[task]
        folder = f"run-{arguments.seed}-{number}"
        tries = train_and_kill(task, folder, arguments.processes, seconds, draws)
        same = read(folder, exact) == wanted
        equal += same
        outcome = "equal" if same else "DIFFERENT"
        print(f"{number + 1} {task}: killed {len(tries) - 1} times, processes {tries}: {outcome}", flush=True)
        if same:
            shutil.rmtree(folder)
    print(f"{equal} of {arguments.runs} runs are equal to those that were not killed")
    sys.exit(equal != arguments.runs)


if __name__ == "__main__":
    main()
