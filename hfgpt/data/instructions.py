"""Rows of instructions or chats -> token ids, and which of them are learned.

A row is a conversation whose last message is an answer. Learned are the answers and the end-of-text token after each,
unless the recipe asks for all tokens. A row whose answer is missing or would be cut is left out and counted: learned,
it would teach to say nothing or never to stop.
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
EXAMPLES = 20  # of near duplicates, kept in the report
KINDS = {"messages": ("messages",), "prompt": ("prompt", "completion"), "instruction": ("instruction", "output")}


@dataclass
class InstructionDataArguments(SourceArguments):
    """The recipe's section `data` for instructions, beside where the rows come from.

    A row has `instruction`, `output` and maybe `input` (Alpaca's form), or `prompt` and `completion`, or `messages`, a
    list of {role, content}.

    Args:
        test_split: Split to test on, or the word in the names of a folder's test files. None: `test` if there is one,
            otherwise `test_fraction` of the training split.
        validation_fraction: Part of the rows that validates, where the source gives no split for it.
        test_fraction: Part of the rows that tests, where the source gives no split for it.
        divide: `random`, where all rows of one prompt are on one side; or `order`: the first rows train, the next
            test, the last validate, as in the book.
        template: How a conversation is written: `chat`, `alpaca` or `phi3`; None keeps the tokenizer's own template,
            and gives `chat` to one that has none.
        learn: `answers` and the end of text after each, or `all` tokens, in training and validation; the test split is
            always measured over its answers.
        packing: Several rows in one, kept apart by their positions: no padding, the same loss.
        max_rows: Read only the first N rows of each split; for synthetic rows, how many to generate.
        max_length: Rows of more tokens are left out; None: the context length of the model.
        near_duplicate_threshold: Test prompts at least so similar to a training prompt are counted and shown: the
            cosine of their character 3-gram counts, weighted by rarity; 1 finds copies.
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
                raise InputError(f"data.{name} is {getattr(self, name)}, the least is 1: unset it for no limit")
        for name in ("validation_fraction", "test_fraction", "near_duplicate_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"data.{name} is {getattr(self, name)}, it must be above 0 and at most 1")
        if self.validation_fraction + self.test_fraction >= 1:
            raise InputError(
                f"data.validation_fraction {self.validation_fraction} and data.test_fraction {self.test_fraction} "
                "leave nothing to train on: lower one"
            )


def load_conversations(
    arguments: InstructionDataArguments, seed: int, report: DataReport
) -> dict[str, list[Conversation]]:
    """Reads rows and divides them into `train`, `validation` and `test`.

    A message may have an `input` beside its `content`: `hfgpt.data.templates.write_inputs` writes it.

    Args:
        arguments: What to read.
        seed: Chooses which rows validate and test.
        report: Filled in place.

    Raises:
        InputError: The source cannot be read, its rows are of no known form, a chat does not alternate, or there are
            too few rows with answers.
    """
    rows = _read_splits(arguments, seed, report)
    missing = {"validation": arguments.validation_fraction, "test": arguments.test_fraction}
    missing = {split: fraction for split, fraction in missing.items() if split not in rows}
    report.split_by = ("order" if arguments.divide == "order" else "rows") if missing else "given"
    # All rows of one prompt are on one side, unless they are divided by their order.
    different = rows["train"] if arguments.divide == "order" else set(map(prompt_of, rows["train"]))
    if len(different) <= len(missing):
        prompts = "" if len(different) == len(rows["train"]) else f" to {len(different)} different prompts"
        raise InputError(
            f"data.path {arguments.path!r} has {counted(len(rows['train']), 'rows')} with an answer{prompts} "
            f"({report.reasons}), too few for {len(missing) + 1} splits: add rows"
        )
    if empty := [split for split, found in rows.items() if not found]:
        raise InputError(
            f"the {empty[0]} split of data.path {arguments.path!r} has no row with an answer ({report.reasons}): name "
            f"another in data.{empty[0]}_split, or take only the files of the others"
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
    """Reads rows to measure a model on: all there are, or `test_split` where one is named.

    Args:
        arguments: What to read.
        report: Filled in place.

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
    """What the last answer of a conversation answers: all that was said before, as one text."""
    return "\n".join(message["content"] for message in write_inputs(conversation[:-1]))


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    learn: str,
    max_length: int,
    report: DataReport,
) -> tuple[datasets.Dataset, list[Conversation]]:
    """Conversations -> token ids and targets, by the tokenizer's chat template.

    Args:
        conversations: Each ends with an answer.
        tokenizer: With a chat template that marks the answers.
        learn: `answers`, or `all`.
        max_length: Longer rows are left out.
        report: Counts those left out.

    Returns:
        A row each with `input_ids` (T), `shift_labels` (T), the target of each position or -100, `labels` (T), the
        same before the shift, and `length`, T; and the conversations that were kept.
    """

    def encode(row: dict[str, Conversation]) -> dict[str, Any]:
        encoded, reason = _encode(row["messages"], tokenizer, learn, max_length)
        return {**(encoded or NO_ROW), "reason": reason}

    rows = datasets.Dataset.from_dict({"messages": list(conversations)})
    fingerprint = f"{rows._fingerprint}-encoded"  # to find one, datasets would pickle the tokenizer
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
    """Puts rows together into as few as fit, the longest first, each where it leaves the least room.

    Args:
        rows: As `encode_conversations` gives them, none longer than `length`.
        length: Tokens of a packed row at most.

    Returns:
        Rows that also have `position_ids` (T), which restart at each row of old: the model then keeps them apart.
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
    """Writes the sizes of a split's rows into the report.

    Args:
        rows: As `encode_conversations` gives them.
        unknown_id: The tokenizer's id for what it cannot express; None if there is nothing such.
        report: Filled in place.
        split: The split's name.

    Raises:
        InputError: Nothing in the split is learned.
    """
    sizes = report.split(split)
    sizes.documents = len(rows)
    sizes.tokens = sum(rows["length"]) if len(rows) else 0
    sizes.unknown_tokens = sum(token == unknown_id for row in rows for token in row["input_ids"])
    sizes.predicted_tokens = sum(target != IGNORED for row in rows for target in row["shift_labels"])
    if not sizes.predicted_tokens:
        raise InputError(
            f"no row of the {split} split of {report.source} can be used ({report.reasons}): shorten its rows, raise "
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
    """The conversation of a row in any of the three forms.

    Raises:
        InputError: The row has none of them, or its chat does not alternate.
    """
    kind = next((kind for kind, columns in KINDS.items() if set(columns) <= row.keys()), None)
    if kind is None:
        raise InputError(
            f"{place} has {', '.join(map(repr, row))}: a row needs instruction and output, prompt and completion, or "
            "messages; rename its columns"
        )
    if kind == "messages":
        return _check_chat(row["messages"], place)
    asked, answered = KINDS[kind]
    texts = [row[asked], row[answered], row.get("input") if kind == "instruction" else None]
    for column, text in zip((asked, answered, "input"), texts, strict=True):
        if text is not None and not isinstance(text, str):
            raise InputError(f"{place}: {column} is of type {type(text).__name__}, it must be text: correct the row")
    content, answer, given = (text or "" for text in texts)
    question = {"role": "user", "content": content} | ({"input": given} if given.strip() else {})
    return [question, {"role": "assistant", "content": answer}]


def _check_chat(messages: object, place: str) -> Conversation:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise InputError(f"{place}: messages must be a list of {{role, content}}, both text: correct the row")
    conversation = [{"role": message["role"], "content": message["content"]} for message in messages]
    turns = conversation[1:] if conversation and conversation[0]["role"] == "system" else conversation
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message["role"] != expected:
            raise InputError(
                f"{place}: message {number + 1 + len(conversation) - len(turns)} is of role '{message['role']}', but "
                f"the turn is of '{expected}': a chat alternates between user and assistant, after one system message"
            )
    # What follows the last answer could only be learned with `learn: all`, and would not be answered.
    return conversation[:-1] if turns and turns[-1]["role"] == "user" else conversation


def _encode(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, learn: str, max_length: int
) -> tuple[Row, str]:
    """A row, or the reason to leave it out."""
    special = set(tokenizer.all_special_tokens)
    if any(token in message["content"] for message in conversation for token in special):
        return {}, "special token in the text"
    encoded = encode_chat(tokenizer, conversation, return_assistant_tokens_mask=True)
    ids, learned = encoded["input_ids"], encoded["assistant_masks"]
    if len(ids) - 1 > max_length:
        return {}, "too long: the answer would be cut"
    for turn, message in enumerate(conversation):
        if message["role"] == "assistant":
            # What generation will start from: a token that joined prompt and answer would never be generated.
            prompt = encode_chat(tokenizer, conversation[:turn], add_generation_prompt=True)
            start = len(prompt["input_ids"])
            if ids[:start] != prompt["input_ids"] or not learned[start]:
                return {}, "the answer's first token joins the prompt"
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
                f"{counted(len(conversations), 'rows')} to train on: lower them, or add rows"
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
    """Pairs of a test prompt and the training prompt most like it, where that is at least the threshold."""
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
