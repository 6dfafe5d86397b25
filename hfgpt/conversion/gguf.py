"""GGUF, the file format of llama.cpp and of the programs built on it, such as Ollama and LM Studio.

llama.cpp runs GPT-2 as its architecture `gpt2`: the weights are GPT-2's, in hfgpt's orientation, with query, key and
value in one matrix, and biases everywhere. Its tokenizer `gpt2` is a BPE over the bytes of GPT-2's words, each byte
written as a printable character. A character vocabulary becomes one too: the token of a character is its bytes in
UTF-8, and merges join the bytes of each character and nothing else. Other tokenizers are refused.

Sources: github.com/ggml-org/llama.cpp, src/models/gpt2.cpp and src/llama-vocab.cpp.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hfgpt.configuration_hfgpt import HfGPTConfig
from hfgpt.conversion.assembly import build_on_meta, load_whole
from hfgpt.conversion.checkpoints import is_classifier
from hfgpt.conversion.gpt2 import QKV, check_plain_weights
from hfgpt.conversion.layouts import Layout
from hfgpt.errors import InputError

GGUF_FILE = "model.gguf"
MODULES = {
    "token_embd": ("model.embed_tokens",),
    "position_embd": ("model.embed_positions",),
    "blk.*.attn_norm": ("model.layers.*.input_layernorm",),
    "blk.*.attn_qkv": QKV,
    "blk.*.attn_output": ("model.layers.*.self_attn.o_proj",),
    "blk.*.ffn_norm": ("model.layers.*.post_attention_layernorm",),
    "blk.*.ffn_up": ("model.layers.*.mlp.up_proj",),
    "blk.*.ffn_down": ("model.layers.*.mlp.down_proj",),
    "output_norm": ("model.norm",),
    "output": ("lm_head",),
}
LAYOUT = Layout("gguf", MODULES, "gelu_pytorch_tanh")
# `--dtype` -> name of the file type in the package gguf.
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
# Of the logits, relative to the largest; None: those of an exact conversion.
TOLERANCES = {"f32": None, "f16": 0.005, "q8_0": 0.05}
# Names of the same function, the only one in llama.cpp's GPT-2.
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
CHARACTERS = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
# Settings of a BPE that llama.cpp does not have.
UNSUPPORTED = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
OTHERWISE = "use --format onnx or gpt2"


@dataclass
class Vocabulary:
    """A tokenizer as llama.cpp's tokenizer `gpt2` stores it.

    Args:
        tokens: Token of each id; bytes are written as in GPT-2's vocabulary, except in added tokens.
        added: Ids of the tokens that are found in a text as a whole -> whether they are special.
        merges: Pairs of tokens, separated by a space, in the order in which they are joined.
    """

    tokens: list[str]
    added: dict[int, bool]
    merges: list[str]


def import_gguf() -> ModuleType:
    """The package gguf.

    Raises:
        InputError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError("GGUF files need the package gguf: pip install 'hfgpt[gguf]'") from error
    return gguf


def check_dtype(dtype: str):
    """Checks `--dtype`, and that the package gguf is installed.

    Raises:
        InputError: The type is not supported, or the package is not installed.
    """
    if dtype not in FILE_TYPES:
        raise InputError(f"--dtype is '{dtype}'; it must be one of {', '.join(FILE_TYPES)}")
    import_gguf()


def check_config(config: HfGPTConfig, dtype: str):
    """Checks that llama.cpp can run a model.

    Raises:
        InputError: It cannot, with the reason.
    """
    if is_classifier(config):
        raise InputError("the model is a classifier, and llama.cpp has no GPT-2 classifiers: use --format gpt2")
    if config.hidden_act not in TANH_GELU:
        names = " and ".join(TANH_GELU)
        raise InputError(f"hidden_act is '{config.hidden_act}', but llama.cpp's GPT-2 has only {names}: {OTHERWISE}")
    for name in ("hidden_size", "intermediate_size") if dtype == "q8_0" else ():
        if (size := getattr(config, name)) % 32:
            raise InputError(f"{name} is {size}, but q8_0 needs a multiple of 32: use --dtype f16")


