"""Faster generation on a CPU, for one text at a time: a decoding loop with few operations per token.

A step of a small model takes less time than the Python around it, and a step of a large one takes as long as reading
the weights. So this loop has no masks, no modules and a cache of fixed size, and can read weights of half the size;
its steps are in `decoding_steps.py`.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput, GenerationMixin
from transformers.utils import output_capturing

from hfgpt.errors import InputError
from hfgpt.evaluation.decoding_steps import LargeStep, SmallStep, has_few_weights
from hfgpt.modeling_hfgpt import (
    HfGPTAttention,
    HfGPTBlock,
    HfGPTForCausalLM,
    HfGPTMLP,
    HfGPTModel,
)

MODULES = (
    *(HfGPTForCausalLM, HfGPTModel, HfGPTBlock, HfGPTAttention, HfGPTMLP),
    *(nn.Embedding, nn.LayerNorm, nn.Linear, nn.Dropout, nn.ModuleList),
)
KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "tokenizer"}


def speed_up_generation(model: HfGPTForCausalLM, half: bool = False) -> HfGPTForCausalLM:
    """Makes `model.generate` faster on a CPU, for one text at a time; `del model.decoding_loop` undoes it.

    Greedy decoding and sampling then use another loop, with any logits processors, stopping criteria and streamer.
    Batches, padding, other ways of decoding, a cache or positions of your own, returned attentions or hidden states,
    and hooks or adapters that are added later still use transformers' loop.

    Args:
        model: A language model in float32 on the CPU.
        half: Whether to read the weights in float16, half as many bytes, from a copy. Matrix products and their inputs
            are rounded to float16, so that the text can differ. The prompt is still processed in float32, and so are
            blocks with a hidden size of up to 256, for which NumPy in float32 is faster. The copy is made again when
            weights change, but PyTorch does not notice changes through `.data`: then call this again.

    Returns:
        The same model.

    Raises:
        InputError: The model is not an `HfGPTForCausalLM` in float32 on the CPU, or has adapters, quantized weights
            or hooks; or a weight is too large for float16.

    Example:

    ```python
    >>> model = speed_up_generation(AutoModelForCausalLM.from_pretrained("runs/demo"))
    >>> model.generate(**inputs, max_new_tokens=100)
    ```
    """
    if not isinstance(model, HfGPTForCausalLM):
        raise InputError(
            f"fast generation needs an HfGPTForCausalLM, not a {type(model).__name__}: merge an adapter first"
        )
    for weight in model.parameters():
        if not is_in_float32_on_cpu(weight):
            raise InputError(
                f"fast generation needs weights in float32 on the CPU, not in {weight.dtype} on {weight.device.type}: "
                "use generate as it is (omit --fast)"
            )
    if not is_plain(model):
        raise InputError(
            "fast generation needs a model without adapters, quantized weights and hooks: merge or remove them first"
        )
    model.decoding_loop = FastLoop(model, half)
    return model


def is_in_float32_on_cpu(weight: torch.Tensor) -> bool:
    """Whether this module can compute with a weight."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def is_plain(model: nn.Module) -> bool:
    """Whether a model can be computed from its weights alone: nothing was replaced in it, or hooked to it."""
    blocks = model.model.layers
    if not all(type(block.self_attn) is HfGPTAttention and type(block.mlp) is HfGPTMLP for block in blocks):
        return False
    if model.lm_head.bias is not None or model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    for block in blocks:
        attention = block.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        if len({projection.bias is None for projection in projections}) > 1:
            return False
    if any(isinstance(module, nn.LayerNorm) and module.bias is None for module in model.modules()):
        return False
    activations = {block.mlp.act_fn for block in blocks}
    for module in model.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers installs its own hooks when it first returns hidden states, and never removes them.
        has_hooks = any(getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks)
        if has_hooks or "forward" in vars(module) or (type(module) not in MODULES and module not in activations):
            return False
    is_usual = all(type(weight) is nn.Parameter and is_in_float32_on_cpu(weight) for weight in model.parameters())
    return is_usual and "prepare_inputs_for_generation" not in vars(model)


class Ends(NamedTuple):
    """The length and the tokens that end a text."""

    length: int
    tokens: set[int]


def find_ends(criteria: StoppingCriteriaList) -> Ends | None:
    """When a text ends; None if there are criteria other than transformers' own for this."""
    ends = Ends(criteria.max_length, set())
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            ends.tokens.update(criterion.eos_token_id.tolist())
        elif type(criterion) is not MaxLengthCriteria or criterion.max_length != ends.length:
            return None
    return ends


