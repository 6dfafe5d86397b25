"""Uploading to the Hub under faults: server errors, broken connections, and a client that is killed."""

import errno
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import Fault
from rich.console import Console
from sending import send

from hfgpt.commands.train import check_publication
from hfgpt.commands.train import train as train_and_publish
from hfgpt.errors import InputError
from hfgpt.hub import HubArguments
from hfgpt.hub import upload as way
from hfgpt.hub.background import CheckpointPushes
from hfgpt.hub.upload import Target, check_login, upload, verify
from hfgpt.models import load_model
from hfgpt.recipe import load_recipe
from hfgpt.saving import hash_file
from hfgpt.training.arguments import HfGPTTrainingArguments

TARGET = Target("me/model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files of both kinds: regular ones, sent in the commit, and LFS files, uploaded before it."""
    folder, generator = tmp_path_factory.mktemp("files"), random.Random(0)
    for index in range(3):
        (folder / f"model-{index}.safetensors").write_bytes(generator.randbytes(40_000))
        (folder / f"notes-{index}.txt").write_text(str(index))
    (folder / "notes[0].txt").write_text("by a name that is a pattern, too")
    (folder / "README.md").write_text("---\ntags: [hfgpt]\n---\n# It\n")
    return folder


@pytest.fixture
def skip_pauses(monkeypatch):
    """Skips the pauses between attempts, both in the client's code and in ours."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hashes_of(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in folder.iterdir()}


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("act", [500, 503, "cut", "slow"])
@pytest.mark.parametrize(
    "pattern",
    [
        "repos/create",
        "GET /api/models",
        "validate-yaml",
        "preupload",
        "lfs/objects/batch",
        "PUT ",
        "__verify",
        "/commit/",
    ],
)
def test_a_fault_that_passes_is_retried(hub, folder, skip_pauses, act, pattern):
    hub.faults.append(Fault(pattern, act))
    commit = upload(folder, names_in(folder), TARGET)
    verify(hashes_of(folder), TARGET, commit)
    assert hub.files("me/model") == content_of(folder)
    assert len(hub.repositories["me/model"].messages) == 1
    assert hub.faults[0].times == 0, "the fault occurred"


def test_a_card_that_the_hub_rejects_creates_no_repository(hub, folder, skip_pauses):
    hub.faults.append(Fault("validate-yaml", 400))
    with pytest.raises(InputError, match=r"the Hub rejected the metadata of the card .*: correct the section hub"):
        upload(folder, names_in(folder), TARGET)
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("act", "match"),
    [
        (400, r"the Hub rejected 'me/model' \(told to fail with 400\)"),
        (413, r"the Hub rejected 'me/model' \(told to fail with 413\)"),
        (401, "log in with `hf auth login`"),
        (403, "use a token with write access"),
        (404, "check the name and the login"),
        (409, "'me/model' was changed during the upload"),
        (500, "the Hub returned an error .*publish again later"),
        ("cut", "cannot reach the Hub .*files already uploaded are not sent again"),
    ],
)
def test_a_permanent_fault_is_a_one_line_error(hub, folder, skip_pauses, act, match):
    hub.faults.append(Fault("/commit/", act, times=99))
    with pytest.raises(InputError, match=match) as caught:
        upload(folder, names_in(folder), TARGET)
    assert "\n" not in str(caught.value)
    assert hub.files("me/model") == {}
    hub.faults.clear()
    sent = sum("PUT" in line for line in hub.log)
    upload(folder, names_in(folder), TARGET)
    assert hub.files("me/model") == content_of(folder)
    assert sum("PUT" in line for line in hub.log) == sent, "files that had arrived are not sent again"


def test_a_pull_request_is_opened_once(hub, folder, skip_pauses):
    hub.faults.append(Fault("/commit/", 500, times=99))
    with pytest.raises(InputError, match="the Hub returned an error"):
        upload(folder, names_in(folder), Target("me/model", create_pr=True))
    hub.faults.clear()
    upload(folder, names_in(folder), Target("me/model", create_pr=True))
    assert sum("/commit/" in line for line in hub.log) == 2


def test_a_concurrent_commit_is_taken_into_account(hub, folder, skip_pauses, tmp_path):
    """The commit is rejected if the branch has moved, and created again on top of the new head."""
    upload(folder, names_in(folder), TARGET)
    (head,) = [hub.repositories["me/model"].branches["main"]]

    def move():
        repository = hub.repositories["me/model"]
        repository.commits["a" * 40] = repository.commits[head] | {"old.safetensors": (False, "x")}
        hub.blobs["x"] = b""
        repository.branches["main"] = "a" * 40

    changed = shutil.copytree(folder, tmp_path / "changed")
    (changed / "notes-1.txt").write_text("changed")
    hub.faults.append(Fault("/preupload/", move))
    upload(changed, names_in(changed), Target("me/model", message="Again"))
    assert hub.files("me/model")["notes-1.txt"] == b"changed"
    assert "old.safetensors" not in hub.files("me/model"), "a stale file from the concurrent commit is removed"


def test_a_lost_response_causes_no_second_commit(hub, folder, skip_pauses):
    hub.faults.append(Fault("/commit/", "deaf"))
    upload(folder, names_in(folder), TARGET)
    assert hub.files("me/model") == content_of(folder)
    assert len(hub.repositories["me/model"].messages) == 1


def test_a_file_that_differs_after_upload_is_detected(hub, folder, skip_pauses):
    commit = upload(folder, names_in(folder), TARGET)
    repository = hub.repositories["me/model"]
    hub.blobs["other"] = b"2!"
    repository.commits[commit.oid]["notes-2.txt"] = (False, "other")
    with pytest.raises(InputError, match=r"'notes-2\.txt' in me/model differs from the uploaded file"):
        verify(hashes_of(folder), TARGET, commit)


def test_a_local_error_is_not_blamed_on_the_hub(hub, folder, skip_pauses, monkeypatch):
    attempts = []

    def fail(*args):
        attempts.append(args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x")

    monkeypatch.setattr(way, "_commit", fail)
    with pytest.raises(InputError, match=r"cannot read or write a local file \(.*No space left"):
        upload(folder, names_in(folder), TARGET)
    assert len(attempts) == 1, "retrying would not help"


def test_an_upload_killed_anywhere_completes_when_restarted(hub, folder, tmp_path, monkeypatch):
    """50 processes, each killed at a random request while the server handles it; then one that may finish."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # killed processes leave temporary files there
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hfgpt.hub.upload"])
    generator, killed = random.Random(0), 0
    expected = content_of(folder)

    def start() -> multiprocessing.Process:
        process = context.Process(target=send, args=(folder,))
        process.start()
        return process

    while killed < 50:
        hub.reset()
        started: list = []
        for _ in range(4):  # killed several times on the way to completion
            # Before the server handles the request, or after it, when the response is lost.
            skip, late = generator.randrange(15), generator.random() < 0.5
            hub.faults = [Fault("", lambda alive=started: alive[-1].kill(), skip, late=late)]
            started.append(start())
            started[-1].join(60)
            killed += started[-1].exitcode == -9
            if "me/model" in hub.repositories:
                assert hub.files("me/model") in ({}, expected), "all files or none"
        hub.faults = []
        started.append(start())
        started[-1].join(60)
        assert started[-1].exitcode == 0
        assert hub.files("me/model") == expected
        puts = [line for line in hub.log if line.startswith("PUT")]
        assert len(puts) <= 3 + 4 * 3
        assert len(hub.repositories["me/model"].messages) == 1


def test_a_login_is_required_before_training(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(InputError, match="log in with `hf auth login`"):
        check_login("me/model")
    monkeypatch.setenv("HF_TOKEN", "hf_MyOwnToken")
    check_login("me/model")
    hub.faults.append(Fault("whoami", "cut", times=99))
    check_login("me/model")  # a network failure is no reason not to train


def test_an_adapter_that_cannot_be_published_is_refused_before_training(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_MyOwnToken")
    (tmp_path / "recipe.yaml").write_text(
        "task: classify\ndata: {path: synthetic:messages}\nhub: {repo_id: me/lora}\n"
    )
    (tmp_path / "base").mkdir()
    overrides = ["--model.path", str(tmp_path / "base"), "--adapters.r", "2"]
    with pytest.raises(InputError, match=r"which its users do not have: .*--hub\.base_model user/name"):
        check_publication(load_recipe(str(tmp_path / "recipe.yaml"), overrides))
    check_publication(load_recipe(str(tmp_path / "recipe.yaml"), [*overrides, "--hub.base_model", "me/base"]))


def test_trainers_own_pushes_are_refused():
    with pytest.raises(InputError, match=r"set hub\.repo_id instead"):
        HfGPTTrainingArguments(output_dir="x", push_to_hub=True)


# During training ---------------------------------------------------------------------------------------------------


@pytest.fixture
def train(recipes, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_MyOwnToken")
    monkeypatch.setattr("hfgpt.commands.publish.check_as_stranger", lambda *args, **kwargs: None)
    monkeypatch.setattr(way, "WAITS", ())

    def train(*overrides: str):
        console = Console(file=io.StringIO(), width=300)
        out = ["--training.output_dir", str(tmp_path / "run"), "--hub.repo_id", "me/run", *overrides]
        try:
            train_and_publish(load_recipe(str(recipes / "text.yaml"), out), console=console)
        finally:
            train.shown = console.file.getvalue()
        return tmp_path / "run"

    return train


def test_a_run_publishes_itself(hub, train):
    folder = train()
    assert hub.repositories["me/run"].messages == ["Publish run"]
    assert hub.files("me/run")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert 'from_pretrained("me/run", trust_remote_code=True)' in train.shown


def test_checkpoints_are_pushed_with_their_code(hub, train):
    train("--hub.strategy", "checkpoints")
    repository = hub.repositories["me/run"]
    assert repository.messages[-1] == "Publish run"
    assert {*repository.messages[:-1]} <= {"Step 2", "Step 3"}
    first = list(repository.commits.values())[1]
    assert {"config.json", "model.safetensors", "modeling_hfgpt.py", "configuration_hfgpt.py", "README.md"} <= {*first}
    assert not any(name.endswith((".pt", ".pth", ".bin")) for name in first)


def test_only_the_newest_checkpoint_waits_and_no_copies_remain(hub, text_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_MyOwnToken")
    busy, done = threading.Event(), threading.Event()
    sent = []

    def push(self, step, folder):
        busy.set()
        assert done.wait(60)
        sent.append((step, (folder / "modeling_hfgpt.py").is_file()))

    monkeypatch.setattr(CheckpointPushes, "_push", push)
    pushes = CheckpointPushes(HubArguments("me/run"), Console(file=io.StringIO()))
    arguments = SimpleNamespace(output_dir=str(tmp_path / "text"))
    model = load_model(str(text_run))
    for step in (2, 4, 6, 8):
        shutil.copytree(text_run / "checkpoint-2", tmp_path / "text" / f"checkpoint-{step}")
        pushes.on_save(arguments, SimpleNamespace(is_world_process_zero=True, global_step=step), None, model=model)
        assert busy.wait(60)
    copies = Path(pushes.copies.name)
    assert {path.name for path in copies.iterdir()} == {"checkpoint-2", "checkpoint-8"}, (
        "one is being uploaded, one waits"
    )
    pushes.stop()
    done.set()
    assert pushes.finish() == {}
    assert sent == [(2, True)]
    assert list(copies.iterdir()) == []


def test_no_secret_is_uploaded_with_a_checkpoint(hub, text_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "my-very-own")
    pushes = CheckpointPushes(HubArguments("me/run"), Console(file=io.StringIO()))
    shutil.copytree(text_run, tmp_path / "text")
    (tmp_path / "text" / "checkpoint-2" / "notes.txt").write_text("my-very-own")
    arguments = SimpleNamespace(output_dir=str(tmp_path / "text"))
    state = SimpleNamespace(is_world_process_zero=True, global_step=2)
    pushes.on_save(arguments, state, None, model=load_model(str(text_run)))
    pushes.waiting.put(None)  # not `stop`, which would drop the waiting checkpoint
    assert "'notes.txt' contains a token that is in use" in pushes.finish()[2]
    assert hub.log == []


def test_a_network_failure_does_not_stop_training_and_is_reported_at_the_end(hub, train, skip_pauses):
    hub.faults.append(Fault("/api/(models|repos)", "cut", times=9999))
    with pytest.raises(InputError, match=r"is finished, but not all of it was published: .*publish it with: hfgpt"):
        train("--hub.strategy", "checkpoints")
    assert re.search("checkpoint [23] was not uploaded", train.shown)
    folder = Path(re.search(r"saved to (\S+)\. Next", train.shown)[1])
    assert (folder / "README.md").is_file()
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert any("hub_error" in entry for entry in log)
