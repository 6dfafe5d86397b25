"""Prepared data has exactly the tokens that training makes of the source, in parts of any size."""

import gzip
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from hfgpt.commands.prepare import prepare, render_manifest
from hfgpt.data import files, parts, prepared, writing
from hfgpt.data.files import divide_file, read_rows
from hfgpt.data.prepared import Manifest, find_prepared
from hfgpt.errors import InputError
from hfgpt.recipe import load_recipe
from hfgpt.tasks import TASKS

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "old", "red", "barn", "near", "lake"]


def write_texts(number, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 40))) + "." for _ in range(number)]


def write_lines(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Builds a recipe for a source in `tmp_path`, with overrides of section `data` and others."""
    monkeypatch.chdir(tmp_path)
    base = {
        "tokenizer": {"kind": "bpe", "vocab_size": 300},
        "model": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 16},
        "data": {"cache_dir": str(tmp_path / ".cache"), "num_proc": 1},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(base))

    def build(path, **overrides):
        values = {"data.path": str(path), **{key.replace("__", "."): value for key, value in overrides.items()}}
        return load_recipe("r.yaml", [f"--{key}={value}" for key, value in values.items()])

    return build


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 2000)
    monkeypatch.setattr(writing, "BATCH_CHARACTERS", 500)


def prepare_quietly(recipe, out="out", shard=None):
    said = io.StringIO()
    return prepare(recipe, str(out), shard, Console(file=said, width=200)), said.getvalue()


def load_streams(recipe):
    data = TASKS["pretrain"].load(recipe)
    return {split: blocks.stream[:] for split, blocks in data.splits.items()}, data


def report_of(data):
    report = data.report.to_dict()
    report.pop("sha256")
    return report


def assert_prepared_as_loaded(recipe, source, **overrides):
    """Prepared data gives the streams, document boundaries, tokenizer and report of the source."""
    expected, direct = load_streams(recipe(source, **overrides))
    prepare_quietly(recipe(source, **overrides))
    streams, data = load_streams(recipe("out", **overrides))
    for split in ("train", "validation"):
        assert streams[split].tolist() == expected[split].tolist()
        assert data.splits[split].stream.offsets.tolist() == direct.splits[split].stream.offsets.tolist()
        assert streams[split].dtype == np.uint16
    assert data.tokenizer.backend_tokenizer.to_str() == direct.tokenizer.backend_tokenizer.to_str()
    assert report_of(data) == report_of(direct)
    return data


@pytest.mark.parametrize("sample_by", ["document", "paragraph", "line"])
def test_one_part_gives_what_training_makes_of_the_source(recipe, tmp_path, sample_by):
    texts = write_texts(60)
    (tmp_path / "a.txt").write_text("\n\n".join([*texts, texts[3], "  "]))
    data = assert_prepared_as_loaded(recipe, "a.txt", data__sample_by=sample_by)
    assert data.report.split_by == ("position" if sample_by == "document" else "documents")


def test_many_parts_with_a_given_validation_split_give_the_same_streams(recipe, tmp_path, small_parts):
    texts = write_texts(200)
    write_lines(tmp_path / "d/train-0.jsonl", [*texts[:90], "", texts[0]])
    write_lines(tmp_path / "d/train-1.jsonl", texts[90:150])
    write_lines(tmp_path / "d/valid.jsonl", [*texts[150:], texts[1]])
    data = assert_prepared_as_loaded(recipe, "d")
    manifest = Manifest.read(tmp_path / "out")
    assert len(manifest.files("train")) > 5
    assert len(manifest.files("validation")) > 2
    assert (data.report.leaked, data.report.duplicated, data.report.dropped) == (1, 2, {"empty": 1})


def test_unknown_tokens_are_counted_as_in_training(recipe, tmp_path, small_parts):
    texts = write_texts(40)
    write_lines(tmp_path / "d/train.jsonl", texts)
    write_lines(tmp_path / "d/valid.jsonl", [*texts[:5], "αβγ"])
    data = assert_prepared_as_loaded(recipe, "d", tokenizer__kind="char")
    assert data.report.splits["validation"].unknown_tokens == 3


@pytest.mark.parametrize("seed", range(4))
def test_few_documents_in_several_parts_are_divided_as_in_training(recipe, tmp_path, small_parts, seed):
    texts = write_texts(6, seed)
    write_lines(tmp_path / "d/a.jsonl", [" ".join(texts * 20), texts[0]])
    write_lines(tmp_path / "d/b.jsonl", [texts[0], texts[2], "", texts[3]])
    write_lines(tmp_path / "d/c.jsonl", [texts[4], texts[5]])
    data = assert_prepared_as_loaded(recipe, "d")
    assert len(Manifest.read(tmp_path / "out").parts) > 1
    assert data.report.splits["validation"].documents == 1


def test_a_single_document_or_two_texts_in_several_parts_are_divided_as_in_training(recipe, tmp_path, small_parts):
    texts = [" ".join(write_texts(20, seed)) for seed in (0, 7)]
    for name, rows in (("one", [texts[0], *[""] * 300]), ("two", texts * 110)):
        write_lines(tmp_path / f"{name}.jsonl", rows)
        data = assert_prepared_as_loaded(recipe, f"{name}.jsonl")
        assert len(Manifest.read(tmp_path / "out").parts) > 1
        assert data.report.split_by == ("position" if name == "one" else "documents")
        shutil.rmtree(tmp_path / "out")


def test_sources_without_text_for_both_splits_are_refused_before_anything_is_written(recipe, tmp_path, small_parts):
    text = " ".join(write_texts(20))
    write_lines(tmp_path / "same.jsonl", [text] * 30)
    write_lines(tmp_path / "d/train.jsonl", write_texts(90))
    write_lines(tmp_path / "d/valid.jsonl", ["", " "])
    same = "all 30 documents of data.path 'same.jsonl' have the same text"
    empty = r"the validation split of d is empty \(2 rows read; dropped: 2 empty\): add text"
    for path, message in (("same.jsonl", same), ("d", empty)):
        with pytest.raises(InputError, match=message):
            prepare_quietly(recipe(path))
        assert not (tmp_path / "out").exists()


def test_parts_divide_validation_by_text(recipe, tmp_path, small_parts):
    texts = write_texts(600)
    write_lines(tmp_path / "a.jsonl", texts + texts[:100])
    manifest, said = prepare_quietly(recipe("a.jsonl"))
    _, data = load_streams(recipe("out"))
    documents = {
        split: [data.tokenizer.decode(row, skip_special_tokens=True) for row in stream.documents["input_ids"]]
        for split, stream in ((split, blocks.stream) for split, blocks in data.splits.items())
    }
    assert sorted(documents["train"] + documents["validation"]) == sorted(texts + texts[:100])
    assert not set(documents["train"]) & set(documents["validation"])
    assert 40 < len(documents["validation"]) < 100
    assert (manifest.report.duplicated, manifest.report.split_by, manifest.report.leaked) == (100, "documents", 0)
    assert f"a.jsonl: {(tmp_path / 'a.jsonl').stat().st_size / 1e3:.1f} kB in " in said


@pytest.mark.parametrize(("kind", "reason"), [("exact", "duplicate"), ("near", "near-duplicate")])
def test_repeated_texts_are_removed_and_counted(recipe, tmp_path, small_parts, kind, reason):
    texts = write_texts(100)
    long = [" ".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=100)) for i in range(20)]
    similar = [text[:-1] + "!" for text in long]
    write_lines(tmp_path / "d/train.jsonl", [*texts, *long, texts[7], "", *similar[:10], texts[99]])
    write_lines(tmp_path / "d/valid.jsonl", [*write_texts(20, seed=1), texts[0], *similar[10:]])
    for num_proc in (1, 2):
        manifest, said = prepare_quietly(
            recipe("d", data__deduplicate=kind, data__num_proc=num_proc), f"out{num_proc}"
        )
        removed = 3 if kind == "exact" else 3 + len(similar)
        assert manifest.report.dropped == {reason: removed, "empty": 1}
        assert (manifest.report.duplicated, manifest.report.leaked) == (0, 0)
        assert f"looking for {reason}s" in said
    first, second = (load_streams(recipe(f"out{n}", data__deduplicate=kind))[0] for n in (1, 2))
    assert all(first[split].tolist() == second[split].tolist() for split in first)
    _, data = load_streams(recipe("out1"))
    rows = data.splits["train"].stream.documents["input_ids"]
    kept = [*texts, *long, *(similar[:10] if kind == "exact" else [])]
    assert [data.tokenizer.decode(row, skip_special_tokens=True) for row in rows] == kept


def test_deduplication_is_refused_where_it_would_not_be_done(recipe, tmp_path):
    write_lines(tmp_path / "a.jsonl", write_texts(20))
    source = recipe("a.jsonl", data__deduplicate="exact")
    with pytest.raises(InputError, match="only hfgpt prepare removes repeated texts: run hfgpt prepare RECIPE OUT"):
        load_streams(source)
    with pytest.raises(InputError, match="--shard 1/1 cannot remove the duplicates of other shards"):
        prepare_quietly(source, "out", "1/1")


def test_a_mixture_has_every_block_and_the_given_shares(recipe, tmp_path, small_parts):
    write_lines(tmp_path / "a.jsonl", write_texts(150))
    write_lines(tmp_path / "b/train.jsonl", write_texts(40, seed=1))
    write_lines(tmp_path / "b/valid.jsonl", write_texts(10, seed=2))
    (tmp_path / "c.txt").write_text("\n".join(write_texts(30, seed=3)))
    mixture = [
        {"path": "a.jsonl", "weight": 2},
        {"path": "b"},
        {"path": "c.txt", "weight": 1, "sample_by": "line"},
    ]
    settings = json.loads((tmp_path / "r.yaml").read_text())
    settings["data"]["mixture"] = mixture
    (tmp_path / "r.yaml").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"^data.mixture is mixed by hfgpt prepare: run hfgpt prepare RECIPE OUT"):
        load_streams(load_recipe("r.yaml", []))
    manifest, said = prepare_quietly(load_recipe("r.yaml", []))
    assert "mixture of 3 sources: " in said
    assert [part.source for name, part in sorted(manifest.parts.items()) if name[0] == "v"] == [1]
    data = TASKS["pretrain"].load(recipe("out"))
    blocks, report = data.splits["train"], data.report

    alone = {}
    for number, source in enumerate(mixture):
        del settings["data"]["mixture"]
        settings["tokenizer"] = {"path": "out/tokenizer"}
        settings["data"]["sample_by"] = source.get("sample_by", "document")
        (tmp_path / "alone.yaml").write_text(json.dumps(settings))
        prepare_quietly(load_recipe("alone.yaml", [f"--data.path={source['path']}"]), f"alone{number}")
        alone[number] = TASKS["pretrain"].load(load_recipe("alone.yaml", [f"--data.path=alone{number}"])).splits
        settings["data"]["mixture"] = mixture
    sizes = [len(splits["train"]) for splits in alone.values()]
    expected = [
        max(size / share for size, share in zip(sizes, (0.5, 0.25, 0.25), strict=True)) * s for s in (0.5, 0.25, 0.25)
    ]
    assert blocks.sizes == [round(size) for size in expected]
    rows = [tuple(blocks[index]["input_ids"].tolist()) for index in range(len(blocks))]
    start = 0
    for number, size in enumerate(blocks.sizes):
        own = [tuple(row["input_ids"].tolist()) for row in alone[number]["train"]]
        found = rows[start : start + size]
        assert list(dict.fromkeys(found)) == list(dict.fromkeys(own)), "every block, in order"
        times = [found.count(row) / own.count(row) for row in own]
        assert max(times) - min(times) <= 1
        start += size
    validation = data.splits["validation"]
    assert validation.sizes == [len(splits["validation"]) for splits in alone.values()]
    assert report.splits["validation"].predicted_tokens == sum(
        splits["validation"].predicted_tokens for splits in alone.values()
    )
    weight = report.mixture["1"].weight
    assert weight == pytest.approx(0.5, abs=0.01)
    assert f"source 1, a.jsonl: {weight:.1%} of the training blocks" in report.summary()
    assert data.splits["validation"].first_tokens() == [
        int(splits["validation"].stream[0:1][0]) for splits in alone.values()
    ]


def test_the_command_that_trains_on_the_data_has_one_path(recipe, tmp_path):
    write_lines(tmp_path / "a.jsonl", write_texts(50))
    manifest, _ = prepare_quietly(recipe("a.jsonl"))
    for overrides in (["--data.path", "a.jsonl", "--training.seed", "42"], ["--training.seed", "42", "--data.path=a"]):
        said = render_manifest(manifest, "r.yaml", overrides, "out")
        assert said.endswith(" train with: hfgpt train r.yaml --training.seed 42 --data.path out")


def read_all(folder):
    """The content of the files, without times."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_and_processes_give_the_same_files(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 2000)
    write_lines(tmp_path / "a.jsonl", write_texts(250))
    prepare_quietly(recipe("a.jsonl"), "whole")
    source = recipe("a.jsonl")
    assert prepare_quietly(source, "shards", "2/2")[0] is None
    with pytest.raises(InputError, match=r"shards is incomplete, 6 of 13 parts are finished: run the same hfgpt"):
        find_prepared("shards")
    assert prepare_quietly(source, "shards", "1/2")[0] is not None
    prepare_quietly(recipe("a.jsonl", data__num_proc=2), "processes")
    assert read_all(tmp_path / "whole") == read_all(tmp_path / "shards") == read_all(tmp_path / "processes")


def test_finished_parts_are_kept_and_damaged_ones_repaired(recipe, tmp_path, small_parts, monkeypatch):
    write_lines(tmp_path / "a.jsonl", write_texts(150))
    prepare_quietly(recipe("a.jsonl"), "whole")
    real, tokenized = writing.tokenize_part, []

    def stop_at_third(output, job):
        tokenized.append(job.name)
        if len(tokenized) == 3:
            raise KeyboardInterrupt
        return real(output, job)

    monkeypatch.setattr("hfgpt.commands.prepare.tokenize_part", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_quietly(recipe("a.jsonl"))
    _, said = prepare_quietly(recipe("a.jsonl"))
    assert "already finished: 2 of " in said
    assert tokenized[:4] == ["train-00000", "train-00001", "train-00002", "train-00002"]
    assert read_all(tmp_path / "out") == read_all(tmp_path / "whole")

    damaged = tmp_path / "out/train/train-00001.arrow"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    (tmp_path / "out/train/train-00000.arrow").unlink()
    with pytest.raises(InputError, match=r"train-00000\.arrow of out is missing: run the same hfgpt prepare again"):
        load_streams(recipe("out"))
    tokenized.clear()
    tokenized += ["", "", ""]
    _, said = prepare_quietly(recipe("a.jsonl"))
    assert tokenized[3:] == ["train-00000", "train-00001"]
    assert "train/train-00001.arrow is missing or damaged: preparing train-00001 again" in said
    assert read_all(tmp_path / "out") == read_all(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data__validation_fraction": "0.2"}, "data.validation_fraction was 0.1 and is 0.2"),
        ({"tokenizer__vocab_size": 290}, "tokenizer.vocab_size was 300 and is 290"),
        ({"training__seed": 7}, "training.seed was 42 and is 7"),
    ],
)
def test_a_folder_with_other_data_is_refused(recipe, tmp_path, changed, message):
    write_lines(tmp_path / "a.jsonl", write_texts(50))
    prepare_quietly(recipe("a.jsonl"))
    with pytest.raises(InputError, match=f"^out was prepared from something else: {message}.*choose another folder"):
        prepare_quietly(recipe("a.jsonl", **changed))


def test_a_changed_source_is_refused(recipe, tmp_path):
    write_lines(tmp_path / "a.jsonl", write_texts(50))
    prepare_quietly(recipe("a.jsonl"))
    os.utime(tmp_path / "a.jsonl", (0, 0))
    with pytest.raises(InputError, match="something else: the files of the source"):
        prepare_quietly(recipe("a.jsonl"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data__sample_by": "line"}, "data.sample_by is 'line', but out was prepared with 'document'"),
        ({"tokenizer__kind": "char"}, "tokenizer.kind is 'char', but out was prepared with 'bpe'"),
        ({"tokenizer__path": "other"}, r"out was prepared with another tokenizer \(300 tokens\)"),
    ],
)
def test_training_with_other_settings_is_refused(recipe, tmp_path, changed, message):
    write_lines(tmp_path / "a.jsonl", write_texts(50))
    prepare_quietly(recipe("a.jsonl"))
    shutil.copytree(tmp_path / "out/tokenizer", tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other/tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["Ġa"], vocab["Ġt"] = vocab["Ġt"], vocab["Ġa"]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=message):
        load_streams(recipe("out", **changed))


def test_prepared_data_is_refused_by_other_tasks_and_as_a_source(recipe, tmp_path):
    write_lines(tmp_path / "a.jsonl", write_texts(50))
    prepare_quietly(recipe("a.jsonl"))
    for action in (lambda: prepare_quietly(recipe("out"), "again"), lambda: classify(tmp_path)):
        with pytest.raises(InputError, match="'out' has tokens, which only pre-training can use"):
            action()


def classify(tmp_path):
    (tmp_path / "c.yaml").write_text("task: classify\nmodel: {hidden_size: 8, num_attention_heads: 1}\n")
    TASKS["classify"].load(load_recipe("c.yaml", ["--data.path=out"]))


def test_folders_with_other_files_and_bad_shards_are_refused(recipe, tmp_path):
    write_lines(tmp_path / "a.jsonl", write_texts(50))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("my notes")
    with pytest.raises(InputError, match=r"'mine' has other files, such as README.md: choose a new folder"):
        prepare_quietly(recipe("a.jsonl"), "mine")
    for shard in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(InputError, match=f"--shard is '{shard}'; it must be I/N"):
            prepare_quietly(recipe("a.jsonl"), "out", shard)
    with pytest.raises(InputError, match=r"--shard is 1/2, but a.jsonl has only 1 part: lower N"):
        prepare_quietly(recipe("a.jsonl"), "out", "1/2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "line.txt", "paragraph.md", "csv"])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_sections_of_a_file_have_exactly_its_rows(tmp_path, monkeypatch, kind, chunk):
    monkeypatch.setattr(files, "CHUNK", chunk)
    texts = [text + ("\n\n é\t" if i % 3 else "") for i, text in enumerate(write_texts(40))]
    path = tmp_path / f"a.{kind.split('.', 1)[-1] if 'txt' in kind or 'md' in kind else kind}"
    if kind.startswith("jsonl"):
        data = "\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else b"\xef\xbb\xbf" + data)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=3)
    elif kind == "csv":
        path.write_text("text,id\n" + "".join(f'"{text}",1\n' for text in texts))
    else:
        path.write_text("\r\n \t\r\n".join(texts) + "\n", newline="")
    sample_by = kind.split(".")[0]
    whole = list(read_rows(path, sample_by))
    for size in (1, 50, 300, 10**6):
        sections = [section for section, _ in divide_file(path, sample_by, size)]
        rows = [row for file, start, stop in sections for row in read_rows(file, sample_by, start=start, stop=stop)]
        assert rows == whole
    assert sum(bytes_ for _, bytes_ in divide_file(path, sample_by, 50)) >= path.stat().st_size // 2
    if kind in ("jsonl", "parquet", "line.txt", "paragraph.md"):
        assert len(divide_file(path, sample_by, 1)) > 10


def test_errors_in_a_section_name_the_line_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 20 + "{oops\n")
    (file, start, stop), _ = divide_file(path, "document", 100)[-1]
    with pytest.raises(InputError, match="in line 21, column 2"):
        list(read_rows(file, start=start, stop=stop))


def test_documents_that_do_not_fit_into_memory_are_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "LONGEST_DECOMPRESSED", 1000)
    (tmp_path / "a.txt").write_text("word " * 300)
    with pytest.raises(
        InputError, match=r"a.txt is read as one document of 1,500 bytes, the limit is 1,000: set data.sample"
    ):
        prepare_quietly(recipe("a.txt"))
    (tmp_path / "a.json").write_text(json.dumps([{"text": "word"}] * 100))
    with pytest.raises(
        InputError,
        match=r"a.json is read as one JSON value of 1,800 bytes.*: convert it to JSON Lines, or rename it to .jsonl",
    ):
        prepare_quietly(recipe("a.json"))


