"""The Python code on a card: for any labels, prompts and paths, it is our template with these as string literals."""

import ast
import shlex
from pathlib import Path

import pytest

from hfgpt.hub.folder import FolderRecords
from hfgpt.hub.usage import Place, loading_code, serving_command, usage_code, verifying_code
from hfgpt.records import RunRecord

NASTY = [
    "plain",
    'a"b',
    "a'b",
    "a\\",
    '"), __import__("os").system("touch planted"), ("',
    "'), __import__('os').system('touch planted'), ('",
    "a\nimport os",
    "a\r\nb\x00\x1b[31m\u2028\u202e\x85\ud800",
    "```\nend of the card",
    "{name} %s \\N{BULLET} \\x41",
    "Ä, ö and 😀",
]


def records_of(task: str, text: str, adapter: bool = False, context: int = 64, **evaluation) -> FolderRecords:
    settings = {"prompts": [text], "max_new_tokens": 60, "temperature": 1.0, "top_k": None, **evaluation}
    return FolderRecords(
        folder=Path(),
        recipe={"task": task, "evaluation": settings} if task else {},
        run=RunRecord(architecture={"max_position_embeddings": context}),
        metrics={},
        data=None,
        merge=None,
        conversion=None,
        adapter={"peft_type": "LORA"} if adapter else {},
        labels={0: text, 1: "other"} if task == "classify" else {},
        has_tokenizer=True,
    )


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("task", ["pretrain", "classify", "instruct"])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("write_code", [usage_code, verifying_code])
def test_names_appear_only_as_string_literals(text, task, adapter, write_code):
    records, place = records_of(task, text, adapter), Place(text, text)
    plain = ast.parse(write_code(records_of(task, "plain", adapter), Place("plain", "plain")))
    tree = ast.parse(write_code(records, place))
    strings, expected = (
        [node.value for node in ast.walk(code) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        for code in (tree, plain)
    )
    assert strings == [text if value == "plain" else value for value in expected]
    for node in [*ast.walk(tree), *ast.walk(plain)]:
        if isinstance(node, ast.Constant):
            node.value = None
    assert ast.dump(tree) == ast.dump(plain), "the code is the same except for strings and numbers"
    assert ast.parse(loading_code(records, place))


@pytest.mark.parametrize("text", NASTY)
def test_a_name_is_one_word_of_the_command_for_vllm(text):
    words = shlex.split(serving_command(records_of("pretrain", "The"), Place(text, text)))
    assert words == ["vllm", "serve", text, "--trust-remote-code", "--revision", text, "--dtype", "float32"]


def test_a_command_for_vllm_is_given_for_what_runs_there():
    pooler = '--pooler-config \'{"seq_pooling_type": "LAST"}\''
    classifier, model = records_of("classify", "a"), records_of("pretrain", "The")
    assert serving_command(classifier, Place("x")) == f"vllm serve x {pooler} --dtype float32"
    assert serving_command(model, Place("x", native=True)) == "vllm serve x --dtype float32"
    assert serving_command(classifier, Place("x", native=True)) is None
    assert serving_command(records_of("pretrain", "The", adapter=True), Place("x")) is None


def test_options_of_a_recipe_are_literals():
    records = records_of("pretrain", "The", temperature="__import__('os').system('touch planted')")
    (call,) = [
        node
        for node in ast.walk(ast.parse(usage_code(records, Place("me/x"))))
        if isinstance(node, ast.keyword) and node.arg == "temperature"
    ]
    assert isinstance(call.value, ast.Constant)


def test_a_tokenizer_is_loaded_without_a_prompt():
    """AutoTokenizer reads config.json first, and asks the user before running code that it refers to."""
    line = 'tokenizer = AutoTokenizer.from_pretrained("me/x"{})'
    assert line.format(", trust_remote_code=True") in loading_code(records_of("pretrain", "The"), Place("me/x"))
    assert line.format("") in loading_code(records_of("pretrain", "The"), Place("me/x", native=True))
    assert line.format("") in loading_code(records_of("classify", "a", adapter=True), Place("me/x"))


@pytest.mark.parametrize(
    ("task", "prompt", "context", "new_tokens"),
    [
        ("pretrain", "The", 256, 60),
        ("pretrain", "The", 32, 29),
        ("pretrain", "Ä" * 20, 48, 8),
        ("pretrain", "The" * 20, 32, 1),
        ("instruct", "Who?", 96, 48),
        (None, "The", 256, 64),
        (None, "The", 8, 5),
    ],
)
def test_the_example_generates_no_more_than_fits_the_context(task, prompt, context, new_tokens):
    code = usage_code(records_of(task, prompt, context=context), Place("me/x"))
    assert f"max_new_tokens={new_tokens}" in code
