"""Texts -> token ids, by the tokenizers library or, many times faster, by gigatoken if it is installed."""

import functools
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import datasets
import numpy as np
import pyarrow as pa
from datasets import LargeList, Value
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hfgpt.errors import InputError

if TYPE_CHECKING:
    import gigatoken

# Characters per call of the tokenizer: about a second of work.
BATCH_CHARACTERS = 1 << 20
# Longer texts are cut where that is possible, since the first text of a batch is also encoded by the slower library.
LONGEST_PIECE = 1 << 14
# GPT-2's pre-tokenizer always splits between these two characters, in any context.
CUT = re.compile(r"[!-~]\n(?=[!-~])")
NO_END = "the tokenizer does not have an eos_token to end documents with: set tokenizer.eos_token"
# Parts of texts on which tokenizers differ most easily.
DIFFICULT = (
    *(" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\r", "\x0b", "\x0c", "\x00", "\x85", "\xa0", "\u2028", "\u3000"),
    *("'s", "'S", "'t", "'re", "'ve", "'m", "'ll", "'d", "'", "’s", "I", "don", "The", "the", "a", ".", "...", "!?"),
    *("1", "12", "123", "1234567", "²", "½", "Ⅳ", "٣", "é", "e\u0301", "ß", "İ", "ŉ", "▁", "Ġ", "##"),
    *("中文", "日本語", "हिन्दी", "ไทย", "العربية"),
    *("😀", "👩\u200d👩\u200d👧", "🇩🇪", "\ufeff", "\u200b", "\ue000", "\U0010ffff", "𝄞"),
)


@dataclass(frozen=True)
class Encoding:
    """How texts become token ids: plain values, so that other processes can encode in the same way.

    Args:
        backend: The tokenizer as JSON, without the truncation and padding settings of earlier calls.
        encode_special_tokens: Whether "<|endoftext|>" in a text is encoded as plain text rather than as the special
            token; not part of the JSON.
        end: Id of the end-of-text token; None: there is none.
        token_type: `uint16` if all ids fit, else `uint32`.
    """

    backend: str
    encode_special_tokens: bool
    end: int | None
    token_type: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Self:
        """The encoding of a tokenizer.

        Raises:
            InputError: It is not a fast tokenizer.
        """
        if not tokenizer.is_fast:
            raise InputError(f"{type(tokenizer).__name__} is not a fast tokenizer: use one with a tokenizer.json")
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        largest = max(backend.get_vocab(with_added_tokens=True).values())
        special = tokenizer.backend_tokenizer.encode_special_tokens
        return cls(backend.to_str(), special, tokenizer.eos_token_id, "uint16" if largest < 2**16 else "uint32")

    def encode(self, texts: Sequence[str], append_eos: bool) -> pa.Table:
        """The column `input_ids` of texts, as a LargeList; see `tokenize_documents`."""
        end = [self.end] if append_eos else []
        return encode_texts(texts, self.backend, self.encode_special_tokens, end).cast(self.schema)

    @property
    def schema(self) -> pa.Schema:
        """The schema of token files."""
        return datasets.Features({"input_ids": LargeList(Value(self.token_type))}).arrow_schema

    @property
    def sha256(self) -> str:
        """Fingerprint; equal for tokenizers that give the same tokens."""
        return hashlib.sha256(json.dumps([self.backend, self.encode_special_tokens, self.end]).encode()).hexdigest()


def encode_texts(texts: Sequence[str], backend: str, encode_special_tokens: bool, end: list[int]) -> pa.Table:
    """The column `input_ids` of texts.

    Args:
        texts: The texts.
        backend, encode_special_tokens: See `Encoding`.
        end: Ids to append to each text: one or none.

    Raises:
        InputError: The tokenizer cannot encode a text.
    """
    tokens, ends, size = [], [np.zeros(1, dtype=np.int64)], 0
    for pieces in _batch_pieces(texts, _can_cut(backend)):
        ids, piece_ends = _encode_batch([text for text, _ in pieces], backend, encode_special_tokens)
        document_ends = piece_ends[[ends_document for _, ends_document in pieces]]
        if end:
            ids = np.insert(ids, document_ends, end[0])
            document_ends = document_ends + np.arange(1, len(document_ends) + 1)
        tokens.append(ids)
        ends.append(size + document_ends)
        size += len(ids)
    offsets, values = pa.array(np.concatenate(ends)), pa.array(np.concatenate(tokens))
    return pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, values)})


