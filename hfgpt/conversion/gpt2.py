"""GPT-2's layout: linear layers stored (in, out), and query, key and value in one matrix.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019); the names are transformers'.
"""

import functools

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import GPT2Config, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    ConversionOps,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from hfgpt.configuration_hfgpt import HfGPTConfig
from hfgpt.conversion.layouts import Layout, strip_wrappers
from hfgpt.errors import InputError

QKV = tuple(f"model.layers.*.self_attn.{letter}_proj" for letter in "qkv")
MODULES = {
    "wte": ("model.embed_tokens",),
    "wpe": ("model.embed_positions",),
    "ln_f": ("model.norm",),  # before the blocks: in the reverse direction, `norm.` must not match `input_layernorm.`
    "h.*.ln_1": ("model.layers.*.input_layernorm",),
    "h.*.attn.c_attn": QKV,
    "h.*.attn.c_proj": ("model.layers.*.self_attn.o_proj",),
    "h.*.ln_2": ("model.layers.*.post_attention_layernorm",),
    "h.*.mlp.c_fc": ("model.layers.*.mlp.up_proj",),
    "h.*.mlp.c_proj": ("model.layers.*.mlp.down_proj",),
    "lm_head": ("lm_head",),
    "score": ("score",),
}
LAYOUT = Layout("gpt2", MODULES, "gelu_new", transposed=True, ignored=r"\.attn\.(masked_)?bias$")


class WholeConversion(ConversionOps):
    """Converts a weight that may be divided among processes.

    transformers divides each weight of a checkpoint by the dimensions of the converted one, and then converts the
    parts. Here, these are gathered, converted, and divided again, one weight at a time.

    Args:
        operations: The conversions, in their order.
    """

    def __init__(self, operations: list[ConversionOps]):
        self.operations = operations

    @torch.no_grad()
    def convert(self, input_dict: dict, source_patterns, target_patterns, full_layer_name, model, **kwargs) -> dict:
        """Converts the tensors of one weight; for the arguments see transformers' `ConversionOps`."""
        parameters = dict(model.named_parameters())
        divided = parameters.get(full_layer_name)
        if isinstance(divided, DTensor):
            input_dict = {
                name: gather(tensors[0], divided, len(target_patterns)) for name, tensors in input_dict.items()
            }
        for operation in self.operations:
            input_dict = operation.convert(input_dict, source_patterns, target_patterns, model=model, **kwargs)
        for name, tensor in input_dict.items():
            parameter = parameters.get(full_layer_name.replace(target_patterns[0], name))
            if isinstance(parameter, DTensor):
                place = (parameter.device_mesh, parameter.placements)
                input_dict[name] = distribute_tensor(tensor, *place, src_data_rank=None).to_local()
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return WholeConversion([operation.reverse_op for operation in reversed(self.operations)])


def gather(part: torch.Tensor, parameter: DTensor, joined: int) -> torch.Tensor:
    """The whole weight of a checkpoint.

    Args:
        part: This process's part of it, as transformers divided it.
        parameter: The parameter by whose dimensions it was divided, the transpose of the weight.
        joined: How many parameters of this shape the weight has, side by side.
    """
    *rows, columns = reversed(parameter.shape)
    shape = torch.Size([*rows, joined * columns])
    stride = torch.empty(shape, device="meta").stride()
    place = (parameter.device_mesh, parameter.placements)
    return DTensor.from_local(part, *place, run_check=False, shape=shape, stride=stride).full_tensor()


def register_loading():
    """Registers the conversion mapping with which `from_pretrained` of hfgpt's classes loads GPT-2 checkpoints."""
    mapping = [WeightRenaming(r"(?<!\w)h\.", "layers.")]
    for theirs, ours in MODULES.items():
        # transformers adds the base model prefix to these names where needed.
        theirs, *ours = [name.removeprefix("model.").split("*.")[-1] for name in (theirs, *ours)]
        parameters = ("weight",) if theirs in ("wte", "wpe") else ("weight", "bias")  # embeddings have no bias
        for parameter in parameters if theirs != ours[0] else ():
            targets = [f"{name}.{parameter}" for name in ours]
            operations = [Transpose(0, 1)] if parameter == "weight" and ".c_" in theirs else []
            operations += [Chunk(0)] if len(ours) > 1 else []
            if operations:
                mapping.append(WeightConverter(f"{theirs}.{parameter}", targets, [WholeConversion(operations)]))
            else:
                mapping.append(WeightRenaming(rf"(?<!\w){theirs}.{parameter}", targets[0]))
    for name in ("HfGPTModel", "HfGPTForCausalLM", "HfGPTForSequenceClassification"):
        has_head = name != "HfGPTModel"
        prefix = (
            WeightRenaming(r"^transformer\.", "model.") if has_head else PrefixChange(prefix_to_remove="transformer")
        )
        register_checkpoint_conversion_mapping(name, [prefix, *mapping], overwrite=True)


def gpt2_config(config: HfGPTConfig) -> GPT2Config:
    """The configuration of the native GPT-2 that is equivalent to an hfgpt model.

    Args:
        config: Configuration of the hfgpt model.
    """
    fields = ("vocab_size", "initializer_range", "embd_pdrop", "resid_pdrop", "attn_pdrop", "use_cache")
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype")
    labels = ("id2label", "label2id", "problem_type")
    return GPT2Config(
        n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_positions=config.max_position_embeddings,
        n_ctx=config.max_position_embeddings,  # not read by transformers, but by llama.cpp's convert_hf_to_gguf.py
        n_inner=config.intermediate_size,
        activation_function=config.hidden_act,
        layer_norm_epsilon=config.layer_norm_eps,
        **{name: getattr(config, name) for name in (*fields, *kept, *labels)},
    )


def check_plain_weights(weights: dict[str, torch.Tensor]):
    """Checks that weights are dense floating-point tensors.

    Raises:
        InputError: Names a quantized weight.
    """
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or type(tensor) is not torch.Tensor:
            raise InputError(
                f"{name} is quantized ({tensor.dtype}), which cannot be exported: export the original model"
            )


def gpt2_weights(
    weights: dict[str, torch.Tensor], native: PreTrainedModel
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Converts the weights of an hfgpt model to the names and layout of transformers' GPT-2 classes.

    Args:
        weights: The model's state dict; emptied, to avoid a second copy in memory.
        native: The target GPT-2; may be on the meta device.

    Returns:
        The weights, and the names of biases that were filled with zeros because the hfgpt model does not have them.

    Raises:
        InputError: A weight is quantized, or has no counterpart in GPT-2, such as an adapter's.
    """
    if native.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    check_plain_weights(weights)
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in weights.values()})
    # Memory is allocated only when it is written to, so there is one copy of the weights at a time.
    theirs = {name: torch.empty(parameter.shape, dtype=dtype) for name, parameter in native.named_parameters()}
    filled = []
    for name, place in LAYOUT.view(strip_wrappers(theirs)).items():
        if name in weights or not name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            place.copy_(weights.pop(name))
        else:
            place.zero_()
            filled.append(name)
    if weights:
        raise InputError(f"GPT-2 has no weight like {min(weights)} ({len(weights)} in all): merge or remove them")
    return theirs, filled
