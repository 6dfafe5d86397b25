"""Publishing: what is uploaded and what must not be, over HTTP with the real client and a Hub on 127.0.0.1."""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import Fault
from huggingface_hub import ModelCard, parse_eval_result_entries
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hfgpt.commands import publish as task
from hfgpt.commands.convert import import_checkpoint
from hfgpt.commands.merge import merge
from hfgpt.commands.publish import PublishArguments, check_metadata, publish
from hfgpt.configuration_hfgpt import AUTO_MAP
from hfgpt.errors import InputError
from hfgpt.foreign_code import find_foreign_code
from hfgpt.hub import fresh_process, stranger
from hfgpt.hub.contents import SECRETS, find_secrets
from hfgpt.hub.folder import read_records
from hfgpt.models import SavedModel, find_model, load_model
from hfgpt.recipe import load_recipe
from hfgpt.records import KnownAnswers
from hfgpt.runs.remeasure import _find_rows
from hfgpt.runs.run import run as train
from hfgpt.saving import write_json
from hfgpt.tokenizer import train_tokenizer

WORDS = """
task: pretrain
tokenizer: {kind: char}
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 1, max_position_embeddings: 8}
data: {path: words.txt, num_proc: 1, cache_dir: cache}
training: {output_dir: run, per_device_train_batch_size: 4, max_steps: 1, use_cpu: true, bf16: false}
"""


TOKEN = "hf_" + "plantedToken" * 3


@pytest.fixture
def skip_load_check(monkeypatch):
    """Skips the check in a separate process, which takes ten seconds, and the client's pauses."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(task, "check_as_stranger", lambda *args, **kwargs: None)


@pytest.fixture
def final(text_run, tmp_path) -> Path:
    """A copy of the language model's run without its checkpoints, as it is published."""
    return shutil.copytree(text_run, tmp_path / "final", ignore=shutil.ignore_patterns("checkpoint-*"))


def expected_of(folder: Path) -> stranger.Expected:
    saved = find_model(str(folder))
    return stranger.compute_expected(saved.load(), saved.load_tokenizer(), read_records(folder))


@contextmanager
def stranger_in_this_process(tmp_path):
    """Runs the stranger's script in this process, since starting a new one takes ten seconds."""

    def run(command, **kwargs):
        try:
            fresh_process.main(command[-1])
        except Exception as error:  # any error would end the real process
            return subprocess.CompletedProcess(command, 1, stderr=str(error))
        return subprocess.CompletedProcess(command, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        patch.syspath_prepend(tmp_path / "modules")
        yield


def send(folder, repo_id="me/model", *overrides, **options):
    """Publishes a folder; returns the code to load it, and the output."""
    console = Console(file=io.StringIO(), width=400)
    code = publish(str(folder), repo_id, PublishArguments(**options), overrides, console)
    return code, console.file.getvalue()


def test_a_dry_run_shows_everything_and_sends_nothing(hub, run, skip_load_check):
    before = sorted(path.stat().st_mtime_ns for path in run.rglob("*"))
    code, shown = send(run, dry_run=True)
    assert hub.log == []
    assert sorted(path.stat().st_mtime_ns for path in run.rglob("*")) == before
    assert "# model" in shown
    assert f"{(run / 'model.safetensors').stat().st_size:,}  model.safetensors" in shown
    assert "not published  checkpoint-2: a checkpoint" in shown
    assert shown.count("  ok  ") == 7
    assert code == "", "the loading code is on the card"
    assert 'pipeline("text-generation", model="me/model", trust_remote_code=True)' in shown


@pytest.mark.parametrize("name", ["text", "classes", "answers"])
def test_the_model_is_loaded_once_for_all_checks(hub, runs, tmp_path, monkeypatch, name):
    loaded, load = [], SavedModel.load
    monkeypatch.setattr(
        SavedModel, "load", lambda self, *args, **kw: (loaded.append(self.path), load(self, *args, **kw))[1]
    )
    with stranger_in_this_process(tmp_path):
        _, shown = send(runs / name, dry_run=True)
    assert "re-evaluated on the " in shown
    assert "a fresh process without hfgpt loads the files" in shown
    assert loaded == [str(runs / name)]


@pytest.mark.parametrize(
    ("token", "said"), [(None, "not logged in: run `hf auth login` before publishing"), (TOKEN, "a Hub token is set")]
)
def test_a_dry_run_reports_whether_there_is_a_login(hub, run, skip_load_check, monkeypatch, token, said):
    monkeypatch.setattr(task, "get_token", lambda: token)
    _, shown = send(run, dry_run=True, measure=False)
    assert shown.endswith(f"nothing was uploaded (--dry-run); {said}\n")
    assert hub.log == []


def test_tensorboard_logs_are_not_published(hub, run, skip_load_check):
    logs = run / "runs" / "Jan01_00-00-00_machine"
    logs.mkdir(parents=True)
    (logs / "events.out.tfevents.1.machine.2.0").write_bytes(b"\0")
    _, shown = send(run, dry_run=True, measure=False)
    assert "not published  runs: TensorBoard logs" in shown
    (logs / "notes.txt").touch()
    with pytest.raises(InputError, match="'runs' is a folder"):
        send(run, dry_run=True, measure=False)


def test_wandb_logs_are_not_published(hub, run, skip_load_check):
    logs = run / "wandb" / "offline-run-20260101_000000-abc123" / "files"
    logs.mkdir(parents=True)
    (logs / "output.log").touch()
    (run / "wandb" / "latest-run").symlink_to(logs.parent.name)
    (run / "wandb" / "debug.log").symlink_to(logs / "output.log")
    _, shown = send(run, dry_run=True, measure=False)
    assert "not published  wandb: W&B logs" in shown
    (run / "wandb" / "notes.txt").touch()
    with pytest.raises(InputError, match="'wandb' is a folder"):
        send(run, dry_run=True, measure=False)


def test_a_run_is_published_in_one_commit(hub, run, skip_load_check):
    send(run, commit_message="First")
    files = hub.files("me/model")
    assert hub.repositories["me/model"].private
    assert hub.repositories["me/model"].messages == ["First"]
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert {"configuration_hfgpt.py", "modeling_hfgpt.py", "tokenizer.json", "loss.png"} <= files.keys()
    assert not {name for name in files if name.endswith((".pt", ".bin", ".pth")) or name.startswith("checkpoint")}
    assert not any(str(run.parent).encode() in content for content in files.values()), "no local path"
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.language, card.data.pipeline_tag) == ("mit", ["en"], "text-generation")
    metrics = json.loads(files["metrics.json"])
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["perplexity"] == metrics["eval_perplexity"]
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/hfgpt.yaml"]))
    assert {entry.task_id: entry.value for entry in entries} == results
    # Again: nothing has changed, so nothing is sent.
    puts = sum("PUT" in line for line in hub.log)
    send(run)
    assert hub.repositories["me/model"].messages == ["First"]
    assert sum("PUT" in line for line in hub.log) == puts


