"""Files and folders that are there whole or not at all, whatever happens meanwhile, and their checksums."""

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

# Empty while a folder is being filled; written last, so that a folder with checksums is complete. `sha256sum --check`
# reads it.
CHECKSUMS_FILE = "SHA256SUMS"


def write_text(path: Path, text: str):
    """Writes a file whole or not at all; a link becomes a file of its own, and what it named stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]):
    """Writes JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path):
    """Writes the SHA-256 of every file in a folder and below it, which completes the folder."""
    _share_weights(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_FILE)
    lines = [f"{hash_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    write_text(folder / CHECKSUMS_FILE, "".join(lines))


def read_checksums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, as `write_checksums` wrote them; empty if the folder has none."""
    path = folder / CHECKSUMS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return {name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}


def _share_weights(folder: Path):
    """Gives the files of weights the permissions of any other file: safetensors makes them its owner's alone."""
    usual = folder / f".mode.{os.getpid()}.tmp"
    usual.touch()
    mode = usual.stat().st_mode
    usual.unlink()
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(mode)


def remove_leftovers(folder: Path):
    """Removes what a killed process left half-written in a folder that only this process writes to."""
    for path in [*folder.glob(".staging-*"), *folder.glob(".*.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def staged_files(folder: Path, first: str | None = None) -> Iterator[Path]:
    """A folder to write several files into that then appear in `folder` together, or not at all if writing fails.

    Args:
        folder: Where they appear.
        first: The file that comes first, by which a later process knows what a killed one was about to do.
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
    """The path of a folder that can be made, without `.` and `..`.

    Raises:
        InputError: It exists, or cannot be written.
    """
    out = Path(os.path.normpath(out))
    if os.path.lexists(out):
        raise InputError(f"'{out}' exists: name a folder that does not")
    check_writable(out)
    return out


def check_model_path(path: str):
    """Refuses what cannot be a model, before anything asks the Hub for it.

    Raises:
        InputError: A file, a folder without config.json, or a path that does not exist and is no Hub id.
    """
    local = Path(path)
    if local.is_file():
        raise InputError(f"'{path}' is a file; a model is a folder with config.json and weights, or a Hub id")
    if local.is_dir():
        if not any((local / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise InputError(
                f"the folder '{path}' has no config.json: name the folder of a finished run or of a saved model"
            )
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        raise InputError(f"the folder '{path}' does not exist, and it is not a Hub id either: check the path")
    elif "/" in path and local.parent.is_dir():
        raise InputError(
            f"the folder '{local.parent}' does not have '{local.name}': check the path; to load '{path}' from the "
            f"Hub, run this in a directory without a folder '{local.parent}'"
        )


def check_writable(folder: Path):
    """Refuses a folder that cannot be created or written to, before any work is spent on its content.

    Raises:
        InputError: Something above it is a file, or its disk is full or read-only, or it belongs to somebody else.
    """
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir():
        raise InputError(f"cannot create '{folder}': '{above}' is not a directory; choose another path")
    try:
        with tempfile.TemporaryFile(dir=above) as file:  # has no name, and is gone at once
            file.write(bytes(4096))
    except OSError as error:
        # What the kernel says of /proc and its like.
        fault = "no files can be created there" if error.errno == errno.ENOENT else error.strerror
        raise InputError(f"cannot write to '{folder}': {fault} ('{above}'); choose another path") from error


def quote_path(path: str | Path) -> str:
    """A path as it is pasted into a shell: quoted where it has to be, and never taken for an option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


@contextmanager
def appearing_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` when all went well, and is gone when not."""
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
    """Turns the full disk that safetensors and torch.save report in words of their own into one line with a remedy.

    Args:
        folder: What is written.
        following: What to do then, or instead.

    Raises:
        InputError: The disk is full.
    """
    try:
        yield
    except OSError:
        raise  # names the file itself
    # tokenizers raises a bare Exception; whatever does not speak of a full disk goes on.
    except Exception as error:
        full = ("No space left on device", "PytorchStreamWriter failed writing", "unexpected pos", "iostream error")
        if not any(sign in str(error) for sign in full):
            raise
        raise InputError(f"no space left on the disk of '{folder}': free some, {following}") from error
