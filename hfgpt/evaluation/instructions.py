"""Evaluation of instruction-following: greedy answers and their exact match."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfgpt.data.templates import encode_chat
from hfgpt.errors import InputError
from hfgpt.evaluation.generation import generate_ids
from hfgpt.evaluation.spread import Map

Conversation = Sequence[dict[str, str]]


@dataclass
class Answer:
    """One row of `answers.jsonl`.

    Args:
        messages: The messages before the answer.
        reference: The reference answer.
        answer: The model's answer.
        finished: Whether it ended with the end-of-text token before reaching the maximum number of new tokens.
    """

    messages: list[dict[str, str]]
    reference: str
    answer: str
    finished: bool

    def to_dict(self) -> dict:
        return asdict(self)


def encode_question(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, context: int) -> list[int]:
    """The token ids of a conversation's prompt: all messages but the last.

    Raises:
        InputError: The prompt leaves no room for an answer in the context.
    """
    messages = list(conversation[:-1])
    ids = encode_chat(tokenizer, messages, add_generation_prompt=True)["input_ids"]
    if len(ids) >= context:
        raise InputError(
            f"the prompt has {len(ids)} tokens with its template, which leaves no room in the context of {context}: "
            f"shorten it to at most {context - 1} tokens"
        )
    return ids


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    batch_size: int,
    spread: Map = map,
) -> list[Answer]:
    """Generates answers by greedy decoding.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer, with a chat template and an end-of-text token.
        conversations: Each ends with the reference answer, which the model does not see.
        max_new_tokens: Maximum number of tokens per answer; less if the context ends earlier.
        batch_size: Prompts per batch, grouped by length.
        spread: Applies the model to the batches, in one process or several.

    Returns:
        The answers, in the order of the conversations.

    Raises:
        InputError: A prompt leaves no room for an answer.
    """
    end, context = tokenizer.eos_token_id, model.config.max_position_embeddings
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    prompts = [encode_question(conversation, tokenizer, context) for conversation in conversations]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    # Prompts with less room than max_new_tokens run alone: in a batch, they would truncate the other answers.
    roomy = [index for index in order if context - len(prompts[index]) >= max_new_tokens]
    batches = [roomy[start : start + batch_size] for start in range(0, len(roomy), batch_size)]

    def answer(chosen: list[int]) -> list[Answer]:
        longest = len(prompts[chosen[-1]])
        room = min(max_new_tokens, context - longest)
        rows = [[padding] * (longest - len(prompts[index])) + prompts[index] for index in chosen]
        mask = [[0] * (longest - len(prompts[index])) + [1] * len(prompts[index]) for index in chosen]
        generated = generate_ids(
            model,
            torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=padding,
        )[:, longest:]
        answers = []
        for index, ids in zip(chosen, generated.tolist(), strict=True):
            finished = end in ids
            text = tokenizer.decode(ids[: ids.index(end)] if finished else ids, skip_special_tokens=True)
            *before, last = conversations[index]
            answers.append(Answer(list(before), last["content"].strip(), text.strip(), finished))
        return answers

    batches += [[index] for index in order[len(roomy) :]]
    answers = itertools.chain.from_iterable(spread(answer, batches))
    of_conversation = dict(zip(itertools.chain.from_iterable(batches), answers, strict=True))
    return [of_conversation[index] for index in range(len(conversations))]


def match_answers(answers: Sequence[Answer], prefix: str = "eval") -> dict[str, float | int]:
    """Exact and normalised match of the answers, and the number of unfinished answers."""
    from hfgpt.evaluation.metrics.answer_match import AnswerMatch

    matched = AnswerMatch(keep_in_memory=True).compute(
        predictions=[answer.answer for answer in answers], references=[answer.reference for answer in answers]
    )
    counts = {"answers": len(answers), "unfinished_answers": sum(not answer.finished for answer in answers)}
    return {f"{prefix}_{name}": value for name, value in (matched | counts).items()}