def test_stale_files_of_an_earlier_publication_are_removed(hub, run, skip_load_check):
    repository = hub.create("me/model", private=True)
    stale, kept = {"model-00001-of-00002.safetensors", "adapter_config.json"}, {"notes.md", "onnx/model.safetensors"}
    for name in ("README.md", *stale, *kept):
        hub.blobs[name] = b"---\ntags: [hfgpt]\n---\n"
        repository.commits[repository.branches["main"]][name] = (False, name)
    send(run, measure=False)
    assert not stale & hub.files("me/model").keys()
    assert kept <= hub.files("me/model").keys(), "not files of hfgpt"


def test_branches_and_pull_requests(hub, run, skip_load_check):
    send(run, revision="dev", measure=False)
    assert hub.files("me/model") == {}
    assert "model.safetensors" in hub.files("me/model", "dev")
    send(run, create_pr=True, measure=False)
    assert hub.files("me/model") == {}
    assert "model.safetensors" in hub.files("me/model", "refs/pr/1")
    with pytest.raises(InputError, match="leave out --revision"):
        PublishArguments(create_pr=True, revision="dev")


def test_a_file_that_differs_after_upload_is_reported(hub, run, skip_load_check):
    def corrupt():
        _, sha256 = hub.repositories["me/model"].commits[hub.repositories["me/model"].branches["main"]]["metrics.json"]
        hub.blobs[sha256] += b" "

    hub.faults.append(Fault("GET /me/model/resolve/.*/metrics.json|HEAD /me/model/resolve/.*/metrics.json", corrupt))
    with pytest.raises(InputError, match=r"'metrics\.json' in me/model differs from the uploaded file"):
        send(run, measure=False)


def test_data_rows_and_names_of_other_files_are_not_published(hub, run, runs, skip_load_check):
    report = json.loads((run / "data_report.json").read_text())
    report |= {"near_duplicate_examples": [["a row of mine", "another"]], "unused_files": ["salaries.txt"]}
    (run / "data_report.json").write_text(json.dumps(report))
    with open(run / "training_log.jsonl", "a") as log:
        log.write(json.dumps({"step": 3, "hub_error": "no /home/me/secret"}) + "\n")
    send(run, "me/model", "--hub.author", "Me")
    sent = b"".join(content for name, content in hub.files("me/model").items() if not name.endswith(".safetensors"))
    for text in (b"a row of mine", b"salaries", b"/home/me"):
        assert text not in sent
    assert b'"step"' in hub.files("me/model")["training_log.jsonl"]
    _, shown = send(runs / "answers", "me/answers")
    assert "not published  answers.jsonl: contains rows of the data" in shown
    assert "answers.jsonl" not in hub.files("me/answers")
    recipe = yaml.safe_load(hub.files("me/model")["recipe.yaml"])
    assert recipe["hub"] == {"license": "mit", "author": "Me", "language": ["en"]}, "others must not publish there"


def test_notes_and_license_are_published_on_both_branches(hub, run, skip_load_check):
    (run / "LICENSE").write_text("Do what you like.")
    (run / "notes.txt").write_text("By hand.")
    _, shown = send(run, "me/model", "--hub.native_branch", "true", measure=False)
    for branch in ("main", "gpt2"):
        assert {"LICENSE", "notes.txt", "loss.png", "README.md"} <= hub.files("me/model", branch).keys()
    native = hub.files("me/model", "gpt2")
    assert not {"modeling_hfgpt.py", "configuration_hfgpt.py"} & native.keys()
    assert 'revision="gpt2"' in native["README.md"].decode()
    assert "not published  README.md: a new card is rendered" in shown


