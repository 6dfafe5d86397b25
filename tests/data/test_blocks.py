"""Documents give exactly their tokens, and blocks predict exactly the right tokens. All checks are exact."""

import contextlib
import copy
import errno
import functools
import itertools
import json
import multiprocessing
import os
import pickle
import resource
import time

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, default_data_collator

from hfgpt.data import encoding
from hfgpt.data.blocks import BlockDataset, count_blocks
from hfgpt.data.cache import remove_abandoned
from hfgpt.data.report import DataReport
from hfgpt.data.streams import TokenStream, tokenize_documents
from hfgpt.errors import InputError

TEXTS = ["abc", "c\nba", "bbb", "a"]


def char_tokenizer(largest_id=3):
    """a, b, c, \\n -> 0, 1, 2, 3; eos is `largest_id` + 1."""
    vocabulary = {"a": 0, "b": 1, "c": 2, "\n": 3, "<|endoftext|>": largest_id + 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@functools.cache
def byte_level_tokenizer(text):
    """A byte-level BPE tokenizer like GPT-2's, with 300 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def documents(texts=TEXTS):
    return datasets.Dataset.from_dict({"text": texts})


@pytest.fixture
def stored_documents(tmp_path):
    """Documents in an Arrow file, as sources have them: their tokens are cached in the same folder."""

    def write(texts=TEXTS, name="text"):
        path = tmp_path / "kept" / f"{name}.arrow"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            table = pa.table({"text": pa.array(texts, pa.string())})
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
        return datasets.Dataset.from_file(str(path))

    return write


def stream_of(*lengths):
    """Documents of these lengths with the consecutive tokens 0, 1, 2, ..."""
    offsets = np.cumsum([0, *lengths])
    features = datasets.Features({"input_ids": datasets.LargeList(datasets.Value("uint16"))})
    rows = {"input_ids": [range(*ends) for ends in itertools.pairwise(offsets.tolist())]}
    return TokenStream(datasets.Dataset.from_dict(rows, features=features))


def tokens_of(stream):
    return stream[:].tolist()


def token_files(tmp_path):
    """The token files in the folder of the texts."""
    return sorted(path for path in (tmp_path / "kept").iterdir() if path.name != "text.arrow")


@contextlib.contextmanager
def forbid_tokenizing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding.Tokenizer, "encode_batch_fast", None)  # cached tokens do not even call the tokenizer
        yield


def test_each_complete_document_ends_with_eos():
    stream = tokenize_documents(documents(), char_tokenizer())
    assert tokens_of(stream) == [0, 1, 2, 4, 2, 3, 1, 0, 4, 1, 1, 1, 4, 0, 4]
    assert stream.offsets.tolist() == [0, 4, 9, 13, 15]
    assert (stream.largest_id(), stream.count(1), len(stream)) == (4, 5, 15)
    part = tokenize_documents(documents(["abc"]), char_tokenizer(), append_eos=False)
    assert tokens_of(part) == [0, 1, 2]
    assert part.offsets.tolist() == [0, 3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=9), st.data())
def test_any_slice_of_the_stream_is_independent_of_arrow_chunks(ids, data):
    whole = [token for row in ids for token in row]
    if not whole:
        return
    chunks = [pa.array([row], pa.large_list(pa.uint16())) for row in ids]
    stream = TokenStream(datasets.Dataset(pa.table({"input_ids": pa.chunked_array(chunks)})))
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    assert stream[start:stop].tolist() == whole[start:stop]
    assert (len(stream), stream.offsets.tolist()) == (len(whole), np.cumsum([0, *map(len, ids)]).tolist())


@pytest.mark.parametrize(
    ("largest_id", "token_type", "width"), [(3, np.uint16, 2), (65_534, np.uint16, 2), (65_535, np.uint32, 4)]
)
def test_a_token_takes_two_bytes_while_the_vocabulary_fits(stored_documents, largest_id, token_type, width):
    stream = tokenize_documents(stored_documents(), char_tokenizer(largest_id))
    assert stream[:].dtype == token_type
    assert stream.largest_id() == largest_id + 1 == stream[3:4]
    values = stream.documents.data.column("input_ids").chunks[0].values
    assert values.nbytes == width * 15
    # The stream is the memory-mapped buffer itself.
    assert stream[:].ctypes.data == values.buffers()[1].address
    assert not stream[:].flags.writeable


def test_truncation_and_padding_settings_of_the_tokenizer_have_no_effect(stored_documents):
    tokenizer = char_tokenizer()
    first = tokenize_documents(stored_documents(), tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    with forbid_tokenizing():
        again = tokenize_documents(stored_documents(), tokenizer)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2, "the tokenizer itself is not changed"
    assert len(first) == len(again) == 15


def test_tokens_are_cached_for_the_same_rows_tokenizer_and_eos(stored_documents, tmp_path):
    first = tokenize_documents(stored_documents(), char_tokenizer())
    with forbid_tokenizing():
        again = tokenize_documents(stored_documents(), char_tokenizer())
    assert tokens_of(again) == tokens_of(first)
    assert len(token_files(tmp_path)) == 1
    others = [
        (stored_documents().select([3, 2, 1, 0]), char_tokenizer(), True),
        (stored_documents().select([0, 1]), char_tokenizer(), True),
        (stored_documents(), char_tokenizer(5), True),
        (stored_documents(), char_tokenizer(), False),
    ]
    for number, (rows, tokenizer, append_eos) in enumerate(others, start=2):
        tokenize_documents(rows, tokenizer, append_eos=append_eos)
        assert len(token_files(tmp_path)) == number
        with forbid_tokenizing():
            tokenize_documents(rows, tokenizer, append_eos=append_eos)
    assert not list(tmp_path.glob("kept/tmp*")), "no other files are left"


@pytest.mark.parametrize("size", [-2, -8, 0.5, 0, 100])
def test_a_damaged_token_cache_is_rebuilt(stored_documents, tmp_path, size):
    expected = tokens_of(tokenize_documents(stored_documents(TEXTS * 600), char_tokenizer()))
    (path,) = token_files(tmp_path)
    content = path.read_bytes()
    # The file is replaced, not overwritten: the first stream still maps the old one.
    path.unlink()
    path.write_bytes(content[: int(len(content) * size) if isinstance(size, float) else size])
    again = tokenize_documents(stored_documents(), char_tokenizer())
    assert tokens_of(again) == expected
    with forbid_tokenizing():
        assert tokens_of(tokenize_documents(stored_documents(), char_tokenizer())) == expected


def tokenize_at_once(barrier, rows, results):
    barrier.wait()
    results.put(tokens_of(tokenize_documents(rows, char_tokenizer())))


def test_two_real_processes_at_once(stored_documents, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    rows = stored_documents(TEXTS * 500)
    processes = [context.Process(target=tokenize_at_once, args=(barrier, rows, results)) for _ in range(2)]
    for process in processes:
        process.start()
    streams = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert streams == [[0, 1, 2, 4, 2, 3, 1, 0, 4, 1, 1, 1, 4, 0, 4] * 500] * 2
    assert len(token_files(tmp_path)) == 1


def test_several_processes_give_the_same_stream_as_one(stored_documents, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 20)
    texts = [TEXTS[i % 4] * (i % 7 + 1) for i in range(200)]
    one = tokenize_documents(documents(texts), char_tokenizer(), num_proc=1)
    two = tokenize_documents(stored_documents(texts), char_tokenizer(), num_proc=2)
    assert len(token_files(tmp_path)) == 2
    assert tokens_of(one) == tokens_of(two)
    assert one.offsets.tolist() == two.offsets.tolist()
    with forbid_tokenizing():
        tokenize_documents(stored_documents(), char_tokenizer(), num_proc=1)  # whatever the number of processes
    assert "TOKENIZERS_PARALLELISM" not in os.environ


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["ab", "a", " ", "\n", "\n\n", "\r\n", "'s", "\x1c", "é", "<|endoftext|>", ".", "\t"]))
)
def test_a_long_document_tokenized_in_pieces_gives_the_same_tokens(pieces):
    text = "".join(pieces)
    tokenizer = byte_level_tokenizer("ab\n\n\na ab\nab's a\r\n." * 9)
    assert encoding._can_cut(tokenizer.backend_tokenizer.to_str())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "LONGEST_PIECE", 3)
        parts = list(encoding._cut_text(text, True))
    assert "".join(parts) == text
    ids = [token for part in parts for token in tokenizer.encode(part)]
    assert ids == tokenizer.encode(text)


def test_only_documents_for_gpt2_like_tokenizers_are_split(monkeypatch):
    for name in ("BATCH_CHARACTERS", "LONGEST_PIECE"):
        monkeypatch.setattr(encoding, name, 4)
    text = "ab\nab ab\nab\n\nab.\nab" * 5
    tokenizer = byte_level_tokenizer(text)
    stream = tokenize_documents(documents([text]), tokenizer)
    assert tokens_of(stream) == [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert stream.offsets.tolist() == [0, len(stream)]
    assert len(list(encoding._cut_text(text, True))) > 5
    spaced = copy.deepcopy(tokenizer)
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for other in (char_tokenizer(), spaced):
        assert not encoding._can_cut(other.backend_tokenizer.to_str())


def test_a_full_disk_raises_and_leaves_no_files(stored_documents, tmp_path):
    rows = stored_documents(TEXTS * 1000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="large") as error:
            tokenize_documents(rows, char_tokenizer())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert token_files(tmp_path) == []


def test_an_interrupt_leaves_no_files_and_those_of_a_killed_run_are_removed_after_a_day(
    stored_documents, tmp_path, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    rows = stored_documents()
    monkeypatch.setattr(encoding, "_cut_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenize_documents(rows, char_tokenizer())
    assert token_files(tmp_path) == []
    entry = "0123456789abcdef" * 2
    others = [".git", "folder"]  # the cache may be any user folder
    for name, age in {f".{entry}-old": 25, f".{entry}-new": 23, entry: 99, **dict.fromkeys(others, 99)}.items():
        (tmp_path / name).mkdir()
        for file in ("train.arrow", "tmp1"):
            (tmp_path / name / file).write_bytes(b"1")
        for path in (*(tmp_path / name).iterdir(), tmp_path / name):
            os.utime(path, (time.time() - age * 3600,) * 2)
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{entry}-new", ".git", entry, "folder", "kept"]
    for name, left in {
        entry: ["train.arrow"],
        ".git": ["tmp1", "train.arrow"],
        "folder": ["tmp1", "train.arrow"],
    }.items():
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == left


def test_unusable_tokenizers_and_arguments_are_refused():
    backend = char_tokenizer().backend_tokenizer
    with pytest.raises(InputError, match="the tokenizer does not have an eos_token"):
        tokenize_documents(documents(), PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(InputError, match=r"data.num_proc is 0; it must be at least 1"):
        tokenize_documents(documents(), char_tokenizer(), num_proc=0)
    backend = Tokenizer(models.BPE())
    silent = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    with pytest.raises(InputError, match="produces no tokens for this text"):
        tokenize_documents(documents(), silent, append_eos=False)


def test_blocks_share_one_token_so_that_no_prediction_is_lost():
    blocks = BlockDataset(stream_of(10), 3)
    assert [item["input_ids"].tolist() for item in blocks] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [item["shift_labels"].tolist() for item in blocks] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert all(item["labels"].tolist() == item["input_ids"].tolist() for item in blocks)
    assert {tensor.dtype for item in blocks for tensor in item.values()} == {torch.int64}
    assert blocks.tail_tokens == 0


@pytest.mark.parametrize(
    ("tokens", "size", "stride", "count"), [(4612, 256, 256, 18), (534, 256, 256, 2), (5145, 4, 1, 5141)]
)
def test_the_number_of_blocks_matches_the_book(tokens, size, stride, count):
    blocks = BlockDataset(stream_of(tokens), size, stride)
    assert len(blocks) == len(range(0, tokens - size, stride)) == count
    assert blocks[-1]["input_ids"][0] == blocks[count - 1]["input_ids"][0] == (count - 1) * stride
    with pytest.raises(IndexError):
        blocks[count]


def predictions(blocks):
    """(input, target) pairs of all blocks whose target is not ignored; ids are positions in the stream."""
    pairs = []
    for item in blocks:
        ids, labels, targets = (item[key] for key in ("input_ids", "labels", "shift_labels"))
        assert torch.equal(labels[1:], targets[:-1]), "both kinds of labels ignore the same targets"
        pairs += [(i, t) for i, t in zip(ids.tolist(), targets.tolist(), strict=True) if t != -100]
    assert all(target == position + 1 for position, target in pairs)
    return [target for _, target in pairs]


LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) >= 2)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_every_token_is_predicted_and_the_counts_add_up(lengths, size, stride, boundaries):
    stream = stream_of(*lengths)
    starts = set(stream.offsets.tolist()) if boundaries else {0}
    targets = [token for token in range(1, len(stream)) if token not in starts]
    # With the tail, every target occurs once, whether blocks overlap or not.
    if stride <= size:
        kept = BlockDataset(stream, size, stride, keep_tail=True, document_boundaries=boundaries)
        assert predictions(kept) == targets
        assert (kept.predicted_tokens, kept.tail_tokens) == (len(targets), 0)
    if len(stream) <= size:
        with pytest.raises(InputError, match=f"data has {len(stream)} tokens?, but one block needs {size + 1}"):
            BlockDataset(stream, size, stride)
        return
    blocks = BlockDataset(stream, size, stride, document_boundaries=boundaries)
    found = predictions(blocks)
    assert len(blocks) == len(range(0, len(stream) - size, stride))
    assert blocks.predicted_tokens == len(found)
    covered = len(stream) - blocks.tail_tokens
    assert covered == (len(blocks) - 1) * stride + size + 1
    if stride <= size:
        assert sorted(set(found)) == [token for token in targets if token < covered]
    if stride == size:
        assert len(set(found)) == len(found)


def test_the_last_block_is_moved_back_and_counts_only_new_tokens():
    items = list(BlockDataset(stream_of(9), 5, keep_tail=True))
    assert items[1]["input_ids"].tolist() == [3, 4, 5, 6, 7]
    assert items[1]["shift_labels"].tolist() == [-100, -100, 6, 7, 8]
    assert items[1]["labels"].tolist() == [-100, -100, -100, 6, 7]
    assert items[0]["labels"].tolist() == [0, 1, 2, 3, 4]
    # A stream shorter than a block becomes one block of its own length.
    assert [item["shift_labels"].tolist() for item in BlockDataset(stream_of(4), 5, keep_tail=True)] == [[1, 2, 3]]


def test_document_boundaries_by_hand():
    # Documents 0 1 2 | 3 | 4 5 6 7 8; blocks of 4.
    items = list(BlockDataset(stream_of(3, 1, 5), 4, document_boundaries=True))
    assert [item["input_ids"].tolist() for item in items] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [item["position_ids"].tolist() for item in items] == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert [item["shift_labels"].tolist() for item in items] == [[1, 2, -100, -100], [5, 6, 7, 8]]
    assert [item["labels"].tolist() for item in items] == [[-100, 1, 2, -100], [-100, 5, 6, 7]]
    # A document that began in an earlier block starts again at position 0.
    second = BlockDataset(stream_of(3, 1, 5), 3, 2, document_boundaries=True)[1]
    assert second["input_ids"].tolist() == [2, 3, 4]
    assert second["position_ids"].tolist() == [0, 0, 0]
    assert second["labels"].tolist() == [2, -100, -100]
    assert second["shift_labels"].tolist() == [-100, -100, 5]


def test_blocks_are_batched_by_transformers_and_sent_to_workers(stored_documents):
    stream = tokenize_documents(stored_documents(TEXTS * 2000), char_tokenizer())
    blocks = BlockDataset(stream, 7, document_boundaries=True)
    packed = pickle.dumps(blocks)
    assert len(packed) < 2000, "the tokens themselves are not pickled"
    batch = default_data_collator([pickle.loads(packed)[i] for i in range(4)])
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(
        ["input_ids", "labels", "shift_labels", "position_ids"], (4, 7)
    )
    assert torch.equal(batch["input_ids"].flatten(), torch.from_numpy(stream[:28].astype(np.int64)))
    in_memory = BlockDataset(stream_of(9), 2)
    assert torch.equal(pickle.loads(pickle.dumps(in_memory))[3]["labels"], in_memory[3]["labels"])


@pytest.mark.parametrize(
    ("tokens", "arguments", "message"),
    [
        (
            37,
            {"block_size": 64},
            "validation has 37 tokens, but one block needs 65: lower data.block_size or add text",
        ),
        (1, {"block_size": 64, "keep_tail": True}, "validation has 1 token, but one block needs 2: add text"),
        (9, {"block_size": 0}, "data.block_size is 0; it must be at least 1"),
        (9, {"block_size": 3, "stride": 0}, "data.stride is 0; it must be at least 1"),
        (9, {"block_size": 3, "stride": 0, "keep_tail": True}, "evaluation.stride is 0; it must be at least 1"),
        (
            9,
            {"block_size": 3, "stride": 4, "keep_tail": True},
            "evaluation.stride is 4, larger than the block size of 3, .*: lower it to at most 3",
        ),
    ],
)
def test_impossible_sizes_are_refused(tokens, arguments, message):
    with pytest.raises(InputError, match=message):
        BlockDataset(stream_of(tokens), **arguments, name="validation")


def test_a_split_without_predictions_is_refused():
    stream = stream_of(1, 1, 1)
    blocks = BlockDataset(stream, 8, document_boundaries=True, keep_tail=True)
    with pytest.raises(
        InputError, match=r"^the validation split of a.txt has no tokens to predict, since each document is"
    ):
        count_blocks(blocks, DataReport(source="a.txt"), "validation")


def test_the_report_contains_the_sizes_of_the_blocks():
    report = DataReport()
    count_blocks(BlockDataset(stream_of(4612), 256), report, "train")
    assert json.loads(json.dumps(report.to_dict()))["splits"]["train"] == {
        "documents": 0,
        "characters": 0,
        "bytes": 0,
        "tokens": 4612,
        "unknown_tokens": 0,
        "blocks": 18,
        "predicted_tokens": 4608,
        "tail_tokens": 3,
        "labels": {},
    }
