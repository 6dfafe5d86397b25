"""Text out of a language model: one prompt in, whole continuations or a stream of them out."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from hfgpt.data.report import counted
from hfgpt.errors import InputError, make_visible


class TerminalStreamer(TextStreamer):
    """Prints tokens as they come: on a terminal with control characters made visible, elsewhere as they are."""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        super().on_finalized_text(make_visible(text) if sys.stdout.isatty() else text, stream_end)


@dataclass
class SamplingArguments:
    """How to choose each next token.

    Args:
        max_new_tokens: At most so many; end of text stops earlier. None: 100, or as many as the context leaves.
        temperature: Divides the logits; below 1 sharper, above 1 more varied.
        top_k: Sample among the k likeliest tokens only; 0: all.
        top_p: Sample among the likeliest tokens that together have this probability; 1: all.
        greedy: Always take the likeliest token; the three above are then unused.
        num_samples: Continuations of the one prompt.
        seed: Of the sampling; the same seed gives the same text on the same machine.
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
                f"temperature is {self.temperature}; it must be above 0: for the most likely token every time, set "
                "top_k to 1"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.greedy and self.num_samples > 1:
            raise InputError(f"greedy gives one text, not {self.num_samples}: leave out greedy or num_samples")


def unknown_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that stands for text the tokenizer cannot express; None if it can express any.

    A byte-level tokenizer can. GPT-2's names its end of text the unknown token, too, which it never needs.
    """
    return None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, context: int) -> list[int]:
    """The token ids to continue.

    Args:
        tokenizer: Of the model.
        prompt: Any text; empty gives the end of text, after which a new document begins.
        max_new_tokens: Room that must be left.
        context: The model's, in tokens.

    Raises:
        InputError: Prompt and continuation exceed the context, or the prompt holds characters the tokenizer lacks.
    """
    try:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # The Rust library's bare one: a vocabulary without a token for what it does not know.
    except Exception as error:
        raise InputError(f"the tokenizer does not know all of the prompt {prompt!r} ({error}): change it") from error
    unknown_id = unknown_token_id(tokenizer)
    if unknown_id in ids:
        unknown = next((c for c in prompt if unknown_id in tokenizer(c)["input_ids"]), prompt)
        raise InputError(f"the prompt {prompt!r} has {unknown!r}, which the tokenizer does not know: leave it out")
    if not ids and tokenizer.eos_token_id is None:
        raise InputError(
            "an empty prompt starts a new document, and this tokenizer has no end-of-text token to start one: give "
            "some text"
        )
    ids = ids or [tokenizer.eos_token_id]
    size = counted(len(ids), "tokens")
    if len(ids) >= context:
        raise InputError(
            f"the prompt has {size}, and the context of {context} has to hold at least one more: shorten "
            f"it to at most {counted(context - 1, 'tokens')}"
        )
    if len(ids) + max_new_tokens > context:
        raise InputError(
            f"the prompt has {size} and {max_new_tokens} more were asked for, but the context is "
            f"{context}: ask for at most {counted(context - len(ids), 'new tokens')}, or shorten the prompt"
        )
    return ids


def generate_ids(model: PreTrainedModel, prompt_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    """`model.generate` for ids and settings that are known to be right: what else decides is generation_config.json.

    Raises:
        InputError: That file has values that transformers cannot use.
    """
    try:
        return model.generate(prompt_ids, return_dict_in_generate=False, **settings)
    except (OSError, MemoryError, torch.OutOfMemoryError, UnicodeEncodeError):
        raise  # of the machine, and of where a streamer prints
    # What a wrong type or number raises depends on where it is first used.
    except Exception as error:
        if model.generation_config.to_dict() == GenerationConfig.from_model_config(model.config).to_dict():
            raise  # the file says nothing of its own
        fact = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"the model's generation_config.json cannot be used ({fact}): correct it, or move it away"
        ) from error


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
        prompt: Any text; empty starts from end of text, as a new document does.
        arguments: How to sample.
        streamer: Receives the tokens as they come (one sample only).

    Returns:
        Prompt and continuation, one text a sample, special tokens left out.

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
    set_seed(arguments.seed)
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