def test_files_that_change_during_the_checks_are_not_sent(hub, run, skip_load_check, monkeypatch):
    plan = task.plan_branches

    def late(*args):
        (run / "late.txt").write_text("hf_" + "a1B2" * 9)
        return plan(*args)

    monkeypatch.setattr(task, "plan_branches", late)
    send(run, "me/late", measure=False)
    assert "late.txt" not in hub.files("me/late")
    (run / "late.txt").unlink()
    monkeypatch.setattr(task, "plan_branches", lambda *args: (edit_weight(run), plan(*args))[1])
    with pytest.raises(InputError, match="changed during the checks"):
        send(run, "me/other", measure=False)
    assert "me/other" not in hub.repositories


def test_missing_or_invalid_metadata_is_refused(tmp_path):
    for text in ("# no metadata\n", "---\nlicense: [\n---\n# It\n"):
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(InputError, match="metadata"):
            check_metadata(tmp_path / "README.md")


def test_there_is_only_one_way_to_set_the_destination(hub, run):
    for option, value in (("repo_id", "me/other"), ("private", "false"), ("strategy", "end")):
        with pytest.raises(InputError, match=rf"--hub\.{option} only applies to hfgpt train"):
            send(run, "me/model", f"--hub.{option}", value)
    for name in ("", "my branch", "-x"):
        with pytest.raises(InputError, match="is not a valid branch name"):
            PublishArguments(revision=name)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("metrics.json", "{", r"metrics\.json' cannot be read .*: restore the original"),
        (
            "metrics.json",
            '{"eval_loss": null}',
            r"metrics\.json' has an invalid value, eval_loss is not a number",
        ),
        ("metrics.json", '{"eval_judge_scre": 1, "x": 9}', "metrics.json has x, which is not a metric"),
        ("recipe.yaml", "a: [", r"recipe\.yaml' cannot be read"),
        ("recipe.yaml", "", r"recipe\.yaml' has no task"),
        (
            "data_report.json",
            "{}",
            r"data_report\.json' .* does not have dropped, rows_kept, rows_read, sha256, splits",
        ),
        ("conversion.json", "[]", r"conversion\.json' is not a JSON object"),
        (
            "conversion.json",
            '{"source": "x", "format": "book", "differences": [{}]}',
            r"the records in .* \(UndefinedError: ",
        ),
        (
            "recipe.yaml",
            "{task: pretrain, hub: 5}",
            r"recipe\.yaml' has an invalid section: hub is 5; restore the original, or remove it",
        ),
        (
            "recipe.yaml",
            "{task: pretrain, hub: {license: mit}, data: 5}",
            r"recipe\.yaml' has an invalid section: data is 5",
        ),
        ("trainer_state.json", "{}", r"\(KeyError: 'global_step'\): restore the ones saved with the model"),
        ("labels.json", '{"id2label": ["a"]}', r"the records in .* \(AttributeError: 'list' object has no"),
    ],
)
def test_invalid_records_are_a_one_line_error(hub, run, name, content, match):
    (run / name).write_text(content)
    with pytest.raises(InputError, match=match):
        send(run, dry_run=True)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("run.json", {"data_source": [5]}),
        ("run.json", {"actual": [1]}),
        ("run.json", {"versions": "1"}),
        ("data_report.json", {"dropped": 3}),
        ("data_report.json", {"splits": ["train"]}),
    ],
)
def test_record_values_of_wrong_types_are_a_one_line_error(hub, run, skip_load_check, name, changes):
    edit_json(run / name, **changes)
    (key,) = changes
    with pytest.raises(InputError, match=rf"'{run / name}' has an invalid value, {key} is ") as error:
        send(run, dry_run=True)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is not None


def test_a_log_nested_too_deeply_is_a_one_line_error(hub, run, skip_load_check):
    with open(run / "training_log.jsonl", "a") as log:
        log.write("[" * 100_000 + "\n")
    with pytest.raises(InputError, match=rf"the records in '{run}' .* are damaged or were edited"):
        send(run, dry_run=True)