def convert_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Converts a byte-level BPE with GPT-2's splitting into words, or a character vocabulary, for llama.cpp.

    Raises:
        InputError: llama.cpp would encode some text differently, with the reason.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token["special"] for token in state["added_tokens"]}
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.get)
    model, split = state["model"], state["pre_tokenizer"] or {}
    if _is_by_character(state) and all(len(token) == 1 or ids[token] in added for token in tokens):
        written = {token: _write_bytes(token) for token in tokens if ids[token] not in added}
        starts = {word[:end] for word in written.values() for end in range(2, len(word) + 1)}
        merges = [f"{start[:-1]} {start[-1]}" for start in sorted(starts, key=lambda start: (len(start), start))]
        tokens = [written.get(token, token) for token in tokens]
    elif model["type"] != "BPE":
        raise InputError(f"the tokenizer is a {model['type']}, which llama.cpp encodes differently: {OTHERWISE}")
    elif any(model.get(name) for name in UNSUPPORTED) or not BYTE_LEVEL.items() <= split.items():
        raise InputError(f"the tokenizer does not split text into words like GPT-2's, as llama.cpp does: {OTHERWISE}")
    else:
        merges = [" ".join(pair) for pair in model["merges"]]
    _check_tokens(tokenizer, state, tokens)
    return Vocabulary(tokens, added, merges)


def _is_by_character(state: dict[str, Any]) -> bool:
    """Whether every character is encoded on its own."""
    model, split = state["model"], state["pre_tokenizer"]
    return (model["type"] == "WordLevel" and split == CHARACTERS) or (
        model["type"] == "BPE" and not model["merges"] and split is None
    )


def _write_bytes(text: str) -> str:
    """The bytes of a text in UTF-8, each written as the character that stands for it in GPT-2's vocabulary."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


def _check_tokens(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], tokens: list[str]):
    """Rejects what a GGUF file cannot describe."""
    if state["normalizer"] is not None:
        raise InputError(f"the tokenizer normalizes text, which llama.cpp does not do: {OTHERWISE}")
    if tokenizer.num_special_tokens_to_add():
        raise InputError(f"the tokenizer adds special tokens to every text, which llama.cpp does not do: {OTHERWISE}")
    if max(tokenizer.get_vocab().values()) != len(tokens) - 1 or len(set(tokens)) < len(tokens):
        raise InputError(f"the vocabulary has an id without a token, or the same token twice: {OTHERWISE}")
    for token in state["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise InputError(
                f"the added token {token['content']!r} includes the spaces around it, or is only found as a whole "
                f"word, which llama.cpp ignores: {OTHERWISE}"
            )


def find_end(model: PreTrainedModel) -> int:
    """The id of the token that ends a text.

    Raises:
        InputError: There is none, or more than one.
    """
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if len(ends) != 1:
        raise InputError(
            f"the model has {len(ends)} end-of-text tokens, but llama.cpp needs exactly one (without one, it ends "
            f"texts at token 11): set eos_token_id in generation_config.json, or {OTHERWISE}"
        )
    return ends[0]


def strip_generation(template: str) -> str:
    """A chat template without transformers' `{% generation %}`, which other engines do not support."""
    return re.sub(
        r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}",
        lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}",
        template,
    )


