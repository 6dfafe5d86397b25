"""`hfgpt prepare`: tokenizes the text of a pre-training recipe into a data set that training opens at once."""

import contextlib
import dataclasses
import functools
import io
import json
import re
import shlex
import shutil
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from hfgpt.building import find_base_model
from hfgpt.data.duplicates import find_repeated
from hfgpt.data.encoding import NO_END, Encoding, load_gigatoken
from hfgpt.data.files import is_url
from hfgpt.data.parts import Part, find_parts, fingerprint_parts
from hfgpt.data.prepared import (
    FORMAT_VERSION,
    RECORDS_FOLDER,
    SPLITS,
    TOKENIZER_FOLDER,
    Folder,
    Manifest,
    Preparation,
    read_manifest,
    read_part_records,
    read_preparation,
)
from hfgpt.data.processes import run_in_processes
from hfgpt.data.report import DataReport, counted
from hfgpt.data.sources import SETTINGS, reading_of
from hfgpt.data.streams import count_cores
from hfgpt.data.writing import (
    REASONS,
    OutputSettings,
    PartJob,
    Rules,
    divide_jobs,
    finish_preparation,
    list_jobs,
    read_training_texts,
    sign_part,
    start_preparation,
    tokenize_part,
)
from hfgpt.errors import InputError
from hfgpt.evaluation.generation import unknown_token_id
from hfgpt.output import stderr_console
from hfgpt.recipe import Recipe
from hfgpt.saving import check_writable, quote_path
from hfgpt.tasks.preparation import find_tokenizer
from hfgpt.tokenizer import load_tokenizer

SAMPLE_CHARACTERS = 1 << 20  # tokenized to estimate the size


def prepare(recipe: Recipe, out: str, shard: str | None = None, console: Console | None = None) -> Manifest | None:
    """Tokenizes the text of a recipe, in several processes; finished parts of an earlier call are kept.

    Args:
        recipe: A pre-training recipe; its sections `data`, `tokenizer` and `model`, and `training.seed`.
        out: Folder or URL for the data.
        shard: `I/N`: only every Nth part, starting with the Ith, so that N machines share the work; None: all parts.
        console: Shows progress; None: stderr.

    Returns:
        The manifest; None if parts of other shards are not finished.

    Raises:
        InputError: The recipe, source, folder or tokenizer cannot be used, or the folder has other data.
        OSError: The disk is full or not writable.
    """
    console = console or stderr_console()
    if recipe.task != "pretrain":
        raise InputError(f"the task of the recipe is {recipe.task}; only the text of pre-training can be prepared")
    index, number = _parse_shard(shard)
    sources = _find_sources(recipe)
    jobs = list_jobs([(source.parts, source.rules) for source in sources])
    name = sources[0].report.source if len(sources) == 1 else f"mixture of {len(sources)} sources"
    if shard and recipe.data.deduplicate:
        raise InputError(f"--shard {shard} cannot remove the duplicates of other shards: unset data.deduplicate")
    if number > len(jobs):
        raise InputError(f"--shard is {shard}, but {name} has only {counted(len(jobs), 'parts')}: lower N")
    folder = _open_folder(out, recipe)
    try:
        if recipe.data.deduplicate:
            jobs = _drop_repeated(folder, jobs, recipe.data.num_proc, console)
        jobs = divide_jobs(jobs, [source.report.source for source in sources])
        tokenizer = _find_tokenizer(recipe, folder, jobs)
        preparation = _describe_preparation(recipe, name, sources, jobs, tokenizer)
        start_preparation(folder, preparation, tokenizer)
        waiting = _list_waiting(folder, jobs[index - 1 :: number], preparation, console)
        encoding = Encoding.of(tokenizer)
        if waiting:
            _describe_size(folder, name, waiting, jobs, encoding, console)
        output = OutputSettings(out, preparation.sha256, encoding, unknown_token_id(tokenizer))
        _tokenize(output, waiting, recipe.data.num_proc, console)
    finally:
        folder.remove_leftovers()  # of processes that an error or Ctrl-C ended
    unused = sorted(file for source in sources for file in source.report.unused_files)
    manifest = finish_preparation(folder, preparation, DataReport(unused_files=unused))
    if manifest is None and number == 1:
        raise InputError(f"parts of {out} have disappeared: run the same command again")
    return manifest


