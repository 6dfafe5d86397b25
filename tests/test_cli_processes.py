"""The command line in separate processes: --help is quick and imports nothing heavy; output that cannot be written."""

import os
import resource
import subprocess
import sys

import pytest

COMMANDS = [
    "train",
    "prepare",
    "generate",
    "chat",
    "classify",
    "evaluate",
    "merge",
    "publish",
    "recipes",
    "keys",
    "inspect",
    "plan",
    "doctor",
    "demo",
]


def test_help_imports_no_heavy_packages():
    script = f"""
import contextlib, io, os, sys
from hfgpt import cli
for words in [[], ["-h"], ["--help"], *([name, option] for name in {COMMANDS} for option in ("-h", "--help"))]:
    sys.argv, out = ["hfgpt", *words], io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            cli.main()
        except SystemExit as stop:
            assert stop.code == 0, words
    assert "Usage: hfgpt " + (words[0] if words[1:] else "[OPTIONS]") in out.getvalue(), out.getvalue()
    assert all(name in out.getvalue() for name in ({COMMANDS} if not words[1:] else ["Options:"]))
heavy = {{"torch", "transformers", "datasets", "numpy", "tokenizers", "huggingface_hub", "yaml"}} & set(sys.modules)
print(heavy or "light", os.environ["TRANSFORMERS_VERBOSITY"], os.environ["HF_HUB_DISABLE_TELEMETRY"])
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TRANSFORMERS", "HF_"))}
    words = [sys.executable, "-c", script]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "light error 1\n", "")


REFUSED = {
    "train r.yaml --training.lr 1": "there is no key 'lr' in section 'training'; did you mean 'learning_rate'?",
    "train r.yaml --modle.path x": "there is no section 'modle'; did you mean 'model'?",
    "plan key.yaml": "key.yaml, line 2: there is no key 'strid' in section 'data'; did you mean 'stride'?",
    "inspect wrong.yaml": "wrong.yaml, line 2: invalid YAML: expected the node content, but found '<stream end>'",
    "train shakespear-char": "the recipe 'shakespear-char' does not exist; did you mean 'shakespeare-char'?",
    "train r.yaml --data.path r.txt": "data.path 'r.txt' does not exist: check the path",
    "train r.yaml --model.path=r.yaml": (
        "'r.yaml' is a file; a model is a folder with config.json and weights, or a Hub id"
    ),
    "generate ./r x": "the folder './r' does not exist, and it is not a Hub id: check the path",
    "merge ./r out": "the folder './r' does not exist, and it is not a Hub id: check the path",
    "evaluate folder": "the folder 'folder' does not have a config.json: give the folder of a saved model or a "
    "finished run",
    "evaluate me/x --task classify --data.pth x": "there is no key 'pth' in section 'data'; did you mean 'path'?",
    "evaluate me/x --task instruct --data.path r.txt": ("data.path 'r.txt' does not exist: check the path"),
}


def test_typos_and_missing_files_are_reported_before_torch_is_imported(tmp_path):
    (tmp_path / "r.yaml").write_text("data: {path: somebody/texts}\n")
    (tmp_path / "key.yaml").write_text("data:\n  strid: 3\n")
    (tmp_path / "wrong.yaml").write_text("data: [\n")
    (tmp_path / "folder").mkdir()
    script = f"""
import contextlib, io, sys
from hfgpt import cli
for words, message in {REFUSED}.items():
    sys.argv, err = ["hfgpt", *words.split()], io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            assert stop.code == 2, words
    assert err.getvalue() == f"hfgpt: {{message}}\\n", err.getvalue()
    assert "torch" not in sys.modules, words
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


@pytest.mark.parametrize(("command", "first"), [("recipes", "demo\n"), ("keys", "task  pretrain, classify or inst")])
def test_recipes_and_keys_are_listed_before_torch_is_imported(command, first):
    script = f"""
import sys
from hfgpt import cli
sys.argv = ["hfgpt", "{command}"]
try:
    cli.main()
except SystemExit as stop:
    assert stop.code == 0
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(first)


def test_help_is_quick():
    """At most half the CPU time of importing torch; CPU time does not depend on other processes."""

    def cpu_seconds(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert cpu_seconds("-m", "hfgpt", "train", "--help") <= cpu_seconds("-c", "import torch") / 2


# Results that are still in Python's buffer when the command has finished.
BUFFERED = "from hfgpt import cli; cli.app = lambda *words, **options: print('result'); cli.main()"


def run_into(stdout, words: list[str]) -> tuple[int, str]:
    """Returns the exit status and stderr."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    words = [sys.executable, *words]
    result = subprocess.run(words, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    return result.returncode, result.stderr


@pytest.mark.parametrize("words", [["-m", "hfgpt", "--help"], ["-c", BUFFERED]])
def test_a_closed_pipe_is_not_an_error(words):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        assert run_into(pipe, words) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
@pytest.mark.parametrize("words", [["-m", "hfgpt", "--help"], ["-c", BUFFERED]])
def test_a_result_that_cannot_be_written_is_reported(words):
    message = "hfgpt: No space left on device: while writing; free some space, or choose a folder on another disk\n"
    with open("/dev/full", "w") as full:
        assert run_into(full, words) == (2, message)


LAST_WORDS = """
import atexit, sys
import torch
from hfgpt import cli

class Object:
    def __del__(self):
        print("Python shuts down")

held, cleanup = Object(), atexit.register(print, "cleanup")
if sys.argv[2:]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv.pop()}", rank=0, world_size=1)
cli.main()
"""


@pytest.mark.parametrize(("word", "status"), [("--version", 0), ("--typo", 2)])
@pytest.mark.parametrize("group", [False, True])
def test_one_of_several_processes_ends_without_the_shutdown_of_python(word, status, group, tmp_path):
    """In which a thread of gloo that still releases a tensor would abort it; functions of atexit still run."""
    words = [sys.executable, "-c", LAST_WORDS, word, *[str(tmp_path / "store")] * group]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stderr
    ending = ["cleanup"] if group else ["cleanup", "Python shuts down"]
    assert result.stdout.splitlines()[not status :] == ending
    assert result.stderr.startswith("hfgpt: ") is bool(status)
