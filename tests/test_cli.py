"""The command line: commands print their result; an error that a user can fix is one line on stderr, with status 2.

Commands run in this process (tests that need a separate one are in test_cli_processes.py). Each has a Hub token in its
environment, which must not appear anywhere. All comparisons are exact.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer

from hfgpt import cli
from hfgpt.demo_corpus import generate_stories

TOKEN = "hf_SecretSecretSecret"
COMMANDS = [
    "train",
    "prepare",
    "generate",
    "chat",
    "classify",
    "evaluate",
    "verify",
    "serve",
    "merge",
    "import",
    "export",
    "publish",
    "recipes",
    "keys",
    "bench",
    "inspect",
    "plan",
    "doctor",
    "demo",
]
RECIPE = """
task: pretrain
tokenizer: {{kind: char, pad_token: null}}
model: {{num_hidden_layers: 2, num_attention_heads: 2, hidden_size: 32, max_position_embeddings: 32, embd_pdrop: 0.0}}
data: {{path: stories.txt, num_proc: 1, cache_dir: {cache}}}
training:
  per_device_train_batch_size: 8
  per_device_eval_batch_size: 16
  max_steps: 20
  learning_rate: 0.03
  logging_steps: 5
  eval_strategy: steps
  eval_steps: 10
  save_steps: 10
  use_cpu: true