def test_other_programs_read_prepared_data(recipe, tmp_path, small_parts):
    write_lines(tmp_path / "a.jsonl", write_texts(150))
    prepare_quietly(recipe("a.jsonl"))
    streams, _ = load_streams(recipe("out"))
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / ".hf"))
    for split, stream in streams.items():
        assert [token for row in loaded[split]["input_ids"] for token in row] == stream.tolist()


def test_data_is_prepared_in_and_read_from_a_remote_folder(recipe, tmp_path, small_parts, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / ".hf"))
    write_lines(tmp_path / "a.jsonl", write_texts(80))
    prepare_quietly(recipe("a.jsonl"))
    _, said = prepare_quietly(recipe("a.jsonl"), "memory://bucket/data")
    _, again = prepare_quietly(recipe("a.jsonl"), "memory://bucket/data")
    assert "train-00001" in said
    assert "already finished: 5 of 5 parts" in again
    assert "train-00001" not in again
    expected, _ = load_streams(recipe("out"))
    streams, _ = load_streams(recipe("memory://bucket/data"))
    assert {split: stream.tolist() for split, stream in streams.items()} == {
        split: stream.tolist() for split, stream in expected.items()
    }
    memory, damaged = fsspec.filesystem("memory"), "/bucket/data/train/train-00001.arrow"
    content = memory.cat_file(damaged)
    memory.pipe_file(damaged, content[:-1] + b"?")
    shutil.rmtree(tmp_path / ".hf")  # the copies of downloaded files
    with pytest.raises(InputError, match=r"train-00001.arrow of memory://bucket/data is damaged: run the same hfgpt"):
        load_streams(recipe("memory://bucket/data"))
    _, said = prepare_quietly(recipe("a.jsonl"), "memory://bucket/data")
    assert "train/train-00001.arrow is missing or damaged: preparing train-00001 again" in said
    assert memory.cat_file(damaged) == content
    load_streams(recipe("memory://bucket/data"))
    for copy in (tmp_path / ".hf").rglob("*.arrow"):
        copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    streams, _ = load_streams(recipe("memory://bucket/data"))
    assert all(stream.tolist() == expected[split].tolist() for split, stream in streams.items()), "downloaded again"


