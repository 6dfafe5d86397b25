"""GPT from top to bottom: attention, MLP, block, model, generation, language model, sequence classifier.

GPT-2's architecture: learned token and position embeddings, pre-LayerNorm blocks, causal multi-head attention, a
tanh-GELU MLP of four times the hidden size, a final LayerNorm and a linear head, with tied or separate embeddings.

Everything else uses transformers: attention kernels through its attention interface, masks through its mask functions,
caches through its cache classes, losses through `loss_function`. There are no buffers, so `from_pretrained` cannot
leave anything uninitialized, and the projections are plain `nn.Linear`, so adapters, quantizers and parallel plans
work without special cases.

Shapes: B batch, T tokens in this call, S tokens attended to (including the cache), C hidden size, H heads, D = C / H,
V vocabulary size.

This file is uploaded to the Hub with the weights, so it imports only torch, transformers and the configuration.

Sources: Vaswani et al., "Attention Is All You Need" (2017); Radford et al., "Language Models are Unsupervised
Multitask Learners" (GPT-2, 2019); Press and Wolf, "Using the Output Embedding to Improve Language Models" (2017).
"""

import math
import shutil
import sys
from functools import partial
from pathlib import Path
from uuid import uuid4

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import ContinuousBatchingManager, GenerationMixin, StoppingCriteria
from transformers.generation.continuous_batching.requests import RequestState
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_tracing, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_hfgpt import AUTO_MAP, HfGPTConfig

logger = logging.get_logger(__name__)

MANY_LOGITS, CHUNK_OF_LOGITS = 2**25, 2**27  # bytes in float32, see `CrossEntropyInChunks`
SHORT_ROW, SMALL_HEAD = 256, 2**14  # tokens, and values in a head, see `is_faster_in_float32`
MANY_WEIGHTS = 2**17  # of a matrix whose product with one row is divided among threads, see `multiply_row`


