"""Faster generation on a CPU, for one text at a time: a decoding loop with few operations per token.

A step of a small model takes less time than the Python around it, and a step of a large one takes as long as reading
the weights. So this loop has no masks, no modules and a cache of fixed size, and can read weights of half the size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput, GenerationMode

from hfgpt.errors import InputError
from hfgpt.modeling_hfgpt import MANY_WEIGHTS, HfGPTForCausalLM, has_plain_weight, multiply_row


def speed_up_generation(model: HfGPTForCausalLM, half: bool = False) -> HfGPTForCausalLM:
    """Replaces the decoding loop of `model.generate`, on a CPU; `del model.generate` undoes it.

    The loop is used for one text at a time, greedy or sampled, with any logits processors, stopping criteria and
    streamer. Batches, beam search, assisted generation, padding, and returned attentions or hidden states still use
    transformers' own loop. A copy of the weights of query, key and value is kept, a third of those of the blocks; it
    is made again whenever the model's weights have changed.

    Args:
        model: A language model in float32 on the CPU.
        half: Whether to read the weights in float16, half as many bytes, from another copy. Results of the matrix
            products are rounded to float16, so that the text can differ. The prompt is still processed in float32.

    Returns:
        The same model.

    Raises:
        InputError: The model has adapters, quantized weights or hooks, or is not in float32 on the CPU; or a weight
            is too large for float16.

    Example:

    ```python
    >>> model = speed_up_generation(AutoModelForCausalLM.from_pretrained("runs/demo"))
    >>> model.generate(**inputs, max_new_tokens=100)
    ```
    """
    # A bound method, so that a deep copy of the model has a loop of its own.
    model.generate = FastLoop(model, half).generate
    return model


class Layer(NamedTuple):
    """The weight and the bias of a linear layer or a norm."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Block(NamedTuple):
    """The weights of a block, with query, key and value in one matrix (3C, C)."""

    input_norm: Layer
    projections: Layer
    output: Layer
    norm: Layer
    up: Layer
    activation: Callable
    down: Layer


