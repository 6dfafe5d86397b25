"""Documents become exactly their tokens, and blocks predict exactly the tokens they should. All checks are exact."""

import copy
import errno
import functools
import json
import multiprocessing
import os
import pickle
import resource
import time

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, default_data_collator

from hfgpt.data import streams
from hfgpt.data.blocks import BlockDataset, count_blocks
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
    """GPT-2's kind of tokenizer with 300 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def documents(texts=TEXTS):
    return datasets.Dataset.from_dict({"text": texts})


def stream_of(*lengths):
    """Documents of these lengths with the tokens 0, 1, 2, ... in a row."""
    offsets = np.cumsum([0, *lengths])
    return TokenStream(np.arange(offsets[-1], dtype=np.uint16), offsets, max_token_id=int(offsets[-1]) - 1)


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_each_whole_document_ends_with_eos(tmp_path):
    stream = tokenize_documents(documents(), char_tokenizer(), cache_dir=tmp_path)
    assert stream.tokens.tolist() == [0, 1, 2, 4, 2, 3, 1, 0, 4, 1, 1, 1, 4, 0, 4]
    assert stream.offsets.tolist() == [0, 4, 9, 13, 15]
    assert (stream.max_token_id, stream.cached, len(stream)) == (4, False, 15)
    part = tokenize_documents(documents(["abc"]), char_tokenizer(), cache_dir=tmp_path, append_eos=False)
    assert part.tokens.tolist() == [0, 1, 2]
    assert part.offsets.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("largest_id", "token_type", "width"), [(3, np.uint16, 2), (65_534, np.uint16, 2), (65_535, np.uint32, 4)]
)
def test_a_token_takes_two_bytes_while_the_vocabulary_fits(tmp_path, largest_id, token_type, width):
    stream = tokenize_documents(documents(), char_tokenizer(largest_id), cache_dir=tmp_path)
    assert stream.tokens.dtype == token_type
    assert stream.max_token_id == largest_id + 1 == stream.tokens[3]
    assert (stream.path / "tokens.bin").stat().st_size == width * 15
    assert files_in(stream.path) == ["meta.json", "offsets.bin", "tokens.bin"]


def test_truncation_and_padding_left_over_in_the_tokenizer_change_nothing(tmp_path):
    tokenizer = char_tokenizer()
    first = tokenize_documents(documents(), tokenizer, cache_dir=tmp_path)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    again = tokenize_documents(documents(), tokenizer, cache_dir=tmp_path)
    assert again.cached
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2, "the tokenizer itself is left alone"
    assert len(first) == len(again) == 15


def test_the_cache_is_keyed_by_texts_tokenizer_and_eos(tmp_path):
    tokenizer = char_tokenizer()
    first = tokenize_documents(documents(), tokenizer, cache_dir=tmp_path)
    # The same texts in the same order are the same data, however the table is made.
    same = documents(["x", *TEXTS]).select([1, 2, 3, 4])
    again = tokenize_documents(same, char_tokenizer(), cache_dir=tmp_path)
    assert again.cached
    assert again.path == first.path
    assert again.tokens.tolist() == first.tokens.tolist()
    others = [
        tokenize_documents(documents([*TEXTS[:-2], "bbba"]), tokenizer, cache_dir=tmp_path),
        tokenize_documents(documents(TEXTS[::-1]), tokenizer, cache_dir=tmp_path),
        tokenize_documents(documents(), char_tokenizer(5), cache_dir=tmp_path),
        tokenize_documents(documents(), tokenizer, cache_dir=tmp_path, append_eos=False),
    ]
    assert not any(other.cached for other in others)
    assert len({first.path, *(other.path for other in others)}) == 5
    assert len(files_in(tmp_path)) == 3 * 5, "nothing but the streams is left"


@pytest.mark.parametrize(
    "damage", ["short tokens", "short offsets", "no meta", "bad meta", "no tokens", "empty tokens"]
)
def test_a_damaged_cache_entry_is_made_again(tmp_path, damage):
    first = tokenize_documents(documents(), char_tokenizer(), cache_dir=tmp_path)
    expected = first.tokens.tolist()
    how, what = damage.split()
    path = first.path / {"tokens": "tokens.bin", "offsets": "offsets.bin", "meta": "meta.json"}[what]
    content = path.read_bytes()
    # Another file is put there: the first stream still maps the old one.
    path.unlink()
    if how != "no":
        path.write_bytes({"short": content[:-2], "bad": b"{", "empty": b""}[how])
    again = tokenize_documents(documents(), char_tokenizer(), cache_dir=tmp_path)
    assert not again.cached
    assert again.tokens.tolist() == expected
    assert tokenize_documents(documents(), char_tokenizer(), cache_dir=tmp_path).cached
    assert len(files_in(tmp_path)) == 3


def test_of_two_processes_that_race_both_get_the_stream(tmp_path, monkeypatch):
    # The other process publishes between our look into the cache and our own publishing.
    publish = streams._publish_stream
    others = []

    def publish_second(temporary, folder):
        monkeypatch.setattr(streams, "_publish_stream", publish)
        others.append(tokenize_documents(documents(), char_tokenizer(), cache_dir=tmp_path))
        return publish(temporary, folder)

    monkeypatch.setattr(streams, "_publish_stream", publish_second)
    ours = tokenize_documents(documents(), char_tokenizer(), cache_dir=tmp_path)
    assert ours.path == others[0].path
    assert ours.tokens.tolist() == others[0].tokens.tolist()
    assert len(files_in(tmp_path)) == 3


def tokenize_at_once(barrier, cache_dir, results):
    barrier.wait()
    results.put(tokenize_documents(documents(TEXTS * 500), char_tokenizer(), cache_dir=cache_dir).tokens.tolist())


def test_two_real_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=tokenize_at_once, args=(barrier, tmp_path, results)) for _ in range(2)]
    for process in processes:
        process.start()
    streams = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert streams == [[0, 1, 2, 4, 2, 3, 1, 0, 4, 1, 1, 1, 4, 0, 4] * 500] * 2
    assert len(files_in(tmp_path)) == 3


def test_several_processes_make_the_same_stream_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BATCH_CHARACTERS", 20)
    texts = [TEXTS[i % 4] * (i % 7 + 1) for i in range(200)]
    one = tokenize_documents(documents(texts), char_tokenizer(), cache_dir=tmp_path / "one", num_proc=1)
    two = tokenize_documents(documents(texts), char_tokenizer(), cache_dir=tmp_path / "two", num_proc=2)
    for name in ("tokens.bin", "offsets.bin", "meta.json"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()
    assert one.path.name == two.path.name
    assert "TOKENIZERS_PARALLELISM" not in os.environ


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["ab", "a", " ", "\n", "\n\n", "\r\n", "'s", "\x1c", "é", "<|endoftext|>", ".", "\t"]))
)
def test_a_long_document_is_tokenized_in_pieces_as_in_one(pieces):
    text = "".join(pieces)
    tokenizer = byte_level_tokenizer("ab\n\n\na ab\nab's a\r\n." * 9)
    assert streams._can_cut(tokenizer.backend_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BATCH_CHARACTERS", 3)
        parts = list(streams._pieces(text, True))
    assert "".join(parts) == text
    ids = [token for part in parts for token in tokenizer.encode(part)]
    assert ids == tokenizer.encode(text)


def test_only_a_tokenizer_like_gpt2s_lets_a_document_be_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BATCH_CHARACTERS", 4)
    text = "ab\nab ab\nab\n\nab.\nab" * 5
    tokenizer = byte_level_tokenizer(text)
    stream = tokenize_documents(documents([text]), tokenizer, cache_dir=tmp_path)
    assert stream.tokens.tolist() == [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert stream.offsets.tolist() == [0, len(stream)]
    assert len(list(streams._pieces(text, True))) > 5
    spaced = copy.deepcopy(tokenizer)
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for other in (char_tokenizer(), spaced):
        assert not streams._can_cut(other.backend_tokenizer)


def test_a_full_disk_raises_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="large") as error:
            tokenize_documents(documents(TEXTS * 1000), char_tokenizer(), cache_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_and_what_a_killed_run_left_goes_after_a_day(tmp_path, monkeypatch):
    for name, age in {"old": 25, "new": 23}.items():
        folder = tmp_path / f".partial-{name}"
        folder.mkdir()
        (folder / "tokens.bin").write_bytes(b"1")
        for path in (folder / "tokens.bin", folder):
            os.utime(path, (time.time() - age * 3600,) * 2)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(streams, "_open_stream", interrupt)
    monkeypatch.setattr(streams, "_open_valid", lambda folder: None)
    with pytest.raises(KeyboardInterrupt):
        tokenize_documents(documents(), char_tokenizer(), cache_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".partial-new"]


def test_what_the_tokenizer_lacks_is_said(tmp_path):
    backend = char_tokenizer().backend_tokenizer
    with pytest.raises(InputError, match="the tokenizer has no eos_token"):
        tokenize_documents(documents(), PreTrainedTokenizerFast(tokenizer_object=backend), cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"data.num_proc is 0, the least is 1"):
        tokenize_documents(documents(), char_tokenizer(), cache_dir=tmp_path, num_proc=0)
    backend = Tokenizer(models.BPE())
    silent = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    with pytest.raises(InputError, match="makes no tokens of this text"):
        tokenize_documents(documents(), silent, cache_dir=tmp_path, append_eos=False)
    assert list(tmp_path.iterdir()) == []


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
def test_the_number_of_blocks_is_the_books(tokens, size, stride, count):
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
        assert torch.equal(labels[1:], targets[:-1]), "both kinds of labels ignore the same predictions"
        pairs += [(i, t) for i, t in zip(ids.tolist(), targets.tolist(), strict=True) if t != -100]
    assert all(target == position + 1 for position, target in pairs)
    return [target for _, target in pairs]


LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) >= 2)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_every_token_is_predicted_and_the_numbers_add_up(lengths, size, stride, boundaries):
    stream = stream_of(*lengths)
    starts = set(stream.offsets.tolist()) if boundaries else {0}
    targets = [token for token in range(1, len(stream)) if token not in starts]
    # With the tail, every target once, whether blocks overlap or not.
    if stride <= size:
        kept = BlockDataset(stream, size, stride, keep_tail=True, document_boundaries=boundaries)
        assert predictions(kept) == targets
        assert (kept.predicted_tokens, kept.tail_tokens) == (len(targets), 0)
    if len(stream) <= size:
        with pytest.raises(InputError, match=f"data has {len(stream)} tokens, one block needs {size + 1}"):
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


def test_the_last_block_is_moved_back_and_counts_only_what_is_new():
    items = list(BlockDataset(stream_of(9), 5, keep_tail=True))
    assert items[1]["input_ids"].tolist() == [3, 4, 5, 6, 7]
    assert items[1]["shift_labels"].tolist() == [-100, -100, 6, 7, 8]
    assert items[1]["labels"].tolist() == [-100, -100, -100, 6, 7]
    assert items[0]["labels"].tolist() == [0, 1, 2, 3, 4]
    # A stream shorter than a block is one block of its own length.
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


def test_blocks_are_batched_by_transformers_and_travel_to_workers(tmp_path):
    stream = tokenize_documents(documents(TEXTS * 2000), char_tokenizer(), cache_dir=tmp_path)
    blocks = BlockDataset(stream, 7, document_boundaries=True)
    packed = pickle.dumps(blocks)
    assert len(packed) < 1000, "the tokens themselves are not pickled"
    batch = default_data_collator([pickle.loads(packed)[i] for i in range(4)])
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(
        ["input_ids", "labels", "shift_labels", "position_ids"], (4, 7)
    )
    assert torch.equal(batch["input_ids"].flatten(), torch.from_numpy(stream.tokens[:28].astype(np.int64)))
    in_memory = BlockDataset(stream_of(9), 2)
    assert torch.equal(pickle.loads(pickle.dumps(in_memory))[3]["labels"], in_memory[3]["labels"])


@pytest.mark.parametrize(
    ("tokens", "arguments", "message"),
    [
        (37, {"block_size": 64}, "validation has 37 tokens, one block needs 65: lower data.block_size or add text"),
        (1, {"block_size": 64, "keep_tail": True}, "validation has 1 tokens, one block needs 2: add text"),
        (9, {"block_size": 0}, "data.block_size is 0, the least is 1"),
        (9, {"block_size": 3, "stride": 0}, "data.stride is 0, the least is 1"),
        (9, {"block_size": 3, "stride": 0, "keep_tail": True}, "evaluation.stride is 0, the least is 1"),
        (9, {"block_size": 3, "stride": 4, "keep_tail": True}, "lower evaluation.stride to at most 3"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tokens, arguments, message):
    with pytest.raises(InputError, match=message):
        BlockDataset(stream_of(tokens), **arguments, name="validation")


def test_a_split_in_which_nothing_is_predicted_is_refused():
    stream = TokenStream(np.array([3, 4, 5], dtype=np.uint16), np.array([0, 1, 2, 3]), max_token_id=5)
    blocks = BlockDataset(stream, 8, document_boundaries=True, keep_tail=True)
    with pytest.raises(InputError, match=r"^nothing is predicted in the validation split of a.txt: each of its docum"):
        count_blocks(blocks, None, DataReport(source="a.txt"), "validation")


def test_the_report_holds_the_sizes_of_the_blocks():
    report = DataReport()
    count_blocks(BlockDataset(stream_of(4612), 256), 7, report, "train")
    assert json.loads(json.dumps(report.to_dict()))["splits"]["train"] == {
        "documents": 0,
        "characters": 0,
        "bytes": 0,
        "tokens": 4612,
        "unknown_tokens": 1,
        "blocks": 18,
        "predicted_tokens": 4608,
        "tail_tokens": 3,
        "labels": {},
    }
