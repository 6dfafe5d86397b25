"""Files and folders that are there whole or not at all, whatever happens while they are written."""

import json
import os
import shlex
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfgpt.errors import InputError


def write_text(path: Path, text: str):
    """Writes a file whole or not at all; a link becomes a file of its own, and what it named stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]):
    """Writes JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """A folder to write several files into that then appear in `folder` together, or not at all if writing fails."""
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
    try:
        yield staging
        for path in sorted(staging.iterdir()):
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
        raise InputError(f"cannot write to '{folder}': {error.strerror} ('{above}'); choose another path") from error


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