def project(linear: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """`linear(inputs)`; for a single row on a CPU, such as a token of `generate`, by `multiply_row`."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or inputs.shape[:-1].numel() != 1:
        return linear(inputs)
    if not has_plain_weight(linear):
        return linear(inputs)
    weight = linear.weight
    is_suitable = weight.device.type == "cpu" and weight.dtype == inputs.dtype == torch.float32
    if not is_suitable or weight.numel() < MANY_WEIGHTS or is_tracing(inputs) or torch.is_autocast_enabled("cpu"):
        return linear(inputs)
    return multiply_row(inputs.reshape(1, -1), weight, linear.bias).view(*inputs.shape[:-1], -1)


def multiply_row(row: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`nn.functional.linear` of a row (1, in), divided into as many products as there are threads.

    PyTorch multiplies a single row in one thread, which reads the weights (out, in) about half as fast as the memory
    allows. Each output is the same sum of products in both cases.
    """
    parts = min(torch.get_num_threads(), len(weight))
    size = len(weight) // parts
    divided = weight[: parts * size].reshape(parts, size, -1)
    output = torch.bmm(row.expand(parts, 1, -1), divided.transpose(1, 2)).view(1, -1)  # (1, parts * size)
    if parts * size < len(weight):
        output = torch.cat([output, nn.functional.linear(row, weight[parts * size :])], dim=1)
    return output if bias is None else output.add_(bias)


def has_plain_weight(linear: nn.Module) -> bool:
    """Whether a linear layer is not quantized, adapted, divided among processes, or with hooks.

    accelerate replaces `forward` of the layers whose weights it moves to another device.
    """
    is_plain = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and "forward" not in vars(linear)
    return is_plain and not linear._forward_hooks and not linear._forward_pre_hooks


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # (B, H, T, D)
    key: torch.Tensor,  # (B, H, S, D)
    value: torch.Tensor,  # (B, H, S, D)
    attention_mask: torch.Tensor | None,  # (B, 1, T, S), added to the scores; None: nothing is masked
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(Q K^T / sqrt(D) + mask) V; returns the output (B, T, H, D) and the attention weights (B, H, T, S)."""
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    # In float32: half-precision sums over long rows lose small weights.
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def is_faster_in_float32(query: torch.Tensor) -> bool:
    """Whether attention is being trained in bfloat16 on short rows on a CPU.

    There, PyTorch's kernel takes up to three times as long backward as in float32; on longer rows, it takes less time.
    """
    if query.dtype != torch.bfloat16 or query.device.type != "cpu" or not query.requires_grad or is_tracing(query):
        return False
    length, head_dim = query.shape[2:]
    return length <= SHORT_ROW and length * head_dim <= SMALL_HEAD


def attend_in_float32(attention_interface, module, query, key, value, attention_mask, **kwargs):
    """`attention_interface` on float32 copies; returns what it returns, the output in the type of the query."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        inputs = (query.float(), key.float(), value.float(), attention_mask)
        output, weights = attention_interface(module, *inputs, **kwargs)
    return output.to(query.dtype), weights


class HfGPTAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: HfGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj.ends_residual_branch = True
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # -1 for the heads: with tensor parallelism, each process has a subset of them.
        head_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = project(self.q_proj, hidden_states).view(head_shape).transpose(1, 2)  # (B, H, T, D)
        key = project(self.k_proj, hidden_states).view(head_shape).transpose(1, 2)
        value = project(self.v_proj, hidden_states).view(head_shape).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, H, S, D)

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.config._attn_implementation == "sdpa" and is_faster_in_float32(query):
            attention_interface = partial(attend_in_float32, attention_interface)
        dropout = self.config.attn_pdrop if self.training else 0.0
        output, weights = attention_interface(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()  # (B, T, C)
        return self.resid_dropout(project(self.o_proj, output)), weights


class HfGPTMLP(nn.Module):
    """Two linear layers with an activation between them, applied to each position separately."""

    def __init__(self, config: HfGPTConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.down_proj.ends_residual_branch = True
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        activations = self.act_fn(project(self.up_proj, hidden_states))  # (B, T, 4C)
        return self.resid_dropout(project(self.down_proj, activations))


class HfGPTBlock(GradientCheckpointingLayer):
    """One pre-LayerNorm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: HfGPTConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = HfGPTAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = HfGPTMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attention_output, _ = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HfGPTPreTrainedModel(PreTrainedModel):
    """Declarations for transformers, and weight initialization, shared by all hfgpt models."""

    config_class = HfGPTConfig
    config: HfGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HfGPTBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$"]  # GPT-2's causal masks
    _can_record_outputs = {"hidden_states": HfGPTBlock, "attentions": HfGPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # transformers' `init` functions do not overwrite weights that `from_pretrained` has loaded.
        super()._init_weights(module)
        # GPT-2, section 2.3: scale the weights of residual layers by 1/sqrt(N) for N residual layers (two per block).
        # The layer itself is marked, since transformers skips third-party modules without direct parameters.
        if getattr(module, "ends_residual_branch", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Like transformers, but raises ValueError for missing or unexpected weights, except those of the heads."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        asked = output_loading_info or "state_dict" in kwargs  # the caller checks, or has chosen the weights
        for kind, heads in (("missing", {"score.weight"}), ("unexpected", {"lm_head.weight", "score.weight"})):
            if not asked and (keys := sorted(set(info[f"{kind}_keys"]) - heads)):
                raise ValueError(
                    f"'{model.name_or_path}' has {len(keys)} {kind} weights, such as {keys[0]}: use another copy"
                )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """Like transformers, but always with hfgpt's weight names, and with the model's code.

        By default, transformers would save a model loaded from a GPT-2 checkpoint with GPT-2's names, which could not
        be loaded without hfgpt.
        """
        kwargs.setdefault("save_original_format", False)
        self.config.auto_map = dict(AUTO_MAP)
        if is_main_process and not Path(save_directory).is_file():
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            for module in (HfGPTConfig.__module__, HfGPTPreTrainedModel.__module__):
                shutil.copyfile(code := sys.modules[module].__file__, Path(save_directory, Path(code).name))
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)


def find_padding_mask(attention_mask) -> torch.Tensor | None:
    """The mask if it is a padding mask (B, S); None if it is a prepared mask."""
    return attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 else None


def count_positions(inputs_embeds: torch.Tensor, padding_mask: torch.Tensor | None, seen: int) -> torch.Tensor:
    """The positions (B or 1, T) of the tokens after `seen` cached ones: the number of real tokens before each."""
    index = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen  # (T)
    if padding_mask is None:
        return index.unsqueeze(0)
    counted = padding_mask.long().cumsum(-1) - 1  # (B, S)
    return counted.clamp(min=0).index_select(1, index)


def find_packed_documents(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The document index of each token (B, T) in packed rows; None if every row is a single document.

    A document starts at each real token whose position (B, T) is not one more than that of the real token before it.
    Padding, zero in the mask (B, T), never starts a document, whatever its positions.
    """
    index = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    real = torch.ones_like(position_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    last_real = torch.where(real, index, -1).cummax(-1).values
    previous = nn.functional.pad(last_real, (1, -1), value=-1)
    expected = position_ids.gather(-1, previous.clamp(min=0)) + 1
    starts = real & (previous >= 0) & (position_ids != expected)
    # Values are not available while tracing, so the mask is then always built.
    if not is_tracing(position_ids) and not starts.any():
        return None
    return starts.cumsum(-1)


class HfGPTModel(HfGPTPreTrainedModel):
    """Embeddings, blocks and the final norm: token ids in, hidden states out."""

    def __init__(self, config: HfGPTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embd_dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList([HfGPTBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Computes the hidden states of the last layer.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds`, (B, T, C), in their place.
            attention_mask: (B, S), zero for padding on either side, over cached and new tokens; or a mask prepared by
                transformers' mask functions.
            position_ids: (B, T); None: count the real tokens of each row. Positions that restart mark packed
                documents, which do not attend to each other; such rows are not cached.
            past_key_values: Cache of the previous tokens.
            use_cache: Whether to return a cache; None: as in the configuration.

        Raises:
            ValueError: More tokens than the context length; packed rows with a cache; an attention mask that does not
                cover the cached tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, C)

        if "cache" in kwargs:  # continuous batching computes a token past the end of a request, and drops it
            position_ids = position_ids.clamp(max=self.config.max_position_embeddings - 1)
        given, padding_mask = position_ids is not None, find_padding_mask(attention_mask)  # (B, S)
        position_ids = self._find_positions(inputs_embeds, padding_mask, position_ids, past_key_values)  # (B or 1, T)

        documents = same_document = None
        if given and (attention_mask is None or padding_mask is not None):
            documents = self._find_documents(position_ids, padding_mask, past_key_values)  # (B, T)
        if documents is not None:  # no cache is created, since packed documents cannot be continued

            def same_document(batch, head, query, key):
                return documents[batch, query] == documents[batch, key]

        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        # Without position_ids, since transformers does not detect packed rows if there is a mask or a cache.
        causal_mask = create_causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values, and_mask_function=same_document
        )

        hidden_states = self.embd_dropout(self._add_positions(inputs_embeds, position_ids))
        for block in self.layers:
            # Flash attention detects packed documents from the positions.
            hidden_states = block(
                hidden_states, causal_mask, past_key_values=past_key_values, position_ids=position_ids, **kwargs
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def _find_positions(self, inputs_embeds, padding_mask, position_ids, past_key_values) -> torch.Tensor:
        """The given or counted positions (B or 1, T), checked against the context length."""
        batch_size, length = inputs_embeds.shape[:2]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        refuse_short_mask(padding_mask, seen, length)
        if position_ids is None:
            found = count_positions(inputs_embeds, padding_mask, seen)
        else:
            found = position_ids.expand(batch_size, -1)
        # Checked only if one can be too large: reading values from an accelerator synchronizes with it.
        if not is_tracing(found) and (
            position_ids is not None or int(seen) + length > self.config.max_position_embeddings
        ):
            refuse_positions_past(self.config.max_position_embeddings, found)
        return found

    def _add_positions(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The inputs of the first block (B, T, C)."""
        # In a later stage of vLLM's or SGLang's pipeline, the inputs are hidden states.
        if isinstance(self.layers[0], nn.Identity):
            return inputs_embeds
        return inputs_embeds + self.embed_positions(position_ids)

    def _find_documents(self, position_ids, padding_mask, past_key_values) -> torch.Tensor | None:
        """The document indices (B, T) of packed rows; None if every row is a single document."""
        length = position_ids.shape[1]
        # While tracing, positions with a cache come from `generate`: one document per row.
        if length == 1 or (past_key_values is not None and is_tracing(position_ids)):
            return None
        mask = None if padding_mask is None else padding_mask[:, -length:]  # (B, T)
        documents = find_packed_documents(position_ids, mask)
        if documents is not None:
            refuse_documents_that_mix(documents, mask, past_key_values, self.config._attn_implementation)
        return documents


class HfGPTGenerationMixin(GenerationMixin):
    """Ends generation at the context, where transformers would continue until the position embedding fails."""

    decoding_loop = None  # set by `hfgpt.speed_up_generation`

    def _sample(self, *args, **kwargs):
        return (self.decoding_loop or super()._sample)(*args, **kwargs)

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length):
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        generation_config._prompt_length = input_ids_length

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Limits the generated length to what fits, since here `generate` first has the length and the positions."""
        context, prompt = self.config.max_position_embeddings, generation_config._prompt_length
        positions = model_kwargs.get("position_ids")  # (B, T); None if a wrapper hides the signature of `forward`
        lengths = torch.tensor([prompt]) if positions is None else positions.amax(-1) + 1  # (B), without padding
        longest, shortest = int(lengths.max()), int(lengths.min())
        if longest >= context:
            raise ValueError(describe_full_prompt(context, longest))
        new_tokens = generation_config.max_length - prompt
        excess = max(new_tokens - (context - shortest), 0)
        generation_config.max_length -= excess
        generation_config._row_ends = None
        warn_of_the_end(context, new_tokens, context - longest)
        if longest > shortest and new_tokens > context - longest:  # the row with the longest prompt ends first
            generation_config._row_ends = prompt + context - lengths
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length - excess
        )

    def _get_stopping_criteria(self, generation_config, stopping_criteria, *args, **kwargs):
        criteria = super()._get_stopping_criteria(generation_config, stopping_criteria, *args, **kwargs)
        if (ends := getattr(generation_config, "_row_ends", None)) is not None:
            beams, end = generation_config.num_beams > 1, generation_config._eos_token_tensor
            if generation_config._pad_token_tensor is None or (beams and end is None):
                raise ValueError(
                    "the rows reach the end of the context at different steps, after which they are padded: set "
                    f"{'eos_token_id' if beams else 'pad_token_id'}"
                )
            criteria.append(RowEndCriteria(ends))
        return criteria

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        if mask is not None and positions is not None:
            # A row that has reached the context gets padding while the others continue.
            mask[:, -1:].masked_fill_(positions[:, -1:] >= self.config.max_position_embeddings, 0)
            positions[:, -1:].clamp_(max=self.config.max_position_embeddings - 1)
        return model_kwargs

    def _get_candidate_generator(self, generation_config, **kwargs):
        """Candidates of assisted generation, cut before the end, as transformers does except with prompt lookup."""
        generator = super()._get_candidate_generator(generation_config=generation_config, **kwargs)
        propose, end = generator.get_candidates, generation_config.max_length - 1

        def get_candidates(input_ids, **kwargs):
            ids, logits = propose(input_ids, **kwargs)
            return ids[:, :end], None if logits is None else logits[:, : end - input_ids.shape[1]]

        generator.get_candidates = get_candidates
        return generator

    def init_continuous_batching(self, *args, **kwargs):
        """Like transformers, but a request ends at the context, and a prompt that does not fit fails alone."""
        manager = super().init_continuous_batching(*args, **kwargs)
        manager.add_request = partial(add_request_that_fits, manager)
        return manager


class RowEndCriteria(StoppingCriteria):
    """Ends each row of a padded batch at its own length.

    Args:
        ends: (rows), the number of columns at which each row ends.
    """

    eos_token_id = None  # transformers pads the rows that have ended if a criterion has this attribute

    def __init__(self, ends: torch.Tensor):
        self.ends = ends

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        rows = torch.arange(len(input_ids), device=input_ids.device)  # beam search has several for each of `ends`
        return input_ids.shape[1] >= self.ends.to(input_ids.device)[rows * len(self.ends) // len(input_ids)]


def add_request_that_fits(manager: ContinuousBatchingManager, input_ids: list[int], request_id=None, **kwargs):
    """`ContinuousBatchingManager.add_request` with `max_new_tokens` limited to the context."""
    context = manager.model.config.max_position_embeddings
    room = context - len(input_ids)
    limits = kwargs.pop("max_new_tokens", None), manager.generation_config.max_new_tokens, room
    asked = next(limit for limit in limits if limit is not None)
    if room > 0 or not manager.is_tp_driver:
        warn_of_the_end(context, asked, room)
        return type(manager).add_request(manager, input_ids, request_id, max_new_tokens=min(asked, room), **kwargs)
    request_id = request_id or f"req_{uuid4()}"
    for name in [request_id, *(f"{request_id}__child#{i}" for i in range(manager.num_return_sequences - 1))]:
        state = RequestState(name, list(input_ids))
        manager.output_router.fail_and_deliver(state, ValueError(describe_full_prompt(context, len(input_ids))))
    return request_id


class CrossEntropyInChunks(torch.autograd.Function):
    """The cross-entropy of a linear head, computed together with its gradients for some rows at a time.

    Logits of all rows would take up most of the memory of a small model, three times: also as probabilities and as
    gradients. Here there are never more than `CHUNK_OF_LOGITS` bytes of them in float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, divisor):
        """The summed loss of hidden states (N, C) and targets (N), -100 for none, over `divisor`; weight (V, C)."""
        device, vocab_size, dtype = hidden.device.type, len(weight), product_dtype(hidden)
        inputs, matrix = hidden.to(dtype), weight.to(dtype)
        loss = torch.zeros((), device=hidden.device)
        by_hidden = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        by_weight = None
        count = -(-4 * len(hidden) * vocab_size // CHUNK_OF_LOGITS)
        size = -(-len(hidden) // count)
        # Rows that start at multiples of 64 values: matrix products are slower with GPT-2's 50,257.
        shape = (size, -(-vocab_size // 64) * 64)
        place = hidden.new_empty(shape, dtype=torch.float32)[:, :vocab_size]
        low_place = place if dtype == torch.float32 else hidden.new_empty(shape, dtype=dtype)[:, :vocab_size]
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), size):
                rows, target = inputs[start : start + size], targets[start : start + size]
                learned, column = target != -100, target.clamp(min=0).unsqueeze(1)
                # (n, V): logits, then probabilities, then gradients; in float32, both are the same memory.
                scores, gradient = place[: len(rows)], low_place[: len(rows)]
                scores.copy_(torch.mm(rows, matrix.T, out=gradient))
                expected, largest = scores.gather(1, column).squeeze(1), scores.amax(1)
                total = scores.sub_(largest.unsqueeze(1)).exp_().sum(1)
                loss += ((largest + total.log() - expected) * learned).sum()
                share = learned / divisor
                scores.mul_((share / total).unsqueeze(1)).scatter_add_(1, column, -share.unsqueeze(1))
                gradient.copy_(scores)
                if by_hidden is not None:
                    torch.mm(gradient, matrix, out=by_hidden[start : start + size])
                if ctx.needs_input_grad[1] and by_weight is None:
                    by_weight = (gradient.T @ rows).float()
                elif ctx.needs_input_grad[1] and dtype == torch.float32:
                    by_weight.addmm_(gradient.T, rows)
                elif ctx.needs_input_grad[1]:
                    by_weight += gradient.T @ rows
        ctx.gradients = (
            None if by_hidden is None else by_hidden.to(hidden.dtype),
            None if by_weight is None else by_weight.to(weight.dtype),
        )
        return loss / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx, by_loss):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were used before: call backward once, or keep the logits")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(by_loss) for gradient in gradients), None, None


def product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The type in which a linear layer computes: with autocast, not that of its input."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class HfGPTForCausalLM(HfGPTPreTrainedModel, HfGPTGenerationMixin):
    """The language model, with a linear head that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HfGPTConfig):
        super().__init__(config)
        self.model = HfGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Computes logits (B, T, V) and, given labels, the mean cross-entropy in nats.

        Args:
            labels: (B, T), the input ids (shifted internally), or -100 for positions to ignore.
            logits_to_keep: Compute logits only for the last n positions, or for the given positions; 0: for all.
            kwargs: Among others `shift_labels` (B, T), targets that are already shifted and replace `labels`, so that
                the last position also has a target; `num_items_in_batch`, the divisor of the summed loss instead of
                the number of targets; and `skip_logits=True` if only the loss is needed: if there are many logits,
                they are then not returned, which saves time and memory.

        For the other arguments see `HfGPTModel.forward`.
        """
        skip_logits = kwargs.pop("skip_logits", False)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states, logits, loss = outputs.last_hidden_state[:, kept, :], None, None
        has_targets = labels is not None or kwargs.get("shift_labels") is not None
        if has_targets and skip_logits and self._can_skip_logits(hidden_states, **kwargs):
            loss = self._loss_in_chunks(hidden_states, labels, **kwargs)
        else:
            logits = project(self.lm_head, hidden_states)  # (B, T, V)
        if has_targets and loss is None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions)

    def _can_skip_logits(self, hidden_states: torch.Tensor, ignore_index: int = -100, **kwargs) -> bool:
        """Whether the loss can be computed in chunks, and there are so many logits that it is worthwhile."""
        if 4 * hidden_states.shape[:-1].numel() * self.config.vocab_size < MANY_LOGITS or is_tracing(hidden_states):
            return False
        if product_dtype(hidden_states) not in (torch.float32, torch.bfloat16):
            return False  # in float16, gradients that are not scaled up would be rounded to zero
        return has_plain_weight(self.lm_head) and self.loss_function is ForCausalLMLoss and ignore_index == -100

    def _loss_in_chunks(self, hidden_states, labels, shift_labels=None, num_items_in_batch=None, **kwargs):
        """The loss of `ForCausalLMLoss`."""
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        targets = shift_labels.flatten().to(hidden_states.device)
        divisor = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return CrossEntropyInChunks.apply(hidden_states.flatten(0, 1), self.lm_head.weight, targets, divisor)


class HfGPTForSequenceClassification(HfGPTPreTrainedModel):
    """The sequence classifier (or regression), with a linear head on the last real token of each row."""

    def __init__(self, config: HfGPTConfig):
        super().__init__(config)
        self.model = HfGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Computes logits (B, num_labels) and, given labels (B) or (B, num_labels), the loss of `problem_type`.

        The head reads the last token that `attention_mask` does not mark as padding, on either side. Without a mask,
        trailing `pad_token_id`s count as padding, as in GPT-2's classifier.

        Raises:
            ValueError: A row has only padding.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        hidden_states = outputs.last_hidden_state  # (B, T, C)
        batch_size, length = hidden_states.shape[:2]
        real = torch.ones(batch_size, length, dtype=torch.bool, device=hidden_states.device)
        if attention_mask is not None:
            real = attention_mask[:, -length:].bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        if not is_tracing(real) and not real.any(-1).all():
            raise ValueError("a row has only padding: drop empty texts before classifying")
        last = torch.where(real, torch.arange(length, device=real.device), -1).amax(-1).to(hidden_states.device)  # (B)
        logits = self.score(hidden_states[torch.arange(batch_size, device=last.device), last])  # (B, num_labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions
        )


# Checks that prevent silently wrong results. They are skipped while tracing, since a graph cannot branch on values.


def refuse_short_mask(padding_mask: torch.Tensor | None, seen: int, length: int):
    """Raises ValueError if a padding mask (B, S) does not cover all cached and new tokens."""
    if padding_mask is None or is_tracing(padding_mask) or padding_mask.shape[1] >= int(seen) + length:
        return
    raise ValueError(
        f"attention_mask covers {padding_mask.shape[1]} tokens, but the cache has {int(seen)} and the input {length}: "
        f"pass a mask for all {int(seen) + length}"
    )


def refuse_positions_past(context: int, position_ids: torch.Tensor):
    """Raises ValueError if a position (B, T) is beyond the context length."""
    if (last := int(position_ids.max())) >= context:
        raise ValueError(
            f"the sequence has {last + 1} tokens, but the context length of this model is {context} "
            "(max_position_embeddings): shorten it"
        )


def describe_full_prompt(context: int, length: int) -> str:
    """The error of a prompt that leaves no room for a new token."""
    return (
        f"prompt length {length} leaves no room for new tokens in the context length {context}: shorten the prompt to "
        f"at most {context - 1} tokens"
    )


def warn_of_the_end(context: int, new_tokens: int, room: int):
    """Warns, once per process, that generation may end before the number of new tokens."""
    if new_tokens > room:
        logger.warning_once(
            f"max_new_tokens or max_length may exceed the context length of this model ({context}, "
            "max_position_embeddings): generation ends there"
        )


def refuse_documents_that_mix(
    documents: torch.Tensor, mask: torch.Tensor | None, past_key_values: Cache | None, attention: str
):
    """Raises ValueError if attention between packed documents (B, T) could not be prevented."""
    if past_key_values is not None:
        raise ValueError(
            "position_ids restart, so these rows are packed documents, which cannot be cached: set use_cache=False "
            "and do not pass past_key_values"
        )
    # Flash attention detects documents itself, but only in a batch of one row without padding.
    if "flash" in attention and not (len(documents) == 1 and (mask is None or mask.bool().all())):
        raise ValueError(
            "flash attention separates packed documents only in a batch of one row without padding: flatten the rows "
            "into one, or use attn_implementation='sdpa' or 'flex_attention'"
        )


__all__ = ["HfGPTForCausalLM", "HfGPTForSequenceClassification", "HfGPTModel", "HfGPTPreTrainedModel"]