def render_manifest(manifest: Manifest | None, recipe: str, overrides: Sequence[str], out: str) -> str:
    """The result as text for the terminal.

    Args:
        manifest: From `prepare`.
        recipe: The recipe, as the user named it.
        overrides: The overrides of its keys.
        out: The folder or URL.
    """
    if manifest is None:
        return "this shard is finished; others are not"
    kept, words = "", iter(overrides)
    for word in words:
        if word == "--data.path":
            next(words)
        elif not word.startswith("--data.path="):
            kept += f" {shlex.quote(word)}"
    size = sum(file.size for split in SPLITS for file in manifest.files(split))
    return (
        f"{manifest.report.summary()}\n{out} is complete: {_readable(size)}; train with: hfgpt train "
        f"{quote_path(recipe)}{kept} --data.path {quote_path(out)}"
    )


@dataclasses.dataclass
class _Source:
    """A source of a mixture; its report has its name, and the files that are not used."""

    weight: float
    parts: dict[str, list[Part]]
    rules: Rules
    report: DataReport


def _find_sources(recipe: Recipe) -> list[_Source]:
    if recipe.data.mixture and recipe.data.path:
        raise InputError("data.path and data.mixture are both set: remove one of them")
    if recipe.data.num_proc is not None and recipe.data.num_proc < 1:
        raise InputError(f"data.num_proc is {recipe.data.num_proc}; it must be at least 1 (unset: one per core)")
    sources, seed = [], recipe.training.seed
    for arguments, weight in recipe.data.sources():
        report = DataReport()
        parts = find_parts(arguments, dataclasses.replace(reading_of(arguments, seed), stream=True), report)
        fraction = None if "validation" in parts else arguments.validation_fraction
        rules = Rules(arguments.text_column, seed, fraction, arguments.deduplicate)
        sources.append(_Source(weight, parts, rules, report))
    return sources


def _parse_shard(shard: str | None) -> tuple[int, int]:
    if shard is None:
        return 1, 1
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard is '{shard}'; it must be I/N with I from 1 to N, such as 2/8")
    return int(match[1]), int(match[2])


def _open_folder(out: str, recipe: Recipe) -> Folder:
    """The folder; empty, or of an earlier call."""
    folder = Folder(out)
    if folder.is_local:
        check_writable(folder.path())
        for source, _ in recipe.data.sources():
            place = Path(source.path).expanduser()
            if place.is_dir() and folder.path().resolve().is_relative_to(place.resolve()):
                raise InputError(f"'{out}' is in the folder of the source, '{source.path}': choose another folder")
    strange = set(folder.entries()) - {TOKENIZER_FOLDER, RECORDS_FOLDER}
    if strange and not folder.exists(Preparation.FILE):
        raise InputError(f"'{folder}' has other files, such as {min(strange)}: choose a new folder")
    return folder


def _drop_repeated(folder: Folder, jobs: list[PartJob], num_proc: int | None, console: Console) -> list[PartJob]:
    """The jobs, without repeated documents; which ones these are is kept until all parts are finished."""
    name, reason = f"{RECORDS_FOLDER}/repeated.npz", REASONS[jobs[0].rules.deduplicate]
    rules = [dataclasses.astuple(job.rules) for job in jobs]
    version = fingerprint_parts([job.part for job in jobs]) + json.dumps(rules)
    content, repeated = folder.read(name), {}
    if content:
        with contextlib.suppress(ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile):  # damaged
            repeated = dict(np.load(io.BytesIO(content), allow_pickle=False))
    if str(repeated.pop("version", "")) != version:
        console.print(f"looking for {reason}s")
        results = run_in_processes(sign_part, jobs, _count_processes(num_proc, jobs))
        signatures = {job.name: result for job, result in results}
        indices = find_repeated([signatures[job.name] for job in jobs])
        repeated = {job.name: rows for job, rows in zip(jobs, indices, strict=True)}
        buffer = io.BytesIO()
        np.savez(buffer, version=version, **repeated)
        folder.write(name, buffer.getvalue())
    return [dataclasses.replace(job, repeated=repeated[job.name]) for job in jobs]


def _count_processes(num_proc: int | None, jobs: list[PartJob]) -> int:
    return min(num_proc or count_cores(), len(jobs))


def _find_tokenizer(recipe: Recipe, folder: Folder, jobs: list[PartJob]) -> PreTrainedTokenizerBase:
    """The tokenizer of the recipe; a trained one is kept in the folder."""
    base = find_base_model(recipe.model)
    is_trained = base is None and recipe.tokenizer.path is None
    # The tokenizer is complete, and that of this recipe, once the preparation is described.
    if is_trained and read_preparation(folder) and folder.exists(f"{TOKENIZER_FOLDER}/tokenizer.json"):
        with tempfile.TemporaryDirectory() as copy:
            for name in folder.list_names(TOKENIZER_FOLDER):
                Path(copy, name).write_bytes(folder.read(f"{TOKENIZER_FOLDER}/{name}"))
            tokenizer = load_tokenizer(copy, pad_token=None, add_eos=False)
    else:
        tokenizer = find_tokenizer(recipe, base, None, read_training_texts(jobs))
    if tokenizer.eos_token_id is None:
        raise InputError(NO_END)
    return tokenizer


