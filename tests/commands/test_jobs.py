"""`hfgpt train --on`: what the job runs, what it gets, and what is refused; with a fake Hub."""

import inspect
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub import HfApi, JobHardware, Volume
from huggingface_hub.cli.hf import app
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from hfgpt.commands import jobs
from hfgpt.commands.jobs import JobArguments, build_job, train_on_job
from hfgpt.errors import InputError
from hfgpt.recipe import load_recipe, recipe_names

TOKEN = "hf_" + "a" * 34
RECIPE = """
task: pretrain
data: {path: me/texts}
training: {max_steps: 2}
"""
# The command that uv would run in the job's environment: records its words.
STUB = '#!/bin/bash\nshift 4\nprintf "%s\\n" "$PYTHONPATH" "$@" > "$RECORD"\n'


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "home")
    monkeypatch.setattr(jobs, "get_token", lambda: TOKEN)
    monkeypatch.setattr(jobs, "HfApi", FakeApi)
    FakeApi.calls, FakeApi.error = [], None
    Path("mine.yaml").write_text(RECIPE)
    return tmp_path


class FakeApi:
    """Records calls, and accepts the arguments that HfApi accepts."""

    run_job = HfApi.run_job  # JobArguments checks its arguments
    calls: list
    error: Exception | None

    def __getattribute__(self, name):
        def call(*args, **kwargs):
            if FakeApi.error:
                raise FakeApi.error
            arguments = inspect.signature(getattr(HfApi, name)).bind(self, *args, **kwargs).arguments
            FakeApi.calls.append((name, {key: value for key, value in arguments.items() if key != "self"}))
            return {
                "whoami": lambda: {"name": "me"},
                "create_bucket": lambda: None,
                "sync_job_volume": lambda: Volume(type="bucket", source="me/jobs-artifacts", mount_path="/job"),
                "run_job": lambda: SimpleNamespace(url="https://huggingface.co/jobs/me/123"),
            }[name]()

        return call


def train(*overrides: str, name: str = "mine.yaml", resume: bool = False, **arguments) -> str:
    options = JobArguments(**{"flavor": "a10g-small", **arguments})
    return train_on_job(name, load_recipe(name, list(overrides)), overrides, options, resume)


def test_a_dry_run_shows_commands_that_hf_accepts_and_submits_nothing(place, capsys):
    shown = train("--training.max_steps", "3", flavor="a100x4", timeout="90m")
    assert FakeApi.calls == [("whoami", {})]
    assert TOKEN not in shown
    assert "hf buckets sync hf://buckets/me/hfgpt-runs/mine runs/mine" in shown
    bucket, run = shown.splitlines()[-2:]
    assert bucket == "hf buckets create me/hfgpt-runs --private --exist-ok"
    words = shlex.split(run)
    assert words[:3] == ["hf", "jobs", "run"]
    app([*words[1:3], "--dry-run", *words[3:]], standalone_mode=False)  # with hf's own parser
    accepted = capsys.readouterr().out
    for expected in (
        *("a100x4", "90m", "HF_TOKEN=", "PYTHONPATH=/job", "hf://buckets/me/hfgpt-runs:/runs", jobs.IMAGE),
        "torchrun --standalone --nproc_per_node=4 -m hfgpt train /job/mine.yaml --training.max_steps 3 ",
        "Job not submitted",
    ):
        assert expected in accepted, accepted


