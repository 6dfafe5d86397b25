"""The cache of texts and tokens; entries are complete or absent."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

ABANDONED_AFTER_SECONDS = 24 * 3600
ENTRY = "[0-9a-f]" * 32  # pattern of the folder of a source
BYTES_WITH_PROGRESS = 1 << 22  # takes seconds


def cache_folder(cache_dir: str | os.PathLike | None) -> Path:
    """The folder where texts and tokens are cached; created if needed.

    Args:
        cache_dir: `data.cache_dir`; None: `hfgpt` in the Hugging Face cache folder (HF_HOME).
    """
    folder = Path(cache_dir).expanduser() if cache_dir else Path(datasets.config.HF_CACHE_HOME) / "hfgpt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def map_rows(
    rows: datasets.Dataset,
    function: Callable[..., pa.Table],
    features: dict[str, Any],
    arguments: dict[str, Any],
    description: str,
    num_proc: int = 1,
) -> datasets.Dataset:
    """Maps rows one to one with `datasets.Dataset.map`, or loads the cached result of an earlier run.

    Args:
        rows: From an Arrow file, next to which the result is cached; or in memory, and then so is the result.
        function: Called with a batch as an Arrow table and `arguments`; returns a table of `features`.
        features: Columns of the result and their types.
        arguments: Plain values; part of the fingerprint.
        description: Text of the progress bar.
        num_proc: Number of processes.
    """

    def run(load_from_cache_file: bool) -> datasets.Dataset:
        mapped = rows.with_format("arrow").map(
            function,
            batched=True,
            remove_columns=rows.column_names,
            features=datasets.Features(features),
            fn_kwargs=arguments,
            num_proc=num_proc if num_proc > 1 else None,  # even 1 would start a process
            keep_in_memory=not rows.cache_files,
            load_from_cache_file=load_from_cache_file,
            desc=description,
        )
        return mapped.with_format(None)

    with progress_bar(rows.data.nbytes >= BYTES_WITH_PROGRESS), _clean_full_disk(rows):
        if (mapped := read_kept(lambda: run(True))) and len(mapped) == len(rows):
            return mapped
        return run(False)


@contextlib.contextmanager
def _clean_full_disk(rows: datasets.Dataset) -> Iterator[None]:
    """Removes the partial files that datasets leaves when the disk is full, and adds the folder to the error."""
    folders = {Path(file["filename"]).parent for file in rows.cache_files}
    before = {path for folder in folders for path in folder.glob("tmp*")}
    try:
        yield
    except OSError as error:
        for path in {path for folder in folders for path in folder.glob("tmp*")} - before:
            path.unlink(missing_ok=True)
        error.filename = error.filename or next(map(str, folders), None)
        raise


@contextlib.contextmanager
def progress_bar(worthwhile: bool = True) -> Iterator[None]:
    """Shows the progress bar of datasets only on a terminal, and only for work that takes a while."""
    disabled = datasets.are_progress_bars_disabled()
    if not (worthwhile and sys.stderr.isatty()):
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()


def read_kept(read: Callable[[], datasets.Dataset]) -> datasets.Dataset | None:
    """The result of `read`; None if the cached Arrow file is damaged."""
    try:
        return read()
    except (pa.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # a disk error
        return None


def remove_abandoned(cache: Path):
    """Removes files that a killed process left; a running one would have written to them within a day.

    Matches only hfgpt's own names, since the user may choose any folder as the cache.
    """
    for path in [*cache.glob(f".{ENTRY}-*"), *cache.glob(f"{ENTRY}/tmp*")]:
        times = [item.stat().st_mtime for item in (path, *path.glob("*")) if item.exists()]
        if max(times, default=0) < time.time() - ABANDONED_AFTER_SECONDS:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