class FastLoop:
    """Generates tokens in place of transformers' `_sample`; for the arguments see `speed_up_generation`."""

    def __init__(self, model: HfGPTForCausalLM, half: bool = False):
        self.model, self.half, self.version = model, half, None
        self._read_weights()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles of the model, which read their own weights."""
        return {"model": self.model, "half": self.half, "version": None}

    def __call__(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.LongTensor:
        """The prompt (1, T) with its continuation, or with `return_dict_in_generate`, what the settings ask for."""
        config, past, length = generation_config, model_kwargs.get("past_key_values"), input_ids.shape[1]
        suits = stopping_criteria.max_length == config.max_length and self._suits(input_ids, config, model_kwargs)
        if synced_gpus or not suits:
            arguments = (logits_processor, stopping_criteria, config, synced_gpus, streamer)
            return GenerationMixin._sample(self.model, input_ids, *arguments, **model_kwargs)
        self._read_weights()
        logits = self.model(input_ids, past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1]
        caches = self._copy_caches(past, config.max_length)
        ids = torch.empty(1, config.max_length, dtype=torch.int64)
        ids[:, :length] = input_ids
        row, ends = ids[0].numpy(), find_ends(stopping_criteria)
        kept_logits = () if config.return_dict_in_generate and config.output_logits else None
        kept_scores = () if config.return_dict_in_generate and config.output_scores else None
        while True:
            if kept_logits is not None:
                kept_logits += (logits.clone(),)  # the processors may change them in place
            scores = logits_processor(ids[:, :length], logits)
            if kept_scores is not None:
                kept_scores += (scores,)
            if config.do_sample:
                token = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)  # (1)
            else:
                token = scores.argmax(dim=-1)
            row[length] = number = token.item()
            length += 1
            if streamer is not None:
                streamer.put(token)
            if ends is None:
                is_done = stopping_criteria(ids[:, :length], kept_scores).all()
            else:
                is_done = length >= ends.length or number in ends.tokens
            if is_done:
                break
            logits = self.step(number, length - 1, caches)
        if streamer is not None:
            streamer.end()
        # As in transformers, the cache does not include the last new token, which was never passed to the model.
        for index, cache in enumerate(caches):
            past.update(*cache[:, :, input_ids.shape[1] : length - 1].split(1), index)
        sequences = ids[:, :length].clone()
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences, kept_scores, kept_logits, past_key_values=past)

    def _suits(self, input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> bool:
        """Whether this loop can replace transformers' own."""
        model, past, positions = self.model, model_kwargs.get("past_key_values"), model_kwargs.get("position_ids")
        is_asked_for_more = config.return_dict_in_generate and (
            config.output_attentions or config.output_hidden_states
        )
        return (
            len(input_ids) == 1
            and not any(value is not None and name not in KNOWN for name, value in model_kwargs.items())
            and model_kwargs.get("attention_mask") is None  # transformers removes it if nothing is padding
            and (positions is None or torch.equal(positions, torch.arange(input_ids.shape[1]).unsqueeze(0)))
            and type(past) is DynamicCache
            and past.get_seq_length() == 0
            and not is_asked_for_more
            and not model.training
            and not torch.is_autocast_enabled("cpu")
            and is_plain(model)
        )

    @torch.no_grad()
    def _read_weights(self):
        """Finds the weights, and copies them to float16 unless they are those of the last copy.

        In float32, those of small models are read each time, which takes about as long as a token or two.
        """
        if self.half:
            version = self._find_version()
            if version == self.version:
                return
        is_small = has_few_weights(*self.model.model.layers)
        self.step = SmallStep(self.model, self.half) if is_small else LargeStep(self.model, self.half)
        if self.half:
            self.version = version  # only now, since weights that overflow float16 are refused

    def _find_version(self) -> list[Any]:
        """A value that changes whenever a step has to be built again: with the weights, or a setting of a block."""
        version: list[Any] = [(weight.data_ptr(), weight._version) for weight in self.model.parameters()]
        for module in self.model.modules():
            if isinstance(module, nn.LayerNorm):
                version.append(module.eps)
            elif isinstance(module, HfGPTAttention):
                version.append(module.scaling)
            elif isinstance(module, HfGPTMLP):
                version.append(module.act_fn)
        return version

    def _copy_caches(self, past: DynamicCache, size: int) -> list[torch.Tensor]:
        """Keys and values (2, H, size, D) of each block, with those of the prompt."""
        caches = []
        for layer in past.layers:
            joined = torch.cat([layer.keys, layer.values])  # (2, H, T, D)
            cache = joined.new_empty(*joined.shape[:2], size, joined.shape[3])
            cache[:, :, : joined.shape[2]] = joined
            caches.append(cache)
        return caches
