"""Prepared data: the token files that `hfgpt prepare` writes, in a folder or at any URL that fsspec can write to.

prepared.json       the manifest, written last: all parts, with sizes and checksums, and the data report
preparation.json    what the data is made from; every process that writes parts checks it
tokenizer/          the tokenizer
train/, validation/ one Arrow file per part, with a row of token ids per document
README.md           a dataset card, with which `datasets.load_dataset` finds the splits
parts/              only until all parts are finished: the record of each, and a digest of each document
"""

import contextlib
import hashlib
import json
import os
import posixpath
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

import datasets
import fsspec
from fsspec.implementations.local import LocalFileSystem

from hfgpt.data.cache import ABANDONED_AFTER_SECONDS, cache_folder
from hfgpt.data.files import PREPARATION_FILE, describe_file, family, is_prepared, is_url, without_secrets
from hfgpt.data.report import DataReport
from hfgpt.data.streams import TokenStream
from hfgpt.errors import InputError
from hfgpt.records import PLACE, REQUIRED, Record
from hfgpt.saving import appearing_folder

FORMAT_VERSION = 1
TOKENIZER_FOLDER, RECORDS_FOLDER = "tokenizer", "parts"
SPLITS = ("train", "validation")
DOWNLOADS = 4  # files at the same time
LEFTOVER = ".part-"  # temporary folders begin with this
MACHINE = f"{uuid.getnode():x}"  # more often unique than a host name, in a folder that several machines share
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja"),
)
CARD = """---
configs:
- config_name: default
  data_files:
{files}---

Token ids, one document per row, prepared by `hfgpt prepare` for `hfgpt train RECIPE --data.path FOLDER`. The tokenizer
is in `tokenizer/`; `prepared.json` lists the files with their sizes, numbers of tokens and checksums.
"""


@dataclass(kw_only=True)
class TokenFile(Record):
    """One Arrow file of a split.

    Args:
        file: Its path in the folder.
        documents, characters, bytes: Documents, and the sizes of their texts.
        tokens, unknown_tokens: Tokens, and how many of them are the unknown token.
        size: Bytes of the file.
        sha256: SHA-256 of the file.
    """

    file: Annotated[str, REQUIRED]
    documents: Annotated[int, REQUIRED]
    characters: Annotated[int, REQUIRED]
    bytes: Annotated[int, REQUIRED]
    tokens: Annotated[int, REQUIRED]
    unknown_tokens: Annotated[int, REQUIRED]
    size: Annotated[int, REQUIRED]
    sha256: Annotated[str, REQUIRED]


@dataclass(kw_only=True)
class PartRecord(Record):
    """A finished part of the source.

    Args:
        name: The part, such as `train-00007`.
        preparation: SHA-256 of what the data is made from.
        rows_read: Rows of the part.
        dropped: Reason -> rows dropped.
        files: Split -> token file; none for a split without a document of this part.
        source: Index of its source in the mixture.
    """

    name: Annotated[str, REQUIRED]
    preparation: Annotated[str, REQUIRED]
    rows_read: Annotated[int, REQUIRED]
    dropped: Annotated[dict[str, int], REQUIRED]
    files: Annotated[dict[str, TokenFile], REQUIRED]
    source: int = 0


