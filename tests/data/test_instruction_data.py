"""Instructions: all formats give the same conversation, and the targets are exactly the answer and its end token."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from hfgpt.data.collators import IGNORED, PaddingCollator
from hfgpt.data.instructions import (
    InstructionDataArguments,
    count_tokens,
    encode_conversations,
    load_all_conversations,
    load_conversations,
    pack_rows,
    prompt_of,
)
from hfgpt.data.report import DataReport
from hfgpt.data.templates import TEMPLATES, set_chat_template, write_inputs
from hfgpt.errors import InputError
from hfgpt.tokenizer import train_tokenizer

LETTERS = "".join(map(chr, range(32, 127))) + "\n"


@pytest.fixture(scope="module", params=["bpe", "char", "unigram", "wordpiece"])
def tokenizer(request):
    texts = ["What is the sky? The sky is blue.\n\n### User: Assistant System Response Input Instruction", LETTERS] * 3
    return train_tokenizer(texts, kind=request.param, vocab_size=400)


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer([LETTERS], vocab_size=300)


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def load(tmp_path):
    def load(rows, seed=0, **arguments):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = DataReport()
        arguments = InstructionDataArguments(**{"path": str(tmp_path / "rows.jsonl"), **arguments})
        return load_conversations(arguments, seed, report), report

    return load


# Formats


def test_the_three_formats_give_the_same_conversation(load):
    forms = [
        [{"instruction": f"Say {i}", "input": "", "output": f"It is {i}"} for i in range(20)],
        [{"instruction": f"Say {i}", "output": f"It is {i}"} for i in range(20)],
        [{"prompt": f"Say {i}", "completion": f"It is {i}"} for i in range(20)],
        [{"messages": turn(f"Say {i}", f"It is {i}")} for i in range(20)],
    ]
    loaded = [load(rows)[0] for rows in forms]
    assert loaded[0] == loaded[1] == loaded[2] == loaded[3]
    assert len(loaded[0]["train"]) == 17
    conversation = loaded[0]["train"][0]
    assert conversation == turn(*(message["content"] for message in conversation))


def test_an_input_follows_its_instruction(load):
    rows = [{"instruction": f" Add {i} ", "input": " 1 and 2\n", "output": "3"} for i in range(20)]
    conversations = load(rows)[0]["train"]
    assert {prompt_of(row) for row in conversations} <= {f"Add {i}\n1 and 2" for i in range(20)}
    for before_input in ("\n", "\n\n### Input:\n"):
        contents = {write_inputs(conversation, before_input)[0]["content"] for conversation in conversations}
        assert contents <= {f"Add {i}{before_input}1 and 2" for i in range(20)}


def test_messages_after_the_last_answer_are_dropped(load):
    rows = [{"messages": [{"role": "system", "content": "s"}, *turn(f"q{i}", "a"), {"role": "user", "content": "?"}]}
            for i in range(20)]  # fmt: skip
    assert all([m["role"] for m in row] == ["system", "user", "assistant"] for row in load(rows)[0]["train"])


def test_rows_without_an_answer_are_counted(load):
    rows = [{"instruction": f"Say {i}", "output": "yes"} for i in range(20)]
    rows += [{"instruction": "Say", "output": " "}, {"instruction": "", "output": "x"}, {"messages": []}]
    rows += [{"instruction": "Say", "output": "half \ud800"}]
    rows += [{"instruction": "Say", "output": None}, {"messages": [{"role": "user", "content": "alone"}]}]
    report = load(rows)[1]
    assert report.dropped == {"empty answer": 2, "empty message": 1, "no answer": 2, "not Unicode": 1}
    assert (report.rows_read, report.rows_kept) == (26, 20)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "reply": "b"},
            "train row 1 has the columns 'question', 'reply', but needs instruction and output",
        ),
        ({"prompt": "a"}, "train row 1 has the columns 'prompt', but needs"),
        ({"messages": "hello"}, "messages must be a list of {role, content}"),
        ({"messages": [{"role": "user"}]}, "messages must be a list of {role, content}"),
        ({"instruction": 1, "output": "x"}, "instruction has the type int; it must be a string"),
        (
            {"messages": [*turn("a", "b"), *turn("a", "b")[1:]]},
            "message 3 has the role 'assistant', expected 'us",
        ),
        ({"messages": turn("a", "b")[1:]}, "message 1 has the role 'assistant', expected 'user'"),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, *turn("a", "b")]},
            "message 3 has the role 'user', expected 'assistant': after an optional",
        ),
        ({"messages": [{"role": "tool", "content": "s"}, *turn("a", "b")]}, "message 1 has the role 'tool'"),
    ],
)
def test_a_row_of_unknown_format_is_reported_with_its_number(load, row, message):
    with pytest.raises(InputError) as error:
        load([row] * 5)
    assert message in str(error.value)


def test_nothing_to_learn_from(load):
    with pytest.raises(
        InputError,
        match=r"has 0 rows with an answer .3 rows read; dropped: 3 empty answer., too few for 3 splits: add rows",
    ):
        load([{"instruction": "Say", "output": ""}] * 3)


# Splits


def test_rows_with_the_same_prompt_are_in_one_split_and_duplicates_are_counted(load):
    rows = [{"instruction": f"Say {i % 30}", "output": f"It is {i}"} for i in range(90)]
    splits, report = load(rows)
    prompts = {split: {prompt_of(row) for row in rows} for split, rows in splits.items()}
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    assert sum(map(len, splits.values())) == 90
    assert (report.duplicated, report.leaked) == (60, 0)
    assert load(rows)[0] == splits != load(rows, seed=1)[0]


def test_each_split_gets_a_prompt_whatever_the_number_of_duplicates(load):
    """A twentieth of 72 rows is 4, fewer than the 6 rows of any prompt: validation gets the rarest prompt."""
    splits, _ = load([{"instruction": f"Say {i % 12}", "output": f"It is {i}"} for i in range(72)])
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 60, "validation": 6, "test": 6}
    assert len({prompt_of(row) for rows in splits.values() for row in rows}) == 12
    rare = [{"instruction": "rare", "output": f"{i}"} for i in range(5)]
    often = [{"instruction": f"Say {i % 12}", "output": f"It is {i}"} for i in range(240)]
    assert {prompt_of(row) for row in load(often + rare, validation_fraction=0.01)[0]["validation"]} == {"rare"}
    for arguments in ({"test_fraction": 0.9}, {"validation_fraction": 0.9, "test_fraction": 0.05}):
        assert [len(rows) for rows in load(often[:3], **arguments)[0].values()] == [1, 1, 1]


def test_too_few_prompts_or_rows_for_three_splits_are_reported(load):
    rows = [{"instruction": f"Say {i % 2}", "output": f"It is {i}"} for i in range(72)]
    with pytest.raises(
        InputError, match=r"has 72 rows with an answer, with 2 distinct prompts .*, too few for 3 splits"
    ):
        load(rows)
    with pytest.raises(
        InputError, match=r"data.test_fraction leave none of 3 rows for training: lower them, or add rows"
    ):
        load(rows[:3], divide="order", test_fraction=0.9)


def test_a_given_split_without_answers_is_reported(load, tmp_path):
    for name, answer in {"train": "yes", "test": ""}.items():
        lines = [json.dumps({"instruction": f"{name} {i}", "output": answer}) + "\n" for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    with pytest.raises(InputError, match=r"the test split of .* has no row with an answer .*9 empty answer"):
        load([], path=str(tmp_path))


def test_the_books_split_is_by_order(load):
    rows = [{"instruction": f"Say {i}", "output": "yes"} for i in range(1100)]
    splits = load(rows, divide="order")[0]
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 935, "validation": 55, "test": 110}
    in_order = splits["train"] + splits["test"] + splits["validation"]
    assert [prompt_of(row) for row in in_order] == [row["instruction"] for row in rows]


def test_near_duplicates_between_train_and_test_are_found(load):
    rows = [{"instruction": f"{chr(97 + i % 26) * 9} {i}{i}{i}", "output": "yes"} for i in range(98)]
    rows += [{"instruction": "Convert 1000 grams to kilograms.", "output": "1"}]
    rows = [{"instruction": "Convert 100 grams to kilograms.", "output": "0.1"}, *rows]
    splits, report = load(rows, divide="order", test_fraction=0.01, validation_fraction=0.01)
    assert report.near_duplicates == 0, "the last row is the validation split"
    rows[-1], rows[-2] = rows[-2], rows[-1]
    splits, report = load(rows, divide="order", test_fraction=0.01, validation_fraction=0.01)
    assert prompt_of(splits["test"][0]) == "Convert 1000 grams to kilograms."
    assert report.near_duplicate_examples == [["Convert 1000 grams to kilograms.", "Convert 100 grams to kilograms."]]
    assert report.near_duplicates == 1


# Templates and targets


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_targets_are_the_answers_and_their_end_tokens(tokenizer, template):
    set_chat_template(tokenizer, template)
    conversation = [
        {"role": "system", "content": "Be kind."},
        *turn("What is the sky?", "The sky is blue."),
        *turn("Why?", "Air."),
    ]
    rows, kept = encode_conversations([conversation], tokenizer, "answers", 1000, DataReport())
    assert kept == [conversation]
    row = rows[0]
    ids = [*row["input_ids"], row["shift_labels"][-1]]
    learned = [target for target in row["shift_labels"] if target != IGNORED]
    end = tokenizer.eos_token_id
    assert tokenizer.decode(learned).replace(" ", "") == "Theskyisblue.<|endoftext|>Air.<|endoftext|>"
    assert learned.count(end) == 2
    assert learned[-1] == end == ids[-1]
    # Each target is the next token, and an answer starts where a prompt for generation ends.
    assert all(target in (IGNORED, ids[place + 1]) for place, target in enumerate(row["shift_labels"]))
    assert row["labels"][1:] == row["shift_labels"][:-1]
    for turns in (2, 4):
        prompt = tokenizer.apply_chat_template(conversation[:turns], add_generation_prompt=True, return_dict=True)
        length = len(prompt["input_ids"])
        assert ids[:length] == prompt["input_ids"]
        assert row["shift_labels"][length - 1] != IGNORED
        assert row["shift_labels"][length - 2] == IGNORED


def test_transformers_finds_the_same_tokens(bpe, tmp_path):
    set_chat_template(bpe, None)
    bpe.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    conversation = turn("Hi", "Hello.")
    found = loaded.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    row = encode_conversations([conversation], bpe, "answers", 1000, DataReport())[0][0]
    assert [target != IGNORED for target in row["shift_labels"]] == [bool(m) for m in found["assistant_masks"][1:]]
    assert any(found["assistant_masks"])


def test_all_tokens_are_targets_on_request(bpe):
    set_chat_template(bpe, "chat")
    row = encode_conversations([turn("Hi", "Hello.")], bpe, "all", 1000, DataReport())[0][0]
    assert row["input_ids"][1:] == row["shift_labels"][:-1]
    assert IGNORED not in row["shift_labels"]


def test_rows_too_long_or_with_special_tokens_are_dropped(bpe):
    set_chat_template(bpe, "chat")
    report = DataReport(rows_kept=3)
    rows = [turn("Hi", "Hello."), turn("Hi", "Hello. " * 50), turn("Hi <|endoftext|>", "Hello.")]
    encoded, kept = encode_conversations(rows, bpe, "answers", 100, report)
    assert (len(encoded), kept) == (1, rows[:1])
    assert report.dropped == {"too long: the answer would be truncated": 1, "special token in the text": 1}
    assert report.rows_kept == 1
    exactly = len(encoded[0]["input_ids"])
    assert len(encode_conversations(rows[:1], bpe, "answers", exactly, DataReport())[0]) == 1
    assert len(encode_conversations(rows[:1], bpe, "answers", exactly - 1, DataReport())[0]) == 0


def test_a_split_without_targets_is_refused(bpe):
    set_chat_template(bpe, "chat")
    report = DataReport(source="x.json", rows_kept=1)
    encoded = encode_conversations([turn("Hi", "Hello.")], bpe, "answers", 3, report)[0]
    with pytest.raises(
        InputError, match=r"the train split of x.json has no usable row .0 rows read; dropped: 1 too long"
    ):
        count_tokens(encoded, None, report, "train")


def test_a_token_that_spans_prompt_and_answer_is_detected(bpe):
    bpe.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{{ 'x' * 3 }}"
        "{% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    joined = train_tokenizer(["xxxyyy " * 50, LETTERS], vocab_size=300)
    joined.chat_template = bpe.chat_template
    report = DataReport(rows_kept=1)
    encoded = encode_conversations([turn("a ", "yyy")], joined, "answers", 100, report)[0]
    assert (len(encoded), report.dropped) == (0, {"first token of the answer merges with the prompt": 1})
    set_chat_template(bpe, "chat")


def test_templates_that_do_not_mark_answers_are_refused(bpe):
    with pytest.raises(InputError, match=r"data.template is 'chatml'; it must be one of chat, alpaca, phi3"):
        set_chat_template(bpe, "chatml")
    bpe.chat_template = "{{ messages }}"
    with pytest.raises(InputError, match=r"does not mark the answers with \{% generation %\}"):
        set_chat_template(bpe, None)
    assert set_chat_template(bpe, "alpaca") == "\n\n### Input:\n"
    assert set_chat_template(bpe, None) == "\n\n### Input:\n", "a saved template is recognized"
    set_chat_template(bpe, "chat")


def test_the_books_prompts(bpe):
    set_chat_template(bpe, "alpaca")
    text = bpe.apply_chat_template(turn("Add.\n\n### Input:\n1 2", "3"), tokenize=False)
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<|endoftext|>"
    )
    set_chat_template(bpe, "phi3")
    assert (
        bpe.apply_chat_template(turn("Add.", "3"), tokenize=False) == "<|user|>\nAdd.\n<|assistant|>\n3<|endoftext|>"
    )
    set_chat_template(bpe, "chat")


# Batches


def test_the_books_batch():
    """Chapter 7 pads with end of text and ignores every pad token but the first."""
    end = 50256
    rows = []
    for ids in ([0, 1, 2, 3, 4], [5, 6], [7, 8, 9]):
        rows.append({"input_ids": ids, "shift_labels": [*ids[1:], end]})
    batch = PaddingCollator(end)(rows)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4], [5, 6, end, end, end], [7, 8, 9, end, end]]
    assert batch["shift_labels"].tolist() == [
        [1, 2, 3, 4, end],
        [6, end, -100, -100, -100],
        [8, 9, end, -100, -100],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]


def test_labels_of_rows_and_of_tokens():
    rows = [{"input_ids": [1, 2, 3], "labels": 1, "length": 3}, {"input_ids": [4], "labels": 0, "length": 1}]
    batch = PaddingCollator(9, pad_to_multiple_of=4)(rows)
    assert batch.keys() == {"input_ids", "labels", "attention_mask"}
    assert batch["labels"].tolist() == [1, 0]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_packing_loses_no_tokens_and_wastes_little_space(bpe):
    set_chat_template(bpe, "chat")
    conversations = [turn(f"Say {'x' * (i % 37)}", "y" * (i % 11 + 1)) for i in range(200)]
    rows = encode_conversations(conversations, bpe, "answers", 1000, DataReport())[0]
    packed = pack_rows(rows, 128)
    assert max(packed["length"]) <= 128
    assert sum(packed["length"]) == sum(rows["length"])
    assert len(packed) <= sum(rows["length"]) / 128 * 1.1
    pieces = []
    for row in packed:
        starts = [place for place, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], row["length"]], strict=True):
            pieces.append((row["input_ids"][start:end], row["shift_labels"][start:end], row["labels"][start:end]))
            assert row["position_ids"][start:end] == list(range(end - start))
    assert sorted(pieces) == sorted((row["input_ids"], row["shift_labels"], row["labels"]) for row in rows)


def test_evaluation_reads_all_rows(tmp_path):
    rows = [{"instruction": f"Say {i}", "output": "yes"} for i in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    report = DataReport()
    arguments = InstructionDataArguments(path=str(tmp_path / "rows.json"))
    assert len(load_all_conversations(arguments, report)) == 5
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "x", "output": ""}]))
    with pytest.raises(InputError, match="has no row with an answer"):
        load_all_conversations(arguments, DataReport())
