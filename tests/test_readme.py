"""All commands and Python code in the README run."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from hfgpt import cli
from hfgpt.commands.demo import run_demo
from hfgpt.conversion import book, gpt2
from hfgpt.conversion.assembly import build_native_on_meta
from hfgpt.demo_corpus import generate_instructions, generate_messages, generate_stories
from hfgpt.runs import budget
from hfgpt.training import estimate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = ["--training.max_steps", "2"]
FEW_TOKENS = ["--evaluation.max_new_tokens", "4"]
SHORTER = {  # for recipes, and for models evaluated by their answers
    "my-gpt.yaml": FEW_TOKENS,
    "shakespeare-char": FEW_TOKENS,
    "demo": [*FEW_TOKENS, "--data.max_documents", "100"],
    "demo-instructions": ["--data.max_rows", "30"],
    "spam": ["--pretraining.max_steps", "2"],
    "instruct": ["--evaluation.max_answers", "2", *FEW_TOKENS],
    "instruct-lora": ["--evaluation.max_answers", "2", *FEW_TOKENS],
    "merged/instruct": FEW_TOKENS,
}


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found
    return found


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the files used in the README, and the demo's model after two steps."""
    folder = tmp_path_factory.mktemp("readme")
    text = "\n".join(generate_stories(100))
    (folder / "my_text.txt").write_text(text)
    (folder / "another_text.txt").write_text("\n".join(generate_stories(20, seed=1)))
    (folder / "tinyshakespeare.txt").write_text(text)
    (folder / "my-gpt.yaml").write_text(blocks("yaml")[0])
    notes = [f"{row['label']}\t{row['text']}\n" for row in generate_messages(60)]
    (folder / "SMSSpamCollection").write_text("".join(notes))
    (folder / "instruction-data.json").write_text(json.dumps(list(generate_instructions(40))))
    (folder / "other-instructions.json").write_text(json.dumps(list(generate_instructions(5, split="test"))))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", folder / "cache")
    probe = estimate.probe_tokens_per_second  # half a second per run
    monkeypatch.setattr(estimate, "probe_tokens_per_second", lambda *args, **kwargs: probe(*args[:3], seconds=0.02))
    for name in ("PLANNING", "RECORDING"):
        monkeypatch.setattr(budget, name, 0.2)
    monkeypatch.setattr(budget, "SHAPES", [(1, 32)])
    with contextlib.chdir(folder):
        quick = ["--training.max_steps", "2", "--training.save_strategy", "no"]
        run_demo(
            Path("runs/demo"),
            {
                "demo": [*quick, "--data.max_documents", "100", *FEW_TOKENS],
                "demo-messages": [*quick, "--data.max_rows", "60"],
                "demo-instructions": [*quick, "--data.max_rows", "30", "--evaluation.max_answers", "2", *FEW_TOKENS],
            },
        )
        save_in_other_formats(AutoModelForCausalLM.from_pretrained("runs/demo"), folder)
    yield folder
    monkeypatch.undo()


def save_in_other_formats(model, folder):
    """Saves the demo's model as nanoGPT and the book do."""
    config = model.config
    weights, _ = gpt2.gpt2_weights(dict(model.state_dict()), build_native_on_meta(config))
    nano = {name: tensor.T if ".c_" in name and tensor.ndim == 2 else tensor for name, tensor in weights.items()}
    (folder / "out-shakespeare-char").mkdir()
    arguments = {"n_head": config.num_attention_heads, "dropout": 0.0}
    torch.save({"model": nano, "model_args": arguments}, folder / "out-shakespeare-char" / "ckpt.pt")
    modules = [f"{module}.{name}" for module in book.LAYOUT.modules for name in ("weight", "bias")]
    keys = [key.replace("*", str(number)) for key in modules for number in range(config.num_hidden_layers)]
    theirs = {book.LAYOUT.find(key): key for key in reversed(keys)}
    torch.save({theirs[(name,)]: tensor for name, tensor in model.state_dict().items()}, folder / "model.pth")


def test_readme_commands_run(workspace, monkeypatch, capsys):
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("hfgpt ")]
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command.replace("--budget 1m", "--budget 5s"))
        if words[1] in ("train", "plan", "inspect") and "--budget" not in words:
            words += SHORT
        words += SHORTER.get("".join(words[2:3]), ())
        monkeypatch.setattr("sys.argv", words)
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        with contextlib.chdir(workspace), pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0, f"{command}: {capsys.readouterr().err}"


def test_readme_python_runs(workspace):
    printed = io.StringIO()
    with contextlib.chdir(workspace), contextlib.redirect_stdout(printed):
        for code in blocks("python"):
            exec(code.replace("max_steps=200", "max_steps=2"), {})
    assert printed.getvalue().startswith("Once upon a time")
    assert " parameters\n" in printed.getvalue()
    assert " nats per token\nOnce upon a time" in printed.getvalue()
    assert (workspace / "runs" / "script" / "README.md").is_file()


def test_make_targets_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)$", "\n".join(blocks("bash")), re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(f"\n{target}: " in makefile for target in targets)


def test_tree_names_files_that_exist():
    (tree,) = re.findall(r"^```\n(hfgpt/\n.*?)^```", README, re.DOTALL | re.MULTILINE)
    names = re.findall(r"^  ((?:[\w/]+(?:\.py|/) ?)+)", tree, re.MULTILINE)
    assert len(names) >= 10
    for name in " ".join(names).split():
        assert (ROOT / "hfgpt" / name).exists(), name
