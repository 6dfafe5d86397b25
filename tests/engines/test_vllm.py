"""Models in vLLM on the CPU, with the plugin and with the saved code: the results are those of transformers."""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from engines import ENGINES, encode, run_jobs
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hfgpt import HfGPTConfig, HfGPTForCausalLM
from hfgpt.commands.export import ExportArguments, export
from hfgpt.commands.verify import verify
from hfgpt.demo_corpus import generate_messages, generate_stories
from hfgpt.errors import InputError

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
PYTHON = ENGINES / "vllm" / "bin" / "python"
CONTINUED = 40
EAGER = {"dtype": "float32", "enforce_eager": True}
REMOTE = {**EAGER, "trust_remote_code": True}
LAST = {"pooler_config": {"seq_pooling_type": "LAST"}}  # the option of the model cards
SECONDS = 600  # to wait for a server
CLASSIFIER = """
task: classify
model: {{path: "{path}"}}
data: {{path: "synthetic:messages", max_rows: 1000}}
training: {{per_device_train_batch_size: 16, num_train_epochs: 1, learning_rate: 0.003, eval_strategy: "no"}}
evaluation: {{baseline: false}}
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    """hfgpt as pip installs it, for `PYTHONPATH`: vLLM's own environment does not have it."""
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def classifier(models, tmp_path_factory) -> Path:
    from hfgpt.recipe import load_recipe
    from hfgpt.runs.run import run

    folder = tmp_path_factory.mktemp("classifier")
    (folder / "classifier.yaml").write_text(CLASSIFIER.format(path=models["bpe", "tied"]))
    run(load_recipe(str(folder / "classifier.yaml"), ["--training.output_dir", str(folder / "model")]))
    return folder / "model"


def environment(plugin: Path | None) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # Without binding threads to cores, which two processes of a pipeline could not share here.
    settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CACHE_ROOT": str(ENGINES / "vllm" / "cache")}
    return {**ours, **settings, **({"PYTHONPATH": str(plugin)} if plugin else {})}


def run_vllm(jobs: list[dict], folder: Path, plugin: Path | None) -> list[dict]:
    command = [str(PYTHON), str(Path(__file__).parent / "vllm_jobs.py")]
    return run_jobs(command, jobs, folder, environment(plugin))


