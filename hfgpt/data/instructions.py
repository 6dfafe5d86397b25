"""Rows of instructions or chats -> token ids and targets.

A row is a conversation that ends with an answer. The loss covers the answers and the end-of-text token after each,
unless the recipe asks for all tokens. Rows whose answer is missing or would be truncated are dropped and counted: they
would teach the model to answer nothing, or never to stop.
"""

import bisect
import collections
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hfgpt.data.cache import progress_bar
from hfgpt.data.collators import IGNORED
from hfgpt.data.report import DataReport, counted
from hfgpt.data.rows import Reading, Row, SourceArguments, is_unicode, open_rows
from hfgpt.data.splits import divide_texts
from hfgpt.data.templates import encode_chat, write_inputs
from hfgpt.errors import InputError

Conversation = list[dict[str, str]]
SPLITS = ("train", "validation", "test")
COLUMNS = ("input_ids", "labels", "shift_labels")
FEATURES = datasets.Features(
    {**dict.fromkeys(COLUMNS, datasets.List(datasets.Value("int64"))), "length": datasets.Value("int64")}
)
NO_ROW = {**{name: [] for name in COLUMNS}, "length": 0}
EXAMPLES = 20  # near-duplicates listed in the report
KINDS = {"messages": ("messages",), "prompt": ("prompt", "completion"), "instruction": ("instruction", "output")}


