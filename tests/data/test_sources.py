"""Every kind of source gives exactly the text that was written, and every fault is reported. All checks are exact."""

import csv
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from hfgpt.data import files, rows, sources
from hfgpt.data.files import find_files, read_rows
from hfgpt.data.report import DataReport
from hfgpt.data.sources import DataArguments, load_documents, shorten
from hfgpt.errors import InputError

TEXTS = [
    "NA",
    "007",
    'says "hi", twice',
    " käse €\t𝄞 ",
    "two\nlines",
    "\u2028 \x85 \x1c end",
    "null",
    "1.50",
    "True",
    "x\r\ny",
]


@pytest.fixture
def load(tmp_path):
    """Loads `tmp_path / path` (or a named source) and returns both splits and the report."""

    def load(path, seed=0, check=True, **arguments):
        report = DataReport()
        cache = tmp_path / ".cache"
        path = path if path.startswith(("synthetic:", "hub/")) or "://" in path else str(tmp_path / path)
        splits = load_documents(DataArguments(path=path, cache_dir=str(cache), **arguments), seed, report)
        assert not check or not list(cache.glob(".*")), "no partial files are left"
        return splits["train"]["text"][:], splits["validation"]["text"][:], report

    return load


def table_bytes(delimiter):
    if delimiter == "\t":
        rows = [text for text in TEXTS if not set("\t\n") & set(text)]
        return "".join(f"{row}\n" for row in ["id\ttext", *(f"{i}\t{row}" for i, row in enumerate(rows))]), rows
    out = io.StringIO(newline="")
    csv.writer(out).writerows([["id", "text"], *enumerate(TEXTS)])
    return out.getvalue(), TEXTS


def written_rows(suffix):
    """The bytes of a file with TEXTS, and the texts in it."""
    if suffix == ".json":
        return json.dumps([{"id": i, "text": text} for i, text in enumerate(TEXTS)], indent=1).encode(), TEXTS
    if suffix == ".jsonl":
        lines = [json.dumps({"id": i, "text": text}, ensure_ascii=False) for i, text in enumerate(TEXTS)]
        return "\n\n".join(lines).encode(), TEXTS
    if suffix == ".parquet":
        out = io.BytesIO()
        pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), out)
        return out.getvalue(), TEXTS
    if suffix in (".csv", ".tsv"):
        text, rows = table_bytes("," if suffix == ".csv" else "\t")
        return text.encode(), rows
    text = "".join(f"{text}\r\n\n" for text in TEXTS)
    return text.encode(), [text]


def compress(data, compression):
    if compression == ".gz":
        # Two members, one after the other, are one valid file.
        return gzip.compress(data[:7]) + gzip.compress(data[7:])
    return zstandard.ZstdCompressor().compress(data) if compression else data


