"""Fine-tuning on the command line: valid commands print their result, user errors are one line with status 2."""

import contextlib
import io
import json
import re
import shutil

import datasets
import pytest

from hfgpt import cli
from hfgpt.demo_corpus import generate_instructions, generate_messages
from hfgpt.training import estimate

COMMON = """
training: {{max_steps: 3, use_cpu: true, bf16: false, output_dir: {name}, per_device_train_batch_size: 4}}
"""
MODEL = """
tokenizer: {kind: bpe, vocab_size: 300}
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 128}
"""
RECIPES = {
    "classes": "task: classify\ndata: {path: notes.jsonl}\nevaluation: {baseline: false}" + MODEL,
    "answers": "task: instruct\ndata: {path: questions.json}\nevaluation: {max_new_tokens: 4}" + MODEL,
    "classes-lora": "task: classify\nmodel: {path: classes}\nadapters: {r: 2}\ndata: {path: notes.jsonl}",
}


def hfgpt(*arguments, stdin="", terminal=False):
    """Exit status, standard output and standard error of a command; a traceback fails the test."""
    out, err = io.StringIO(), io.StringIO()
    out.isatty = lambda: terminal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["hfgpt", *map(str, arguments)])
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
            cli.main()
    return stop.value.code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """The working directory of all commands, with data, recipes and their finished runs."""
    folder = tmp_path_factory.mktemp("here")
    probe = estimate.probe_tokens_per_second
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(estimate, "probe_tokens_per_second", lambda *args, **kwargs: probe(*args[:3], seconds=0.02))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in generate_messages(60)))
        (folder / "questions.json").write_text(json.dumps(list(generate_instructions(40))))
        (folder / "lines.txt").write_text("first line\nsecond line\n")
        (folder / "bad.json").write_text(json.dumps([{"instruction": "x", "output": ""}]))
        (folder / "other.jsonl").write_text('{"text": "x", "label": "nonsense"}\n')
        chat = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        (folder / "chats.json").write_text(json.dumps([{"messages": chat}]))
        for name, text in RECIPES.items():
            (folder / f"{name}.yaml").write_text(text + COMMON.format(name=name))
            status, out, err = hfgpt("train", f"{name}.yaml")
            assert (status, out) == (0, ""), err
        yield folder


@pytest.mark.parametrize("model", ["classes", "classes-lora"])
def test_classify_prints_labels_and_probabilities(model):
    status, out, _ = hfgpt("classify", model, "come to the lake", "--file", "lines.txt", "--json")
    assert status == 0
    found = json.loads(out)["predictions"]
    assert [row["text"] for row in found] == ["come to the lake", "first line", "second line"]
    for row in found:
        assert row.keys() == {"text", "label", "score"}
        assert row["label"] in ("invitation", "lost", "thanks", "trick")
        assert 0.25 <= row["score"] <= 1
    status, out, _ = hfgpt("classify", model, "first line")
    label, probabilities, text = out.rstrip("\n").split("\t")
    assert (label, text) == (found[1]["label"], "first line")
    numbers = [float(number) for number in re.findall(r"\d\.\d+", probabilities)]
    assert len(numbers) == 4
    assert sum(numbers) == pytest.approx(1, abs=1e-3)
    assert numbers == sorted(numbers, reverse=True)


def test_a_text_cannot_control_the_terminal():
    text = "first\x1b[2J line\x9b2J"
    assert hfgpt("classify", "classes", text)[1].endswith(f"\t{text}\n"), "unchanged if the output is not a terminal"
    assert hfgpt("classify", "classes", text, terminal=True)[1].endswith("\tfirst\\x1b[2J line\\x9b2J\n")
    assert hfgpt("classify", "classes", text, "--json")[1].startswith(
        '{"predictions": [{"text": "first\\u001b[2J line\x9b2J"'
    )
    shown = hfgpt("classify", "classes", text, "--json", terminal=True)[1]
    assert json.loads(shown)["predictions"][0]["text"] == text
    assert shown.isascii()
    assert "\x1b" not in shown


def test_classify_reads_standard_input():
    for words in (["--json"], ["--json", "--file", "-"]):
        status, out, _ = hfgpt("classify", "classes", *words, stdin="first line\r\nsecond: \u00e9\n")
        assert status == 0
        assert [row["text"] for row in json.loads(out)["predictions"]] == ["first line", "second: \u00e9"]
    status, out, _ = hfgpt("classify", "classes", "a text", stdin="not read\n")
    assert (status, len(out.splitlines())) == (0, 1)
    assert hfgpt("classify", "classes", stdin="a\n\nb\n")[::2] == (
        2,
        "hfgpt: standard input, line 2 is empty: leave it out\n",
    )


