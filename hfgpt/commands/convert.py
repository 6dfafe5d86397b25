"""Stage 6, converting weights: imports third-party checkpoints, exports native GPT-2, and compares the logits."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import GPT2Tokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from hfgpt.adapters import merge_adapter
from hfgpt.conversion import gpt2, nanogpt, openai
from hfgpt.conversion.assembly import build_native_on_meta, load_whole, native_class
from hfgpt.conversion.checkpoints import SUFFIXES, Checkpoint, check_weights, is_classifier, read_checkpoint
from hfgpt.conversion.parity import ROUNDED_TOLERANCE, Parity, compare, compute_with, record
from hfgpt.conversion.sources import LARGE, ImportArguments, Source, open_weights
from hfgpt.demo_corpus import generate_stories
from hfgpt.errors import InputError
from hfgpt.hub import HubArguments
from hfgpt.hub.card import describe_architecture, write_card
from hfgpt.hub.folder import read_records
from hfgpt.hub.usage import Place
from hfgpt.known_answers import record_answers
from hfgpt.models import (
    TRAINABLE_TYPES,
    check_vocabulary,
    check_weights_match,
    explained,
    find_model,
    hash_weights,
    load_model_tokenizer,
    quiet_bars,
)
from hfgpt.output import stderr_console
from hfgpt.records import ConversionRecord, public_name
from hfgpt.saving import appearing_folder, check_free
from hfgpt.tokenizer import GPT2_FILES, build_char_tokenizer, load_tokenizer

GREEDY_TOKENS = 16
PARITY_TOKENS = 64


def import_checkpoint(
    source: str, out: Path, arguments: ImportArguments | None = None, console: Console | None = None
) -> Parity:
    """Converts a checkpoint of GPT-2, nanoGPT or the book to a folder that every Auto class loads.

    Args:
        source: GPT-2's Hub id or folder, OpenAI's TensorFlow folder, a folder with nanoGPT's `ckpt.pt`, or a file.
        out: Output folder (must not exist).
        arguments: Settings that are missing from the checkpoint.
        console: Where to print the report; None: standard error.

    Returns:
        The parity report, also saved as `out/conversion.json`.

    Raises:
        InputError: The source cannot be read or is another kind of model, `out` exists, or the logits differ.
    """
    arguments = arguments or ImportArguments()
    out = check_free(out)
    opened, tokenizer = open_source(source, arguments)
    rows = parity_rows(opened.config, tokenizer)
    greedy_tokens = count_greedy_tokens(opened.config)
    expected = record(opened.reference, rows, greedy_tokens)
    opened.reference = None  # before the result is loaded: one copy of the weights at a time
    with appearing_folder(out) as staging:
        model = opened.load()
        if tokenizer is None:
            opened.notes.append("no tokenizer: none found next to the weights, and --tokenizer not set")
        else:
            place = public_name(arguments.tokenizer) if arguments.tokenizer else "next to the weights"
            opened.notes.append(f"tokenizer: {len(tokenizer):,} tokens, {place}")
            check_vocabulary(model, tokenizer)
            tokenizer.model_max_length = model.config.max_position_embeddings
            tokenizer.save_pretrained(staging)
            if len(tokenizer) < model.config.vocab_size and model.can_generate():
                model.generation_config.suppress_tokens = list(range(len(tokenizer), model.config.vocab_size))
        parameters = model.num_parameters()
        with quiet_bars(parameters < LARGE):
            model.save_pretrained(staging)
        del model
        saved = find_model(str(staging)).load(dtype="auto")
        tolerance = ROUNDED_TOLERANCE if opened.recomputed else None
        differences, greedy_equal = compare(expected, record(compute_with(saved), rows, greedy_tokens), tolerance)
        report = Parity(source, opened.format, parameters, opened.parameters, differences, greedy_equal, opened.notes)
        if tokenizer is not None:
            record_answers(saved, tokenizer, hash_weights(staging)).write(staging)
        _finish(report, staging, out, describe_architecture(saved), console)
    return report


def export_model(model_path: str, out: Path, merge_adapter: bool = False, console: Console | None = None) -> Parity:
    """Exports a model as a native GPT-2, which transformers and other GPT-2 tools load without hfgpt.

    Args:
        model_path: Folder or Hub id of an hfgpt model.
        out: Output folder (must not exist).
        merge_adapter: Whether `model_path` is a PEFT adapter, to be merged into its base model.
        console: Where to print the report; None: standard error.

    Returns:
        The parity report, also saved as `out/conversion.json`.

    Raises:
        InputError: There is no hfgpt model, GPT-2 cannot represent it, `out` exists, or the logits differ.
    """
    out = check_free(out)
    model, tokenizer = load_to_export(model_path, merge_adapter)
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    rows = parity_rows(model.config, tokenizer)
    greedy_tokens = count_greedy_tokens(model.config)
    expected = record(compute_with(model), rows, greedy_tokens)
    config, parameters, architecture = model.config, model.num_parameters(), describe_architecture(model)
    answers = None if tokenizer is None else record_answers(model, tokenizer, None)
    generation_config = model.generation_config if model.can_generate() else None
    weights = dict(model.state_dict())
    del model  # the weights are removed from the dictionary one by one: one copy at a time
    native = build_native_on_meta(config)
    weights, filled = gpt2.gpt2_weights(weights, native)
    notes = (
        [f"filled with zeros: {len(filled)} biases that are not in the model, such as {filled[0]}"] if filled else []
    )
    with appearing_folder(out) as staging:
        load_whole(native, weights)
        if native.can_generate():
            native.generation_config = generation_config
        del weights
        with quiet_bars(parameters < LARGE):
            native.save_pretrained(staging)
            del native
            _save_gpt2_tokenizer(tokenizer, staging)
            if answers is not None:
                dataclasses.replace(answers, weights_sha256=hash_weights(staging)).write(staging)
            saved = native_class(config).from_pretrained(staging, dtype="auto").eval()
        differences, greedy_equal = compare(expected, record(compute_with(saved), rows, greedy_tokens))
        report = Parity(model_path, "to gpt2", saved.num_parameters(), parameters, differences, greedy_equal, notes)
        # GPT-2 always has biases on query, key and value.
        architecture |= {"parameters": saved.num_parameters(), "qkv_bias": True}
        _finish(report, staging, out, architecture, console)
    return report


def open_source(source: str, arguments: ImportArguments) -> tuple[Source, PreTrainedTokenizerBase | None]:
    """Prepares a checkpoint for conversion, and finds its tokenizer.

    Args:
        source: See `import_checkpoint`.
        arguments: Settings that are missing from the checkpoint.

    Raises:
        InputError: There is no checkpoint, or it cannot be converted.
    """
    path = Path(source)
    file = path / "ckpt.pt" if (path / "ckpt.pt").is_file() else path  # nanoGPT's folder
    if openai.is_tensorflow_folder(path):
        weights, hparams = openai.read_tensorflow(path)
        check_weights(path, weights)
        checkpoint = Checkpoint(weights, {"n_head": hparams.get("n_head")})
    elif file.is_file():
        checkpoint = read_checkpoint(file)
    else:
        return _open_transformers(source, arguments)
    tokenizer = find_tokenizer(file, arguments, checkpoint)
    special = {}
    if tokenizer is not None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        special = {name: getattr(tokenizer, name) for name in names}
    opened = open_weights(checkpoint, arguments, None if tokenizer is None else len(tokenizer), special)
    if opened.format == "gpt2" and file.is_file() and (file.parent / "config.json").is_file():
        raise InputError(f"'{file}' has its config.json next to it: import the folder '{file.parent}' instead")
    return opened, tokenizer


def _open_transformers(source: str, arguments: ImportArguments) -> tuple[Source, PreTrainedTokenizerBase | None]:
    """Prepares a GPT-2 in transformers' format, from a folder or the Hub."""
    if Path(source).suffix in SUFFIXES and not Path(source).exists():
        raise InputError(f"'{source}' does not exist: check the path")
    saved = find_model(source, arguments.revision)
    config = saved.config
    if config.model_type != "gpt2":
        raise InputError(
            f"'{source}' is a model of type {config.model_type}; only models of type gpt2, and checkpoint files of "
            "nanoGPT and the book, can be imported"
        )
    if arguments.format not in ("auto", "gpt2"):
        raise InputError(f"'{source}' is in the format gpt2, not {arguments.format}: leave out --format")
    for name in ("num_heads", "vocab_size", "lora_scale", "hidden_act"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is already in the config.json of '{source}': leave it out")
    check_weights_match(source, arguments.revision, config)

    def load() -> PreTrainedModel:
        # Strict, so that a GPT-2 with silently random weights is never the reference.
        return saved.load(dtype="auto")

    with explained("a model", source), quiet_bars(Path(source).is_dir()):
        # Mismatched weights are reported when the result is loaded.
        settings = {"revision": arguments.revision or "main", "dtype": "auto", "ignore_mismatched_sizes": True}
        native = native_class(config).from_pretrained(source, **settings).eval()
    tokenizer = find_tokenizer(Path(source), arguments)
    return Source("gpt2", config, native.num_parameters(), compute_with(native), load), tokenizer


def find_tokenizer(
    source: Path, arguments: ImportArguments, checkpoint: Checkpoint | None = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the user named, or the one next to the weights, unchanged; None if there is none.

    Raises:
        InputError: It cannot be read.
    """
    if arguments.tokenizer is not None:
        if arguments.tokenizer.endswith(".pkl"):
            return build_char_tokenizer(nanogpt.read_meta(Path(arguments.tokenizer).expanduser()))
        return load_tokenizer(arguments.tokenizer, pad_token=None, add_eos=False)
    if checkpoint is not None and checkpoint.model_args and (meta := nanogpt.find_meta(source, checkpoint.settings)):
        return build_char_tokenizer(nanogpt.read_meta(meta))
    names = ("tokenizer.json", *GPT2_FILES)
    if not source.exists():  # on the Hub, where the configuration was just found
        settings = {"revision": arguments.revision or "main", "_raise_exceptions_for_missing_entries": False}
        if not any(cached_file(str(source), name, **settings) for name in names):
            return None
        return load_model_tokenizer(str(source), arguments.revision)
    folder = source if source.is_dir() else source.parent
    if any((folder / name).is_file() for name in names):
        return load_tokenizer(folder, pad_token=None, add_eos=False)
    return None


def count_greedy_tokens(config: PreTrainedConfig) -> int | None:
    """Number of tokens to generate for the comparison; None for a classifier."""
    return None if is_classifier(config) else min(GREEDY_TOKENS, config.max_position_embeddings - 1)


def parity_rows(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, torch.Tensor]:
    """Token ids (B, T) to compare models on: random ones and, with a tokenizer, those of a story."""
    size, length = config.vocab_size, min(PARITY_TOKENS, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    rows = {"random": torch.randint(size, (2, length), generator=generator)}
    if tokenizer is not None:
        text = next(generate_stories(1))
        try:
            ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids[:length]
        except Exception:  # the Rust library's, if a character table lacks a letter of the story
            known = tokenizer.get_vocab()
            ids = [known[letter] for letter in text if letter in known][:length]
        if len(ids) > 1 and max(ids) < size:
            rows["story"] = torch.tensor([ids])
    if (padding := config.pad_token_id) is not None:  # a classifier uses the last token that is not padding
        rows = {name: ids.where(ids != padding, (padding + 1) % size) for name, ids in rows.items()}
    return rows


def load_to_export(model_path: str, merge_adapters: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Loads a model, or an adapter merged into its base model, and its tokenizer, which may be missing.

    Raises:
        InputError: `model_path` is not an hfgpt model, or `merge_adapters` is not whether it is an adapter.
    """
    saved = find_model(model_path)
    if (saved.base is not None) != merge_adapters:
        raise InputError(
            f"'{model_path}' is an adapter: pass --merge-adapter to export it with its base model"
            if saved.base
            else f"'{model_path}' is not an adapter: leave out --merge-adapter"
        )
    if saved.config.model_type not in TRAINABLE_TYPES:
        raise InputError(
            f"'{model_path}' is a model of type {saved.config.model_type}; only hfgpt and gpt2 can be exported"
        )
    model = saved.load(dtype=torch.float32 if saved.base else "auto")
    if saved.base:
        model = merge_adapter(model, model_path)
        model.config.architectures = [type(model).__name__]  # so far the base model's
    tokenizer = find_tokenizer(Path(model_path), ImportArguments())
    return model, tokenizer


def _save_gpt2_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path):
    """Saves a tokenizer; a byte-level one also as the two files that older GPT-2 tools read."""
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    if isinstance(tokenizer, GPT2Tokenizer):
        tokenizer.backend_tokenizer.model.save(str(folder))


def _finish(report: Parity, staging: Path, out: Path, architecture: dict[str, Any], console: Console | None):
    """Saves the report of a conversion, if it passed, and a model card with the weights."""
    save_report(report, staging, {"architecture": architecture, "weights_sha256": hash_weights(staging)}, console)
    records = read_records(staging)
    records.run.architecture = architecture
    place = Place.of_folder(out, native=report.format.startswith("to "))
    write_card(staging, records, HubArguments(), place)


def save_report(report: Parity, staging: Path, made: dict[str, Any], console: Console | None):
    """Prints the report of a conversion and, if it passed, saves it with entries about the result.

    Raises:
        InputError: The logits differ.
    """
    (console or stderr_console()).print(report.render(), highlight=False, markup=False)
    if not report.passed:
        raise InputError("the converted model does not match its source, so nothing was written")
    ConversionRecord(**report.to_dict(), **made).stamp().write(staging)