def test_a_job_is_submitted_with_a_private_bucket_and_the_token_only_as_a_secret(place):
    shown = train(submit=True, namespace="org")
    names = [name for name, _ in FakeApi.calls]
    assert names == ["create_bucket", "sync_job_volume", "run_job"]
    calls = dict(FakeApi.calls)
    assert calls["create_bucket"] == {"bucket_id": "org/hfgpt-runs", "private": True, "exist_ok": True}
    job = calls["run_job"]
    assert job.pop("secrets") == {"HF_TOKEN": TOKEN}
    assert TOKEN not in f"{shown}{FakeApi.calls}"
    assert [(volume.source, volume.mount_path) for volume in job["volumes"]] == [
        ("me/jobs-artifacts", "/job"),
        ("org/hfgpt-runs", "/runs"),
    ]
    assert (job["flavor"], job["timeout"], job["attempts"], job["namespace"]) == ("a10g-small", "4h", 3, "org")
    assert "https://huggingface.co/jobs/me/123" in shown
    assert "hf jobs logs -f org/123" in shown


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["mine.yaml", "demo"])
def test_the_first_attempt_starts_the_run_and_the_next_resumes_it(place, name, resume):
    recipe = load_recipe(name, ["--training.output_dir", "elsewhere/my rün"])
    job = build_job(name, recipe, ["--data.max_documents", "7 "], JobArguments("cpu-xl"), "me", resume)
    (place / "bin").mkdir()
    (place / "bin" / "uv").write_text(STUB)
    (place / "bin" / "uv").chmod(0o755)
    script = job.script.replace("/job/", f"{job.folder}/").replace("/runs/", f"{place}/runs/")
    environment = {"PATH": f"{place}/bin:{os.environ['PATH']}", "RECORD": str(place / "words"), "PYTHONPATH": "/job"}

    def words() -> list[str]:
        subprocess.run(["bash", "-c", script], env=environment, check=True)
        return (place / "words").read_text().splitlines()

    expected = ["/job", "python", "-m", "hfgpt", "train", f"{job.folder}/mine.yaml" if "." in name else name]
    expected += ["--data.max_documents", "7 ", "--training.output_dir", f"{place}/runs/my-r-n"]
    assert words() == [*expected, "--resume"] if resume else expected
    (place / "runs" / "my-r-n").mkdir(parents=True)
    (place / "runs" / "my-r-n" / "recipe.yaml").touch()
    assert words() == [*expected, "--resume"]


def test_the_uploaded_folder_is_complete_and_its_name_changes_with_its_content(place):
    job = build_job("mine.yaml", load_recipe("mine.yaml"), [], JobArguments("t4-small"), "me", False)
    listing = [sys.executable, "-m", "hfgpt", "recipes", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(job.folder)}
    shown = subprocess.run(listing, cwd=job.folder.parent, env=environment, capture_output=True, check=True).stdout
    found = json.loads(shown)["recipes"]
    assert [recipe["name"] for recipe in found] == recipe_names()
    assert all(Path(recipe["file"]).is_relative_to(job.folder) for recipe in found)
    assert (job.folder / "hfgpt/model_cards/card.md.jinja").is_file()
    assert (job.folder / "mine.yaml").read_text() == RECIPE
    requirements = (job.folder / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch>=") for line in requirements)
    assert not any(line.startswith(("torchao", "pytest")) for line in requirements)
    before = (job.folder / "hfgpt/cli.py").stat().st_mtime_ns
    assert build_job("mine.yaml", load_recipe("mine.yaml"), [], JobArguments("t4-small"), "me", False) == job
    assert (job.folder / "hfgpt/cli.py").stat().st_mtime_ns == before, "the same files are not written again"
    Path("mine.yaml").write_text(RECIPE + "model: {num_hidden_layers: 1}\n")
    assert build_job("mine.yaml", load_recipe("mine.yaml"), [], JobArguments("t4-small"), "me", False) != job


def test_quantization_adds_its_requirements():
    recipe = SimpleNamespace(model=SimpleNamespace(load_in_4bit=True), training=SimpleNamespace(report_to=["wandb"]))
    names = {line.partition(">")[0] for line in jobs.find_requirements(recipe)}
    assert {"torchao", "bitsandbytes", "wandb", "torch"} <= names
    assert "pytest" not in names


def test_keys_of_other_services_are_passed_as_secrets_if_they_are_set(monkeypatch):
    judge = SimpleNamespace(base_url="https://judge.example.com/v1")
    recipe = SimpleNamespace(evaluation=SimpleNamespace(judge=judge), training=SimpleNamespace(report_to=[]))
    assert jobs.find_secret_names(recipe) == ["HF_TOKEN"]
    monkeypatch.setenv("HFGPT_JUDGE_API_KEY", "secret")
    recipe.training.report_to = ["wandb"]
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(InputError, match="WANDB_API_KEY is not set"):
        jobs.find_secret_names(recipe)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert jobs.find_secret_names(recipe) == ["HF_TOKEN", "HFGPT_JUDGE_API_KEY", "WANDB_API_KEY"]


def test_what_only_this_machine_has_is_refused(place):
    Path("texts").mkdir()
    for name in ("texts/a.txt", "texts/b.txt"):
        Path(name).write_text("some text")
    Path("model").mkdir()
    for override, message in {
        "--data.path=texts/a.txt": "data.path 'texts/a.txt' is on this machine, .* `hf upload user/name texts/a.txt ",
        "--data.path=texts": "data.path 'texts' is on this machine",
        "--data.path=texts/*.txt": r"data.path 'texts/\*.txt' is on this machine",
        f"--data.path=file://{place}/texts/a.txt": "is on this machine",
        "--model.path=model": "model.path 'model' is on this machine, .* `hfgpt publish model user/name`",
        "--tokenizer.path=model": "tokenizer.path 'model' is on this machine",
    }.items():
        with pytest.raises(InputError, match=message):
            train(override)
    Path("answers.yaml").write_text("task: instruct\ndata: {path: me/answers}\n")
    with pytest.raises(InputError, match="base_url 'http://localhost:8000/v1' is on this machine"):
        train(
            "--evaluation.judge.base_url=http://localhost:8000/v1",
            "--evaluation.judge.model=m",
            "--model.path=me/base",
            name="answers.yaml",
        )
    for override in ("--data.path=https://example.com/a.txt", "--data.path=hf://datasets/me/a/b.txt"):
        assert "nothing was submitted" in train(override, namespace="me")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flavor": "a10-small"}, "'a10-small' is not a flavor of HF Jobs; did you mean 'a10g-small'?"),
        ({"flavor": "?"}, "'\\?' is not a flavor of HF Jobs; the flavors are: cpu-basic, "),
        ({"flavor": "h200", "timeout": "90"}, "--timeout is '90'; it must be a positive number and a unit, such as"),
        ({"flavor": "h200", "timeout": "0h"}, "--timeout is '0h'"),
    ],
)
def test_options_are_checked(arguments, message):
    with pytest.raises(InputError, match=message):
        JobArguments(**arguments)