def _encode_batch(texts: list[str], backend: str, encode_special_tokens: bool) -> tuple[np.ndarray, np.ndarray]:
    """The ids of texts, concatenated (uint32), and the end of each text (int64)."""
    tokenizer = load_backend(backend)
    tokenizer.encode_special_tokens = encode_special_tokens
    fast = None if encode_special_tokens else load_gigatoken(backend)
    try:
        if fast:
            encoded = fast.encode_batch(texts, parallel=False).layout
            first = tokenizer.encode(texts[0], add_special_tokens=False).ids
        else:
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    # The Rust libraries raise a bare Exception if the vocabulary has no unknown token.
    except Exception as error:
        raise InputError(f"the tokenizer cannot encode all of the text ({error}): use another one") from error
    if not fast:
        rows = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        return np.concatenate(rows), np.cumsum([len(row) for row in rows])
    ids, ends = np.asarray(encoded.content.data, dtype=np.uint32), np.asarray(encoded.offsets.data)
    ids, ends = ids[ends[0] : ends[-1]], ends[1:] - ends[0]
    if ids[: ends[0]].tolist() != first:
        raise InputError(f"gigatoken encodes a text that begins with {texts[0][:40]!r} wrongly: uninstall it")
    return ids, ends


@functools.lru_cache(maxsize=1)
def load_gigatoken(backend: str) -> "gigatoken.Tokenizer | None":
    """The tokenizer of the package gigatoken, many times faster; None if it is not installed, or gives other tokens.

    It is tried on texts made for this; later, on the first text of every batch.
    """
    try:
        import gigatoken
    except ImportError:
        return None
    slow, texts = load_backend(backend), _difficult_texts(backend)
    slow.encode_special_tokens = False
    try:
        fast = gigatoken.Tokenizer(Tokenizer.from_str(backend))
        same = fast.encode_batch(texts, parallel=False).to_list() == [
            encoding.ids for encoding in slow.encode_batch_fast(texts, add_special_tokens=False)
        ]
    # Both Rust libraries raise bare exceptions, for a tokenizer or a text that they do not support.
    except Exception:
        return None
    return fast if same else None


def _difficult_texts(backend: str) -> list[str]:
    """Texts of many scripts, with runs of spaces, contractions, numbers, emoji and special tokens."""
    random_ = random.Random(0)
    special = [token["content"] for token in json.loads(backend)["added_tokens"]]
    parts = [*special, *(token[: len(token) // 2] for token in special), *DIFFICULT]
    ranges = ((0x20, 0x7F), (0, 0x250), (0x370, 0x600), (0x900, 0x980), (0x3040, 0x3100), (0x4E00, 0x4E80))
    points = [point for first, last in (*ranges, (0x1F300, 0x1F700)) for point in range(first, last)]
    texts = ["".join(random_.choices(parts, k=random_.randint(1, 30))) for _ in range(300)]
    texts += ["".join(map(chr, random_.choices(points, k=random_.randint(1, 40)))) for _ in range(300)]
    letters = "etaoinshrdlcumwfgypbvkjxqzETAOIN0123456789'-"
    words = ["".join(random_.choices(letters, k=random_.randint(1, 10))) for _ in range(3000)]
    return texts + [" ".join(random_.choices(words, k=random_.randint(1, 30))) for _ in range(300)] + [""]


@functools.lru_cache(maxsize=1)
def load_backend(backend: str) -> Tokenizer:
    """The tokenizer of `Encoding.backend`."""
    return Tokenizer.from_str(backend)


@functools.lru_cache(maxsize=1)
def _can_cut(backend: str) -> bool:
    """Whether cutting a text at `CUT` leaves its tokens unchanged.

    True for GPT-2's pre-tokenizer (https://github.com/openai/gpt-2, encoder.py): its pattern joins only a space, never
    a line feed, with a following letter, and a single line feed is always a separate word. Added tokens must not span
    the cut.
    """
    layout = json.loads(backend)
    words = layout["pre_tokenizer"] or {}
    is_gpt2 = words.get("type") == "ByteLevel" and not words["add_prefix_space"] and words.get("use_regex", True)
    return (
        is_gpt2
        and layout["normalizer"] is None
        and not any(
            "\n" in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"]
            for token in layout["added_tokens"]
        )
    )


def _cut_text(text: str, can_cut: bool) -> Iterator[str]:
    """Cuts long texts: tokenization takes about 130 bytes of memory per character (measured on 22 million)."""
    start = 0
    while can_cut and len(text) - start > LONGEST_PIECE:
        found = CUT.search(text, start + LONGEST_PIECE)
        if not found:
            break
        yield text[start : found.end()]
        start = found.end()
    yield text[start:] if start else text


def _batch_pieces(texts: Iterable[str], can_cut: bool) -> Iterator[list[tuple[str, bool]]]:
    """Batches of about BATCH_CHARACTERS characters, as lists of (piece, whether it ends a document)."""
    batch, size = [], 0
    for text in texts:
        pieces = list(_cut_text(text, can_cut))
        for number, piece in enumerate(pieces, start=1):
            batch.append((piece, number == len(pieces)))
            size += len(piece)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
