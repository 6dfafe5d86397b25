"""The text of pre-training -> token streams: from any source, from prepared data, or from datatrove's token files."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hfgpt.data.encoding import Encoding
from hfgpt.data.files import find_files, find_token_files, hash_files, is_url
from hfgpt.data.parts import find_parts
from hfgpt.data.prepared import SPLITS, PreparedData, find_prepared
from hfgpt.data.report import DataReport
from hfgpt.data.sources import SETTINGS, DataArguments, load_all_documents, load_documents, reading_of, shorten
from hfgpt.data.streams import TokenStream, tokenize_documents
from hfgpt.data.token_files import named_tokenizer, open_token_files
from hfgpt.data.writing import Rules, divide_jobs, list_jobs, read_texts
from hfgpt.errors import InputError
from hfgpt.evaluation.generation import unknown_token_id
from hfgpt.models import SavedModel
from hfgpt.recipe import Recipe
from hfgpt.records import public_name
from hfgpt.tasks.preparation import find_tokenizer
from hfgpt.tokenizer import load_tokenizer

DOCUMENTS = 10_000  # read to plan a run of a given number of steps
LARGE = 4  # parts of a source that is only sampled for a plan


@dataclass
class Tokens:
    """Tokenized text.

    Args:
        streams: Split -> tokens of each source; several are a mixture.
        tokenizer: Their tokenizer.
        report: The data report, before blocks are counted.
        share: Fraction of the training text in the streams; None if its total size is unknown.
        weights: The share of each source of a mixture in the training blocks.
        sources: The name of each source of a mixture.
    """

    streams: dict[str, list[TokenStream]]
    tokenizer: PreTrainedTokenizerBase
    report: DataReport
    share: float | None = 1.0
    weights: list[float] = dataclasses.field(default_factory=lambda: [1.0])
    sources: list[str] = dataclasses.field(default_factory=lambda: [""])


def load_tokens(recipe: Recipe, base: SavedModel | None, folder: Path | None, characters: int | None = None) -> Tokens:
    """The tokens of a recipe's text.

    Args:
        recipe: Its sections `data`, `tokenizer` and `training`.
        base: The base model.
        folder: Folder of a run to resume, whose tokenizer is reused.
        characters: Tokenize only about this many characters of each split, enough for a plan; None: all.

    Raises:
        InputError: The source or the tokenizer cannot be used, or the tokens were made by another one.
    """
    if prepared := find_prepared(recipe.data.path):
        return _open_prepared(recipe, base, prepared, folder)
    if recipe.data.path and (files := find_token_files(recipe.data.path)):
        return _open_token_files(recipe, base, files, folder)
    report = DataReport()
    documents, share = _load_texts(recipe, report, characters)
    tokenizer = find_tokenizer(recipe, base, folder, (row["text"] for row in documents["train"]))
    streams = {split: [_tokenize(texts, tokenizer, recipe.data, report, split)] for split, texts in documents.items()}
    return Tokens(streams, tokenizer, report, share)


def load_all_tokens(data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenStream, DataReport]:
    """The tokens to evaluate a model on: of all documents, or of `validation_split` if it is set.

    Returns:
        The tokens, and the report, in which they are the split `validation`.
    """
    if prepared := find_prepared(data.path):
        _check_same_tokenizer(tokenizer, prepared)
        splits = ["validation"] if data.validation_split else SPLITS
        return prepared.stream(*splits), prepared.manifest.report.merge(splits, "validation")
    report = DataReport()
    return _tokenize(load_all_documents(data, report), tokenizer, data, report, "validation"), report


def _tokenize(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataArguments, report: DataReport, split: str
) -> TokenStream:
    """The texts as one token stream, with an end-of-text token after each; unknown tokens are counted."""
    # A single text may be only a part of a document, cut by position, without its end.
    stream = tokenize_documents(texts, tokenizer, num_proc=data.num_proc, append_eos=len(texts) > 1)
    if (unknown := unknown_token_id(tokenizer)) is not None:
        report.split(split).unknown_tokens = stream.count(unknown)
    return stream


def _load_texts(
    recipe: Recipe, report: DataReport, characters: int | None
) -> tuple[Mapping[str, Dataset], float | None]:
    """The texts of both splits, or about `characters` characters of each, enough for a plan.

    Returns:
        The texts, and the fraction of the training text that was read; None if its total size is unknown.
    """
    if not characters:
        return load_documents(recipe.data, recipe.training.seed, report), 1.0
    if not (sample := _sample_large_source(recipe, report)):
        arguments, has_steps = recipe.data, recipe.training.max_steps > 0
        if has_steps and (arguments.max_documents or DOCUMENTS) >= DOCUMENTS:
            # The length of the run is known, so a large dataset need not be read or downloaded completely.
            arguments = dataclasses.replace(arguments, max_documents=DOCUMENTS)
        documents = load_documents(arguments, recipe.training.seed, report)
        sample = documents, None if has_steps and report.rows_read >= DOCUMENTS else 1.0
    documents, share = sample
    if share is not None:
        share *= min(characters / report.split("train").characters, 1.0)
    return {split: shorten(texts, report.split(split), characters) for split, texts in documents.items()}, share


def _sample_large_source(recipe: Recipe, report: DataReport) -> tuple[dict[str, Dataset], float] | None:
    """The first part of each split of large local files, and its fraction of the training text; None: not large."""
    data, seed = recipe.data, recipe.training.seed
    if not data.path or is_url(data.path) or data.max_documents or data.deduplicate or not find_files(data.path):
        return None
    parts = find_parts(data, reading_of(data, seed), report)
    if len(parts["train"]) < LARGE:
        return None
    fraction = None if "validation" in parts else data.validation_fraction
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    read = 0
    jobs = list_jobs([(parts, Rules(data.text_column, seed, fraction))])
    for job in divide_jobs(jobs, [data.path]):
        if texts["train"] and (texts["validation"] or (fraction is None and job.source_split == "train")):
            continue
        read += job.part.bytes if job.source_split == "train" else 0
        for split, text in read_texts(job):
            texts[split].append(text)
    if not all(texts.values()):
        return None
    for split, found in texts.items():
        report.split(split).characters = sum(map(len, found))
    total = sum(part.bytes for part in parts["train"])
    return {split: Dataset.from_dict({"text": found}) for split, found in texts.items()}, read / total


def _open_prepared(recipe: Recipe, base: SavedModel | None, prepared: PreparedData, folder: Path | None) -> Tokens:
    """Opens prepared data, with the tokens that its source would give.

    Raises:
        InputError: It was prepared with another tokenizer, or with other values of keys that the recipe sets.
    """
    # Keys with their default value are not compared, so that a recipe need not repeat them. Nor is the seed, which
    # only affects training here.
    settings, defaults = prepared.manifest.preparation.settings, DataArguments()
    # A new tokenizer was trained by `hfgpt prepare`.
    is_new = base is None and recipe.tokenizer.path is None and folder is None
    set_keys = {f"data.{name}": getattr(recipe.data, name) for name in SETTINGS}
    keys = {key: value for key, value in set_keys.items() if value != getattr(defaults, key.partition(".")[2])}
    if recipe.data.mixture:
        keys["data.mixture"] = [vars(source) for source in recipe.data.mixture]
    if is_new:
        keys |= {f"tokenizer.{name}": value for name, value in vars(recipe.tokenizer).items()}
    for key, value in keys.items():
        # A preparation with a given tokenizer has no settings of a new one.
        was = settings.get(key, value if key.startswith("tokenizer.") else None)
        if value != was:
            raise InputError(
                f"{key} is {value!r}, but {prepared.place} was prepared with {was!r}: change it, or prepare the text "
                "again"
            )
    tokenizer = find_tokenizer(recipe, base, prepared.tokenizer if is_new else folder, ())
    _check_same_tokenizer(tokenizer, prepared)
    sources = range(len(prepared.weights))
    streams = {split: [prepared.stream(split, source=source) for source in sources] for split in SPLITS}
    names = [public_name(source) for source in prepared.manifest.preparation.sources]
    return Tokens(streams, tokenizer, prepared.manifest.report, weights=prepared.weights, sources=names)


def _check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, prepared: PreparedData):
    # Both are serialized by this version of tokenizers.
    other = load_tokenizer(prepared.tokenizer, pad_token=None, add_eos=False)
    if Encoding.of(tokenizer).sha256 != Encoding.of(other).sha256:
        raise InputError(
            f"{prepared.place} was prepared with another tokenizer ({len(other):,} tokens) than the recipe's or "
            f"model's ({len(tokenizer):,}): prepare the text again, or set tokenizer.path to {prepared.tokenizer}"
        )


def _open_token_files(recipe: Recipe, base: SavedModel | None, files: list[Path], folder: Path | None) -> Tokens:
    """Opens token files of datatrove.

    Raises:
        InputError: The recipe does not name their tokenizer, or a file is damaged.
    """
    name, path = named_tokenizer(files[0]), recipe.data.path
    for key in ("deduplicate", "max_documents", "validation_split"):
        if getattr(recipe.data, key):
            raise InputError(f"data.{key} has no effect on the token files of data.path {path!r}: leave it out")
    if base is None and recipe.tokenizer.path is None and folder is None:
        raise InputError(f"data.path {path!r} has tokens of the tokenizer {name or '(unknown)'!r}: set tokenizer.path")
    tokenizer = find_tokenizer(recipe, base, folder, ())
    streams = open_token_files(files, recipe.data.validation_fraction)
    indices = [Path(f"{file}.index") for file in files]
    report = DataReport(source=path, sha256=hash_files([*files, *indices]), split_by="documents")
    for split, stream in streams.items():
        if (largest := stream.largest_id()) >= len(tokenizer):
            raise InputError(
                f"data.path {path!r} has the token id {largest}, but the tokenizer has only {len(tokenizer):,} "
                f"tokens: set tokenizer.path to {name or 'the one that made it'}"
            )
        report.split(split).documents = len(stream.documents)
        report.rows_read += len(stream.documents)
    report.rows_kept = report.rows_read
    # Bits per byte need the text of the validation split.
    sizes = report.split("validation")
    for row in streams["validation"].documents:
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        sizes.characters, sizes.bytes = sizes.characters + len(text), sizes.bytes + len(text.encode())
    report.warnings.append(
        f"the tokens were made with the tokenizer {public_name(name) or '(unknown)'!r}; whether the recipe's is the "
        "same cannot be checked"
    )
    return Tokens({split: [stream] for split, stream in streams.items()}, tokenizer, report)
