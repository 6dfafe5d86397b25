"""Documents -> one stream of tokens on disk.

A flat file of 2 bytes a token (4 if the vocabulary needs them), as in nanoGPT's `prepare.py`, kept under a key made of
the texts and the tokenizer: a second run tokenizes nothing again.
"""

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from datasets.utils import tqdm
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hfgpt.errors import InputError

FORMAT_VERSION = 1
# Characters given to the tokenizer at once, and to one process for one task: about a second of work.
BATCH_CHARACTERS = 1 << 20
# Starting a process costs about as much time as tokenizing this much.
CHARACTERS_PER_PROCESS = 8 << 20
ABANDONED_AFTER_SECONDS = 24 * 3600
# Between these two letters GPT-2's pre-tokenizer always separates, whatever surrounds them.
CUT = re.compile(r"[!-~]\n(?=[!-~])")


@dataclass
class TokenStream:
    """The tokens of all documents, one after the other.

    Args:
        tokens: uint16 or uint32 [number of tokens]; a memory map if the stream is on disk.
        offsets: int64 [documents + 1]: document i is `tokens[offsets[i] : offsets[i + 1]]`.
        max_token_id: The largest id in `tokens`; a model needs a larger vocabulary size.
        cached: Whether an earlier run had tokenized these documents.
        path: Folder of the stream; None if it lives in memory only.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    max_token_id: int
    cached: bool = False
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self) -> tuple:
        # A memory map would be pickled with its content; a worker process maps the file again.
        if self.path is not None:
            return _open_stream, (self.path, self.cached)
        return TokenStream, (self.tokens, self.offsets, self.max_token_id)


def tokenize_documents(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: str | os.PathLike,
    num_proc: int | None = None,
    append_eos: bool = True,
) -> TokenStream:
    """Tokenizes documents into one stream on disk, or finds the stream that an earlier run left there.

    Several processes may do this at once; each gets a whole stream. An error or an interrupt leaves nothing behind.

    Args:
        documents: Rows with the column `text`.
        tokenizer: A fast tokenizer; its truncation and padding are not used.
        cache_dir: Folder that holds a folder for each stream.
        num_proc: Processes; None: one per core, fewer for little text. The stream does not depend on it.
        append_eos: End each document with the tokenizer's `eos_token_id`. Off for a part of a document.

    Returns:
        The stream; its `cached` tells whether it was there.

    Raises:
        InputError: The tokenizer is not a fast one, has no end-of-sequence token, or makes no tokens of the text.
        OSError: The disk is full or cannot be written.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} is not a fast tokenizer: load one that has a tokenizer.json")
    if append_eos and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no eos_token to end documents with: set tokenizer.eos_token")
    if num_proc is not None and num_proc < 1:
        raise InputError(f"data.num_proc is {num_proc}, the least is 1: unset it to use one process per core")
    backend = _plain_backend(tokenizer)
    eos_token_id = tokenizer.eos_token_id if append_eos else None
    texts_hash, characters = _hash_texts(documents)
    parts = [FORMAT_VERSION, texts_hash, backend.to_str(), backend.encode_special_tokens, eos_token_id]
    folder = Path(cache_dir) / hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if stream := _open_valid(folder):
        return stream
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    if num_proc is None:
        num_proc = max(1, min(_cores(), characters // CHARACTERS_PER_PROCESS))
    temporary = folder.with_name(f".partial-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        encoded = _encode_documents(documents, backend, eos_token_id, num_proc)
        _write_stream(temporary, encoded, _token_type(backend))
        return _publish_stream(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy without the truncation and padding that an earlier call may have left switched on."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    # Not part of the serialized tokenizer: whether "<|endoftext|>" written in a text is that token or plain letters.
    backend.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
    return backend


def _token_type(backend: Tokenizer) -> np.dtype:
    largest = max(backend.get_vocab(with_added_tokens=True).values())
    return np.dtype(np.uint16 if largest < 2**16 else np.uint32)


def _cores() -> int:
    # Where it exists (Linux), the cores this process may use rather than those of the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _texts(documents: datasets.Dataset) -> Iterator[str]:
    for batch in documents.with_format("arrow").iter(batch_size=1000):
        yield from batch["text"].to_pylist()


def _hash_texts(documents: datasets.Dataset) -> tuple[str, int]:
    """A hash of the texts and of where each ends, and the number of characters."""
    digest, characters = hashlib.sha256(), 0
    for text in _texts(documents):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
        characters += len(text)
    return digest.hexdigest(), characters


def _can_cut(backend: Tokenizer) -> bool:
    """Whether a text may be tokenized in pieces that end between a visible character and a line feed.

    True for GPT-2's pre-tokenizer (https://github.com/openai/gpt-2, encoder.py): its pattern joins only a space, never
    a line feed, with a following letter, and a single line feed is a word of its own wherever the text ends. Added
    tokens must not reach over the cut.
    """
    layout = json.loads(backend.to_str())
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


def _pieces(text: str, can_cut: bool) -> Iterator[str]:
    """Cuts a long text: tokenizing takes about 130 bytes of memory a character, measured on 22 million."""
    start = 0
    while can_cut and len(text) - start > BATCH_CHARACTERS:
        found = CUT.search(text, start + BATCH_CHARACTERS)
        if not found:
            break
        yield text[start : found.end()]
        start = found.end()
    yield text[start:] if start else text


def _batches(documents: datasets.Dataset, can_cut: bool) -> Iterator[list[tuple[str, bool]]]:
    """Lists of about BATCH_CHARACTERS of (text, whether a document ends with it)."""
    batch, size = [], 0
    for text in _texts(documents):
        pieces = list(_pieces(text, can_cut))
        for number, piece in enumerate(pieces, start=1):
            batch.append((piece, number == len(pieces)))
            size += len(piece)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


class _Encoder:
    """Turns a batch of texts into its tokens and the positions where documents end; travels to worker processes."""

    def __init__(self, backend: Tokenizer, eos_token_id: int | None):
        self.backend = backend
        self.eos = [] if eos_token_id is None else [eos_token_id]

    def __call__(self, batch: list[tuple[str, bool]]) -> tuple[np.ndarray, np.ndarray]:
        try:
            encodings = self.backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        # The Rust library's bare one: a vocabulary without a token for what it does not know.
        except Exception as error:
            raise InputError(
                f"the tokenizer does not know all of the text ({error}): train or name another"
            ) from error
        tokens, ends, size = [], [], 0
        for encoding, (_, ends_document) in zip(encodings, batch, strict=True):
            ids = np.array(encoding.ids + (self.eos if ends_document else []), dtype=np.uint32)
            tokens.append(ids)
            size += len(ids)
            if ends_document:
                ends.append(size)
        return np.concatenate(tokens), np.array(ends, dtype=np.int64)


def _encode_documents(
    documents: datasets.Dataset, backend: Tokenizer, eos_token_id: int | None, num_proc: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encoded batches in the order of the documents."""
    batches = _batches(documents, _can_cut(backend))
    encoder = _Encoder(backend, eos_token_id)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(documents), desc="Tokenizing", unit=" documents", disable=None))
        if num_proc == 1:
            encoded: Iterable = map(encoder, batches)
        else:
            stack.enter_context(_one_thread_each())
            pool = ProcessPoolExecutor(num_proc, initializer=_start_worker, initargs=(encoder,))
            encoded = _map_ordered(stack.enter_context(pool), batches, ahead=2 * num_proc)
        for tokens, ends in encoded:
            bar.update(len(ends))
            yield tokens, ends


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Tells tokenizers, in the processes started here, not to start threads of its own besides."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _start_worker(encoder: _Encoder) -> None:
    # Sent once a process, not with every batch: a tokenizer is some megabytes.
    global _worker_encoder
    _worker_encoder = encoder


def _encode_in_worker(batch: list[tuple[str, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return _worker_encoder(batch)


def _map_ordered(
    pool: ProcessPoolExecutor, batches: Iterable[list[tuple[str, bool]]], ahead: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Like `pool.map`, which however reads all batches into memory before it gives the first result."""
    running = deque()
    for batch in batches:
        running.append(pool.submit(_encode_in_worker, batch))
        if len(running) == ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _write_stream(folder: Path, encoded: Iterable[tuple[np.ndarray, np.ndarray]], token_type: np.dtype) -> None:
    size = documents = max_token_id = 0
    with open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "offsets.bin", "wb") as offsets_file:
        offsets_file.write(np.zeros(1, dtype=np.int64))
        for tokens, ends in encoded:
            tokens_file.write(tokens.astype(token_type))
            offsets_file.write(ends + size)
            size += len(tokens)
            documents += len(ends)
            max_token_id = max(max_token_id, int(tokens.max(initial=0)))
    if not size:
        raise InputError("the tokenizer makes no tokens of this text: add text, or choose another tokenizer")
    meta = {
        "format_version": FORMAT_VERSION,
        "token_type": token_type.name,
        "tokens": size,
        "documents": documents,
        "max_token_id": max_token_id,
    }
    (folder / "meta.json").write_text(json.dumps(meta) + "\n", encoding="utf-8")


def _open_stream(folder: Path, cached: bool) -> TokenStream:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    tokens = np.memmap(folder / "tokens.bin", dtype=meta["token_type"], mode="r", shape=(meta["tokens"],))
    offsets = np.memmap(folder / "offsets.bin", dtype=np.int64, mode="r", shape=(meta["documents"] + 1,))
    return TokenStream(tokens, offsets, meta["max_token_id"], cached, folder)


def _open_valid(folder: Path) -> TokenStream | None:
    """The stream in a folder, or None if there is none or its files are not as long as they were written."""
    try:
        stream = _open_stream(folder, cached=True)
        sizes = [(folder / name).stat().st_size for name in ("tokens.bin", "offsets.bin")]
    # ValueError: the text is not JSON, or a file is too short to be mapped.
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return stream if sizes == [stream.tokens.nbytes, stream.offsets.nbytes] else None


def _publish_stream(temporary: Path, folder: Path) -> TokenStream:
    """Gives a finished folder its name; of two processes the second takes what the first has published."""
    # Opened under the old name: its files stay readable whatever others do to the new one.
    stream = _open_stream(temporary, cached=False)
    stream.path = folder
    try:
        os.rename(temporary, folder)
    except OSError:
        if published := _open_valid(folder):
            return published
        # What is there is damaged. It is moved away whole, so that nobody sees half a folder.
        damaged = folder.with_name(f".partial-{uuid.uuid4().hex}")
        os.rename(folder, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
        os.rename(temporary, folder)
    return stream


def _remove_abandoned(cache_dir: Path) -> None:
    """Removes what a killed process left; a live one has written to its folder within a day."""
    for folder in cache_dir.glob(".partial-*"):
        times = [item.stat().st_mtime for item in (folder, *folder.glob("*")) if item.exists()]
        if max(times, default=0) < time.time() - ABANDONED_AFTER_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
