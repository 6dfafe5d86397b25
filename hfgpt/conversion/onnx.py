"""ONNX, the format of ONNX Runtime, laid out and named for transformers.js, which runs it in browsers and Node.js.

The graph takes token ids, an attention mask and the cache of earlier tokens, which may be empty, and returns
logits and the longer cache. transformers.js supports GPT-2: it reads the sizes of the cache from GPT-2's config.json.

Source: github.com/huggingface/transformers.js, src/configs.js and src/models/session.js.
"""

import contextlib
import io
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import DynamicCache, GPT2Config, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hfgpt.conversion.checkpoints import is_classifier
from hfgpt.conversion.gpt2 import gpt2_config
from hfgpt.conversion.parity import ComputeLogits
from hfgpt.errors import InputError

ONNX_FILE = "onnx/model.onnx"
MOST_BYTES = 2**31  # of one file in protobuf


def check_installed():
    """Checks that the packages for ONNX are installed.

    Raises:
        InputError: Names one that is not.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"ONNX files need the package {error.name}: pip install 'hfgpt[onnx]'") from error


def check_exportable(model: PreTrainedModel):
    """Checks that transformers.js can run a model.

    Raises:
        InputError: It cannot, with the reason.
    """
    if is_classifier(model.config):
        raise InputError("the model is a classifier, and transformers.js has no GPT-2 classifiers: use --format gpt2")
    if (size := 4 * model.num_parameters()) >= MOST_BYTES:
        raise InputError(f"the model has {size:,} bytes in float32, but an ONNX file holds {MOST_BYTES:,}: use gguf")


def write_onnx(folder: Path, model: PreTrainedModel):
    """Writes a language model in float32 as `onnx/model.onnx` with GPT-2's config.json and its generation settings.

    Args:
        folder: An existing folder.
        model: The model; converted to float32.

    Raises:
        InputError: The installed transformers cannot export it.
    """
    import onnx_ir
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = model.float()
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(2, 5, dtype=torch.long)  # sizes are only examples; none may be 1, which would be fixed
    with torch.no_grad():
        model(ids[:, :3], past_key_values=cache, use_cache=True)
    inputs = {"input_ids": ids[:, 3:], "attention_mask": torch.ones_like(ids), "past_key_values": cache}
    with _quiet():
        exported = OnnxExporter().export(model, {**inputs, "use_cache": True}, config=OnnxConfig(dynamic=True))
    if not hasattr(exported, "program"):
        raise InputError("transformers is too old to export to ONNX: run pip install --upgrade transformers")
    graph = exported.program.graph
    for value in (*graph.inputs, *graph.outputs):
        value.name = _name_for_javascript(value.name)
    file = folder / ONNX_FILE
    file.parent.mkdir()
    onnx_ir.save(exported.program, file)
    config = gpt2_config(model.config)
    config.architectures = ["GPT2LMHeadModel"]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _name_for_javascript(name: str) -> str:
    """The name that transformers.js uses for an input or output of transformers' exporter."""
    found = re.fullmatch(r"(in|out)put\.past_key_values\.layers\.(\d+)\.(key|value)s", name)
    return f"{'past_key_values' if found[1] == 'in' else 'present'}.{found[2]}.{found[3]}" if found else name


@contextlib.contextmanager
def _quiet():
    """Hides the exporter's progress and its warnings about the versions it was tested with; the result is compared."""
    verbosity, disabled = transformers_logging.get_verbosity(), logging.root.manager.disable
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        transformers_logging.set_verbosity(verbosity)


def compute_with_onnx(folder: Path) -> ComputeLogits:
    """A function for the logits of `onnx/model.onnx` in ONNX Runtime, in float32: first those of half of the tokens,
    then, with their cache, those of the others."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
    config = GPT2Config.from_pretrained(folder)
    names = [f"{layer}.{part}" for layer in range(config.n_layer) for part in ("key", "value")]
    outputs = ["logits", *(f"present.{name}" for name in names)]

    def compute(input_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows, length = input_ids.shape
        empty = numpy.zeros((rows, config.n_head, 0, config.n_embd // config.n_head), numpy.float32)
        cache: list[Any] = [empty] * len(names)
        logits = []
        for start, end in ((0, length // 2), (length // 2, length)):
            if start == end:
                continue
            given = {f"past_key_values.{name}": part for name, part in zip(names, cache, strict=True)}
            given["input_ids"] = input_ids[:, start:end].numpy()
            given["attention_mask"] = numpy.ones((rows, end), numpy.int64)
            found, *cache = session.run(outputs, given)
            logits.append(torch.from_numpy(found))
        return torch.cat(logits, dim=1)

    return compute