@dataclass
class InstructionDataArguments(SourceArguments):
    """The recipe's section `data` for instructions, in addition to the source of the rows.

    A row has `instruction`, `output` and optionally `input` (the Alpaca format); or `prompt` and `completion`; or
    `messages`, a list of {role, content}.

    Args:
        test_split: Split to test on, or the word in the names of a folder's test files. None: `test` if the source
            has one, else `test_fraction` of the training split.
        validation_fraction: Fraction of the rows held out for validation if the source has no validation split.
        test_fraction: Fraction of the rows held out for testing if the source has no test split.
        divide: How to split: `random`, with all rows of the same prompt in one split; or `order`: the first rows for
            training, the next for testing, the last for validation, as in the book.
        template: Chat template: `chat`, `alpaca` or `phi3`; None: the tokenizer's own, or `chat` if it has none.
        learn: Tokens in the loss for training and validation: `answers` (with the end-of-text token after each) or
            `all`; test metrics always cover the answers only.
        packing: Pack several rows into one, separated by their positions: no padding, same loss.
        max_rows: Read only the first N rows of each split; for synthetic data, the number of rows to generate.
        max_length: Maximum number of tokens per row, longer rows are dropped; None: the model's context length.
        near_duplicate_threshold: Minimum similarity to report a test prompt as a near-duplicate of a training prompt:
            cosine of TF-IDF weighted character 3-grams; 1 finds only copies.
    """

    test_split: str | None = None
    validation_fraction: float = 0.05
    test_fraction: float = 0.1
    divide: Literal["random", "order"] = "random"
    template: str | None = None
    learn: Literal["answers", "all"] = "answers"
    packing: bool = False
    max_rows: int | None = None
    max_length: int | None = None
    near_duplicate_threshold: float = 0.9

    def __post_init__(self):
        for name in ("max_rows", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"data.{name} is {getattr(self, name)}; it must be at least 1 (unset: no limit)")
        for name in ("validation_fraction", "test_fraction", "near_duplicate_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"data.{name} is {getattr(self, name)}; it must be above 0 and at most 1")
        if self.validation_fraction + self.test_fraction >= 1:
            raise InputError(
                f"data.validation_fraction {self.validation_fraction} and data.test_fraction {self.test_fraction} "
                "leave no training data: lower one of them"
            )


def load_conversations(
    arguments: InstructionDataArguments, seed: int, report: DataReport
) -> dict[str, list[Conversation]]:
    """Reads rows and splits them into `train`, `validation` and `test`.

    A message may have an `input` in addition to its `content`, see `hfgpt.data.templates.write_inputs`.

    Args:
        arguments: What to read.
        seed: Chooses the rows for validation and test.
        report: Updated in place.

    Raises:
        InputError: The source cannot be read, its rows have an unknown format, a chat does not alternate between user
            and assistant, or there are too few rows with answers.
    """
    rows = _read_splits(arguments, seed, report)
    missing = {"validation": arguments.validation_fraction, "test": arguments.test_fraction}
    missing = {split: fraction for split, fraction in missing.items() if split not in rows}
    report.split_by = ("order" if arguments.divide == "order" else "rows") if missing else "given"
    # All rows with the same prompt go to the same split, unless the split is by order.
    different = rows["train"] if arguments.divide == "order" else set(map(prompt_of, rows["train"]))
    if len(different) <= len(missing):
        prompts = "" if len(different) == len(rows["train"]) else f", with {len(different)} distinct prompts"
        raise InputError(
            f"data.path {arguments.path!r} has {counted(len(rows['train']), 'rows')} with an answer{prompts} "
            f"({report.reasons}), too few for {len(missing) + 1} splits: add rows"
        )
    if empty := [split for split, found in rows.items() if not found]:
        raise InputError(
            f"the {empty[0]} split of data.path {arguments.path!r} has no row with an answer ({report.reasons}): set "
            f"data.{empty[0]}_split to another split, or leave out its files"
        )
    rows |= _divide(rows["train"], missing, arguments.divide, seed)
    prompts = {split: [prompt_of(conversation) for conversation in rows[split]] for split in SPLITS}
    trained, evaluated = set(prompts["train"]), prompts["validation"] + prompts["test"]
    report.leaked = sum(prompt in trained for prompt in evaluated)
    copies = collections.Counter(prompts["train"] + evaluated)
    report.duplicated = sum(count - 1 for count in copies.values())
    similar = _find_near_duplicates(prompts["train"], prompts["test"], arguments.near_duplicate_threshold)
    report.near_duplicates, report.near_duplicate_examples = len(similar), similar[:EXAMPLES]
    for split in SPLITS:
        report.split(split).documents = len(rows[split])
    return {split: rows[split] for split in SPLITS}


def load_all_conversations(arguments: InstructionDataArguments, report: DataReport) -> list[Conversation]:
    """Reads rows to evaluate a model: all rows, or only `test_split` if it is set.

    Args:
        arguments: What to read.
        report: Updated in place.

    Raises:
        InputError: As `load_conversations`.
    """
    rows = _read_splits(arguments, 0, report)
    chosen = rows["test"] if arguments.test_split else [row for split in rows.values() for row in split]
    if not chosen:
        raise InputError(f"data.path {arguments.path!r} has no row with an answer ({report.reasons}): add rows")
    report.split("test").documents = len(chosen)
    return chosen


def prompt_of(conversation: Conversation) -> str:
    """The prompt of a conversation's last answer: all messages before it, as one text."""
    return "\n".join(message["content"] for message in write_inputs(conversation[:-1]))


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    learn: str,
    max_length: int,
    report: DataReport,
) -> tuple[datasets.Dataset, list[Conversation]]:
    """Conversations -> token ids and targets, using the tokenizer's chat template.

    Args:
        conversations: Each ends with an answer.
        tokenizer: With a chat template that marks the answers.
        learn: `answers` or `all`.
        max_length: Longer rows are dropped.
        report: Counts the dropped rows.

    Returns:
        Rows with `input_ids` (T), `shift_labels` (T; the target at each position, or -100), `labels` (T; the same
        before shifting) and `length` (T); and the conversations that were kept.
    """

    def encode(row: dict[str, Conversation]) -> dict[str, Any]:
        encoded, reason = _encode(row["messages"], tokenizer, learn, max_length)
        return {**(encoded or NO_ROW), "reason": reason}

    rows = datasets.Dataset.from_dict({"messages": list(conversations)})
    fingerprint = f"{rows._fingerprint}-encoded"  # to compute one, datasets would pickle the tokenizer
    with progress_bar(len(rows) > 1000):
        rows = rows.map(
            encode,
            remove_columns="messages",
            features=datasets.Features(FEATURES | {"reason": datasets.Value("string")}),
            keep_in_memory=True,
            new_fingerprint=fingerprint,
            desc="Tokenizing",
        )
    kept = [index for index, reason in enumerate(rows["reason"]) if not reason]
    for reason in filter(None, rows["reason"]):
        report.drop(reason)
        report.rows_kept -= 1
    return rows.remove_columns("reason").select(kept), [conversations[index] for index in kept]


