"""Atomic writing of files and folders, and checksums."""

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfgpt.errors import InputError

# Written last, and empty before, so that a folder with checksums is complete. `sha256sum --check` can read it.
CHECKSUMS_FILE = "SHA256SUMS"


def write_text(path: Path, text: str):
    """Writes a file atomically; a symbolic link is replaced, and its target left unchanged."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_text(path: Path, text: str):
    """Adds text to the end of a file, which may not exist; in a mounted bucket, by replacing the file."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except PermissionError:
        if not path.exists():
            raise
        write_text(path, path.read_text(encoding="utf-8") + text)


def write_json(path: Path, content: dict[str, Any]):
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path):
    """Writes the SHA-256 of all files in a folder, recursively, which marks the folder as complete."""
    _share_weights(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_FILE)
    lines = [f"{hash_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    write_text(folder / CHECKSUMS_FILE, "".join(lines))


def read_checksums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, see `write_checksums`; empty if the folder has none."""
    path = folder / CHECKSUMS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}


def _share_weights(folder: Path):
    """Gives weight files the default permissions: safetensors makes them readable only by their owner."""
    usual = folder / f".mode.{os.getpid()}.tmp"
    usual.touch()
    mode = usual.stat().st_mode
    usual.unlink()
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(mode)


def remove_leftovers(folder: Path):
    """Removes temporary files of a killed process from a folder that only this process writes to."""
    for path in [*folder.glob(".staging-*"), *folder.glob(".*.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def staged_files(folder: Path, first: str | None = None) -> Iterator[Path]:
    """A temporary folder whose files are moved to `folder` when all are written; none are if writing fails.

    Args:
        folder: The target folder.
        first: The file to move first, from which a later process can tell what a killed one was doing.
    """
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
    try:
        yield staging
        _share_weights(staging)
        for path in sorted(staging.iterdir(), key=lambda path: (path.name != first, path.name)):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_free(out: Path) -> Path:
    """The normalized path of a folder that can be created.

    Raises:
        InputError: It exists, or is not writable.
    """
    out = Path(os.path.normpath(out))
    if os.path.lexists(out):
        raise InputError(f"'{out}' already exists: choose a new folder")
    check_writable(out)
    return out


def check_model_path(path: str):
    """Rejects paths that cannot be a model, before any request to the Hub.

    Raises:
        InputError: A file, a folder without config.json, or a path that does not exist and is not a Hub id.
    """
    local = Path(path)
    if local.is_file():
        raise InputError(f"'{path}' is a file; a model is a folder with config.json and weights, or a Hub id")
    if local.is_dir():
        if not any((local / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise InputError(
                f"the folder '{path}' does not have a config.json: give the folder of a saved model or a finished run"
            )
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        raise InputError(f"the folder '{path}' does not exist, and it is not a Hub id: check the path")
    elif "/" in path and local.parent.is_dir():
        raise InputError(
            f"the folder '{local.parent}' does not have '{local.name}': check the path; to load '{path}' from the "
            f"Hub, run this in a directory without a folder '{local.parent}'"
        )


def check_writable(folder: Path):
    """Checks that a folder can be created and written to, before doing any work for it.

    Raises:
        InputError: A parent is a file, the disk is full or read-only, or permission is denied.
    """
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir():
        raise InputError(f"cannot create '{folder}': '{above}' is not a directory; choose another path")
    try:
        # Not a TemporaryFile: a mounted bucket cannot remove a file that is being written.
        with tempfile.NamedTemporaryFile(dir=above, prefix=".", suffix=".tmp") as file:
            file.write(bytes(4096))
    except OSError as error:
        # The error in /proc and similar file systems.
        fault = "no files can be created there" if error.errno == errno.ENOENT else error.strerror
        raise InputError(f"cannot write to '{folder}': {fault} ('{above}'); choose another path") from error


def quote_path(path: str | Path) -> str:
    """A path for a shell command: quoted if needed, and never mistaken for an option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


@contextmanager
def appearing_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `out` on success and removed on failure."""
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    staging = parent / f".{out.name}-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        with explain_full_disk(parent):
            yield staging
            _share_weights(staging)
            out.parent.mkdir(parents=True, exist_ok=True)
            staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def explain_full_disk(folder: str | Path, following: str = "or choose another disk") -> Iterator[None]:
    """Turns errors of safetensors, torch.save and tokenizers on a full disk into one line.

    Args:
        folder: The folder that is written.
        following: What to do next, or instead.

    Raises:
        InputError: The disk is full.
    """
    try:
        yield
    except OSError:
        raise  # already names the file
    # tokenizers raises a bare Exception; other errors are raised unchanged.
    except Exception as error:
        full = ("No space left on device", "PytorchStreamWriter failed writing", "unexpected pos", "iostream error")
        if not any(sign in str(error) for sign in full):
            raise
        raise InputError(f"no space left on the disk of '{folder}': free some, {following}") from error