@dataclass(kw_only=True)
class Preparation(Record):
    """What prepared data is made from.

    Args:
        version: Version of the format.
        source: Source of the text, or a description of several.
        sources: Each source of a mixture.
        source_sha256: Fingerprint of the source: names, sizes and times of files, or the commit of a Hub dataset.
        tokenizer_sha256: Fingerprint of the tokenizer.
        settings: Recipe key -> value, of the keys that determine the tokens.
        split_by: As in the data report.
        parts: Split of the source -> number of parts.
        weights: The share of each source of a mixture; one source: 1.
    """

    FILE: ClassVar[str] = PREPARATION_FILE

    version: Annotated[int, REQUIRED]
    source: Annotated[str, REQUIRED, PLACE]
    sources: Annotated[list[str], REQUIRED]
    source_sha256: Annotated[str, REQUIRED]
    tokenizer_sha256: Annotated[str, REQUIRED]
    settings: Annotated[dict[str, Any], REQUIRED]
    split_by: Annotated[str, REQUIRED]
    parts: Annotated[dict[str, int], REQUIRED]
    weights: list[float] = field(default_factory=lambda: [1.0])

    @property
    def sha256(self) -> str:
        """Fingerprint of all entries."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def compare(self, earlier: "Preparation", out: str):
        """Checks that an earlier process prepared the same data.

        Raises:
            InputError: It did not.
        """
        different = [
            f"{key} was {earlier.settings.get(key)!r} and is {value!r}"
            for key, value in self.settings.items()
            if earlier.settings.get(key) != value
        ]
        names = {"version": "the version of the format", "source": "data.path", "tokenizer_sha256": "the tokenizer"}
        names |= {"source_sha256": "the files of the source (names, sizes or times)", "parts": "the number of parts"}
        different += [what for name, what in names.items() if getattr(self, name) != getattr(earlier, name)]
        if different:
            raise InputError(
                f"{out} was prepared from something else: {'; '.join(different)}; choose another folder, or delete it"
            )


@dataclass(kw_only=True)
class Manifest(Record):
    """All parts of prepared data.

    Args:
        preparation: What the data is made from.
        report: The data report, before blocks are counted.
        parts: Name -> part.
    """

    FILE: ClassVar[str] = "prepared.json"

    preparation: Annotated[Preparation, REQUIRED]
    report: Annotated[DataReport, REQUIRED]
    parts: Annotated[dict[str, PartRecord], REQUIRED]

    def files(self, split: str, source: int | None = None) -> list[TokenFile]:
        """The token files of a split, or those of one source, in the order of the stream."""
        parts = (part for _, part in sorted(self.parts.items()) if source in (None, part.source))
        return [part.files[split] for part in parts if split in part.files]


def _is_whole(system: fsspec.AbstractFileSystem, place: str, file: TokenFile, checksum: bool = True) -> bool:
    if not system.exists(place) or system.size(place) != file.size:
        return False
    if not checksum:
        return True
    with system.open(place) as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256


def _is_verified(path: Path, file: TokenFile) -> bool:
    """As `_is_whole`, of a local file; it is not read if it is unchanged since it was verified."""
    if not path.is_file():
        return False
    identity = hashlib.sha256(json.dumps([describe_file(path), file.sha256]).encode()).hexdigest()
    verified = cache_folder(None) / "verified" / identity
    if not verified.exists():
        if not _is_whole(LocalFileSystem(), str(path), file):
            return False
        verified.parent.mkdir(exist_ok=True)
        verified.touch()
    return True


def _prefix() -> str:
    return f"{LEFTOVER}{MACHINE}-{os.getpid()}-"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Folder:
    """A folder at a local path or a URL, whose files appear complete or not at all.

    Args:
        place: The path or URL.

    Raises:
        InputError: It cannot be opened.
    """

    def __init__(self, place: str):
        self.place = place
        with self._explain("open"):
            self._system, self._root = fsspec.url_to_fs(place if is_url(place) else str(Path(place).expanduser()))
        self.is_local = isinstance(self._system, LocalFileSystem)

    def __str__(self) -> str:
        return without_secrets(self.place)

    def path(self, name: str = "") -> Path:
        """The local path of a file."""
        return Path(self._root, name)

    def exists(self, name: str) -> bool:
        """Whether a file exists."""
        with self._explain("read"):
            self._system.invalidate_cache()
            return self._system.exists(self._join(name))

    def is_whole(self, file: TokenFile, checksum: bool) -> bool:
        """Whether a token file exists, with its size and, if it is to be read for that, its checksum."""
        with self._explain("read"):
            self._system.invalidate_cache()
            return _is_whole(self._system, self._join(file.file), file, checksum)

    def list_names(self, name: str) -> list[str]:
        """The names of the files in a subfolder; none if it does not exist."""
        with self._explain("read"):
            self._system.invalidate_cache()
            found = self._system.find(self._join(name), maxdepth=1)
        return sorted(posixpath.basename(path) for path in found)

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if it does not exist."""
        with self._explain("read"):
            try:
                return self._system.cat_file(self._join(name))
            except FileNotFoundError:
                return None

    def read_object(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file; None if the file does not exist.

        Raises:
            InputError: It is not valid JSON.
        """
        content = self.read(name)
        if content is None:
            return None
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"'{self}/{name}' is not valid JSON ({error}): delete it and prepare again") from error
        if not isinstance(found, dict):
            raise InputError(f"'{self}/{name}' is damaged: delete it and prepare again")
        return found

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """A path for a local file, which on success is moved or uploaded to `name` if it exists.

        A killed process leaves its folder, whose name says which process it was.
        """
        target = self.path(name)
        if self.is_local:
            target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_prefix(), dir=target.parent if self.is_local else None) as folder:
            temporary = Path(folder, target.name)
            yield temporary
            if not temporary.exists():
                return
            if self.is_local:
                with open(temporary, "rb+") as file:
                    os.fsync(file)
                os.replace(temporary, target)
            else:
                with self._explain("write to"):
                    self._system.put_file(str(temporary), self._join(name))

    def download(self, file: TokenFile) -> Path:
        """A copy of a remote token file in the cache, where later runs find it.

        Raises:
            InputError: It cannot be read, or is damaged.
        """
        copy = cache_folder(None) / "tokens" / f"{file.sha256}.arrow"
        if not _is_verified(copy, file):
            copy.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=_prefix(), dir=copy.parent) as folder:
                temporary = Path(folder, copy.name)
                with self._explain("read"):
                    self._system.get_file(self._join(file.file), str(temporary))
                if not _is_whole(LocalFileSystem(), str(temporary), file):
                    raise InputError(f"{file.file} of {self} is damaged: run the same hfgpt prepare again")
                os.replace(temporary, copy)
        return copy

    def write(self, name: str, content: str | bytes):
        """Writes a file."""
        with self.new_file(name) as file:
            file.write_bytes(content.encode() if isinstance(content, str) else content)

    def write_record(self, name: str, record: Record):
        """Writes a record as JSON."""
        self.write(name, json.dumps(record.to_dict(), indent=2, ensure_ascii=False) + "\n")

    def remove(self, name: str):
        """Removes a subfolder, if it exists."""
        if self.is_local:
            shutil.rmtree(self.path(name), ignore_errors=True)  # another process may remove it, too
            return
        with self._explain("write to"), contextlib.suppress(FileNotFoundError):
            self._system.rm(self._join(name), recursive=True)

    def remove_leftovers(self):
        """Removes the files of killed processes of this machine, and those that are older than a day."""
        for folder in self.path().rglob(f"{LEFTOVER}*") if self.is_local else ():
            process = folder.name.removeprefix(f"{LEFTOVER}{MACHINE}-").partition("-")[0]
            with contextlib.suppress(FileNotFoundError):
                is_old = folder.stat().st_mtime < time.time() - ABANDONED_AFTER_SECONDS
                if is_old or (process.isdecimal() and not _is_running(int(process))):
                    shutil.rmtree(folder, ignore_errors=True)

    def entries(self) -> list[str]:
        """The names of files and folders, without hidden ones; none if the folder does not exist."""
        with self._explain("read"):
            self._system.invalidate_cache()
            try:
                names = map(
                    posixpath.basename, (path.rstrip("/") for path in self._system.ls(self._root, detail=False))
                )
            except FileNotFoundError:
                return []
        return sorted(name for name in names if name[:1] not in (".", ""))

    def _join(self, name: str) -> str:
        return posixpath.join(self._root, name) if name else self._root

    @contextlib.contextmanager
    def _explain(self, action: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except ImportError as error:
            raise InputError(f"cannot {action} '{self}', which needs another package ({error}): install it") from error
        except OSError as error:
            if error.errno is not None and self.place and not is_url(self.place):
                raise  # names the local file
            raise self._failed(action, error) from error
        # Buckets and their libraries raise all kinds of errors, and only the user can fix them.
        except Exception as error:
            raise self._failed(action, error) from error

    def _failed(self, action: str, error: Exception) -> InputError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return InputError(f"cannot {action} '{self}' ({reason}): check the URL, the login and the network")


@dataclass
class PreparedData:
    """Prepared data, with its files on this machine.

    Args:
        place: The folder or URL.
        manifest: The manifest.
        files: Name of each token file -> its local path.
        tokenizer: Local folder of the tokenizer.
    """

    place: str
    manifest: Manifest
    files: dict[str, Path]
    tokenizer: Path

    @property
    def weights(self) -> list[float]:
        """The share of each source of a mixture."""
        return self.manifest.preparation.weights

    def stream(self, *splits: str, source: int | None = None) -> TokenStream:
        """The token stream of one or more splits.

        Args:
            splits: The splits, in order.
            source: Index of a source of a mixture; None: all.

        Raises:
            InputError: A file is missing or damaged.
        """
        files = [file for split in splits for file in self.manifest.files(split, source)]
        return TokenStream(datasets.concatenate_datasets([self._open(file) for file in files]))

    def _open(self, file: TokenFile) -> datasets.Dataset:
        path = self.files[file.file]
        if not _is_verified(path, file):
            fault = "damaged" if path.exists() else "missing"
            raise InputError(
                f"{file.file} of {self.place} is {fault}: run the same hfgpt prepare again, which repairs it"
            )
        return datasets.Dataset.from_file(str(path))


def find_prepared(place: str | None) -> PreparedData | None:
    """Prepared data at a path or URL, downloaded if it is remote; None if there is something else.

    Raises:
        InputError: It is incomplete or damaged.
    """
    if not place or not (is_prepared(place) or (is_url(place) and not family(Path(urlsplit(place).path)))):
        return None
    folder = Folder(place)
    manifest = read_manifest(folder)
    if manifest is None:
        if preparation := read_preparation(folder):
            finished, total = len(read_part_records(folder, preparation)), sum(preparation.parts.values())
            raise InputError(
                f"{folder} is incomplete, {finished:,} of {total:,} parts are finished: run the same hfgpt prepare "
                "again to finish it"
            )
        return None
    if manifest.preparation.version != FORMAT_VERSION:
        raise InputError(
            f"{folder} has version {manifest.preparation.version} of the format, this hfgpt reads {FORMAT_VERSION}: "
            "prepare it again"
        )
    token_files = [file for split in SPLITS for file in manifest.files(split)]
    if folder.is_local:
        files = {file.file: folder.path(file.file) for file in token_files}
        return PreparedData(str(folder), manifest, files, folder.path(TOKENIZER_FOLDER))
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        copies = list(pool.map(folder.download, token_files))
    files = {file.file: copy for file, copy in zip(token_files, copies, strict=True)}
    names = [name for name in folder.list_names(TOKENIZER_FOLDER) if name in TOKENIZER_FILES]
    contents = {name: folder.read(f"{TOKENIZER_FOLDER}/{name}") for name in names}
    tokenizer = cache_folder(None) / "tokenizers" / hashlib.sha256(repr(contents).encode()).hexdigest()
    with _appearing_copy(tokenizer) as copy:
        for name, content in contents.items() if copy else ():
            (copy / name).write_bytes(content)
    return PreparedData(str(folder), manifest, files, tokenizer)


@contextlib.contextmanager
def _appearing_copy(folder: Path) -> Iterator[Path | None]:
    """As `appearing_folder`; None if the folder exists, and another process may create it meanwhile."""
    if folder.is_dir():
        yield None
        return
    try:
        with appearing_folder(folder) as staging:
            yield staging
    except OSError:
        if not folder.is_dir():
            raise


def read_preparation(folder: Folder) -> Preparation | None:
    """What the data in a folder is made from; None if nothing was prepared there."""
    content = folder.read_object(Preparation.FILE)
    return Preparation.from_dict(content, Path(str(folder), Preparation.FILE)) if content else None


def read_manifest(folder: Folder) -> Manifest | None:
    """The manifest; None if not all parts are finished.

    Raises:
        InputError: It is damaged, or names files outside of the folder.
    """
    content = folder.read_object(Manifest.FILE)
    if content is None:
        return None
    manifest = Manifest.from_dict(content, Path(str(folder), Manifest.FILE))
    for name, part in manifest.parts.items():
        for split, file in part.files.items():
            is_valid = re.fullmatch(r"(train|validation)-\d+", name) and re.fullmatch("[0-9a-f]{64}", file.sha256)
            if not is_valid or split not in SPLITS or file.file != f"{split}/{name}.arrow":
                raise InputError(
                    f"'{folder}/{Manifest.FILE}' has an invalid entry for the part {name!r}: prepare again"
                )
    return manifest


def read_part_records(folder: Folder, preparation: Preparation) -> dict[str, PartRecord]:
    """The records of finished parts of a preparation, by name; those of another one are ignored."""
    records = {}
    for name in folder.list_names(RECORDS_FOLDER):
        found = folder.read_object(f"{RECORDS_FOLDER}/{name}") if name.endswith(".json") else None
        if found is not None:
            record = PartRecord.from_dict(found, Path(str(folder), RECORDS_FOLDER, name))
            if record.preparation == preparation.sha256:
                records[record.name] = record
    return records