def _describe_preparation(
    recipe: Recipe, name: str, sources: list[_Source], jobs: list[PartJob], tokenizer: PreTrainedTokenizerBase
) -> Preparation:
    """What the data is made from."""
    settings = {f"data.{key}": getattr(recipe.data, key) for key in SETTINGS}
    settings["data.mixture"] = [vars(source) for source in recipe.data.mixture] if recipe.data.mixture else None
    settings["training.seed"] = recipe.training.seed
    if recipe.model.path is None and recipe.tokenizer.path is None:
        settings |= {f"tokenizer.{key}": value for key, value in vars(recipe.tokenizer).items()}
    given = [source.rules.validation_fraction is None for source in sources]
    return Preparation(
        version=FORMAT_VERSION,
        source=name,
        sources=[source.report.source for source in sources],
        source_sha256=fingerprint_parts([job.part for job in jobs]),
        tokenizer_sha256=Encoding.of(tokenizer).sha256,
        settings=settings,
        split_by="given" if all(given) else "documents",
        parts={split: sum(job.source_split == split for job in jobs) for split in SPLITS},
        weights=[source.weight for source in sources],
    )


def _list_waiting(folder: Folder, jobs: list[PartJob], preparation: Preparation, console: Console) -> list[PartJob]:
    """The jobs whose part is not finished, or is damaged."""
    manifest, waiting = read_manifest(folder), []
    records = (manifest.parts if manifest else {}) | read_part_records(folder, preparation)
    # Remote files are read only if the data was finished: training may have found one of them damaged.
    checksum = folder.is_local or manifest is not None
    for job in jobs:
        record = records.get(job.name)
        files = record.files.values() if record else ()
        damaged = [file.file for file in files if not folder.is_whole(file, checksum)]
        for name in damaged:
            console.print(f"{name} is missing or damaged: preparing {job.name} again")
        if record is None or damaged:
            waiting.append(job)
    if finished := len(jobs) - len(waiting):
        console.print(f"already finished: {finished:,} of {counted(len(jobs), 'parts')}")
    return waiting


def _describe_size(
    folder: Folder, name: str, waiting: list[PartJob], jobs: list[PartJob], encoding: Encoding, console: Console
):
    """Prints the size of the source, and how much disk space its tokens need."""
    encoder = "gigatoken" if load_gigatoken(encoding.backend) else "tokenizers"
    sizes = [job.part.bytes for job in jobs]
    known = None not in sizes
    size = f"{_readable(sum(sizes))} in " if known else ""
    console.print(f"{name}: {size}{counted(len(jobs), 'parts')}, {len(waiting):,} to prepare with {encoder}")
    if not known or is_url(name):
        return
    texts, characters = [], 0
    for text in read_training_texts(jobs):
        texts.append(text[:SAMPLE_CHARACTERS])
        characters += len(texts[-1])
        if characters >= SAMPLE_CHARACTERS:
            break
    read = sum(len(text.encode()) for text in texts)
    if not read:
        return
    table = encoding.encode(texts, append_eos=True)
    per_byte = table.nbytes / read
    need = sum(job.part.bytes for job in waiting) * per_byte
    free = shutil.disk_usage(folder.path()).free if folder.is_local else None
    on = f"; {_readable(free)} are free" if free is not None else ""
    console.print(f"{folder} needs about {_readable(need)}, more if the source is compressed{on}")
    if free is not None and free < need:
        console.print(f"warning: {folder} may not have enough space")


def _tokenize(output: OutputSettings, waiting: list[PartJob], num_proc: int | None, console: Console):
    start, tokens = time.perf_counter(), 0
    results = run_in_processes(functools.partial(tokenize_part, output), waiting, _count_processes(num_proc, waiting))
    for finished, (_, record) in enumerate(results, start=1):
        new = sum(file.tokens for file in record.files.values())
        tokens += new
        speed = tokens / (time.perf_counter() - start)
        console.print(
            f"{record.name}: {counted(new, 'tokens')} ({finished:,} of {len(waiting):,}, {speed:,.0f} tokens/s)"
        )


def _readable(size: float) -> str:
    """A number of bytes, as in `1.2 GB`."""
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= step:
            return f"{size / step:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"