def test_remote_files_are_read_part_by_part(recipe, tmp_path, small_parts):
    memory = fsspec.filesystem("memory")
    texts = write_texts(90)
    for number in range(3):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[30 * number : 30 * number + 30])
        memory.pipe_file(f"/texts/train-{number}.jsonl", lines.encode())
    memory.pipe_file("/texts/valid.jsonl", json.dumps({"text": "the cat sat"}).encode())
    manifest, _ = prepare_quietly(recipe("memory://texts"))
    assert list(manifest.parts) == ["train-00000", "train-00001", "train-00002", "validation-00000"]
    _, data = load_streams(recipe("out"))
    rows = data.splits["train"].stream.documents["input_ids"]
    assert [data.tokenizer.decode(row, skip_special_tokens=True) for row in rows] == texts


def test_a_remote_file_is_downloaded_once_and_again_by_the_next_call(recipe, tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    real, downloads, folders = memory.get_file, [], []

    def get_file(self, place, target):
        downloads.append(place)
        folders.append(Path(target).parent)
        real(place, target)

    monkeypatch.setattr(type(memory), "get_file", get_file)
    for number, texts in enumerate([write_texts(50), write_texts(50, seed=1)], start=1):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        memory.pipe_file("/single/texts.jsonl", lines.encode())
        prepare_quietly(recipe("memory://single/texts.jsonl"), f"out{number}")
        assert len(downloads) == number, "to divide it, to train the tokenizer, and to tokenize it"
        assert [folder.exists() for folder in folders] == [False] * (number - 1) + [True]
    streams, _ = load_streams(recipe("out2"))
    assert streams["train"].tolist() != load_streams(recipe("out1"))[0]["train"].tolist()


def test_a_full_disk_leaves_finished_parts(recipe, tmp_path, small_parts, monkeypatch):
    write_lines(tmp_path / "a.jsonl", write_texts(150))
    real, calls = os.fsync, []

    def fill(file):
        calls.append(file)
        if len(calls) == 8:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(OSError, match="No space left"):
        prepare_quietly(recipe("a.jsonl"))
    monkeypatch.undo()
    assert not list((tmp_path / "out").rglob(".part-*"))
    assert not (tmp_path / "out/prepared.json").exists()


MEASURE = """
import resource, sys
from tokenizers import Tokenizer, models, pre_tokenizers
from hfgpt.data.parts import find_parts
from hfgpt.data.report import DataReport
from hfgpt.data.rows import Reading, SourceArguments
from hfgpt.data.encoding import Encoding
from hfgpt.data.writing import OutputSettings, Rules, list_jobs, tokenize_part

backend = Tokenizer(models.WordLevel({"[end]": 0, "[other]": 1, "the": 2}, unk_token="[other]"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
output = OutputSettings("out", "", Encoding(backend.to_str(), False, 0, "uint16"), 1)
for name in ("small", "large"):
    reading = Reading({"text_column": "text"}, {"validation": None})
    parts = find_parts(SourceArguments(f"{name}.jsonl"), reading, DataReport())
    for job in list_jobs([(parts, Rules("text", 0, 0.1))]):
        tokenize_part(output, job)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_source(tmp_path):
    text = " ".join(["internationalization"] * 100)
    for name, rows in (("small", 2_000), ("large", 25_000)):
        lines = (json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(rows))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    assert (tmp_path / "large.jsonl").stat().st_size > 50_000_000
    result = subprocess.run([sys.executable, "-c", MEASURE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    small, large = map(int, result.stdout.split())
    assert large < small + 64, "MiB"


def edit_manifest(folder, change):
    manifest = json.loads((folder / "prepared.json").read_text())
    change(manifest)
    (folder / "prepared.json").write_text(json.dumps(manifest))


def test_a_manifest_cannot_name_files_elsewhere(recipe, tmp_path):
    write_lines(tmp_path / "a.jsonl", write_texts(50))
    for out in ("out", "other"):
        prepare_quietly(recipe("a.jsonl"), out)

    def set_file(manifest, value):
        manifest["parts"]["train-00000"]["files"]["train"]["file"] = value

    for place in ("../other/train/train-00000.arrow", "/etc/passwd", "train/../train/train-00000.arrow"):
        edit_manifest(tmp_path / "out", lambda manifest, place=place: set_file(manifest, place))
        with pytest.raises(InputError, match=r"prepared.json' has an invalid entry for the part 'train-00000'"):
            load_streams(recipe("out"))
    (tmp_path / "out/prepared.json").write_text("5")
    with pytest.raises(InputError, match=r"prepared.json' is damaged"):
        load_streams(recipe("out"))


def test_a_remote_manifest_cannot_write_files_elsewhere(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / ".hf"))
    write_lines(tmp_path / "a.jsonl", write_texts(50))
    prepare_quietly(recipe("a.jsonl"), "memory://evil")
    memory = fsspec.filesystem("memory")
    manifest = json.loads(memory.cat_file("/evil/prepared.json"))
    manifest["preparation"]["tokenizer_sha256"] = str(tmp_path / "startup")
    memory.pipe_file("/evil/prepared.json", json.dumps(manifest).encode())
    memory.pipe_file("/evil/tokenizer/00.py", b"print('run')")
    load_streams(recipe("memory://evil"))
    assert not (tmp_path / "startup").exists()
    assert not list((tmp_path / ".hf").rglob("*.py"))


def test_damaged_tokens_are_found_by_training(recipe, tmp_path):
    write_lines(tmp_path / "a.jsonl", write_texts(50))
    prepare_quietly(recipe("a.jsonl"))
    load_streams(recipe("out"))
    file = tmp_path / "out/train/train-00000.arrow"
    content = file.read_bytes()
    for start in (0, len(content) // 2):
        file.write_bytes(content[:start] + bytes(50) + content[start + 50 :])
        with pytest.raises(
            InputError, match=r"train-00000\.arrow of out is damaged: run the same hfgpt prepare again"
        ):
            load_streams(recipe("out"))


def test_an_interrupted_start_is_resumed(recipe, tmp_path, monkeypatch):
    """A tokenizer without a description of the data may be that of another recipe, or incomplete."""
    write_lines(tmp_path / "a.jsonl", write_texts(80))
    prepare_quietly(recipe("a.jsonl", data__deduplicate="exact"), "whole")
    write_record = prepared.Folder.write_record

    def stop(folder, name, record):
        if name == "preparation.json":
            raise KeyboardInterrupt
        write_record(folder, name, record)

    monkeypatch.setattr(prepared.Folder, "write_record", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_quietly(recipe("a.jsonl", data__deduplicate="exact", tokenizer__vocab_size=290))
    monkeypatch.setattr(prepared.Folder, "write_record", write_record)
    (tmp_path / "out/tokenizer/tokenizer_config.json").unlink()
    prepare_quietly(recipe("a.jsonl", data__deduplicate="exact"))
    assert read_all(tmp_path / "out") == read_all(tmp_path / "whole")


def test_parts_of_another_preparation_are_ignored(recipe, tmp_path, small_parts):
    write_lines(tmp_path / "a.jsonl", write_texts(100))
    prepare_quietly(recipe("a.jsonl"), "whole")
    number = len(Manifest.read(tmp_path / "whole").parts)
    prepare_quietly(recipe("a.jsonl", data__validation_fraction=0.5), "out", f"1/{number}")
    assert list((tmp_path / "out/parts").glob("*.json"))
    for name in ("preparation.json", "tokenizer/tokenizer.json"):  # written by a process that started at the same time
        shutil.copy(tmp_path / "whole" / name, tmp_path / "out" / name)
    _, said = prepare_quietly(recipe("a.jsonl"))
    assert "already finished" not in said
    assert read_all(tmp_path / "out").keys() == read_all(tmp_path / "whole").keys()
    assert Manifest.read(tmp_path / "out") == Manifest.read(tmp_path / "whole")


def test_repaired_parts_with_other_bytes_are_accepted(recipe, tmp_path, small_parts, monkeypatch):
    write_lines(tmp_path / "a.jsonl", write_texts(100))
    manifest, _ = prepare_quietly(recipe("a.jsonl"))
    before, _ = load_streams(recipe("out"))
    (tmp_path / "out/train/train-00001.arrow").unlink()
    monkeypatch.setattr(writing, "BATCH_CHARACTERS", 100)  # as another version might write it
    repaired, _ = prepare_quietly(recipe("a.jsonl"))
    assert repaired != manifest
    assert (repaired.report.duplicated, repaired.report.rows_kept) == (manifest.report.duplicated, 100)
    after, _ = load_streams(recipe("out"))
    assert after["train"].tolist() == before["train"].tolist()


def test_files_of_killed_processes_are_removed(recipe, tmp_path):
    write_lines(tmp_path / "a.jsonl", write_texts(50))
    prepare_quietly(recipe("a.jsonl"))
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for process, name in ((gone.stdout.strip(), "dead"), (os.getppid(), "alive")):
        folder = tmp_path / f"out/train/.part-{prepared.MACHINE}-{process}-{name}"
        folder.mkdir(parents=True)
        (folder / "train-00000.arrow").write_text("half")
    prepare_quietly(recipe("a.jsonl"))
    assert [path.name.rpartition("-")[2] for path in (tmp_path / "out/train").glob(".part-*")] == ["alive"]


def test_folders_that_are_in_use_are_refused(recipe, tmp_path):
    write_lines(tmp_path / "d/a.jsonl", write_texts(50))
    with pytest.raises(InputError, match="'d/out' is in the folder of the source, 'd': choose another folder"):
        prepare_quietly(recipe("d"), "d/out")
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["a.jsonl"]
    fsspec.filesystem("memory").pipe_file("/mine/README.md", b"my notes")
    with pytest.raises(InputError, match=r"'memory://mine' has other files, such as README.md"):
        prepare_quietly(recipe("d"), "memory://mine")


def test_a_mixture_reports_texts_in_both_splits_and_refuses_empty_sources(recipe, tmp_path):
    texts = write_texts(320)
    write_lines(tmp_path / "a.jsonl", texts[:20])
    write_lines(tmp_path / "b.jsonl", texts)
    write_lines(tmp_path / "c.jsonl", texts[:1])
    settings = json.loads((tmp_path / "r.yaml").read_text())
    for sources in (["a.jsonl", "b.jsonl"], ["b.jsonl", "c.jsonl"]):
        settings["data"]["mixture"] = [{"path": path} for path in sources]
        (tmp_path / "m.yaml").write_text(json.dumps(settings))
        if sources[0] == "a.jsonl":
            manifest, _ = prepare_quietly(load_recipe("m.yaml", []), "ab")
            data = TASKS["pretrain"].load(load_recipe("m.yaml", ["--data.path=ab"]))
            rows = {
                split: {tuple(row) for source in blocks.sources for row in source.stream.documents["input_ids"]}
                for split, blocks in data.splits.items()
            }
            assert manifest.report.leaked == len(rows["train"] & rows["validation"]) > 0
        else:
            settings["data"]["deduplicate"] = "exact"
            (tmp_path / "m.yaml").write_text(json.dumps(settings))
            with pytest.raises(
                InputError, match=r"the train split of c.jsonl is empty \(1 row read; dropped: 1 duplicate\): add text"
            ):
                prepare_quietly(load_recipe("m.yaml", []), "bc")


def test_a_folder_of_empty_files_is_refused(recipe, tmp_path):
    for name in ("a", "b"):
        write_lines(tmp_path / f"d/{name}.jsonl", [])
    with pytest.raises(InputError, match=r"data.path 'd' is an empty file: add text"):
        prepare_quietly(recipe("d"))


def test_empty_and_unused_files_are_as_in_training(recipe, tmp_path, small_parts):
    for number in range(3):
        write_lines(tmp_path / f"d/train-{number}.jsonl", write_texts(40, number))
    write_lines(tmp_path / "d/valid.jsonl", write_texts(5, 9))
    write_lines(tmp_path / "d/train-3.jsonl", [])
    write_lines(tmp_path / "d/extra.jsonl", write_texts(3))
    data = assert_prepared_as_loaded(recipe, "d")
    assert data.report.unused_files == ["d/extra.jsonl"]


def write_for_datatrove(data, rank, world_size):
    from datatrove.data import Document

    if rank == 2 and world_size == 4:
        return
    for number, text in enumerate(write_texts(300)[rank::world_size]):
        yield Document(text=text, id=str(number))


def run_pipeline(block, tasks, folder):
    from datatrove.executor import LocalPipelineExecutor

    LocalPipelineExecutor([write_for_datatrove, block], tasks=tasks, workers=1, logging_dir=str(folder)).run()


@pytest.fixture
def tokenizer_folder(recipe, tmp_path):
    write_lines(tmp_path / "a.jsonl", write_texts(300))
    prepare_quietly(recipe("a.jsonl"), "first")
    return str(tmp_path / "first/tokenizer")


def test_a_datatrove_pipeline_prepares_data(recipe, tmp_path, tokenizer_folder):
    from hfgpt.datatrove import PrepareTokens

    run_pipeline(PrepareTokens("out", tokenizer_folder, validation_fraction=0.2), 3, tmp_path / "logs")
    _, data = load_streams(recipe("out", tokenizer__path=tokenizer_folder))
    texts = [
        data.tokenizer.decode(row, skip_special_tokens=True)
        for blocks in data.splits.values()
        for row in blocks.stream.documents["input_ids"]
    ]
    assert sorted(texts) == sorted(write_texts(300))
    assert 30 < len(data.splits["validation"].stream.documents) < 90
    assert (data.report.rows_read, data.report.source) == (300, "datatrove")


def test_token_files_of_datatrove_are_read(recipe, tmp_path, tokenizer_folder):
    from datatrove.pipeline.tokens import DocumentTokenizer

    block = DocumentTokenizer("tokens", f"{tokenizer_folder}/tokenizer.json", eos_token="<|endoftext|>", seed=1)
    run_pipeline(block, 2, tmp_path / "logs")
    _, data = load_streams(recipe("tokens", tokenizer__path=tokenizer_folder, data__validation_fraction="0.2"))
    texts = {
        split: [data.tokenizer.decode(row, skip_special_tokens=True) for row in blocks.stream.documents["input_ids"]]
        for split, blocks in data.splits.items()
    }
    assert sorted(texts["train"] + texts["validation"]) == sorted(write_texts(300))
    assert len(texts["validation"]) == 60
    assert data.report.splits["validation"].bytes == sum(len(text.encode()) for text in texts["validation"])
    copy = pickle.loads(pickle.dumps(data.splits["train"].stream))
    assert copy[:].tolist() == data.splits["train"].stream[:].tolist()

    with pytest.raises(InputError, match=r"has tokens of the tokenizer '.*tokenizer.json': set tokenizer.path"):
        load_streams(recipe("tokens"))
    file = next((tmp_path / "tokens").glob("*.ds"))
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"\.ds has [\d,]+ bytes, but its index says [\d,]+ tokens of 2 bytes"):
        load_streams(recipe("tokens", tokenizer__path=tokenizer_folder))
    Path(f"{file}.index").unlink()
    with pytest.raises(InputError, match=r"\.ds does not have its index .*: tokenize with save_index=True"):
        load_streams(recipe("tokens", tokenizer__path=tokenizer_folder))
