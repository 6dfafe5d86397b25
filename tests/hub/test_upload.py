"""The way to the Hub under fire: servers that fail, connections that break, and a client that is killed."""

import errno
import io
import json
import multiprocessing
import os
import random
import re
from pathlib import Path

import pytest
from hub_server import Fault
from rich.console import Console
from sending import send

from hfgpt.errors import InputError
from hfgpt.hub import upload as way
from hfgpt.hub.upload import Target, check_login, upload, verify
from hfgpt.recipe import load_recipe
from hfgpt.tasks.pretrain import pretrain
from hfgpt.tasks.training_run import check_publication
from hfgpt.training.trainer import HfGPTTrainingArguments

TARGET = Target("me/model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files of both kinds: regular ones, which travel in the commit, and large ones, which travel before it."""
    folder, generator = tmp_path_factory.mktemp("files"), random.Random(0)
    for index in range(3):
        (folder / f"model-{index}.safetensors").write_bytes(generator.randbytes(40_000))
        (folder / f"notes-{index}.txt").write_text(str(index))
    (folder / "README.md").write_text("---\ntags: [hfgpt]\n---\n# It\n")
    return folder


@pytest.fixture
def impatient(monkeypatch):
    """Without the pauses before another attempt, in the client's code as in ours."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
def test_what_passes_is_waited_for(hub, folder, impatient, act, pattern):
    hub.faults.append(Fault(pattern, act))
    commit = upload(folder, names_in(folder), TARGET)
    verify(folder, names_in(folder), TARGET, commit)
    assert hub.files("me/model") == content_of(folder)
    assert len(hub.repositories["me/model"].messages) == 1
    assert hub.faults[0].times == 0, "the fault has happened"


@pytest.mark.parametrize(
    ("act", "match"),
    [
        (401, "log in with `hf auth login`"),
        (403, "use a token that may write"),
        (404, "check the name and the login"),
        (409, "is being changed by somebody else"),
        (500, "the Hub fails .*publish again later"),
        ("cut", "the Hub cannot be reached .*what has arrived is not sent again"),
    ],
)
def test_what_does_not_pass_is_one_line(hub, folder, impatient, act, match):
    hub.faults.append(Fault("/commit/", act, times=99))
    with pytest.raises(InputError, match=match) as caught:
        upload(folder, names_in(folder), TARGET)
    assert "\n" not in str(caught.value)
    assert hub.files("me/model") == {}
    hub.faults.clear()
    sent = sum("PUT" in line for line in hub.log)
    upload(folder, names_in(folder), TARGET)
    assert hub.files("me/model") == content_of(folder)
    assert sum("PUT" in line for line in hub.log) == sent, "what had arrived is not sent again"


def test_what_arrives_otherwise_is_found(hub, folder, impatient):
    commit = upload(folder, names_in(folder), TARGET)
    repository = hub.repositories["me/model"]
    hub.blobs["other"] = b"2!"
    repository.commits[commit.oid]["notes-2.txt"] = (False, "other")
    with pytest.raises(InputError, match=r"'notes-2\.txt' did not arrive"):
        verify(folder, names_in(folder), TARGET, commit)


def test_a_fault_of_this_machine_is_not_the_hubs(hub, folder, impatient, monkeypatch):
    attempts = []

    def fail(*args):
        attempts.append(args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x")

    monkeypatch.setattr(way, "_commit", fail)
    with pytest.raises(InputError, match=r"a file of this machine cannot be read or written \(.*No space left"):
        upload(folder, names_in(folder), TARGET)
    assert len(attempts) == 1, "waiting would not help"


def test_killed_anywhere_it_ends_complete(hub, folder):
    """50 processes, each killed while the server holds a request of its, chosen at random; then one is let through."""
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
        for _ in range(2):  # killed once, and once more on the way to the end
            hub.faults = [Fault("", lambda alive=started: alive[-1].kill(), skip=generator.randrange(14))]
            started.append(start())
            started[-1].join(60)
            killed += started[-1].exitcode == -9
            if "me/model" in hub.repositories:
                assert hub.files("me/model") in ({}, expected), "all or nothing"
        hub.faults = []
        started.append(start())
        started[-1].join(60)
        assert started[-1].exitcode == 0
        assert hub.files("me/model") == expected
        puts = [line for line in hub.log if line.startswith("PUT")]
        assert len(puts) <= 3 + 2 * 3
        assert len(hub.repositories["me/model"].messages) == 1


def test_a_login_is_asked_for_before_training(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(InputError, match="log in with `hf auth login`"):
        check_login("me/model")
    monkeypatch.setenv("HF_TOKEN", "some")
    check_login("me/model")
    hub.faults.append(Fault("whoami", "cut", times=99))
    check_login("me/model")  # a dead network is no reason not to train


def test_an_adapter_that_could_not_be_published_is_refused_before_training(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "some")
    (tmp_path / "recipe.yaml").write_text(
        "task: classify\ndata: {path: synthetic:messages}\nhub: {repo_id: me/lora}\n"
    )
    (tmp_path / "base").mkdir()
    overrides = ["--model.path", str(tmp_path / "base"), "--adapters.r", "2"]
    with pytest.raises(InputError, match=r"which nobody else has: .*--hub\.base_model user/name"):
        check_publication(load_recipe(str(tmp_path / "recipe.yaml"), overrides))
    check_publication(load_recipe(str(tmp_path / "recipe.yaml"), [*overrides, "--hub.base_model", "me/base"]))


def test_trainers_own_pushes_are_refused():
    with pytest.raises(InputError, match="use the section hub"):
        HfGPTTrainingArguments(output_dir="x", push_to_hub=True)


# During training ---------------------------------------------------------------------------------------------------


@pytest.fixture
def train(recipes, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "some")
    monkeypatch.setattr("hfgpt.tasks.publish.check_as_stranger", lambda *args, **kwargs: None)
    monkeypatch.setattr(way, "WAITS", ())

    def train(*overrides: str):
        console = Console(file=io.StringIO(), width=300)
        out = ["--training.output_dir", str(tmp_path / "run"), "--hub.repo_id", "me/run", *overrides]
        try:
            pretrain(load_recipe(str(recipes / "text.yaml"), out), console=console)
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


def test_a_dead_network_stops_no_training_and_is_told_at_the_end(hub, train, impatient):
    hub.faults.append(Fault("/api/(models|repos)", "cut", times=9999))
    with pytest.raises(InputError, match=r"is finished, but not all of it was published: .*publish it with: hfgpt"):
        train("--hub.strategy", "checkpoints")
    assert re.search("checkpoint [23] was not pushed", train.shown)
    folder = Path(re.search(r"saved to (\S+);", train.shown)[1])
    assert (folder / "README.md").is_file()
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert any("hub_error" in entry for entry in log)