class FastLoop:
    """Generates tokens in place of transformers' `_sample`; for the arguments see `speed_up_generation`."""

    def __init__(self, model: HfGPTForCausalLM, half: bool = False):
        self.model, self.half, self.version = model, half, None
        self._update_weights()

    def generate(self, *args, streamer: BaseStreamer | None = None, **kwargs):
        """`generate` of the model's class, with this loop."""
        # transformers does not pass the streamer on to a custom loop.
        loop = partial(self._generate_tokens, streamer=streamer)
        return type(self.model).generate(self.model, *args, streamer=streamer, custom_generate=loop, **kwargs)

    def _generate_tokens(
        self,
        model: PreTrainedModel,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.LongTensor:
        """The prompt (1, T) with its continuation, or with `return_dict_in_generate`, what the settings ask for."""
        if not self._suits(model, input_ids, generation_config, model_kwargs):
            arguments = (logits_processor, stopping_criteria, generation_config)
            return type(model)._sample(model, input_ids, *arguments, streamer=streamer, **model_kwargs)
        self._update_weights()
        outputs = model(input_ids, use_cache=True, logits_to_keep=1)
        with torch.inference_mode():
            length = input_ids.shape[1]
            caches = self._fill_caches(outputs.past_key_values, generation_config.max_length)
            ids = input_ids.new_empty(1, generation_config.max_length)
            ids[:, :length] = input_ids
            logits, kept_logits, kept_scores = outputs.logits[:, -1].float(), (), ()
            while True:
                # Copies, since the processors may change the logits in place.
                kept_logits += (logits.clone(),) if generation_config.output_logits else ()
                scores = logits_processor(ids[:, :length], logits)
                kept_scores += (scores,) if generation_config.output_scores else ()
                if generation_config.do_sample:
                    token = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)  # (1)
                else:
                    token = scores.argmax(dim=-1)
                ids[:, length] = token
                length += 1
                if streamer is not None:
                    streamer.put(token)
                if stopping_criteria(ids[:, :length], kept_scores).all():
                    break
                logits = self._step(token, length - 1, caches)
        if streamer is not None:
            streamer.end()
        # Outside of inference mode, copies are tensors like any others.
        sequences = ids[:, :length].clone()
        if not generation_config.return_dict_in_generate:
            return sequences
        past = DynamicCache(config=model.config)
        for index, cache in enumerate(caches):  # the last token has not been processed
            past.update(*cache[:, :, : length - 1].clone().split(1), index)
        scores, logits = (tuple(map(torch.clone, kept)) or None for kept in (kept_scores, kept_logits))
        return GenerateDecoderOnlyOutput(sequences, scores, logits, past_key_values=past)

    def _suits(self, model, input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> bool:
        """Whether this loop can replace transformers' own."""
        if (mode := config.get_generation_mode()) not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise InputError(f"fast generation does not support {mode.value}: call del model.generate first")
        past, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        is_new = past is None or past.get_seq_length() == 0
        is_plain = model is self.model and config.use_cache and not model.training and len(input_ids) == 1
        is_asked = config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states)
        return is_plain and is_new and mask is None and "inputs_embeds" not in model_kwargs and not is_asked

    def _update_weights(self):
        """Reads the weights, if they are not those that were read before."""
        version = [(weight.data_ptr(), weight._version) for weight in self.model.parameters()]
        if version == self.version:
            return
        check_plain_model(self.model)
        with torch.no_grad():
            base = self.model.model
            self.blocks = [self._read_block(block) for block in base.layers]
            self.norm = Layer(base.norm.weight, base.norm.bias)
            self.embeddings, self.positions = base.embed_tokens.weight, base.embed_positions.weight
            head, self.center = self.model.lm_head.weight, None
            if self.half:  # logits can be far from zero together, where float16 is coarse
                self.center = head.mean(dim=0)
                head = head - self.center
            self.head = Layer(self._store(head), None)
        self.version = version

    def _read_block(self, block) -> Block:
        attention, mlp = block.self_attn, block.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [layer.bias for layer in projections]
        joined = torch.cat([layer.weight for layer in projections])
        return Block(
            Layer(block.input_layernorm.weight, block.input_layernorm.bias),
            Layer(self._store(joined), None if biases[0] is None else torch.cat(biases)),
            Layer(self._store(attention.o_proj.weight), attention.o_proj.bias),
            Layer(block.post_attention_layernorm.weight, block.post_attention_layernorm.bias),
            Layer(self._store(mlp.up_proj.weight), mlp.up_proj.bias),
            mlp.act_fn,
            Layer(self._store(mlp.down_proj.weight), mlp.down_proj.bias),
        )

    def _store(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.half:
            return weight
        if not (stored := weight.half()).isfinite().all():
            raise InputError("a weight is too large for float16: use half=False, or omit --fast")
        return stored

    def _fill_caches(self, past: DynamicCache, size: int) -> list[torch.Tensor]:
        """Keys and values (2, H, size, D) of each block, with those of the prompt."""
        caches = []
        for layer in past.layers:
            joined = torch.cat([layer.keys, layer.values])  # (2, H, T, D)
            cache = joined.new_empty(*joined.shape[:2], size, joined.shape[3])
            cache[:, :, : joined.shape[2]] = joined
            caches.append(cache)
        return caches

    def _step(self, token: torch.Tensor, index: int, caches: list[torch.Tensor]) -> torch.Tensor:
        """The logits (1, V) after a token (1), the one at position `index`."""
        config = self.model.config
        size, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        hidden = functional.embedding(token, self.embeddings) + self.positions[index]  # (1, C)
        for block, cache in zip(self.blocks, caches, strict=True):
            normed = functional.layer_norm(hidden, (size,), *block.input_norm, eps)
            projected = self._multiply(normed, block.projections).view(3, heads, 1, size // heads)
            cache.narrow(2, index, 1).copy_(projected.narrow(0, 1, 2))
            keys, values = cache.narrow(2, 0, index + 1).split(1)  # (1, H, S, D)
            attended = functional.scaled_dot_product_attention(projected.narrow(0, 0, 1), keys, values)
            hidden = hidden + self._multiply(attended.view(1, size), block.output)
            normed = functional.layer_norm(hidden, (size,), *block.norm, eps)
            hidden = hidden + self._multiply(block.activation(self._multiply(normed, block.up)), block.down)
        hidden = functional.layer_norm(hidden, (size,), *self.norm, eps)
        logits = self._multiply(hidden, self.head)
        if self.half:
            logits += hidden @ self.center
            if not logits.isfinite().all():
                raise InputError("a value became too large for float16: use half=False, or omit --fast")
        return logits

    def _multiply(self, row: torch.Tensor, layer: Layer) -> torch.Tensor:
        """The product of a row (1, in) and a linear layer."""
        if self.half:
            output = functional.linear(row.half(), layer.weight).float()
            return output if layer.bias is None else output.add_(layer.bias)
        if layer.weight.numel() >= MANY_WEIGHTS:
            return multiply_row(row, *layer)
        return functional.linear(row, *layer)


def check_plain_model(model: PreTrainedModel):
    """Checks that a model can be computed from its weights alone.

    Raises:
        InputError: It cannot.
    """
    if not isinstance(model, HfGPTForCausalLM):
        raise InputError(
            f"fast generation needs an HfGPTForCausalLM, not a {type(model).__name__}: merge an adapter first"
        )
    for weight in model.parameters():
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise InputError(
                f"fast generation needs weights in float32 on the CPU, not in {weight.dtype} on {weight.device.type}: "
                "omit it"
            )
    blocks = [part for block in model.model.layers for part in (block.self_attn, block.mlp)]
    layers = [layer for part in blocks for name, layer in part.named_children() if name.endswith("_proj")]
    if not all(has_plain_weight(layer) for layer in [*layers, model.lm_head]):
        raise InputError(
            "fast generation needs plain linear layers, not adapters, quantized weights or hooks: merge or remove them"
        )