def test_a_merge_reports_invalid_records_of_its_adapter(runs, tmp_path):
    adapter = shutil.copytree(runs / "adapter", tmp_path / "adapter")
    edit_json(adapter / "data_report.json", splits=["train"])
    with pytest.raises(InputError, match=r"data_report\.json' has an invalid value, splits is \["):
        merge(str(adapter), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_different_tokenizer_is_refused(hub, run):
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [token for token in vocabulary if len(token) == 1][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="is not the one used in the run"):
        send(run)


def test_different_results_for_a_stranger_are_an_error(final, tmp_path, monkeypatch):
    ask, expected = stranger._ask, expected_of(final)
    for key, value, match in (
        ("greedy", [1, 2], "generates different text"),
        ("ids", [0], "tokenizes a text differently"),
    ):
        monkeypatch.setattr(
            stranger, "_ask", lambda *args, key=key, value=value: (ask(*args)[0] | {key: value}, ask(*args)[1])
        )
        with stranger_in_this_process(tmp_path), pytest.raises(InputError, match=match):
            stranger.check_as_stranger(final, expected)
    monkeypatch.setattr(stranger, "_ask", ask)
    known = KnownAnswers.read(final)
    known.answers["words"].log_probabilities[0][0] += 0.1
    known.write(final)
    with (
        stranger_in_this_process(tmp_path),
        pytest.raises(InputError, match="do not compute the answers in known_ans"),
    ):
        stranger.check_as_stranger(final, expected)
    monkeypatch.setattr(stranger, "usage_code", lambda *args: "raise RuntimeError('the card is wrong')")
    with (
        stranger_in_this_process(tmp_path),
        pytest.raises(InputError, match=r"cannot load these files \(the card is wrong\)"),
    ):
        stranger.check_as_stranger(final, expected)


def test_the_native_branch_excludes_other_branch_options(hub, run, skip_load_check):
    for options in ({"create_pr": True}, {"revision": "gpt2"}, {"revision": "dev"}):
        with pytest.raises(
            InputError, match=r"hub\.native_branch publishes to main and to the branch gpt2: leave out --"
        ):
            send(run, "me/model", "--hub.native_branch", "true", **options)
    assert hub.log == []


def test_visibility_must_match_the_existing_repository(hub, run, skip_load_check):
    send(run, "me/open", private=False, measure=False)
    assert not hub.repositories["me/open"].private
    with pytest.raises(InputError, match="exists and is public: pass --public, or choose another"):
        send(run, "me/open", measure=False)
    send(run, "me/closed", measure=False)
    with pytest.raises(InputError, match="exists and is private: leave out --public"):
        send(run, "me/closed", private=False, measure=False)


def test_a_model_of_another_kind_is_not_overwritten(hub, run, skip_load_check):
    repository = hub.create("me/llama", private=True)
    hub.blobs["x"] = b'{"model_type": "llama"}'
    repository.commits[repository.branches["main"]]["config.json"] = (False, "x")
    with pytest.raises(InputError, match=r"'me/llama' contains config\.json but not an hfgpt model"):
        send(run, "me/llama", measure=False)
    assert hub.files("me/llama").keys() == {"config.json"}
    # The same for an adapter or a pipeline, which have no config.json.
    for name in ("adapter_model.safetensors", "unet/model.safetensors"):
        repository = hub.create("me/other", private=True)
        repository.commits[repository.branches["main"]] = {name: (False, "x"), "README.md": (False, "x")}
        with pytest.raises(InputError, match="but not an hfgpt model"):
            send(run, "me/other", measure=False)


def plant_nan(run: Path):
    weights = load_file(run / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})


def edit_weight(run: Path):
    weights = load_file(run / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})


def edit_metric(run: Path):
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"eval_perplexity": 1.5}))


def write(name: str, content: bytes):
    def plant(run: Path):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(content)

    return plant


@pytest.mark.parametrize(
    ("plant", "match"),
    [
        (write("notes.txt", b"my token is hf_" + b"a1B2" * 9), "'notes.txt' contains a Hugging Face token at byte 12"),
        (write("key.txt", b"-----BEGIN OPENSSH PRIVATE KEY-----\n"), "'key.txt' contains a private key"),
        (write("model.pkl", b"\x80\x04."), "'model.pkl' is not safetensors, JSON, plain text or PNG"),
        (write("optimizer.pt", b"PK"), r"'optimizer\.pt' is not safetensors"),
        (write("weights.json", b"\x80\x04."), "'weights.json' is not UTF-8 text"),
        (write("extra.safetensors", b"\x80\x04."), "'extra.safetensors' is not a safetensors file"),
        (write("plot.png", b"\x80\x04."), "'plot.png' is not a PNG file"),
        (write("evil.py", b"import os"), r"'evil\.py' is not safetensors"),
        (write(".env", b"A=b"), r"'\.env' is hidden"),
        (write("__pycache__/a.pyc", b"x"), "'__pycache__' is a folder"),
        (
            lambda run: (run / "link.txt").symlink_to("/etc/hostname"),
            "'link.txt' is a symbolic link that points outside",
        ),
        (plant_nan, "have changed since they were saved"),
        (edit_weight, "have changed since they were saved"),
        (edit_metric, "metrics.json has eval_perplexity 1.5, but the weights give"),
    ],
)
def test_files_that_must_not_be_published_are_refused_by_name(hub, run, plant, match):
    plant(run)
    with pytest.raises(InputError, match=match):
        send(run)
    assert hub.log == []


def test_all_faults_are_reported_at_once(hub, run):
    for name in (".env", "a.pkl", "b.bin"):
        (run / name).touch()
    with pytest.raises(InputError, match=r"'\.env' .*'a\.pkl' .*'b\.bin' .*; remove them"):
        send(run)


@pytest.mark.parametrize(
    "text",
    [
        b"ghp_" + b"a1" * 18,
        b"github_pat_" + b"a1" * 35,
        b"glpat-" + b"a1" * 12,
        b"sk-proj-" + b"a1" * 20,
        b"sk-ant-" + b"a1" * 20,
        b"AKIA" + b"A1B2" * 4,
        b"AIza" + b"a" * 35,
        b"xoxb-" + b"1" * 24,
        b"pypi-AgEI" + b"a" * 40,
        b"npm_" + b"a" * 36,
        b"https://user:secret@example.org/data.csv",
        b"-----BEGIN PGP PRIVATE KEY BLOCK-----",
    ],
)
def test_secrets_of_all_kinds_are_found(text, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * (2**24 - 10) + b" " + text + b" ")  # across two chunks
    (found,) = find_secrets(tmp_path, ["a.txt"])
    assert found.startswith("'a.txt' contains a")
    assert text.decode() not in found
    assert any(kind in found for kind, _ in SECRETS)


def test_random_bytes_are_not_secrets(tmp_path):
    generator = random.Random(0)
    noise = [generator.randbytes(12) for _ in range(200_000)]
    (tmp_path / "a.safetensors").write_bytes(b"".join(b"://" + some + b"sk-" + some[:9] for some in noise))
    assert find_secrets(tmp_path, ["a.safetensors"]) == []