KINDS = [
    (suffix, compression)
    for suffix in (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv")
    for compression in ("", ".gz", ".zst")
]


@pytest.mark.parametrize(("suffix", "compression"), [*KINDS, (".parquet", "")])
def test_every_kind_of_file_gives_its_texts_unchanged(load, tmp_path, suffix, compression):
    data, texts = written_rows(suffix)
    content = compress(data, compression)
    name = "data" + suffix + compression
    (tmp_path / name).write_bytes(content)
    assert [row["text"] for row in read_rows(tmp_path / name, columns=["text"])] == texts
    train, validation, report = load(name, validation_fraction=0.5)
    if len(texts) == 1:
        assert train[0] + validation[0] == texts[0]
        assert report.split_by == "position"
    else:
        assert sorted(train + validation) == sorted(texts)
        assert report.split_by == "documents"
        assert (report.rows_read, report.rows_kept, report.dropped) == (len(texts), len(texts), {})
    assert report.sha256 == hashlib.sha256(content).hexdigest()
    parts = report.splits.values()
    assert sum(part.characters for part in parts) == sum(map(len, texts))
    assert sum(part.bytes for part in parts) == sum(len(text.encode()) for text in texts)


def test_one_document_keeps_its_line_endings_and_loses_only_the_byte_order_mark(load, tmp_path):
    text = "\n\n a\r\nb\rc\x0b\u2028 \n \n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    train, validation, _ = load("a.txt")
    assert train[0] + validation[0] == text


def test_characters_across_chunk_boundaries_are_kept(load, tmp_path, monkeypatch):
    monkeypatch.setattr("hfgpt.data.files.CHUNK", 3)
    text = "é€𝄞a\n" * 20
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(text.encode() + b"\xff")
    assert "".join(row["text"] for row in read_rows(tmp_path / "a.txt")) == text
    with pytest.raises(InputError, match=f"byte 0xff at offset {len(text.encode())};"):
        list(read_rows(tmp_path / "b.txt"))


@pytest.mark.parametrize(
    ("sample_by", "documents"),
    [
        ("document", ["a\nb\r\n \n\n  c \nd"]),
        ("paragraph", ["a\nb", "  c \nd"]),
        ("line", ["a", "b", " ", "", "  c ", "d"]),
    ],
)
def test_how_a_text_file_is_divided_into_documents(tmp_path, sample_by, documents):
    (tmp_path / "a.txt").write_bytes(b"a\nb\r\n \n\n  c \nd")
    assert [row["text"] for row in read_rows(tmp_path / "a.txt", sample_by)] == documents


def test_rows_without_text_are_dropped_and_counted_by_reason(load, tmp_path):
    rows = ["one", "two", "", " \n", None, 3, "\ud800", "one"]
    lines = [json.dumps({"text": row}) for row in rows] + ["{}"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    train, validation, report = load("a.jsonl")
    assert sorted(train + validation) == ["one", "one", "two"]
    assert report.dropped == {"empty": 2, "not text": 4}
    assert (report.rows_read, report.rows_kept, report.duplicated) == (9, 3, 1)
    assert "dropped 2: empty" in report.summary()


def test_json_lists_of_texts_and_json_lines_in_json_files(tmp_path):
    (tmp_path / "a.json").write_text('["x", "y"]')
    (tmp_path / "b.json").write_text('{"text": "x"}\n{"text": "y"}\n')
    for name in ("a.json", "b.json"):
        assert [row["text"] for row in read_rows(tmp_path / name)] == ["x", "y"]


def test_a_table_without_header_line_is_read_by_position(load, tmp_path):
    (tmp_path / "a.tsv").write_text('ham\t"quoted\nspam\tsecond"\nham\tthird\n')
    train, validation, report = load("a.tsv", text_column="1")
    assert sorted(train + validation) == ['"quoted', 'second"', "third"]
    assert report.rows_read == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt' is an empty file: add text"),
        ("a.txt", b" \n\t", "has no text (1 row read; dropped: 1 empty)"),
        ("a.txt", b"abc\0def", "a.txt is not text: byte 3 is NUL"),
        ("a.txt", b"caf\xe9 noir", "a.txt is not valid UTF-8: byte 0xe9 at offset 3; convert it to UTF-8"),
        ("a.txt.gz", gzip.compress(b"caf\xe9 noir", mtime=0), "byte 0xe9 at offset 3"),
        ("a.txt", b"x", "one document of 1 character leaves the train split empty"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-9], "is truncated .gz data"),
        ("a.txt.zst", zstandard.compress(b"abc" * 99)[:-5], "is truncated .zst data"),
        ("a.txt.gz", b"plain", "is not valid .gz"),
        ("a.txt.zst", b"plain", "is not valid .zst"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": }', "a.jsonl is not valid JSON: Expecting value in line 3, column 10"),
        ("a.json", b'[{"text": "a"},\n {"text" "b"}]', "a.json is not valid JSON: Expecting ':' delimiter in line 2"),
        ("a.jsonl", b'{"text": "a"}\n[1]', "a.jsonl: line 2 has the type list; it must be an object"),
        (
            "a.jsonl",
            b'{"text": "x"}\n' + b"[" * 9000 + b"]" * 9000,
            "a.jsonl is not valid JSON: nested too deeply in line 2",
        ),
        ("a.json", b"[" * 9000 + b"]" * 9000, "a.json is not valid JSON: nested too deeply"),
        (
            "a.jsonl",
            b'{"text": "x"}\n' + b"9" * 5000,
            "a.jsonl is not valid JSON: Exceeds the limit (4300 digits) for integer",
        ),
        ("a.json", b'{"id": 1, "body": "x"}', "'text' is not a column of {path}, which has: 'id', 'body'"),
        ("a.csv", b"id,body\n1,x\n", "'text' is not a column of {path}, which has: 'id', 'body'"),
        ("a.csv", b"id,text\n1,x\n2,y,z\n", "row 3 has 3 fields, but the first has 2"),
        ("a.csv", b'id,text\n1,"x"y\n', "is not a valid table"),
        ("a.tsv", b"id\ttext\n1\n", "row 2 has 1 fields, but the first has 2"),
        ("a.parquet", b"PAR1", "is not a valid Parquet file"),
        ("a.docx", b"x", "has the unsupported file type '.docx'; supported: .txt, .md"),
        ("a.parquet.gz", b"x", "has the unsupported file type '.gz'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a"}', "all 2 documents"),
    ],
)
def test_a_fault_in_a_file_is_a_one_line_error(load, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load(name)
    assert message.format(path=path) in str(error.value)
    assert "\n" not in str(error.value)


BOMBS = {
    "a.txt": (
        b"a" * 10**7,
        "line 1: one row has more than",
        ": set data.sample_by to paragraph, or decompress it first",
    ),
    "a.json": (b'"' + b"a" * 10**7, "line 1: one row has more than", "files: decompress it first"),
    "a.jsonl": (b'{"text": "x"}\n{"text": "' + b"a" * 10**7, "line 2: one row has more than", "decompress it first"),
    "a.csv": (b"text\nx\n" + b'"' + b'a\n","' * 10**6, ": one row has more than", "decompress it first"),
    "a.tsv": (b"text\nx\n" + b"a" * 10**7, "line 3: one row has more than", "decompress it first"),
}


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("name", BOMBS)
def test_an_endless_row_in_a_compressed_file_is_refused_before_it_is_in_memory(
    name, compression, tmp_path, monkeypatch
):
    monkeypatch.setattr("hfgpt.data.files.CHUNK", 1000)
    monkeypatch.setattr("hfgpt.data.files.LONGEST_DECOMPRESSED", 10**5)
    content, place, remedy = BOMBS[name]
    (tmp_path / f"{name}{compression}").write_bytes(compress(content, compression))
    assert (tmp_path / f"{name}{compression}").stat().st_size < 10**5
    tracemalloc.start()
    with pytest.raises(InputError) as error:
        list(read_rows(tmp_path / f"{name}{compression}", columns=["text"]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**7
    assert place in str(error.value)
    assert "100,000 characters, the limit for compressed files" in str(error.value)
    assert str(error.value).endswith(remedy)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_the_limit_for_one_row_does_not_apply_to_a_compressed_file_of_many_rows(compression, tmp_path, monkeypatch):
    monkeypatch.setattr("hfgpt.data.files.CHUNK", 100)
    monkeypatch.setattr("hfgpt.data.files.LONGEST_DECOMPRESSED", 1000)
    (tmp_path / f"a.csv{compression}").write_bytes(compress(b"text\n" + b"one\n" * 1000, compression))
    assert len(list(read_rows(tmp_path / f"a.csv{compression}", columns=["text"]))) == 1000
    (tmp_path / "a.txt").write_bytes(b"x" * 2000)
    assert len(next(read_rows(tmp_path / "a.txt"))["text"]) == 2000, "the limit is for compressed files only"


def test_a_parquet_file_that_expands_a_hundredfold_is_refused(tmp_path, monkeypatch):
    pq.write_table(pa.table({"id": [1], "text": ["a" * 10**6]}), tmp_path / "a.parquet", compression="zstd")
    assert len(list(read_rows(tmp_path / "a.parquet"))) == 1
    monkeypatch.setattr("hfgpt.data.files.LONGEST_DECOMPRESSED", 10**5)
    with pytest.raises(
        InputError, match=r"decompresses \d+ bytes of text to 1,000,0\d\d, above the limits of 100,000"
    ):
        list(read_rows(tmp_path / "a.parquet"))


SPOIL_PARQUET = """
import sys
from pathlib import Path
from types import SimpleNamespace
from hfgpt.data.files import read_rows
from hfgpt.errors import InputError

path, refused = Path(sys.argv[1]), 0
whole = path.read_bytes()
for place in range(len(whole)):
    path.write_bytes(whole[:place] + b"\\0" + whole[place + 1 :])
    try:
        list(read_rows(path))
    except InputError as error:
        assert "is not a valid Parquet file" in str(error) and "\\n" not in str(error), error
        refused += 1
print(refused)
"""


def test_damaged_parquet_files_give_no_traceback_or_crash(tmp_path):
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "a.parquet")
    # In a separate process, since pyarrow could abort it.
    command = [sys.executable, "-c", SPOIL_PARQUET, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 100, "of its 411 bytes"


def test_wrong_column_of_a_parquet_file(load, tmp_path):
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"data.text_column 'text' is not a column of .*, which has: 'id', 'body'"):
        load("a.parquet")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "stories.tx"}, "does not exist .nearest: .*stories.txt"),
        ({"path": "folder"}, "does not contain a file of a supported type: .txt"),
        ({"path": "*.csv"}, "does not contain a file of a supported type"),
        ({"path": "mixed"}, r"mixes file types, JSON \(b.jsonl\), text \(a.txt\)"),
        ({"path": "synthetic:poems"}, "does not exist; choose one of synthetic:stories"),
        ({"path": "stories.txt", "validation_fraction": 0.0}, "it must be above 0 and below 1"),
        ({"path": "stories.txt", "max_documents": 0}, "data.max_documents is 0; it must be at least 1"),
        ({"path": "stories.txt", "sample_by": "page"}, "it must be document, paragraph or line"),
        ({"path": "stories.txt", "validation_split": "test"}, "is a single file: unset it"),
        (
            {"path": "several", "train_split": "dev"},
            "data.train_split 'dev' does not match any file in .*: a.txt, b.txt",
        ),
        ({"path": "several", "validation_split": "test"}, "'test' does not match any file in .*: a.txt, b.txt"),
    ],
)
def test_invalid_arguments_are_reported(load, tmp_path, arguments, message):
    (tmp_path / "stories.txt").write_text("once\n\nupon")
    for folder, names in {
        "folder": [".hidden.txt", "x.py"],
        "mixed": ["a.txt", "b.jsonl"],
        "several": ["a.txt", "b.txt"],
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text("x")
    with pytest.raises(InputError, match=message):
        load(**arguments)


def test_missing_path_and_missing_permission(load, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"data.path is not set"):
        load_documents(DataArguments(), 0, DataReport())
    (tmp_path / "a.txt").write_text("text")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    # Not chmod: root, as tests may run, reads everything.
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"a.txt cannot be read \(Permission denied\)"):
        load("a.txt")