def pack_rows(rows: datasets.Dataset, length: int) -> datasets.Dataset:
    """Packs rows into as few as possible (best-fit decreasing).

    Args:
        rows: See `encode_conversations`; none longer than `length`.
        length: Maximum number of tokens in a packed row.

    Returns:
        Rows that also have `position_ids` (T), which restart at each original row, so that the model separates them.
    """
    lengths = rows["length"]
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each pack, sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place == len(room):
            packs.append([])
            free, pack = length, len(packs) - 1
        else:
            free, pack = room.pop(place)
        packs[pack].append(index)
        bisect.insort(room, (free - lengths[index], pack))
    packed = []
    for pack in packs:
        chosen = [rows[index] for index in sorted(pack)]
        row = {name: [token for old in chosen for token in old[name]] for name in COLUMNS}
        row["position_ids"] = [position for old in chosen for position in range(old["length"])]
        packed.append(row | {"length": len(row["input_ids"])})
    return datasets.Dataset.from_list(packed)


def count_tokens(rows: datasets.Dataset, unknown_id: int | None, report: DataReport, split: str) -> None:
    """Records the sizes of a split's rows in the report.

    Args:
        rows: See `encode_conversations`.
        unknown_id: Id of the unknown token; None if the tokenizer can encode any text.
        report: Updated in place.
        split: Name of the split.

    Raises:
        InputError: The split has no targets.
    """
    sizes = report.split(split)
    sizes.documents = len(rows)
    sizes.tokens = sum(rows["length"]) if len(rows) else 0
    sizes.unknown_tokens = sum(token == unknown_id for row in rows for token in row["input_ids"])
    sizes.predicted_tokens = sum(target != IGNORED for row in rows for target in row["shift_labels"])
    if not sizes.predicted_tokens:
        raise InputError(
            f"the {split} split of {report.source} has no usable row ({report.reasons}): shorten its rows, raise "
            "data.max_length, or use a model with a longer context"
        )


def _read_splits(arguments: InstructionDataArguments, seed: int, report: DataReport) -> dict[str, list[Conversation]]:
    if not arguments.path:
        raise InputError("data.path is not set: give a Hub id, a file, a folder or synthetic:instructions")
    reading = Reading(
        columns={},
        splits={"validation": arguments.validation_split, "test": arguments.test_split},
        limit=arguments.max_rows,
        seed=seed,
    )
    splits, digest = {}, hashlib.sha256()
    for name, rows in open_rows(arguments, reading, report).items():
        splits[name] = []
        for number, row in enumerate(rows, start=1):
            report.rows_read += 1
            conversation = _read_row(row, f"{arguments.path}, {name} row {number}")
            if not any(message["role"] == "assistant" for message in conversation):
                report.drop("no answer")
            elif not all(message["content"].strip() for message in write_inputs(conversation)):
                report.drop("empty message" if conversation[-1]["content"].strip() else "empty answer")
            elif not all(is_unicode(message["content"]) for message in write_inputs(conversation)):
                report.drop("not Unicode")
            else:
                splits[name].append(conversation)
                digest.update(repr(write_inputs(conversation)).encode())
    report.sha256 = report.sha256 or digest.hexdigest()
    report.rows_kept = sum(map(len, splits.values()))
    return splits