def test_a_token_in_use_is_found_whatever_its_format(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("it is my-very-own one")
    for variable in ("HF_TOKEN", "HFGPT_JUDGE_API_KEY"):
        monkeypatch.setenv(variable, "my-very-own")
        assert find_secrets(tmp_path, ["a.txt"]) == ["'a.txt' contains a token that is in use on this machine"]
        monkeypatch.delenv(variable)
    assert find_secrets(tmp_path, ["a.txt"]) == []


def test_what_is_not_an_hfgpt_model_is_refused(hub, run, runs, tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        send(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"does not have a config\.json"):
        send(tmp_path)
    with pytest.raises(InputError, match="which its users do not have: publish it and pass"):
        send(runs / "adapter")
    with pytest.raises(InputError, match="has no namespace: use user/model"):
        send(run, "model")
    assert hub.log == []


# Third-party code -------------------------------------------------------------------------------------------------


@pytest.fixture
def planted(tmp_path, monkeypatch) -> str:
    """Python code that writes the token in the environment to a file; the test must not run it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was prompted"))
    with stranger_in_this_process(tmp_path):
        yield f"\nimport os\nopen({str(tmp_path / 'stolen')!r}, 'w').write(os.environ['HF_TOKEN'])\n"
    assert not (tmp_path / "stolen").exists()
    assert not any(TOKEN in path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file())


def evil_model(files: dict[str, bytes], code: str) -> dict[str, bytes]:
    return {"modeling_hfgpt.py": files["modeling_hfgpt.py"] + code.encode()}


def evil_map(files: dict[str, bytes], code: str) -> dict[str, bytes]:
    config = json.loads(files["config.json"])
    config["auto_map"] = {name: f"me/evil--evil.{name}" for name in config["auto_map"]}
    return {"config.json": json.dumps(config).replace("auto_map", r"auto\u005fmap").encode(), "evil.py": code.encode()}


def evil_reference(files: dict[str, bytes], code: str) -> dict[str, bytes]:
    config = json.loads(files["config.json"])
    config["auto_map"] = {name: f"me/evil--evil.{name}" for name in config["auto_map"]}
    return {"config.json": json.dumps(config).replace("auto_map", r"auto\u005fmap").encode()}


def evil_generate(files: dict[str, bytes], code: str) -> dict[str, bytes]:
    return {"custom_generate/generate.py": code.encode() + b"def generate(model, **options): pass\n"}


@pytest.mark.parametrize(
    ("plant", "named", "match"),
    [
        (evil_model, "by the adapter", r"'modeling_hfgpt.py' is not a Python file of this version of hfgpt: publish"),
        (
            evil_model,
            "by hub.base_model",
            "'modeling_hfgpt.py' is not a Python file of this version of hfgpt: publish",
        ),
        (evil_map, "by the adapter", "'evil.py' is not a Python file of this version of hfgpt"),
        (evil_reference, "by hub.base_model", r"'config.json' refers to third-party code \(auto_map\)"),
        (evil_generate, "by hub.base_model", "'custom_generate/generate.py' is not a Python file of this version"),
    ],
)
def test_code_in_a_base_model_is_never_run(hub, runs, tmp_path, planted, plant, named, match):
    good = {path.name: path.read_bytes() for path in (runs / "text").iterdir() if path.is_file()}
    good = {name: content for name, content in good.items() if name.endswith((".json", ".py", ".safetensors"))}
    hub.create("me/evil", private=False, files=good | plant(good, planted))
    adapter, options = runs / "adapter", ["--hub.base_model", "me/evil"]
    if named == "by the adapter":
        adapter = shutil.copytree(adapter, tmp_path / "adapter")
        edit_json(adapter / "adapter_config.json", base_model_name_or_path="me/evil")
        options = []
    with pytest.raises(
        InputError, match=f"users of the adapter would run the code of its base model 'me/evil', where {match}"
    ):
        send(adapter, "me/x", *options, dry_run=True, measure=False)
    assert not any("POST" in line for line in hub.log)


def edit_json(path: Path, **changes):
    """Sets keys of a JSON file, which is created if missing; underscores in the first key are escaped."""
    content = json.loads(path.read_text()) if path.exists() else {}
    text, key = json.dumps(content | changes), next(iter(changes))
    path.write_text(text.replace(f'"{key}"', f'"{key}"'.replace("_", r"\u005f")))


AUTO_TOKENIZER = {"AutoTokenizer": [None, "evil.Evil"]}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer_config.json", {"auto_map": AUTO_TOKENIZER}),
        ("tokenizer_config.json", {"auto_map": [None, "me/evil--evil.Evil"]}),
        ("tokenizer_config.json", {"tokenizer_class": "evil.Evil"}),
        ("config.json", {"auto_map": AUTO_MAP | {"AutoModel": "me/evil--evil.Evil"}}),
        ("config.json", {"auto_map": AUTO_MAP | AUTO_TOKENIZER}),
        ("config.json", {"task_specific_params": {"auto_map": AUTO_TOKENIZER}}),
        ("config.json", {"custom_pipelines": {"text-generation": {"impl": "evil.Evil"}}}),
        ("generation_config.json", {"custom_generate": "me/evil"}),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.Evil"}}),
        ("config.4.0.0.json", {"auto_map": AUTO_TOKENIZER}),
        ("more.json", {"attn_implementation": {"": "me/evil"}}),
        ("adapter_config.json", {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}}),
    ],
)
def test_references_to_third_party_code_are_refused(hub, runs, tmp_path, planted, name, changes):
    adapter = name.startswith("adapter")
    folder = shutil.copytree(runs / ("adapter" if adapter else "text"), tmp_path / "copy")
    edit_json(folder / name, **changes)
    key = "auto_map" if "task_specific_params" in changes else next(iter(changes))
    options = ["--hub.base_model", "me/text"] if adapter else []
    with pytest.raises(InputError, match=rf"'{name}' refers to third-party code \({key}\); remove them"):
        send(folder, "me/x", *options, dry_run=True)
    assert hub.log == []


def test_tokens_and_labels_may_have_any_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": AUTO_MAP, "label2id": {"auto_map": 0}}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"auto_map": 5, "tokenizer_class": 6}}}))
    (tmp_path / "adapter_config.json").write_text('{"auto_mapping": null, "megatron_core": "megatron.core"}')
    assert find_foreign_code(tmp_path, ["config.json", "tokenizer.json", "adapter_config.json"]) is None


def test_python_files_in_an_adapter_folder_are_not_sent(hub, runs, tmp_path, skip_load_check):
    send(runs / "text", "me/text", measure=False)
    adapter = shutil.copytree(runs / "adapter", tmp_path / "adapter")
    (adapter / "modeling_hfgpt.py").write_text("raise SystemExit")
    send(adapter, "me/adapter", "--hub.base_model", "me/text", measure=False)
    assert not [name for name in hub.files("me/adapter") if name.endswith(".py")]


def test_the_fresh_process_gets_no_token_no_network_and_a_time_limit(final, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MY_SECRET", TOKEN)
    monkeypatch.setenv("HF_HOME", "/my/home")

    def start(command, env, stdin, timeout, **options):
        assert not [name for name, value in env.items() if TOKEN in value or "/my/home" in value]
        assert env["HF_HUB_OFFLINE"] == "1"
        assert Path(env["HF_HOME"]).is_relative_to(Path(command[-1]).parent)
        assert "PATH" in env
        assert stdin == subprocess.DEVNULL
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", start)
    with pytest.raises(InputError, match="did not load and run these files within 30 minutes"):
        stranger.check_as_stranger(final, expected_of(final))
    for event in ("socket.connect", "socket.getaddrinfo"):
        with pytest.raises(PermissionError, match="network access is blocked"):
            fresh_process.forbid_network(event, ())


def test_the_fresh_process_does_not_run_third_party_code(final, planted):
    with open(final / "modeling_hfgpt.py", "a") as file:
        file.write(planted)
    with pytest.raises(
        InputError, match=r"code that is not hfgpt's and is not run: 'modeling_hfgpt\.py' is not a Python file"
    ):
        stranger.check_as_stranger(final, expected_of(final))


# Folders that are not finished runs --------------------------------------------------------------------------------


def card_of(shown: str) -> str:
    return shown.partition("the card:\n")[2]


def test_a_checkpoint_is_published_as_a_checkpoint(hub, run, skip_load_check):
    _, shown = send(run / "checkpoint-2", dry_run=True)
    assert "re-evaluated on the whole validation split" in shown
    assert "not published  optimizer.pt: training state, for resuming" in shown
    card = card_of(shown)
    assert "This is a checkpoint, saved before the end of the run." in card
    assert "| optimizer steps | 2 |" in card
    assert "training time" not in card, "the times are those of the complete run"


def test_a_merged_adapter_keeps_its_training_history(hub, runs, tmp_path, skip_load_check):
    merge(str(runs / "adapter"), tmp_path / "merged", console=Console(file=io.StringIO()))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "The adapter `adapter` was merged into `text` in float32. Over " in card
    assert "## Evaluation" not in card, "nothing was measured on these weights yet"
    _, shown = send(tmp_path / "merged", dry_run=True)
    assert "re-evaluated on the test split" in shown
    measured = json.loads((runs / "adapter" / "metrics.json").read_text())
    assert f"| accuracy | {measured['eval_accuracy']:.2%} |" in card_of(shown)
    assert "A GPT of " in card_of(shown)


def test_an_imported_model_with_a_small_context_is_published(hub, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        tmp_path / "gpt2"
    )
    train_tokenizer(["The cat"], "char").save_pretrained(tmp_path / "gpt2")
    import_checkpoint(str(tmp_path / "gpt2"), tmp_path / "ours", console=Console(file=io.StringIO()))
    with stranger_in_this_process(tmp_path):
        _, shown = send(tmp_path / "ours", dry_run=True)
    assert 'print(pipe("The", do_sample=True, max_new_tokens=13))' in card_of(shown)


def test_an_imported_model_is_measured_on_the_given_data(hub, tmp_path, skip_load_check):
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    train_tokenizer(["abc " * 9], "char").save_pretrained(tmp_path / "gpt2")
    import_checkpoint(str(tmp_path / "gpt2"), tmp_path / "ours", console=Console(file=io.StringIO()))
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "Converted from `gpt2` (gpt2); the logits differ from the original's by at most " in card
    assert str(tmp_path) not in card
    _, shown = send(tmp_path / "ours", dry_run=True)
    assert "the card has no evaluation results: set --data.path to evaluate the model" in shown
    assert "the card has no license" in shown
    (tmp_path / "text.txt").write_text("a b c " * 40)
    _, shown = send(tmp_path / "ours", "me/ours", "--data.path", str(tmp_path / "text.txt"), dry_run=True)
    assert "Measured on all rows of `text.txt`, with weights of SHA-256" in card_of(shown)
    chosen = ["--data.path", str(tmp_path / "text.txt"), "--data.cache_dir", str(tmp_path), "--data.block_size=8"]
    _, other = send(tmp_path / "ours", "me/ours", *chosen, dry_run=True)
    assert "Measured on the rows selected by `--data.block_size=8` of `text.txt`" in card_of(other)
    assert "| perplexity |" in card_of(shown)
    assert str(tmp_path) not in card_of(shown)


@pytest.mark.parametrize(
    ("name", "metric", "rows", "by"),
    [
        ("classes", "eval_accuracy", "eval_rows", "share"),
        ("answers", "eval_exact_match", "eval_answers", "share"),
        ("answers", "eval_unfinished_answers", "eval_answers", "count"),
    ],
)
def test_one_row_may_differ_when_measured_on_another_machine(
    hub, runs, tmp_path, skip_load_check, name, metric, rows, by
):
    folder = shutil.copytree(runs / name, tmp_path / name)
    measured = json.loads((folder / "metrics.json").read_text())
    row = 1 / measured[rows] if by == "share" else 1
    (folder / "metrics.json").write_text(json.dumps(measured | {metric: measured[metric] + row}))
    send(folder, "me/x")
    assert json.loads(hub.files("me/x")["metrics.json"])[metric] == measured[metric], "the newly measured value"
    (folder / "metrics.json").write_text(json.dumps(measured | {metric: measured[metric] + 2 * row}))
    with pytest.raises(InputError, match=f"metrics.json has {metric}"):
        send(folder, "me/x")


def test_only_the_held_out_rows_are_measured(hub, run, tmp_path, skip_load_check):
    with pytest.raises(InputError, match=r"--data\.validation_fraction would evaluate rows that the run did not hold"):
        send(run / "checkpoint-2", "me/model", "--data.validation_fraction", "0.9")


def test_a_bfloat16_run_can_be_measured_on_a_machine_without_bfloat16(run, monkeypatch):
    recipe = (run / "recipe.yaml").read_text()
    assert "bf16: false" in recipe
    (run / "recipe.yaml").write_text(recipe.replace("bf16: false", "bf16: true"))
    monkeypatch.setattr("hfgpt.training.arguments.has_native_bf16", lambda device: False)
    assert _find_rows(read_records(run), []).training.bf16 is False


def test_weights_that_changed_after_conversion_are_refused(hub, runs, tmp_path, skip_load_check):
    merge(str(runs / "adapter"), tmp_path / "merged", console=Console(file=io.StringIO()))
    edit_weight(tmp_path / "merged")
    with pytest.raises(InputError, match="have changed since they were saved"):
        send(tmp_path / "merged")


def test_a_checkpoint_of_an_adapter_can_be_merged(runs, tmp_path):
    merge(str(runs / "adapter" / "checkpoint-2"), tmp_path / "merged", console=Console(file=io.StringIO()))
    assert "was merged into `text` in float32" in (tmp_path / "merged" / "README.md").read_text()


def test_a_malicious_chat_template_is_not_rendered_by_the_fresh_process(hub, runs, tmp_path):
    run = shutil.copytree(runs / "answers", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    (run / "chat_template.jinja").write_text("{{ 'a' * 10**10 }}")
    with pytest.raises(InputError, match="the tokenizer's chat template fails"):
        expected_of(run)


def test_an_instruction_tuned_run(hub, runs, skip_load_check):
    _, shown = send(runs / "answers", dry_run=True)
    assert "re-evaluated on the test split, with the same results as at the end of the run" in shown
    assert "'role': 'user'" in card_of(shown) or '"role": "user"' in card_of(shown)
    assert "- instruct" in card_of(shown)


def test_an_adapter_as_native_gpt2_needs_no_base_model(hub, runs, skip_load_check):
    send(runs / "adapter", format="gpt2", measure=False)
    files = hub.files("me/model")
    config = json.loads(files["config.json"])
    assert (config["model_type"], config["architectures"]) == ("gpt2", ["GPT2ForSequenceClassification"])
    assert config["id2label"] == {str(index): label for index, label in read_records(runs / "adapter").labels.items()}
    assert not {"adapter_config.json", "modeling_hfgpt.py"} & files.keys()
    card = files["README.md"].decode()
    assert "(since converted to these weights)" in card
    assert "trust_remote_code" not in card
    assert ModelCard(card).data.library_name == "transformers"


def test_an_adapters_base_model_is_pinned(hub, runs, skip_load_check):
    send(runs / "text", "me/text", measure=False)
    commit = hub.repositories["me/text"].branches["main"]
    send(runs / "adapter", "me/adapter", "--hub.base_model", "me/text", measure=False)
    config = json.loads(hub.files("me/adapter")["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/text", commit)
    files = hub.files("me/text")
    weights = files["model.safetensors"]
    hub.create("me/other", private=True, files=files | {"model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])})
    with pytest.raises(InputError, match="the weights of 'me/other' are not those the adapter was trained on"):
        send(runs / "adapter", "me/adapter", "--hub.base_model", "me/other", measure=False)
    with pytest.raises(InputError, match="'me/nothing' or its branch does not exist"):
        send(runs / "adapter", "me/adapter", "--hub.base_model", "me/nothing", measure=False)


def test_data_is_found_again_or_reported_as_missing(hub, tmp_path, skip_load_check, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("to be or not to be " * 30)
    Path("words.yaml").write_text(WORDS)
    train(load_recipe("words.yaml", []), console=Console(file=io.StringIO()))
    monkeypatch.chdir("/")
    _, shown = send(tmp_path / "run", dry_run=True)
    assert "re-evaluated on the whole validation split" in shown
    (tmp_path / "words.txt").write_text("something else")
    with pytest.raises(InputError, match="is not the data of the run"):
        send(tmp_path / "run", dry_run=True)
    (tmp_path / "words.txt").unlink()
    _, shown = send(tmp_path / "run", dry_run=True)
    assert "not re-evaluated, metrics are from the end of the run: the data is no longer at" in shown
    assert re.search(r"with weights of SHA-256 `\w+`, at the end of the run \(20", card_of(shown))


def test_a_token_on_the_command_line_is_not_written_to_the_card(hub, run, skip_load_check):
    with pytest.raises(InputError, match=r"'README\.md' contains a Hugging Face token"):
        send(run, "me/model", "--hub.data_license", "hf_" + "a1B2" * 9, measure=False)
    assert hub.log == []


# A clean virtual environment -------------------------------------------------------------------------------------

CLEAN = """
import importlib.util, sys, torch, transformers
from safetensors.torch import save_file
found = importlib.util.find_spec("hfgpt")  # an editable installation leaves a folder of recipes, but no module
assert found is None or found.origin is None
ids = torch.arange(8)[None]
options = dict(trust_remote_code=True, dtype=torch.float32)
text = transformers.AutoModelForCausalLM.from_pretrained("me/text", **options)
classes = transformers.AutoModelForSequenceClassification.from_pretrained("me/classes", **options)
native = transformers.AutoModelForCausalLM.from_pretrained("me/text", revision="gpt2", dtype=torch.float32)
assert type(native) is transformers.GPT2LMHeadModel
transformers.AutoConfig.from_pretrained("me/text", trust_remote_code=True)
transformers.AutoModel.from_pretrained("me/text", **options)
import peft
labels = {labels}
adapter = peft.AutoPeftModelForSequenceClassification.from_pretrained("me/adapter", id2label=labels, **options)
with torch.no_grad():
    logits = {{name: model.eval()(input_ids=ids).logits.contiguous() for name, model in
              [("text", text), ("classes", classes), ("native", native), ("adapter", adapter)]}}
save_file(logits, "logits.safetensors")
pipe = transformers.pipeline("text-generation", model="me/text", trust_remote_code=True)
print(pipe("The", max_new_tokens=4))
print(transformers.pipeline("text-classification", model="me/classes", trust_remote_code=True)("Dear Mia!"))
{card}
"""


def make_clean_environment(folder: Path) -> Path:
    """Creates a virtual environment with the packages of this one but without hfgpt; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # .pth files in that folder, which make an editable hfgpt importable, are not processed there.
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "python"


def test_a_stranger_loads_what_was_published(hub, runs, tmp_path):
    """End to end: all checks, then loading in a clean environment with access to the Hub only."""
    with stranger_in_this_process(tmp_path):
        handed_out = [
            send(runs / "text", "me/text", "--hub.native_branch", "true")[0],
            send(runs / "classes", "me/classes")[0],
            send(runs / "adapter", "me/adapter", "--hub.base_model", "me/text", "--hub.native_branch", "true")[0],
        ]
    python = make_clean_environment(tmp_path / "venv")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    cards = [hub.files(name)["README.md"].decode() for name in ("me/text", "me/classes", "me/adapter")]
    code = [block for card in cards for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL)]
    assert len(code) == 6
    script = CLEAN.format(labels=read_records(runs / "adapter").labels, card="\n".join([*code, *handed_out]))
    quiet = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run([python, "-c", script], cwd=tmp_path, env=environment, **quiet)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[y/N]" not in done.stdout, "no confirmation prompt"
    assert "You are using a model of type" not in done.stderr, "no warning about the model type"
    assert "generated_text" in done.stdout
    assert "score" in done.stdout
    assert done.stdout.count("verified: this is the model measured on ") == 3
    theirs, ids = load_file(tmp_path / "logits.safetensors"), torch.arange(8)[None]
    with torch.no_grad():
        for name, auto_class in (
            ("text", AutoModelForCausalLM),
            ("classes", AutoModelForSequenceClassification),
            ("adapter", AutoModelForSequenceClassification),
        ):
            ours = load_model(str(runs / name), auto_class=auto_class)(input_ids=ids).logits
            assert torch.equal(theirs[name], ours), name
            if name == "text":
                assert torch.equal(theirs["native"], ours)
    record = json.loads(hub.files("me/adapter")["adapter_config.json"])
    assert record["base_model_name_or_path"] == "me/text"


def test_files_that_give_different_logits_elsewhere_are_refused(hub, run, monkeypatch):
    """If the uploaded files are not the ones measured here, users would get a different model."""
    shutil.rmtree(run / "checkpoint-2")
    stage = task.stage

    def corrupt(folder, staging, *args):
        stage(folder, staging, *args)
        config = json.loads((staging / "config.json").read_text())
        write_json(staging / "config.json", config | {"layer_norm_eps": 1.0})

    monkeypatch.setattr(task, "stage", corrupt)
    with pytest.raises(InputError, match="computes different logits from these files"):
        send(run, measure=False)
    assert hub.log == []