evaluation: {{prompts: ["Once"], max_new_tokens: 8}}
"""


class Result(NamedTuple):
    status: int
    out: str
    err: str


def hfgpt(*arguments, **environment: str) -> Result:
    """Runs a command as the console script does; a traceback fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        # What main() would set for the entire process.
        for name in ("HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
            patch.setenv(name, "1")
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        for name, value in {"HF_TOKEN": TOKEN, **environment}.items():
            patch.setenv(name, value)
        patch.setattr("sys.argv", ["hfgpt", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
            cli.main()
    assert TOKEN not in out.getvalue() + err.getvalue()
    return Result(stop.value.code, out.getvalue(), err.getvalue())


def content_of(folder: Path) -> dict[str, str | None]:
    """Every path in a folder with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in folder.rglob("*")
    }


def refusal(*arguments) -> str:
    """The one-line error with which a command refuses its input."""
    result = hfgpt(*arguments)
    assert (result.status, result.out) == (2, "")
    assert re.fullmatch(r"hfgpt: [^\n]+\n", result.err), result.err
    return result.err.removeprefix("hfgpt: ").removesuffix("\n")


@pytest.fixture(scope="module", autouse=True)
def settings_of_main(tmp_path_factory):
    """What main() sets before transformers is imported, which it already is here; no network; a short probe."""
    import datasets
    import huggingface_hub.constants
    from transformers.utils import logging

    from hfgpt.training import estimate

    probe, verbosity = estimate.probe_tokens_per_second, logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "probe_tokens_per_second", lambda *args, **kwargs: probe(*args[:3], seconds=0.02))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path_factory.mktemp("hf")))
        logging.set_verbosity_error()
        yield
        logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder with a text, a recipe, bad files of every kind, and the finished run of the recipe."""
    folder = tmp_path_factory.mktemp("workplace")
    text = "\n".join(generate_stories(10))
    files = {
        "stories.txt": text.encode(),
        "tiny.yaml": RECIPE.format(cache=tmp_path_factory.mktemp("cache")).encode(),
        "empty.txt": b"",
        "blank.txt": b" \n\n",
        "short.txt": b"too short",
        "binary.txt": b"text\0text",
        "latin.txt": "a naïve text".encode("latin-1"),
        "table.csv": b"id,words\n1,some words\n2,other words\n",
        "picture.png": b"png",
        "wrong.yaml": b"model:\n  hiden_size: 3\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with contextlib.chdir(folder):
        result = hfgpt("train", "tiny.yaml")
        assert (result.status, result.out) == (0, ""), result.err
        (folder / "shown.txt").write_text(result.err)
        for name in ("weights", "tokenizer", "no-json"):
            shutil.copytree("runs/tiny", f"damaged/{name}", ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = folder / "damaged" / "weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "damaged" / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "damaged" / "no-json" / "config.json").write_text("{'model_type': 'hfgpt'}")
    return folder


@pytest.fixture
def here(workspace, monkeypatch) -> Path:
    """The workspace as working directory. Commands must not change it."""
    monkeypatch.chdir(workspace)
    before = content_of(workspace)
    yield workspace
    assert content_of(workspace) == before


# Valid input


def test_train_reports_on_stderr_and_saves_a_model(here):
    shown = (here / "shown.txt").read_text()
    for line in (
        r"stories.txt: 1 row read, 1 kept",
        r"training: 20 steps of 256 tokens on average; about \d+ s at [\d,]+ tokens/s",
        r"step 20/20  loss \d\.\d{3}  [\d,]+ tokens/s  MFU n/a  memory \d+\.\d\d GiB  0:00:00 left",
        r"step 20/20  validation \d\.\d{3}",
        r"sample: Once.*",
        r"saved to runs/tiny\. Next: hfgpt generate runs/tiny .*",
    ):
        assert re.search(f"^{line}", shown, re.MULTILINE), line
    metrics = json.loads((here / "runs" / "tiny" / "metrics.json").read_text())
    assert f"validation loss {metrics['eval_loss']:.4f} nats" in shown
    for path in (here / "runs").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_generate_greedily_is_deterministic(here):
    texts = [hfgpt("generate", "runs/tiny", "Once", "--greedy", "--max-new-tokens", 20, "--seed", s) for s in (1, 2)]
    assert texts[0] == texts[1]
    assert texts[0].status == 0
    assert texts[0].err == ""
    assert texts[0].out.startswith("Once")
    assert len(texts[0].out.removesuffix("\n")) == len("Once") + 20
    from hfgpt.models import load_model, load_model_tokenizer

    model, tokenizer = load_model("runs/tiny"), load_model_tokenizer("runs/tiny")
    ids = tokenizer("Once")["input_ids"]
    with torch.no_grad():
        for _ in range(20):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert texts[0].out == tokenizer.decode(ids) + "\n"
    # In float16, the likeliest tokens of this model are the same.
    assert hfgpt("generate", "runs/tiny", "Once", "--greedy", "--max-new-tokens", 20, "--fast") == texts[0]


def test_generate_samples_by_seed(here):
    def sample(*options):
        result = hfgpt("generate", "runs/tiny", "Once", "--max-new-tokens", 20, "--top-k", 0, *options)
        assert (result.status, result.err) == (0, "")
        return result.out

    assert sample("--seed", 1) == sample("--seed", 1) != sample("--seed", 2)
    three = sample("--num-samples", 3).removesuffix("\n").split("\n\nOnce")
    assert len(three) == 3
    assert len(set(three)) == 3
    # Only the most likely token can be sampled.
    greedy = hfgpt("generate", "runs/tiny", "Once", "--max-new-tokens", 20, "--greedy").out
    assert hfgpt("generate", "runs/tiny", "Once", "--max-new-tokens", 20, "--top-k", 1).out == greedy
    assert hfgpt("generate", "runs/tiny", "Once", "--max-new-tokens", 20, "--top-p", 1e-9).out == greedy
    assert hfgpt("generate", "runs/tiny", "Once", "--max-new-tokens", 20, "--temperature", 1e-6).out == greedy
    assert sample() != greedy


def test_evaluate(here):
    arguments = ("evaluate", "runs/tiny", "--data.path", "stories.txt", "--evaluation.stride=16")
    result = hfgpt(*arguments, "--json")
    assert (result.status, result.err) == (0, "")
    metrics = json.loads(result.out)
    assert result.out == json.dumps(metrics) + "\n", "one JSON object and nothing else"
    size = len((here / "stories.txt").read_text())
    assert (metrics["eval_tokens"], metrics["eval_bytes"]) == (size - 1, size - 1)
    people = hfgpt(*arguments)
    assert people.err == ""
    rows = dict(line.split() for line in people.out.splitlines())
    assert rows.keys() == metrics.keys() == json.loads(Path("runs/tiny/metrics.json").read_text()).keys()
    assert rows["eval_tokens"] == f"{size - 1:,}"
    assert rows["eval_loss"] == f"{metrics['eval_loss']:.4f}"


def test_a_tokenizer_that_makes_its_library_panic_is_a_one_line_error(here, tmp_path):
    shutil.copytree(here / "runs" / "tiny", tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer.json"
    second = [{"Sequence": {"id": "B", "type_id": 0}}]  # although there is only one text
    template = {"type": "TemplateProcessing", "single": second, "pair": second, "special_tokens": {}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": template}))
    assert "the tokenizer's files are damaged (index out of bounds" in refusal("generate", tmp_path / "copy", "Once")


def test_text_the_tokenizer_cannot_encode_is_counted_and_gives_no_bits_per_byte(here, tmp_path):
    (tmp_path / "other.txt").write_text((here / "stories.txt").read_text()[:300] + "@@ @")
    result = hfgpt("evaluate", "runs/tiny", "--data.path", tmp_path / "other.txt", "--json")
    metrics = json.loads(result.out)
    assert (metrics["eval_tokens"], metrics["eval_unknown_tokens"]) == (303, 3)
    assert not metrics.keys() & {"eval_bytes", "eval_bits_per_byte"}


def test_inspect(here):
    result = hfgpt("inspect", "tiny.yaml", "--rows", 2, "--data.block_size", 8, COLUMNS="200")
    assert (result.status, result.err) == (0, "")
    text = (here / "stories.txt").read_text()
    head, *blocks = result.out.split("\nblock ")
    assert head.startswith("stories.txt: 1 row read, 1 kept\n")
    # A block of 8 predictions shows 9 tokens, the first only as context.
    for number, block in enumerate(blocks):
        title, _, shown = block.partition(":\n")
        assert title.startswith(f"{number} of ")
        first, *learned = text[8 * number : 8 * number + 9]
        assert shown == f"«{first}»{''.join(learned)}\n"
    assert len(blocks) == 2
    assert len(hfgpt("inspect", "tiny.yaml", "--rows", 0).out.split("\nblock ")) == 1
    assert hfgpt("inspect", "tiny.yaml", "--rows", 2, "--data.block_size", 8, COLUMNS="9").out == result.out, (
        "not wrapped when piped"
    )


def test_plan(here):
    result = hfgpt("plan", "tiny.yaml", "--json", "--training.output_dir", "planned")
    assert (result.status, result.err) == (0, "")
    plan = json.loads(result.out)
    assert result.out == json.dumps(plan) + "\n"
    run = json.loads(Path("runs/tiny/run.json").read_text())
    probed = {"tokens_per_second", "seconds", "process_bytes", "memory_bytes"}
    assert {key: value for key, value in plan.items() if key not in probed} == {
        key: value for key, value in run["plan"].items() if key not in probed
    }
    assert plan["seconds"] == plan["tokens"] / plan["tokens_per_second"]
    people = hfgpt("plan", "tiny.yaml")
    assert (people.status, people.err) == (0, "")
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in people.out.splitlines())
    assert rows["parameters"] == f"{plan['parameters']:,}"
    assert rows["steps"] == "20 of 256 tokens on average"
    assert rows["speed"].endswith(f" tokens/s on {plan['device']}")


def test_an_error_escapes_control_characters(here):
    message = refusal("generate", "no\x1b[2J/such\x9b2J/mo\u202edel\r", "hi")
    assert message.startswith(r"the folder 'no\x1b[2J/such\x9b2J/mo\u202edel ' does not exist, and it is not a Hub id")


def test_recipes(here):
    result = hfgpt("recipes", "--json")
    assert (result.status, result.err) == (0, "")
    found = json.loads(result.out)
    assert result.out == json.dumps(found) + "\n", "one JSON object and nothing else"
    assert {"name", "purpose", "command", "file"} == found["recipes"][0].keys()
    people = hfgpt("recipes")
    assert (people.status, people.err) == (0, "")
    assert [line for line in people.out.splitlines()[:-1] if line and line[0] != " "] == [
        recipe["name"] for recipe in found["recipes"]
    ]


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_help_fits_the_terminal_and_is_not_truncated(here, columns):
    shown = hfgpt("--help", COLUMNS=str(columns)).out
    assert max(map(len, shown.splitlines())) < columns
    for command in cli.app.registered_commands:
        first = command.callback.__doc__.partition("\n\n")[0]
        assert "".join(first.split()) in "".join(shown.split())
    for name in COMMANDS:
        assert max(map(len, hfgpt(name, "--help", COLUMNS=str(columns)).out.splitlines())) < columns, name


def test_keys(here):
    result = hfgpt("keys", "data", "--task", "pretrain", "--json")
    assert (result.status, result.err) == (0, "")
    (section,) = json.loads(result.out)["sections"]
    assert result.out == json.dumps({"sections": [section]}) + "\n", "one JSON object and nothing else"
    assert section.keys() == {"section", "tasks", "about", "keys"}
    found = {key.pop("key"): key for key in section["keys"]}
    assert found["data.validation_fraction"].pop("meaning").startswith("Fraction of the documents")
    assert found["data.validation_fraction"] == {
        "type": "float", "default": 0.1, "library": "hfgpt", "tasks": ["pretrain"]
    }  # fmt: skip
    people = hfgpt("keys", "data", "--task", "pretrain")
    assert (people.status, people.err) == (0, "")
    assert "data.validation_fraction  float; default: 0.1  Fraction of the documents" in people.out


def test_doctor_reports_whether_there_is_a_token_but_does_not_show_it(here, monkeypatch):
    result = hfgpt("doctor", "--json")
    assert (result.status, result.err) == (0, "")
    findings = json.loads(result.out)
    assert result.out == json.dumps(findings) + "\n"
    assert findings["hub_login"] == "token found"
    assert findings["torch"] == torch.__version__
    people = hfgpt("doctor")
    assert (people.status, people.err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in people.out.splitlines())
    assert {name: str(value) for name, value in findings.items()} == {k: v.strip() for k, v in rows.items()}
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/no/where")
    assert json.loads(hfgpt("doctor", "--json", HF_TOKEN="").out)["hub_login"] == "no token: run hf auth login"


def test_doctor_finishes_if_the_cache_is_a_missing_relative_path(here, monkeypatch):
    def ring(*_):
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "no/where")
    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    try:
        result = hfgpt("doctor", "--json")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    findings = json.loads(result.out)
    assert (findings["cache"], findings["cache_free_gib"] > 0) == ("no/where", True)


def test_ctrl_c(here, tmp_path, monkeypatch):
    from hfgpt.training.callbacks import ProgressCallback

    steps = ["--training.output_dir", tmp_path / "run", "--training.save_steps", 5]

    def press(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressCallback, "on_step_begin", press)
        result = hfgpt("train", "tiny.yaml", *steps)
    assert (result.status, result.out) == (130, "")
    last = f"hfgpt: stopped at step 7 of 20; the checkpoint is in {tmp_path / 'run'}: "
    assert result.err.splitlines()[-1] == last + "rerun the command with --resume"
    assert hfgpt("train", "tiny.yaml", "--resume", *steps).status == 0
    assert (tmp_path / "run" / "metrics.json").is_file()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hfgpt.models.find_model", interrupt)
    assert hfgpt("generate", "runs/tiny", "Once") == (130, "", "hfgpt: stopped\n")


# Refused input

TRAIN = "train tiny.yaml --training.output_dir new"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "there is no command 'trian'; did you mean 'train'?"),
        ("xyz", f"there is no command 'xyz'; the commands are: {', '.join(COMMANDS)}"),
        ("--quiet", "No such option: --quiet; see hfgpt --help"),
        ("train", "Missing argument 'RECIPE'; see hfgpt train --help"),
        ("generate runs/tiny Once upon", "Got unexpected extra argument(s) (upon); see hfgpt generate --help"),
        ("generate runs/tiny Once --topk 3", "No such option: --topk"),
        ("generate runs/tiny Once --top-k many", "Invalid value for '--top-k'"),
        ("generate runs/tiny Once --seed -1", "Invalid value for '--seed'"),
        ("train tiny.yaml --resum", "there is no option '--resum'; did you mean '--resume'?"),
        ("plan tiny.yaml --jsno", "there is no option '--jsno'; did you mean '--json'?"),
        ("train tiny.yaml extra", "unrecognized arguments: extra; overrides must have the form --section.key value"),
        ("train tinny.yaml", "the recipe file 'tinny.yaml' does not exist (nearest: tiny.yaml): check the path"),
        ("plan shakespere-char", "the recipe 'shakespere-char' does not exist; did you mean 'shakespeare-char'?"),
        ("inspect wrong.yaml", "wrong.yaml, line 2: there is no key 'hiden_size' in section 'model'; did you mean"),
        ("train tiny.yaml --data.pth x", "there is no key 'pth' in section 'data'; did you mean 'path'?"),
        ("train tiny.yaml --training.max_steps few", "training.max_steps is 'few'; it must be an integer"),
        ("train tiny.yaml", "'runs/tiny' already contains a finished run: choose another --training.output_dir"),
        ("train tiny.yaml --training.output_dir damaged", "'damaged' already contains other files (no-json, ...)"),
        ("train tiny.yaml --training.output_dir tiny.yaml", "'tiny.yaml' is a file: choose another path"),
        ("train tiny.yaml --resume", "the run in 'runs/tiny' is finished: there is nothing to resume"),
        (f"{TRAIN} --resume", "there is no run to resume in 'new': leave out --resume to start one"),
        ("evaluate runs/tiny", "data.path is not set: give a Hub id, a file, a folder or synthetic:stories"),
        ("evaluate runs/tiny --task clasify", "--task is 'clasify'; it must be pretrain, classify or instruct"),
        ("evaluate runs/tiny --training.seed 1", "there is no section 'training' (available: data, evaluation)"),
        ("evaluate runs/tiny --limit 3", "--limit only applies to --benchmarks: leave it out"),
        ("evaluate runs/tiny --benchmarks piqa --limit 0", "--limit is 0; it must be at least 1"),
        ("evaluate runs/tiny --benchmarks piqa,", "--benchmarks has an empty name"),
        ("evaluate runs/tiny --benchmarks piqa --task pretrain", "--task does not apply to --benchmarks"),
        ("evaluate runs/tiny --benchmarks piqa --data.path x", "--data.path does not apply to --benchmarks"),
        (f"{TRAIN} --max_steps 3", "there is no section 'max_steps'; did you mean the key 'training.max_steps'?"),
        (
            "evaluate runs/tiny --data.path stories.txt --data.block_size 33",
            "the model's context length is 32: lower it",
        ),
        (
            "evaluate runs/tiny --data.path stories.txt --data.validation_fraction 0.5",
            "--data.validation_fraction has no effect on evaluate: all rows are evaluated, without splitting; leave",
        ),
        (
            "evaluate runs/tiny --data.path stories.txt --evaluation.top_k=3",
            "--evaluation.top_k has no effect on evaluate: it does not generate texts, as hfgpt generate does; leave",
        ),
        (
            "evaluate runs/tiny --data.path stories.txt --data.train_split dev",
            "--data.train_split has no effect on evaluate: data.path 'stories.txt' does not have multiple splits",
        ),
        (
            "evaluate runs/tiny --data.path stories.txt --data.revision main",
            "--data.revision has no effect on evaluate: data.path 'stories.txt' is not a Hub dataset; leave it out",
        ),
        (
            "evaluate runs/tiny --data.path stories.txt --data.text_column words",
            "--data.text_column has no effect on evaluate: data.path 'stories.txt' is text without columns; leave it",
        ),
        (
            "evaluate runs/tiny --data.path table.csv --data.text_column words --data.sample_by line",
            "--data.sample_by has no effect on evaluate: data.path 'table.csv' is not a .txt or .md file",
        ),
        ("keys modle", "there is no section 'modle'; did you mean 'model'?"),
        ("keys --task clasify", "--task is 'clasify'; did you mean 'classify'?"),
        ("inspect tiny.yaml --rows -1", "--rows is -1; it must be at least 0"),
        (
            "train instruct",
            "model.path 'runs/demo' in the recipe instruct does not exist: train it first (hfgpt train demo)",
        ),
        (
            "plan shakespeare-char",
            "data.path 'tinyshakespeare.txt' in the recipe shakespeare-char does not exist: set --data",
        ),
        (
            "train tiny.yaml --training.output_dir stories.txt/new",
            "cannot create 'stories.txt/new': ",
        ),
        ("import none.pt stories.txt/new", "cannot create 'stories.txt/new': "),
        ("export none stories.txt/new", "cannot create 'stories.txt/new': "),
        ("generate none Once", "cannot load a tokenizer from 'none' ("),
        (
            "generate runs/none Once",
            "the folder 'runs' does not have 'none': check the path; to load 'runs/none' from the Hub, run this",
        ),
        ("generate stories.txt Once", "'stories.txt' is a file; a model is a folder with config.json and weights"),
        (
            "generate runs Once",
            "the folder 'runs' does not have a config.json: give the folder of a saved model or a finished run",
        ),
        ("generate damaged/weights Once", "cannot load a model from 'damaged/weights' ("),
        (
            "evaluate damaged/weights --data.path stories.txt",
            "the weights in 'damaged/weights' have changed since they were saved: ",
        ),
        ("evaluate damaged/tokenizer --data.path stories.txt", "cannot load a tokenizer from 'damaged/tokenizer' ("),
        ("generate damaged/no-json Once", "is not a valid JSON file): save or copy it again"),
        (
            "generate runs/tiny Once --max-new-tokens 29",
            "new tokens exceeds the context of 32: request at most 28 new tokens, or",
        ),
        ("generate runs/tiny @home --max-new-tokens 5", "the prompt '@home' has '@', which the tokenizer cannot"),
        ("generate runs/tiny Once --temperature 0", "temperature is 0.0; it must be above 0"),
        ("generate runs/tiny Once --num-samples 2 --greedy", "greedy generates one text, not 2: omit --greedy or"),
        ("import none.pt new", "'none.pt' does not exist: check the path"),
        (
            "import stories.txt new",
            "'stories.txt': unsupported file type '.txt' (supported: .pt, .pth, .bin, .ckpt",
        ),
        (
            "import runs/tiny new",
            "'runs/tiny' is a model of type hfgpt; only models of type gpt2",
        ),
        ("import none.pt runs", "'runs' already exists: choose a new folder"),
        ("import none.pt new --format onnx", "--format is 'onnx'; it must be one of auto, gpt2, nanogpt, book"),
        ("export runs/tiny new --format mlx", "--format is 'mlx'; it must be one of gpt2, gguf, ollama, onnx"),
        ("export runs/tiny new --dtype f16", "--dtype is for gguf and ollama, not for gpt2: leave it out"),
        (
            "export runs/none new",
            "the folder 'runs' does not have 'none': check the path; to load 'runs/none' from the Hub, run this",
        ),
        ("export runs/tiny new --merge-adapter", "'runs/tiny' is not an adapter: leave out --merge-adapter"),
        (f"{TRAIN} --model.num_attention_heads 3", "hidden_size 32 is not a multiple of num_attention_heads 3"),
        (f"{TRAIN} --model.vocab_size 5", "model.vocab_size is 5, but the tokenizer has ids up to "),
        (f"{TRAIN} --model.vocab_size 500", "unset it, or set model.pad_vocab_to_multiple_of to round it up"),
        (
            f"{TRAIN} --model.hidden_act gleu",
            "model.hidden_act is 'gleu', which transformers does not have; did you mean 'gelu'?",
        ),
        (f"{TRAIN} --model.attn_implementation flash", "model.attn_implementation is 'flash': "),
        (
            f"{TRAIN} --model.path runs/tiny",
            "model.path determines the architecture and weights: remove model.hidden_size",
        ),
        (
            f"{TRAIN} --training.max_steps -1 --training.num_train_epochs 0",
            "num_train_epochs is 0.0; it must be above 0",
        ),
        (f"{TRAIN} --evaluation.stride 0", "evaluation.stride is 0; it must be at least 1"),
        (f"{TRAIN} --data.block_size 33", "data.block_size is 33, but the model's context length is 32: lower it"),
        (f"{TRAIN} --data.path storys.txt", "'storys.txt' does not exist (nearest: stories.txt): check the path"),
        (f"{TRAIN} --data.path empty.txt", "data.path 'empty.txt' is an empty file: add text"),
        (f"{TRAIN} --data.path blank.txt", "has no text (1 row read; dropped: 1 empty): add text"),
        (f"{TRAIN} --data.path short.txt", "has 8 tokens, but one block needs 33: lower data.block_size or add text"),
        (f"{TRAIN} --data.path binary.txt", "binary.txt is not text: byte 4 is NUL; convert it to UTF-8 text"),
        (f"{TRAIN} --data.path latin.txt", "latin.txt is not valid UTF-8: byte 0xef at offset 4; convert it to UTF-8"),
        (f"{TRAIN} --data.path table.csv", "'text' is not a column of table.csv, which has: 'id', 'words'"),
        (
            f"{TRAIN} --data.path picture.png",
            "data.path 'picture.png' has the unsupported file type '.png'; supported: .txt, ",
        ),
        (f"{TRAIN} --data.path runs", "data.path 'runs' mixes file types, "),
        (f"{TRAIN} --data.validation_fraction 0", "is 0.0; it must be above 0 and below 1, such as 0.1"),
        (f"{TRAIN} --data.validation_fraction 1e-9", "the validation split of stories.txt has 1 token, but one block"),
        (
            f"{TRAIN} --data.validation_split dev",
            "data.validation_split is 'dev', but data.path 'stories.txt' is a single",
        ),
        (f"{TRAIN} --tokenizer.kind bpe --tokenizer.vocab_size 9", "bpe needs at least 257 on this text"),
    ],
)
def test_bad_input(arguments, message, here):
    assert message in refusal(*arguments.split())


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_text_without_read_permission(here, tmp_path):
    (tmp_path / "private.txt").write_text("secret")
    (tmp_path / "private.txt").chmod(0)
    assert "private.txt cannot be read (Permission denied)" in refusal(
        *TRAIN.split(), "--data.path", tmp_path / "private.txt"
    )


@pytest.mark.parametrize(
    ("place", "status", "remedy"),
    [
        ("hfgpt.runs.folder.write_text", errno.ENOSPC, "free some space, or choose a folder on another disk"),
        ("hfgpt.data.sources._write_texts", errno.ENOSPC, "free some space, or choose a folder on another disk"),
        ("hfgpt.runs.folder.write_text", errno.EROFS, "choose a folder on a writable disk"),
        ("hfgpt.runs.folder.write_text", errno.EACCES, "change its permissions, or choose another folder"),
        ("hfgpt.runs.folder.write_text", errno.EIO, "check the path"),
    ],
)
def test_a_disk_that_cannot_be_written_to(place, status, remedy, here, tmp_path, monkeypatch):
    def write(path, *rest):
        raise OSError(status, os.strerror(status), str(path))

    monkeypatch.setattr(place, write)
    result = hfgpt(*TRAIN.split(), "--data.cache_dir", tmp_path)
    assert (result.status, result.out) == (2, "")
    assert re.fullmatch(rf"hfgpt: {os.strerror(status)}: [^\n]+; {remedy}", result.err.splitlines()[-1])
    assert "Traceback" not in result.err
    assert not Path("new").exists()
    assert not list(tmp_path.iterdir()) or "runs.folder" in place


def test_messages_are_one_line_of_unicode(here):
    assert refusal("train", "a\nb.yaml").startswith("the recipe file 'a b.yaml' does not exist")
    assert refusal("generate", "runs/tiny", os.fsdecode(b"caf\xe9")).startswith("'\\udce9' cannot be written in utf-8")


def test_the_version_is_that_of_the_package(here):
    assert hfgpt("--version").out == f"hfgpt {metadata.version('hfgpt')}\n"


def test_the_commands_and_options_are_stable():
    """Scripts rely on them: renaming or removing one breaks scripts."""
    sampling = "--max-new-tokens --temperature --top-k --top-p --greedy"
    expected = {
        "chat": f"MODEL --system {sampling} --seed --web --fast",
        "classify": "MODEL TEXTS --file --json",
        "demo": "--output-dir",
        "doctor": "--json",
        "evaluate": "MODEL --task --benchmarks --batch-size --limit --num-fewshot --chat-template --json",
        "export": "MODEL OUT --format --dtype --merge-adapter",
        "generate": f"MODEL PROMPT {sampling} --num-samples --seed --fast",
        "import": "SOURCE OUT --format --num-heads --tokenizer --vocab-size --lora-scale --hidden-act --revision",
        "inspect": "RECIPE --rows",
        "keys": "SECTION --task --json",
        "verify": "MODEL --against --precision",
        "merge": "ADAPTER OUT --tolerance",
        "plan": "RECIPE --json",
        "prepare": "RECIPE OUT --shard --json",
        "publish": "MODEL REPO_ID --format --private/--public --dry-run --revision --create-pr --commit-message "
        "--space --space-name",
        "recipes": "--json",
        "serve": "MODEL --host --port --web --fast",
        "bench": "PART --nanogpt --json",
        "train": "RECIPE --resume --budget --on --submit --timeout --namespace",
    }
    found = {
        name: " ".join(
            "/".join([*parameter.opts, *parameter.secondary_opts])
            if parameter.param_type_name == "option"
            else parameter.name.upper()
            for parameter in command.params
        )
        for name, command in typer.main.get_command(cli.app).commands.items()
    }
    assert found == expected