def _read_row(row: Row, place: str) -> Conversation:
    """The conversation in a row of any of the three formats."""
    kind = next((kind for kind, columns in KINDS.items() if set(columns) <= row.keys()), None)
    if kind is None:
        raise InputError(
            f"{place} has the columns {', '.join(map(repr, row))}, but needs instruction and output, prompt and "
            "completion, or messages: rename them"
        )
    if kind == "messages":
        return _check_chat(row["messages"], place)
    asked, answered = KINDS[kind]
    texts = [row[asked], row[answered], row.get("input") if kind == "instruction" else None]
    for column, text in zip((asked, answered, "input"), texts, strict=True):
        if text is not None and not isinstance(text, str):
            raise InputError(f"{place}: {column} has the type {type(text).__name__}; it must be a string")
    content, answer, given = (text or "" for text in texts)
    question = {"role": "user", "content": content} | ({"input": given} if given.strip() else {})
    return [question, {"role": "assistant", "content": answer}]


def _check_chat(messages: object, place: str) -> Conversation:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise InputError(f"{place}: messages must be a list of {{role, content}}, both strings")
    conversation = [{"role": message["role"], "content": message["content"]} for message in messages]
    turns = conversation[1:] if conversation and conversation[0]["role"] == "system" else conversation
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message["role"] != expected:
            raise InputError(
                f"{place}: message {number + 1 + len(conversation) - len(turns)} has the role '{message['role']}', "
                f"expected '{expected}': after an optional system message, user and assistant must alternate"
            )
    # A last question without an answer is of no use for training.
    return conversation[:-1] if turns and turns[-1]["role"] == "user" else conversation


def _encode(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, learn: str, max_length: int
) -> tuple[Row, str]:
    """A row, or the reason to drop it."""
    special = set(tokenizer.all_special_tokens)
    if any(token in message["content"] for message in conversation for token in special):
        return {}, "special token in the text"  # would be encoded as that token
    encoded = encode_chat(tokenizer, conversation, return_assistant_tokens_mask=True)
    ids, learned = encoded["input_ids"], encoded["assistant_masks"]
    if len(ids) - 1 > max_length:
        return {}, "too long: the answer would be truncated"
    for turn, message in enumerate(conversation):
        if message["role"] == "assistant":
            # Generation starts from the prompt's tokens, so a token that spans prompt and answer is never generated.
            prompt = encode_chat(tokenizer, conversation[:turn], add_generation_prompt=True)
            start = len(prompt["input_ids"])
            if ids[:start] != prompt["input_ids"] or not learned[start]:
                return {}, "first token of the answer merges with the prompt"
    targets = [
        token if learn == "all" or is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)
    ]
    targets[0] = IGNORED
    row = {"input_ids": ids[:-1], "labels": targets[:-1], "shift_labels": targets[1:], "length": len(ids) - 1}
    return row, ""


def _divide(
    conversations: list[Conversation], fractions: dict[str, float], divide: str, seed: int
) -> dict[str, list[Conversation]]:
    if divide == "order":
        sizes = {split: max(round(len(conversations) * fraction), 1) for split, fraction in fractions.items()}
        start = len(conversations) - sum(sizes.values())
        if start < 1:
            raise InputError(
                f"data.{' and data.'.join(f'{split}_fraction' for split in fractions)} leave none of "
                f"{len(conversations)} rows for training: lower them, or add rows"
            )
        divided = {"train": conversations[:start]}
        for split in sorted(sizes):  # test before validation
            divided[split] = conversations[start : start + sizes[split]]
            start += sizes[split]
        return divided
    split_of = divide_texts(map(prompt_of, conversations), fractions, seed)
    return {
        split: [row for row in conversations if split_of[prompt_of(row)] == split] for split in ("train", *fractions)
    }


def _find_near_duplicates(train: list[str], test: list[str], threshold: float) -> list[list[str]]:
    """Pairs of a test prompt and its most similar training prompt, if their similarity reaches the threshold."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(3, 3), lowercase=True)
    try:
        trained, tested = vectorizer.fit_transform(train), vectorizer.transform(test)
    except ValueError:  # no prompt has three characters
        return []
    found = []
    for start in range(0, len(test), 256):
        similarities = (tested[start : start + 256] @ trained.T).tocsr()
        best, where = similarities.max(axis=1).toarray().ravel(), np.ravel(similarities.argmax(axis=1))
        for offset in (best >= threshold - 1e-9).nonzero()[0]:
            found.append([test[start + offset], train[where[offset]]])
    return found
