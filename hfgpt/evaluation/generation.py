"""Text generation with a language model: complete or streamed continuations of a prompt."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from hfgpt.data.report import counted
from hfgpt.errors import InputError, make_visible


class TerminalStreamer(TextStreamer):
    """Prints tokens as they are generated; on a terminal, control characters are escaped."""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        super().on_finalized_text(make_visible(text) if sys.stdout.isatty() else text, stream_end)


@dataclass
class SamplingArguments:
    """Sampling settings.

    Args:
        max_new_tokens: Maximum number of new tokens; the end-of-text token stops earlier. None: 100, or what fits in
            the context.
        temperature: Divides the logits; below 1 less random, above 1 more random.
        top_k: Sample only from the k most likely tokens; 0: from all.
        top_p: Sample only from the most likely tokens with this total probability; 1: from all.
        greedy: Always take the most likely token; temperature, top_k and top_p are ignored.
        num_samples: Number of continuations.
        seed: Sampling seed; the same seed gives the same text on the same machine.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    greedy: bool = False
    num_samples: int = 1
    seed: int = 0

    def __post_init__(self):
        for name, smallest in (("max_new_tokens", 1), ("num_samples", 1), ("top_k", 0)):
            if getattr(self, name) is not None and getattr(self, name) < smallest:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {smallest}")
        if not self.temperature > 0:
            raise InputError(
                f"temperature is {self.temperature}; it must be above 0: for greedy decoding, use --greedy "
                "(in a recipe: top_k: 1)"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.greedy and self.num_samples > 1:
            raise InputError(f"greedy generates one text, not {self.num_samples}: omit --greedy or --num-samples")


def unknown_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the unknown token; None if the tokenizer can encode any text.

    Byte-level tokenizers can. GPT-2's declares its end-of-text token as the unknown token, but never uses it as such.
    """
    return None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, context: int, allow_unknown: bool = False
) -> list[int]:
    """The token ids of a prompt.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Any text; an empty prompt becomes the end-of-text token, after which a new document starts.
        max_new_tokens: Number of new tokens that must fit.
        context: Context length of the model.
        allow_unknown: Encode characters that the tokenizer does not know as its unknown token.

    Raises:
        InputError: Prompt and continuation exceed the context, or the prompt has characters the tokenizer cannot
            encode.
    """
    try:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # The Rust library raises a bare Exception if the vocabulary has no unknown token.
    except Exception as error:
        raise InputError(f"the tokenizer cannot encode the prompt {prompt!r} ({error}): change it") from error
    unknown_id = unknown_token_id(tokenizer)
    if unknown_id in ids and not allow_unknown:
        unknown = next((c for c in prompt if unknown_id in tokenizer(c)["input_ids"]), prompt)
        raise InputError(f"the prompt {prompt!r} has {unknown!r}, which the tokenizer cannot encode: remove it")
    if not ids and tokenizer.eos_token_id is None:
        raise InputError("an empty prompt needs an end-of-text token, which this tokenizer does not have: give a text")
    ids = ids or [tokenizer.eos_token_id]
    size = counted(len(ids), "tokens")
    if len(ids) >= context:
        raise InputError(
            f"the prompt has {size}, which leaves no room in the context of {context}: shorten it to at most "
            f"{context - 1} tokens"
        )
    if len(ids) + max_new_tokens > context:
        raise InputError(
            f"the prompt has {size}, which with {max_new_tokens} new tokens exceeds the context of {context}: request "
            f"at most {context - len(ids)} new tokens, or shorten the prompt"
        )
    return ids


def generate_ids(model: PreTrainedModel, prompt_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    """`model.generate` for valid ids and settings, so that errors come from generation_config.json.

    Raises:
        InputError: That file has values that transformers cannot use.
    """
    try:
        return model.generate(prompt_ids, return_dict_in_generate=False, **settings)
    except (OSError, MemoryError, torch.OutOfMemoryError, UnicodeEncodeError, InputError):
        raise  # errors of the machine, of the streamer's output, or already explained
    # The exception for a wrong type or value depends on where it is first used.
    except Exception as error:
        if model.generation_config.to_dict() == GenerationConfig.from_model_config(model.config).to_dict():
            raise  # the file only has defaults
        fact = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"the model's generation_config.json cannot be used ({fact}): fix or remove it") from error


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    arguments: SamplingArguments,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """Continues a prompt.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompt: Any text; an empty prompt starts a new document.
        arguments: Sampling settings.
        streamer: Receives the tokens as they are generated (one sample only).

    Returns:
        Prompt and continuation, one text per sample, without special tokens.

    Raises:
        InputError: As `encode_prompt`.
    """
    context = model.config.max_position_embeddings
    ids = encode_prompt(tokenizer, prompt, arguments.max_new_tokens or 1, context)
    sampling = {"do_sample": False}
    if not arguments.greedy:
        sampling = {
            "do_sample": True,
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
            "top_p": arguments.top_p,
        }
    torch.manual_seed(arguments.seed)
    prompt_ids = torch.tensor([ids], device=model.device)
    generated = generate_ids(
        model,
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=arguments.max_new_tokens or min(100, context - len(ids)),
        num_return_sequences=arguments.num_samples,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        streamer=streamer,
        **sampling,
    )
    return tokenizer.batch_decode(generated, skip_special_tokens=True)