def test_the_number_of_gpus_is_that_of_the_flavor():
    gpus = {flavor.value: JobArguments(flavor.value).gpus for flavor in JobHardware}
    assert {name for name, count in gpus.items() if count == 1} >= {"cpu-basic", "t4-medium", "l4x1", "h200"}
    assert (gpus["l4x4"], gpus["a10g-largex2"], gpus["a100x8"], gpus["rtx-pro-6000x4"]) == (4, 2, 8, 4)


def http_error(status: int) -> HfHubHTTPError:
    return HfHubHTTPError(
        "no", response=SimpleNamespace(status_code=status, headers={}, request=None), server_message="not today"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalTokenNotFoundError("no"), "log in with `hf auth login`"),
        (http_error(401), "log in with `hf auth login`"),
        (http_error(402), r"rejected the job \(not today\): add credits at http"),
        (http_error(403), r"no permission to run jobs \(not today\)"),
        (http_error(422), r"rejected the job \(not today\): fix this"),
        (http_error(503), r"cannot reach the Hub \(not today\): submit the job again later"),
        (OfflineModeIsEnabled("no"), "HF_HUB_OFFLINE is set: unset it"),
        (HTTPError("no route\nto host"), r"cannot reach the Hub \(no route to host\)"),
    ],
)
def test_errors_of_the_hub_are_one_line(place, error, message):
    FakeApi.error = error
    for submit in (False, True):
        with pytest.raises(InputError, match=message) as refusal:
            train(submit=submit)
        assert "\n" not in str(refusal.value)


def test_a_login_is_needed_to_submit_but_not_to_see_the_commands(place, monkeypatch):
    monkeypatch.setattr(jobs, "get_token", lambda: None)
    with pytest.raises(InputError, match="log in"):
        train(submit=True, namespace="me")
    assert "nothing was submitted" in train(namespace="me")
    assert FakeApi.calls == []