def write_gguf(path: Path, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: str):
    """Writes a model and its tokenizer to a GGUF file.

    Matrices are stored in `dtype`; position embeddings, norms and biases in float32, as in all GGUF files.

    Args:
        path: The file.
        name: Name of the model in the metadata.
        model: A language model with one embedding per token of the tokenizer.
        tokenizer: Its tokenizer.
        dtype: `f32`, `f16` or `q8_0`.

    Raises:
        InputError: llama.cpp cannot run the model, or would encode text differently.
    """
    gguf = import_gguf()
    check_config(model.config, dtype)
    weights = dict(model.state_dict())
    check_plain_weights(weights)
    tensors = _find_tensors(model.config, weights)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_architecture(writer, model.config)
    _add_tokenizer(writer, convert_tokenizer(tokenizer), tokenizer, find_end(model))
    kinds = {}
    for theirs, parts in tensors.items():
        rows, *width = parts[0].shape
        stored = dtype if width and theirs != "position_embd.weight" else "f32"
        kind = kinds[theirs] = gguf.GGMLQuantizationType[stored.upper()]
        block, size = gguf.GGML_QUANT_SIZES[kind]  # values and bytes per block
        shape = [rows * len(parts), *width]
        writer.add_tensor_info(theirs, shape, numpy.dtype("float32"), math.prod(shape) // block * size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for theirs, parts in tensors.items():  # only one converted tensor at a time is in memory
        tensor = torch.cat([part.detach().float() for part in parts])
        writer.write_tensor_data(gguf.quantize(tensor.numpy(), kinds[theirs]))
    writer.close()


def _find_tensors(config: HfGPTConfig, weights: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """The tensors of the file by name, each as the weights to concatenate; empties `weights`."""
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    tensors = {}
    for theirs, ours in MODULES.items():
        for number in map(str, range(config.num_hidden_layers if "*" in theirs else 1)):
            for parameter in ("weight", "bias"):
                names = [f"{name.replace('*', number)}.{parameter}" for name in ours]
                if ours == QKV and names[0] not in weights:
                    weights |= {name: torch.zeros(config.hidden_size) for name in names}
                if names[0] in weights:
                    key = f"{theirs.replace('*', number)}.{parameter}"
                    tensors[key] = [weights.pop(name) for name in names]
    if weights:
        raise InputError(f"GGUF has no weight like {min(weights)} ({len(weights)} in all): merge or remove them")
    return tensors


def _add_architecture(writer: Any, config: HfGPTConfig):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)


def _add_tokenizer(writer: Any, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, end: int):
    types = import_gguf().TokenType
    kinds = {True: types.CONTROL, False: types.USER_DEFINED, None: types.NORMAL}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([kinds[vocabulary.added.get(number)] for number in range(len(vocabulary.tokens))])
    # llama.cpp needs at least one; the byte FF is in no text.
    writer.add_token_merges(vocabulary.merges or ["ÿ ÿ"])
    writer.add_eos_token_id(end)
    # Never added to a text, but llama.cpp's default would be token 11.
    writer.add_bos_token_id(end if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(strip_generation(tokenizer.get_chat_template()))


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Loads a model, in float32, and its tokenizer as llama.cpp does.

    Unknown characters are dropped, or encoded with ids beyond the vocabulary, which llama.cpp drops.

    Args:
        path: A file written by `write_gguf`.

    Raises:
        InputError: The file is damaged, or was not written by `write_gguf`.
    """
    gguf = import_gguf()
    try:
        reader = gguf.GGUFReader(path)  # memory-mapped
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        weights = {
            found.name: torch.tensor(gguf.dequantize(found.data, found.tensor_type)) for found in reader.tensors
        }
        tokenizer = _read_tokenizer(metadata)
        config = HfGPTConfig(
            vocab_size=len(metadata["tokenizer.ggml.tokens"]),
            max_position_embeddings=metadata["gpt2.context_length"],
            hidden_size=metadata["gpt2.embedding_length"],
            num_hidden_layers=metadata["gpt2.block_count"],
            num_attention_heads=metadata["gpt2.attention.head_count"],
            intermediate_size=metadata["gpt2.feed_forward_length"],
            # Stored in float32; the shortest decimal that rounds to it is the number that was meant.
            layer_norm_eps=float(str(numpy.float32(metadata["gpt2.attention.layer_norm_epsilon"]))),
            tie_word_embeddings="output.weight" not in weights,
            hidden_act=LAYOUT.hidden_act,
            bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
            eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        )
        return load_whole(build_on_meta(config), LAYOUT.view(weights)), tokenizer
    except (ValueError, LookupError, TypeError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"'{path}' cannot be read ({reason}): export the model again") from error


def _read_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    # tokenizers needs a token for each part of a character that is merged.
    parts = dict.fromkeys([*tokens, *(part for left, right in merges for part in (left, right, left + right))])
    backend = Tokenizer(models.BPE({part: number for number, part in enumerate(parts)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    types = import_gguf().TokenType
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (types.CONTROL, types.USER_DEFINED):
            backend.add_tokens([AddedToken(token, normalized=False, special=kind == types.CONTROL)])
    end = tokens[metadata["tokenizer.ggml.eos_token_id"]]
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, chat_template=template)