def continue_greedily(path: Path, options: dict, count: int = 20) -> tuple[dict, list[list[int]]]:
    """A job of greedy continuations of prompts of different lengths, and those of `generate`."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rows = [encode(tokenizer, story) for story in generate_stories(count, seed=77)]
    prompts = [row[: 1 + 6 * index] for index, row in enumerate(rows)]
    expected = []
    for prompt in prompts:
        settings = {"max_new_tokens": CONTINUED, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        expected.append(model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist())
    assert {len(row) for row in expected} == {CONTINUED}
    job = {"model": str(path), "options": options, "prompts": prompts, "temperature": 0, "count": CONTINUED}
    return job, expected


def check_greedy(cases: dict[str, tuple[dict, list[list[int]]]], folder: Path, plugin: Path | None):
    results = run_vllm([job for job, _ in cases.values()], folder, plugin)
    for (name, (_, expected)), found in zip(cases.items(), results, strict=True):
        assert found.get("result") == expected, (name, found.get("error"))


def test_greedy_continuations_with_the_plugin(models, plugin, tmp_path):
    cases = {
        f"{kind}-{layout}": continue_greedily(path, EAGER) for (kind, layout), path in models.items() if kind != "gpt2"
    }
    assert len(cases) == 6
    check_greedy(cases, tmp_path, plugin)


def test_greedy_continuations_without_hfgpt(models, tmp_path):
    cases = {"-".join(key): continue_greedily(models[key], REMOTE) for key in (("bpe", "tied"), ("char", "book"))}
    refused = {**cases["bpe-tied"][0], "options": EAGER}
    for layout in ("tied", "book"):
        path = tmp_path / layout
        export(str(models["bpe", layout]), path, ExportArguments("gpt2"), Console(file=io.StringIO()))
        cases[f"exported-{layout}"] = continue_greedily(path, EAGER)
    check_greedy(cases, tmp_path, None)
    (found,) = run_vllm([refused], tmp_path, None)
    assert "trust_remote_code" in found["error"]


@pytest.mark.parametrize("parallel", ["pipeline_parallel_size", "tensor_parallel_size"])
def test_models_divided_between_two_processes(parallel, models, plugin, tmp_path):
    """Compiled, since vLLM does not support a pipeline on the CPU otherwise."""
    options = {"dtype": "float32", parallel: 2}
    cases = {layout: continue_greedily(models["bpe", layout], options) for layout in ("tied", "untied")}
    check_greedy(cases, tmp_path, plugin)


def test_ids_without_a_token_are_not_sampled(models, plugin, tmp_path):
    job, _ = continue_greedily(models["char", "tied"], EAGER)
    model = AutoModelForCausalLM.from_pretrained(models["char", "tied"])
    folder = tmp_path / "even"  # all tokens have the same probability
    model.model.norm.weight.data.zero_()
    model.model.norm.bias.data.zero_()
    shutil.copytree(models["char", "tied"], folder)
    model.save_pretrained(folder)
    known = len(AutoTokenizer.from_pretrained(folder))
    assert known < model.config.vocab_size
    sampled = []
    for options, path in ((EAGER, plugin), (REMOTE, None)):
        changes = {"model": str(folder), "options": options, "temperature": 1}
        (found,) = run_vllm([{**job, **changes}], tmp_path, path)
        sampled.append({index for row in found["result"] for index in row})
    with_plugin, without = sampled
    assert with_plugin == set(range(known))
    assert without == set(range(model.config.vocab_size)), "vLLM does not read `suppress_tokens`"


def test_class_probabilities(classifier, plugin, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32).eval()
    texts = [message["text"] for message in generate_messages(20, seed=5)]
    with torch.no_grad():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).tolist() for text in texts]
    assert len({max(range(len(row)), key=row.__getitem__) for row in expected}) > 1
    job = {"model": str(classifier), "texts": texts}
    jobs = [{**job, "options": options} for options in (EAGER, {**EAGER, **LAST})]
    first = {**EAGER, "pooler_config": {"seq_pooling_type": "CLS"}}
    *right, wrong = run_vllm([*jobs, {**job, "options": first}], tmp_path, plugin)
    for found in right:
        torch.testing.assert_close(torch.tensor(found["result"]), torch.tensor(expected), rtol=0, atol=1e-4)
    assert (torch.tensor(wrong["result"]) - torch.tensor(expected)).abs().max() > 0.01, "by the first token"
    (refused,) = run_vllm([{**job, "options": {**REMOTE, **LAST}}], tmp_path, None)
    assert "no module or parameter named 'score'" in refused["error"]


def test_a_head_size_that_vllm_does_not_have_is_refused(plugin, tmp_path):
    config = HfGPTConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    HfGPTForCausalLM(config).save_pretrained(tmp_path / "model")
    options = {**EAGER, "skip_tokenizer_init": True}
    job = {"model": str(tmp_path / "model"), "options": options, "prompts": [[1]], "temperature": 0, "count": 1}
    (found,) = run_vllm([job], tmp_path, plugin)
    assert "head_dim=16" in found["error"]


@contextmanager
def served(path: Path, plugin: Path, *options: str):
    """The URL of a server that runs a model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # The command `vllm serve` of vllm-cpu looks for the package `vllm`, and fails.
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
    command += ["--host", "127.0.0.1", "--port", port, *options]
    log = path.with_name(f"{path.name}.log")
    with open(log, "w") as output:
        server = subprocess.Popen(
            command, env=environment(plugin), stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_for(url: str, server: subprocess.Popen, log: Path):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(f"no server:\n{log.read_text()[-4000:]}")


def test_servers_are_verified(models, plugin, tmp_path):
    """In both precisions; a changed weight is named, as is a precision that was not asked for."""
    shutil.copytree(models["bpe", "tied"], path := tmp_path / "model")
    with served(path, plugin, "--dtype", "float32") as url:
        assert "(float32, limit" in verify(str(path), url)
    with served(path, plugin, "--dtype", "bfloat16", "--enforce-eager") as url:
        assert "(bfloat16, limit" in verify(str(path), url, "bfloat16")
        with pytest.raises(InputError, match=f"^{url} differs in its precision"):
            verify(str(path), url)
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][:16] = 0
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with (
        served(path, plugin, "--dtype", "float32", "--enforce-eager") as url,
        pytest.raises(InputError, match=f"^{url} differs in its weights or positions"),
    ):
        verify(str(path), url)