def test_a_folder_is_read_in_order_of_names_without_hidden_files(tmp_path):
    for name in ("b.txt", "sub/a.md", ".hidden.txt", ".git/a.txt", "note.py", "a.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = [file.relative_to(tmp_path).as_posix() for file in find_files(str(tmp_path))]
    assert names == ["a.txt.gz", "b.txt", "sub/a.md"]
    assert [file.name for file in find_files(str(tmp_path / "*.txt"))] == ["b.txt"]
    assert find_files(str(tmp_path / "absent")) == []


def test_validation_files_of_a_folder(load, tmp_path):
    for name in ("train-1.txt", "train-2.txt", "val.txt", "test.txt"):
        (tmp_path / name).write_text(name)
    train, validation, report = load(".")
    assert (train, validation, report.split_by) == (["train-1.txt", "train-2.txt"], ["val.txt"], "given")
    assert report.unused_files == [str(tmp_path / "test.txt")]
    assert load(".", validation_split="test")[1] == ["test.txt"]


def test_one_document_is_split_as_in_the_book_and_nanogpt(load, tmp_path):
    for size, cut in {20_479: int(0.90 * 20_479), 1_115_394: 1_003_854}.items():
        text = "abcdefghij" * (size // 10) + "x" * (size % 10)
        (tmp_path / "a.txt").write_text(text)
        train, validation, report = load("a.txt")
        assert (train, validation) == ([text[:cut]], [text[cut:]])
        assert report.splits["train"].documents == report.splits["validation"].documents == 1


def test_duplicates_of_a_text_are_never_in_both_splits(load, tmp_path):
    texts = [f"text {i % 40}" for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sides = []
    for seed in (0, 0, 1):
        train, validation, report = load("a.jsonl", seed=seed)
        assert not set(train) & set(validation)
        assert sorted(train + validation) == sorted(texts)
        assert len(validation) in (9, 10)
        assert report.duplicated == 60
        sides.append(validation)
    assert sides[0] == sides[1] != sides[2]


def test_each_split_gets_a_document_even_if_there_are_only_two(load, tmp_path):
    (tmp_path / "a.txt").write_text("x\nx\nx\ny")
    train, validation, _ = load("a.txt", sample_by="line")
    assert (train, validation) == (["x", "x", "x"], ["y"])


def test_max_documents_reads_only_the_first_rows(load, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\nnot even JSON')
    train, validation, report = load("a.jsonl", max_documents=3)
    assert sorted(train + validation) == ["a", "b"]
    assert report.rows_read == 3


def test_synthetic_stories_depend_only_on_the_seed(load):
    first, again, other = (load("synthetic:stories", seed=seed, max_documents=20) for seed in (1, 1, 2))
    assert len(first[0]) == 18
    assert len(first[1]) == 2
    assert first == again
    assert first[2].sha256 != other[2].sha256


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_uses_its_validation_split_and_counts_leaked_texts(load, monkeypatch, streaming):
    def load_dataset(path, name, revision, streaming):
        assert (path, name, revision) == ("hub/set", "small", "v1")
        train = datasets.Dataset.from_dict({"body": ["a", "b", None], "image": [0, 1, 2]})
        validation = datasets.Dataset.from_dict({"body": ["a", "c"], "image": [0, 1]})
        splits = datasets.DatasetDict({"train": train, "validation": validation})
        if not streaming:
            return splits
        return datasets.IterableDatasetDict({key: split.to_iterable_dataset() for key, split in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(rows.HfApi, "dataset_info", lambda self, path, revision: SimpleNamespace(sha=revision))
    arguments = {"name": "small", "revision": "v1", "max_documents": 3 if streaming else None}
    train, validation, report = load("hub/set", text_column="body", **arguments)
    assert (train, validation) == (["a", "b"], ["a", "c"])
    assert (report.leaked, report.duplicated, report.dropped) == (1, 1, {"not text": 1})
    with pytest.raises(InputError, match="'text' is not a column of hub/set, which has: 'body', 'image'"):
        load("hub/set", **arguments)
    with pytest.raises(
        InputError, match=r"data.validation_split 'dev' is not a split of hub/set, which has: train, validation"
    ):
        load("hub/set", text_column="body", validation_split="dev", **arguments)


def test_unreachable_hub_data_is_a_one_line_error(load, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"'hub/set' was not found locally or on the Hub \(Couldn't reach"):
        load("hub/set")


def test_a_second_start_reads_no_files_until_one_has_changed(load, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)))
    first = load("a.jsonl")
    report = first[2]
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    def refuse(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_open", refuse)
        assert load("a.jsonl") == first
        assert load("a.jsonl", seed=1)[2].sha256 == report.sha256, "another seed splits the same texts"
        with pytest.raises(AssertionError, match="read again"):
            load("a.jsonl", max_documents=5)
    path.write_text(path.read_text().replace("text 3", "text x"))  # same length as before
    os.utime(path, ns=(1, 1))
    assert "text x" in [*load("a.jsonl")[0], *load("a.jsonl")[1]]
    os.utime(path, ns=(1, 1))
    path.write_text(path.read_text().replace("text x", "text y"))
    os.utime(path, ns=(1, 1))  # even if its timestamps are reset
    assert "text y" in [*load("a.jsonl")[0], *load("a.jsonl")[1]]


@pytest.mark.parametrize("damage", ["train.arrow", "source.json", "short"])
def test_a_damaged_text_cache_is_rebuilt(load, tmp_path, damage):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    first = load("a.txt", sample_by="paragraph")
    (folder,) = (tmp_path / ".cache").iterdir()
    name = "train.arrow" if damage == "short" else damage
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage == "short":
        (folder / name).write_bytes(content[:-100])
    assert load("a.txt", sample_by="paragraph") == first
    assert (folder / name).read_bytes() == content


def test_the_cache_another_process_wrote_meanwhile_is_used(load, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    keep, others = sources._keep, []

    def keep_second(*arguments):
        monkeypatch.setattr(sources, "_keep", keep)
        others.append(load("a.txt", sample_by="paragraph", check=False))
        keep(*arguments)

    monkeypatch.setattr(sources, "_keep", keep_second)
    assert [load("a.txt", sample_by="paragraph")] == others
    assert len(list((tmp_path / ".cache").iterdir())) == 1


def test_a_plan_reads_only_the_beginning_of_a_text(tmp_path):
    for name, text, sample_by in (("one.txt", "abcdefghi " * 100, "document"), ("many.txt", "abcde\n" * 99, "line")):
        lines = "".join(f"{i:05}\n" for i in range(99)) if sample_by == "line" else text
        (tmp_path / name).write_text(lines)
        report = DataReport()
        arguments = DataArguments(path=str(tmp_path / name), cache_dir=str(tmp_path / ".cache"), sample_by=sample_by)
        texts = load_documents(arguments, 0, report)["train"]
        assert shorten(texts, report.split("train"), 10_000) is texts
        short = shorten(texts, report.split("train"), 50)
        assert sum(map(len, short["text"])) == 50
        assert short["text"][0][:5] == texts["text"][0][:5]


@pytest.fixture
def web_server(tmp_path):
    """Serves the folder `web` locally; returns its address and the requested paths."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    (tmp_path / "web").mkdir()
    handler = functools.partial(Handler, directory=tmp_path / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_a_file_on_the_web_is_read_like_a_local_one(load, tmp_path, web_server, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    address, asked = web_server
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "web" / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    train, validation, report = load(f"{address}/a.jsonl.gz?key=SECRET")
    assert sorted(train + validation) == sorted(TEXTS)
    assert report.source == f"{address}/a.jsonl.gz"
    assert report.sha256 == hashlib.sha256((tmp_path / "web" / "a.jsonl.gz").read_bytes()).hexdigest()
    assert asked == ["/a.jsonl.gz?key=SECRET"], "it is downloaded once"
    assert load(f"{address}/a.jsonl.gz?key=SECRET")[2].sha256 == report.sha256
    assert asked == ["/a.jsonl.gz?key=SECRET"]
    (tmp_path / "web" / "b.txt").write_bytes(b"abc\xff")
    for name, message in {
        "b.txt": "is not valid UTF-8: byte 0xff at offset 3",
        "c.txt": "c.txt' was not found, or its server does not answer: check the URL",
        "d.py": "does not contain a file of a supported type",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            load(f"{address}/{name}?key=SECRET")
        assert "SECRET" not in str(error.value)
    with pytest.raises(InputError, match=r"//127.0.0.1/a.txt' contains a user name") as error:
        load("http://me:SECRET@127.0.0.1/a.txt")
    assert "SECRET" not in str(error.value)
    with pytest.raises(InputError, match=r"'nonsense://a.txt' cannot be read \(Protocol not known: nonsense"):
        load("nonsense://a.txt")


def test_a_folder_on_any_file_system_is_read_by_its_url(load, tmp_path):
    for name in ("b.txt", "sub/a.txt", "note.py"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(name)
    for pattern in ("", "/**/*.txt"):
        train, validation, report = load(f"file://{tmp_path}/folder{pattern}")
        assert sorted(train + validation) == ["b.txt", "sub/a.txt"]
        assert report.rows_read == 2


def test_the_report_is_written_completely(tmp_path):
    report = DataReport(source="a.txt", rows_read=3)
    report.drop("empty", 2)
    report.split("train").documents = 1
    report.split("train").characters = 7
    report.write(tmp_path)
    assert json.loads((tmp_path / "data_report.json").read_text()) == report.to_dict()
    assert [item.name for item in tmp_path.iterdir()] == ["data_report.json"]
    assert report.summary() == "a.txt: 3 rows read, 0 kept\n  dropped 2: empty\n  train: 1 document, 7 characters"
    report.split("train").labels = {"a": 1}
    assert report.summary().endswith("  train: 1 row, 7 characters, 1 a")
