"""`hfgpt export`: converts a model for other programs, reads the result back, and compares the logits."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfgpt.commands.convert import count_greedy_tokens, export_model, load_to_export, parity_rows, save_report
from hfgpt.conversion import gguf, onnx
from hfgpt.conversion.ollama import MODELFILE, render_modelfile
from hfgpt.conversion.parity import Parity, compare, compute_with, record
from hfgpt.errors import InputError
from hfgpt.hub.card import describe_architecture
from hfgpt.known_answers import record_answers
from hfgpt.models import check_vocabulary
from hfgpt.saving import appearing_folder, check_free, hash_file, write_text

FORMATS = ("gpt2", "gguf", "ollama", "onnx")


@dataclass
class ExportArguments:
    """Options of `hfgpt export`.

    Args:
        format: One of `FORMATS`.
        dtype: Type of the matrices in a GGUF file; None: f32.
        merge_adapter: Whether the model is a PEFT adapter, to be merged into its base model.
    """

    format: str = "gpt2"
    dtype: str | None = None
    merge_adapter: bool = False


def export(model_path: str, out: Path, arguments: ExportArguments, console: Console | None = None) -> Parity:
    """Exports a model in one of `FORMATS`.

    Args:
        model_path: Folder or Hub id of an hfgpt model.
        out: Output folder (must not exist).
        arguments: The format and its options.
        console: Where to print the report; None: standard error.

    Returns:
        The parity report, also saved as `out/conversion.json`.

    Raises:
        InputError: `model_path` is not an hfgpt model, the format cannot represent it, `out` exists, or the logits
            differ.
    """
    if arguments.format not in FORMATS:
        raise InputError(f"--format is '{arguments.format}'; it must be one of {', '.join(FORMATS)}")
    if arguments.dtype is not None and arguments.format not in ("gguf", "ollama"):
        raise InputError(f"--dtype is for gguf and ollama, not for {arguments.format}: leave it out")
    if arguments.format == "gpt2":
        return export_model(model_path, out, arguments.merge_adapter, console)
    if arguments.format == "onnx":
        return export_onnx(model_path, out, arguments, console)
    return export_gguf(model_path, out, arguments, console)


def export_gguf(model_path: str, out: Path, arguments: ExportArguments, console: Console | None = None) -> Parity:
    """Exports a model and its tokenizer as `out/model.gguf`, for Ollama with a Modelfile; see `export`."""
    dtype = arguments.dtype or "f32"
    gguf.check_dtype(dtype)
    out = check_free(out)
    model, tokenizer = load_to_export(model_path, arguments.merge_adapter)
    gguf.check_config(model.config, dtype)
    if tokenizer is None:
        raise InputError(f"'{model_path}' has no tokenizer, which a GGUF file contains: save it with the model")
    gguf.convert_tokenizer(tokenizer)  # before the parity rows are computed
    parameters, notes = model.num_parameters(), _drop_padding(model, tokenizer)
    if not model.config.qkv_bias:
        notes.append(f"filled with zeros: {3 * model.config.num_hidden_layers} biases that are not in the model")
    rows, greedy_tokens = parity_rows(model.config, tokenizer), count_greedy_tokens(model.config)
    expected = record(compute_with(model), rows, greedy_tokens)
    config, architecture = model.config, describe_architecture(model)
    with appearing_folder(out) as staging:
        file = staging / gguf.GGUF_FILE
        gguf.write_gguf(file, out.name, model, tokenizer, dtype)
        if arguments.format == "ollama":
            modelfile = render_modelfile(gguf.GGUF_FILE, tokenizer, config.max_position_embeddings)
            write_text(staging / MODELFILE, modelfile)
        del model
        saved, tokenizer = gguf.read_gguf(file)
        tolerance = gguf.TOLERANCES[dtype]
        differences, greedy_equal = compare(expected, record(compute_with(saved), rows, greedy_tokens), tolerance)
        if tolerance is not None:
            greedy_equal = None  # rounded weights may change the likeliest token
        converted, sha256 = saved.num_parameters(), hash_file(file)
        report = Parity(model_path, f"to gguf, {dtype}", converted, parameters, differences, greedy_equal, notes)
        save_report(report, staging, {"architecture": architecture, "weights_sha256": sha256}, console)
        record_answers(saved, tokenizer, sha256).write(staging)
    return report


def export_onnx(model_path: str, out: Path, arguments: ExportArguments, console: Console | None = None) -> Parity:
    """Exports a model as `out/onnx/model.onnx`, with the files that transformers.js needs; see `export`."""
    onnx.check_installed()
    out = check_free(out)
    model, tokenizer = load_to_export(model_path, arguments.merge_adapter)
    onnx.check_exportable(model)
    parameters, notes = model.num_parameters(), [] if tokenizer is None else _drop_padding(model, tokenizer)
    rows, greedy_tokens = parity_rows(model.config, tokenizer), count_greedy_tokens(model.config)
    single = (torch.float32,)  # of the file
    expected = record(compute_with(model), rows, greedy_tokens, single)
    with appearing_folder(out) as staging:
        onnx.write_onnx(staging, model)
        found = record(onnx.compute_with_onnx(staging), rows, greedy_tokens, single)
        converted = model.num_parameters()
        report = Parity(model_path, "to onnx", converted, parameters, *compare(expected, found), notes)
        sha256 = hash_file(staging / onnx.ONNX_FILE)
        save_report(report, staging, {"architecture": describe_architecture(model), "weights_sha256": sha256}, console)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
            record_answers(model, tokenizer, sha256).write(staging)
    return report


def _drop_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Removes the embeddings that have no token, which `generate` never samples; returns a note about them."""
    check_vocabulary(model, tokenizer)
    tokens, size = len(tokenizer), model.config.vocab_size
    if tokens == size:
        return []
    model.resize_token_embeddings(tokens)
    suppressed = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = [number for number in suppressed if number < tokens] or None
    return [f"cut: rows {tokens} to {size - 1} of the token embedding, which have no token"]
