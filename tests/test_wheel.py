"""The installed wheel is complete: it includes recipes and tables, and runs in any folder without the checkout."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built and unpacked as pip does, in a separate folder."""
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    name = subprocess.run([sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(folder / name.stdout.split()[-1]) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_wheel_contains_every_recipe_and_every_file_of_the_package(installed):
    for pattern, source, target in (
        ("*.yaml", ROOT / "recipes", installed / "hfgpt/recipes"),
        ("**/*.*", ROOT / "hfgpt", installed / "hfgpt"),
    ):
        expected = {path.relative_to(source) for path in source.glob(pattern) if path.suffix != ".pyc"}
        assert {path.suffix for path in expected} == ({".py", ".toml"} if source.name == "hfgpt" else {".yaml"})
        assert expected <= {path.relative_to(target) for path in target.glob(pattern)}
    machines = [{path.name for path in (root / "recipes/machines").iterdir()} for root in (ROOT, installed / "hfgpt")]
    assert machines[0] == machines[1]
    templates = {path.name for path in (installed / "hfgpt/model_cards").iterdir()}
    assert templates == {"card.md.jinja", "space_app.py"}
    assert not (installed / "tests").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_demo_installs_what_users_need_and_make_test_the_rest():
    def installed(target: str) -> list[str]:
        words = ["make", "--dry-run", "--always-make", target]
        shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return re.findall(r"pip install .* (\S+)$", shown, re.MULTILINE)

    assert installed("demo") == ["."]
    assert installed("test")[:2] == [".", "'.[test]'"]


def test_train_runs_from_the_wheel_in_any_folder(installed, tmp_path):
    text = tmp_path / "plays.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 200)
    command = [sys.executable, "-m", "hfgpt", "train", "shakespeare-char", "--data.path", "plays.txt"]
    command += ["--training.max_steps", "2", "--data.cache_dir", "cache"]
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "runs/shakespeare-char/model.safetensors").is_file()
    assert "# shakespeare-char" in (tmp_path / "runs/shakespeare-char/README.md").read_text(), (
        "rendered with the template in the wheel"
    )
    where = [sys.executable, "-c", "import hfgpt; print(hfgpt.__file__)"]
    printed = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(printed.stdout.strip()).is_relative_to(installed)
