"""Texts -> one stream of tokens.

Tokenization is one `Dataset.map`, cached next to the texts as memory-mapped Arrow with 2 bytes per token (4 for large
vocabularies). A later run with the same texts and tokenizer uses the cached tokens.
"""

import bisect
import functools
import itertools
import os

import datasets
import numpy as np
import pyarrow as pa
from datasets import LargeList, Value
from transformers import PreTrainedTokenizerBase

from hfgpt.data.cache import map_rows
from hfgpt.data.encoding import NO_END, Encoding, encode_texts
from hfgpt.errors import InputError

FORMAT_VERSION = 2  # part of the fingerprint: other versions are not found in the cache
# Starting a process takes about as long as tokenizing this much text.
BYTES_PER_PROCESS = 8 << 20


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


def count_cores() -> int:
    """The cores available to this process, on Linux; elsewhere all cores of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encode(
    batch: pa.Table, backend: str, encode_special_tokens: bool, end: list[int], version: int
) -> dict[str, pa.Array]:
    """Tokenizes a batch of texts; runs in each process of `map`."""
    return encode_texts([text.as_py() for text in batch["text"]], backend, encode_special_tokens, end)