def test_evaluate_detects_the_kind_of_model():
    status, out, _ = hfgpt("evaluate", "classes", "--data.path", "notes.jsonl", "--json")
    assert (status, json.loads(out)["eval_rows"]) == (0, 60)
    assert hfgpt("evaluate", "classes-lora", "--data.path", "notes.jsonl")[0] == 0
    status, out, _ = hfgpt("evaluate", "answers", "--task", "instruct", "--data.path", "questions.json",
                           "--evaluation.max_answers=3", "--evaluation.max_new_tokens=2", "--json")  # fmt: skip
    assert (status, json.loads(out)["eval_answers"]) == (0, 3)
    status, out, _ = hfgpt("evaluate", "answers", "--data.path", "lines.txt", "--json")
    assert status == 0
    assert "eval_perplexity" in json.loads(out)


def test_merge_reports_the_difference(here):
    status, out, err = hfgpt("merge", "classes-lora", "merged")
    assert (status, out) == (0, "")
    assert re.match(r"largest logit difference \S+ on 256 random tokens \(largest logit ", err)
    assert json.loads((here / "merged" / "merge.json").read_text())["difference"] <= 1e-5
    assert hfgpt("classify", "merged", "hello")[0] == 0


def test_a_chat_from_standard_input():
    status, out, _ = hfgpt("chat", "answers", "--max-new-tokens", "5", "--greedy", stdin="What?\n/system x\nWhy?\n")
    assert status == 0
    assert len(out.splitlines()) >= 2


def damage(here, model: str, name: str, change) -> str:
    """A copy of a run in which one JSON file is changed."""
    folder = shutil.copytree(here / model, here / "damaged", dirs_exist_ok=True)
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return "damaged"


COMMANDS = {
    "answers": (
        ["generate", "Hello"],
        ["chat"],
        ["evaluate", "--task", "instruct", "--data.path", "questions.json"],
    ),
    "classes": (["classify", "Dear Mia!"], ["evaluate", "--data.path", "notes.jsonl"]),
}


@pytest.mark.parametrize("model", COMMANDS)
def test_a_tokenizer_larger_than_the_model_is_a_one_line_error(here, model):
    damaged = damage(here, model, "tokenizer.json", lambda content: content["model"]["vocab"].update({"~~": 99999}))
    for command, *options in COMMANDS[model]:
        status, out, err = hfgpt(command, damaged, *options, stdin="Hello\n")
        assert (status, out) == (2, "")
        assert re.fullmatch(
            r"hfgpt: the tokenizer has 100000 tokens, but the model has only \d+ embeddings: .*\n", err
        ), err
    shutil.rmtree(here / damaged)


def test_an_invalid_generation_config_is_a_one_line_error(here):
    damaged = damage(here, "answers", "generation_config.json", lambda content: content.update(suppress_tokens="x"))
    for command, *options in COMMANDS["answers"]:
        status, _, err = hfgpt(command, damaged, *options, stdin="Hello\n")
        assert status == (0 if command == "chat" else 2), "a chat continues"
        said = "hfgpt: the model's generation_config.json cannot be used"
        assert " ".join(err.split()).rpartition("hfgpt: ")[2].startswith(said.removeprefix("hfgpt: ")), err
    shutil.rmtree(here / damaged)


