"""Texts -> one stream of tokens.

Tokenization is one `Dataset.map`, cached next to the texts as memory-mapped Arrow with 2 bytes per token (4 for large
vocabularies). A later run with the same texts and tokenizer uses the cached tokens.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import datasets
import numpy as np
import pyarrow as pa
from datasets import LargeList, Value
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hfgpt.data.cache import map_rows
from hfgpt.errors import InputError

FORMAT_VERSION = 2  # part of the fingerprint: other versions are not found in the cache
# Characters per call of the tokenizer: about a second of work.
BATCH_CHARACTERS = 1 << 20
# Starting a process takes about as long as tokenizing this much text.
BYTES_PER_PROCESS = 8 << 20
# GPT-2's pre-tokenizer always splits between these two characters, in any context.
CUT = re.compile(r"[!-~]\n(?=[!-~])")
NO_END = "the tokenizer does not have an eos_token to end documents with: set tokenizer.eos_token"


class TokenStream:
    """The concatenated tokens of all documents, sliced with `stream[start:stop]`.

    Args:
        documents: Rows with the column `input_ids`, a LargeList of uint16 or uint32. The stream is a zero-copy view
            of its Arrow buffers.

    Attributes:
        offsets: int64 [documents + 1]: document i is `stream[offsets[i] : offsets[i + 1]]`.
    """

    def __init__(self, documents: datasets.Dataset):
        self.documents = documents
        chunks = documents.data.column("input_ids").chunks
        self._pieces = [chunk.flatten().to_numpy() for chunk in chunks]
        self._starts = list(itertools.accumulate(map(len, self._pieces), initial=0))

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        chunks = self.documents.data.column("input_ids").chunks
        lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks]
        return np.cumsum(np.concatenate([[0], *lengths]))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, tokens: slice) -> np.ndarray:
        start, stop, _ = tokens.indices(len(self))
        index = bisect.bisect_right(self._starts, start) - 1
        parts = []
        while start < stop:
            first, end = self._starts[index : index + 2]
            parts.append(self._pieces[index][start - first : stop - first])
            start, index = end, index + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __reduce__(self) -> tuple:
        # A worker process memory-maps the Arrow files again; pickling the views would copy their buffers.
        return TokenStream, (self.documents,)

    def count(self, token_id: int) -> int:
        """Number of occurrences of a token."""
        return sum(int(np.count_nonzero(piece == token_id)) for piece in self._pieces)

    def largest_id(self) -> int:
        """The largest token id in the stream; must be below the model's vocabulary size."""
        return max(int(piece.max(initial=0)) for piece in self._pieces)


def tokenize_documents(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_proc: int | None = None,
    append_eos: bool = True,
) -> TokenStream:
    """Tokenizes documents, or loads the cached tokens of an earlier run from the folder of their Arrow file.

    Safe to run in several processes at the same time; an error or interrupt leaves no partial files.

    Args:
        documents: Rows with the column `text`. Tokens of in-memory rows are not cached.
        tokenizer: A fast tokenizer; its truncation and padding settings are ignored.
        num_proc: Number of processes; None: one per core, fewer for little text. Does not change the result.
        append_eos: Append the tokenizer's `eos_token_id` to each document. Off for a part of a document.

    Raises:
        InputError: The tokenizer is not a fast one, does not have an end-of-text token, or produces no tokens.
        OSError: The disk is full or not writable.
    """
    encoding = Encoding.of(tokenizer)
    if append_eos and encoding.end is None:
        raise InputError(NO_END)
    if num_proc is not None and num_proc < 1:
        raise InputError(f"data.num_proc is {num_proc}; it must be at least 1 (unset: one process per core)")
    if num_proc is None:
        num_proc = min(count_cores(), documents.data.nbytes // BYTES_PER_PROCESS, len(documents))
    arguments = {
        "backend": encoding.backend,
        "encode_special_tokens": encoding.encode_special_tokens,
        "end": [encoding.end] if append_eos else [],
        "version": FORMAT_VERSION,
    }
    features = {"input_ids": LargeList(Value(encoding.token_type))}
    stream = TokenStream(map_rows(documents, _encode, features, arguments, "Tokenizing", num_proc))
    if not len(stream):
        raise InputError("the tokenizer produces no tokens for this text: add text, or choose another tokenizer")
    return stream


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
        return _encode_texts(texts, self.backend, self.encode_special_tokens, end).cast(self.schema)

    @property
    def schema(self) -> pa.Schema:
        """The schema of token files."""
        return datasets.Features({"input_ids": LargeList(Value(self.token_type))}).arrow_schema

    @property
    def sha256(self) -> str:
        """Fingerprint; equal for tokenizers that give the same tokens."""
        return hashlib.sha256(json.dumps([self.backend, self.encode_special_tokens, self.end]).encode()).hexdigest()


def count_cores() -> int:
    """The cores available to this process, on Linux; elsewhere all cores of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encode(
    batch: pa.Table, backend: str, encode_special_tokens: bool, end: list[int], version: int
) -> dict[str, pa.Array]:
    """Tokenizes a batch of texts; runs in each process of `map`."""
    return _encode_texts([text.as_py() for text in batch["text"]], backend, encode_special_tokens, end)


def _encode_texts(texts: Sequence[str], backend: str, encode_special_tokens: bool, end: list[int]) -> pa.Table:
    tokenizer = _load_backend(backend)
    tokenizer.encode_special_tokens = encode_special_tokens
    tokens, ends, size = [], [0], 0
    for pieces in _batch_pieces(texts, _can_cut(backend)):
        try:
            encodings = tokenizer.encode_batch_fast([text for text, _ in pieces], add_special_tokens=False)
        # The Rust library raises a bare Exception if the vocabulary has no unknown token.
        except Exception as error:
            raise InputError(f"the tokenizer cannot encode all of the text ({error}): use another one") from error
        for encoding, (_, ends_document) in zip(encodings, pieces, strict=True):
            ids = np.array(encoding.ids + (end if ends_document else []), dtype=np.uint32)
            tokens.append(ids)
            size += len(ids)
            if ends_document:
                ends.append(size)
    return pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(tokens)))})


@functools.lru_cache(maxsize=1)
def _load_backend(backend: str) -> Tokenizer:
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
    while can_cut and len(text) - start > BATCH_CHARACTERS:
        found = CUT.search(text, start + BATCH_CHARACTERS)
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