def test_inspect_and_plan():
    status, out, _ = hfgpt("inspect", "answers.yaml", "--rows", "1")
    assert status == 0
    assert "### Assistant:" in out
    status, out, _ = hfgpt("inspect", "classes.yaml", "--rows", "1")
    assert "row 0 of" in out
    for name in RECIPES:
        status, out, err = hfgpt("plan", f"{name}.yaml", "--json", "--training.output_dir", "x")
        assert status == 0, err
        assert json.loads(out)["steps"] == 3


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("classify classes", "no text to classify: pass texts, or a file with one text per line (--file)"),
        ("classify classes ''", "text 1 is empty: leave it out"),
        ("classify classes --file none.txt", "No such file or directory: none.txt; check the path"),
        ("classify answers hello", "'answers' is a language model, not a classifier: train one with task: classify"),
        ("classify nowhere/at/all hello", "the folder 'nowhere/at/all' does not exist, and it is not a Hub id"),
        (
            "chat answers --max-new-tokens 128",
            "--max-new-tokens is 128, which leaves no room for a question in the context of 128: lower",
        ),
        ("merge classes-lora out --tolerance -1", "--tolerance is -1.0; it must be at least 0"),
        ("merge classes-lora notes.jsonl/out", "cannot create 'notes.jsonl/out': "),
        (
            "evaluate answers --task instruct --data.path questions.json --evaluation.answers lines.txt/x",
            "cannot create 'lines",
        ),
        ("chat classes", "is a classifier, not a language model"),
        (
            "merge answers out",
            "'answers' is not an adapter, locally or on the Hub: pass the run folder of an adapter",
        ),
        ("merge classes-lora answers", "'answers' already exists: choose a new folder"),
        (
            "evaluate classes --data.path other.jsonl",
            "data.path 'other.jsonl' has the label 'nonsense', which is not one",
        ),
        ("evaluate classes --data.path notes.jsonl --data.label_column kind", "data.label_column 'kind' is not a"),
        (
            "evaluate classes --data.path notes.jsonl --data.balance undersample",
            "--data.balance has no effect on evaluate: all rows of all classes are evaluated",
        ),
        (
            "evaluate answers --task instruct --data.path questions.json --evaluation.judge.model referee",
            "--evaluation.judge.model has no effect on evaluate: evaluation.judge.base_url is not set",
        ),
        ("evaluate classes --data.path questions.json --task instruct", "is a classifier, not a language model"),
        (
            "evaluate answers --task instruct --data.path bad.json",
            "has no row with an answer (1 row read; dropped: 1 empty answer): add rows",
        ),
        ("evaluate answers --task instruct --data.path chats.json", "message 2 has the role 'user', expected"),
        (
            "train classes.yaml --data.path bad.json --training.output_dir new",
            "data.text_column 'text' is not a column of",
        ),
        ("train classes.yaml --data.path other.jsonl --training.output_dir new", "has only one class, 'nonsense'"),
        ("train classes.yaml --data.stride 3", "there is no key 'stride' in section 'data'"),
        (
            "train classes-lora.yaml --training.output_dir new --adapters.target_modules [c_attn]",
            "cannot be adapted (",
        ),
        ("train classes-lora.yaml --adapters.rank 3", "there is no key 'rank' in section 'adapters'"),
        ("train answers.yaml --evaluation.judge.base_url x", "evaluation.judge.base_url is 'x'; it must start with"),
        ("train answers.yaml --evaluation.judge.url x", "there is no key 'url' in section 'evaluation.judge'"),
        ("train answers.yaml --evaluation.judge x", "--evaluation.judge is a section: set one of its keys, as in"),
        (
            "train answers.yaml --training.output_dir new --evaluation.judge.base_url http://127.0.0.1:9 "
            "--evaluation.judge.model m",
            "the judge 'm' at http://127.0.0.1:9 does not answer (",
        ),
    ],
)
def test_invalid_input_is_a_one_line_error(here, command, message):
    before = sorted(path.name for path in here.iterdir())
    status, out, err = hfgpt(*(word.strip("'") for word in command.split()))
    assert (status, out) == (2, "")
    assert re.fullmatch(r"hfgpt: [^\n]+\n", err), err
    assert message in err
    assert sorted(path.name for path in here.iterdir()) == before, "no files are left behind"


def test_recipes_of_the_package_can_be_planned_and_inspected(here):
    (here / "sms.tsv").write_text("".join(f"{row['label']}\t{row['text']}\n" for row in generate_messages(60)))
    columns = ["--data.path", "sms.tsv", "--data.text_column", "1", "--data.label_column", "0"]
    for name in ("spam", "spam-lora"):
        status, out, err = hfgpt("plan", name, *columns, "--json")
        assert status == 0, err
        plan = json.loads(out)
        assert plan["first_pass"]["steps"] == 1000
        assert (plan["parameters"] < plan["first_pass"]["parameters"]) == (name == "spam-lora")
        status, out, _ = hfgpt("plan", name, *columns)
        assert re.search(r"first pass +1,000 steps of [\d,]+ tokens", out)
        assert hfgpt("inspect", name, *columns)[0] == 0
    for name, task in (("demo-messages", "classes"), ("demo-instructions", "answers"), ("instruct-lora", "answers")):
        base = ["--model.path", "answers", "--training.output_dir", "x"]
        limit = ["--data.max_rows", "40"] if name.startswith("demo") else ["--data.path", "questions.json"]
        for command in ("plan", "inspect"):
            status, _, err = hfgpt(command, name, *base, *limit)
            assert status == 0, (task, err)
