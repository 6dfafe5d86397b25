"""Stage 7.2, instructions: train a language model to follow instructions."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hfgpt.building import find_base_model
from hfgpt.data.collators import padding_collator, sorted_by_length
from hfgpt.data.instructions import (
    SPLITS,
    Conversation,
    InstructionDataArguments,
    count_tokens,
    encode_conversations,
    load_all_conversations,
    load_conversations,
    pack_rows,
)
from hfgpt.data.report import DataReport, counted
from hfgpt.data.templates import BEFORE_INPUT, render_letters, set_chat_template, write_inputs
from hfgpt.errors import InputError
from hfgpt.evaluation import AnswerEvaluationArguments
from hfgpt.evaluation.generation import unknown_token_id
from hfgpt.evaluation.instructions import Answer, encode_question, generate_answers, match_answers
from hfgpt.evaluation.judge import check_judge, judge_answers
from hfgpt.evaluation.perplexity import measure_perplexity
from hfgpt.evaluation.spread import Map
from hfgpt.models import SavedModel
from hfgpt.output import stderr_console
from hfgpt.recipe import Recipe
from hfgpt.records import ANSWERS_FILE, JUDGEMENTS_FILE
from hfgpt.saving import check_writable, write_text
from hfgpt.tasks.preparation import build_recipe_model, context_length, find_tokenizer, warn_of_small_vocabulary
from hfgpt.tasks.task import ALL_ROWS, NO_TEXTS, Data, Measured, flips


@dataclass(kw_only=True)
class InstructionData(Data):
    """Conversations as token ids and targets; training rows may be packed.

    Args:
        conversations: Split -> conversations that were kept.
    """

    conversations: dict[str, list[Conversation]]


class Instructions:
    """Trains a language model to follow instructions; see `hfgpt.tasks.task.Task` for the methods."""

    measured_split = "test"
    only_for_training: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("data.validation_fraction", "data.test_fraction", "data.divide"), ALL_ROWS),
        "data.learn": "metrics always cover the answers only",
        "data.packing": "evaluation does not pack rows",
        "data.near_duplicate_threshold": "there are no training rows to compare with",
        "evaluation.prompts": NO_TEXTS.format("chat"),
    }

    def check(self, recipe: Recipe):
        if recipe.evaluation.judge.base_url:
            check_judge(recipe.evaluation.judge)

    def load(
        self, recipe: Recipe, tokenizer_folder: Path | None = None, characters: int | None = None
    ) -> InstructionData:
        base = find_base_model(recipe.model)
        report, arguments = DataReport(), recipe.data
        conversations = load_conversations(arguments, recipe.training.seed, report)
        texts = _training_texts(conversations["train"], arguments.template)
        tokenizer = find_tokenizer(recipe, base, tokenizer_folder, texts)
        warn_of_small_vocabulary(recipe, tokenizer, report)
        before_input = set_chat_template(tokenizer, arguments.template)
        context = context_length(recipe, base)
        length = arguments.max_length or context
        if length > context:
            raise InputError(f"data.max_length is {length}, but the model's context length is {context}: lower it")
        tokenizer.model_max_length = context
        encoded = {}
        for split in SPLITS:
            learn = "answers" if split == "test" else arguments.learn  # test metrics always cover the answers only
            written = [write_inputs(conversation, before_input) for conversation in conversations[split]]
            encoded[split], conversations[split] = encode_conversations(written, tokenizer, learn, length, report)
            count_tokens(encoded[split], unknown_token_id(tokenizer), report, split)
        for split, unit in (("validation", "tokens"), ("test", "tokens"), ("test", "rows")):
            report.warn_if_small(split, unit)
        if arguments.packing:
            encoded["train"] = pack_rows(encoded["train"], length)
            report.split("train").blocks = len(encoded["train"])
        return InstructionData(
            splits=encoded, tokenizer=tokenizer, report=report, base=base, conversations=conversations
        )

    def build(self, recipe: Recipe, data: InstructionData) -> PreTrainedModel:
        set_seed(recipe.training.seed)
        model = build_recipe_model(recipe, data)
        for conversation in ask(recipe.evaluation.prompts):
            encode_question(conversation, data.tokenizer, model.config.max_position_embeddings)
        model.generation_config.eos_token_id = data.tokenizer.eos_token_id  # the token that ends each answer
        return model

    def trainer_arguments(self, recipe: Recipe, data: InstructionData) -> dict[str, Any]:
        return {"data_collator": padding_collator(data.tokenizer)}

    def measure(
        self, model: PreTrainedModel, data: InstructionData, recipe: Recipe, console: Console, spread: Map = map
    ) -> Measured:
        batch_size = recipe.training.per_device_eval_batch_size
        metrics = measure_rows(model, data.tokenizer, data.splits["test"], batch_size, spread)
        return measure_answers(
            model, data.tokenizer, data.conversations["test"], recipe.evaluation, console, metrics, spread
        )

    def sample(self, model: PreTrainedModel, data: InstructionData, recipe: Recipe) -> dict[str, Any]:
        """The recipe's prompts, answered."""
        evaluation = recipe.evaluation
        replies = generate_answers(
            model, data.tokenizer, ask(evaluation.prompts), evaluation.max_new_tokens, evaluation.batch_size
        )
        texts = [f"{prompt}\n{reply.answer}" for prompt, reply in zip(evaluation.prompts, replies, strict=True)]
        return {"texts": texts}

    def evaluate(
        self,
        saved: SavedModel,
        data: InstructionDataArguments,
        evaluation: AnswerEvaluationArguments,
        console: Console | None = None,
    ) -> dict[str, Any]:
        """See `Task`; also saves the answers in `evaluation.answers` and has them judged, if these keys are set."""
        console = console or stderr_console()
        if evaluation.judge.base_url:
            if not evaluation.answers:
                raise InputError("a judge needs a folder for its judgements: set --evaluation.answers")
            check_judge(evaluation.judge)
        if evaluation.answers:
            check_writable(Path(evaluation.answers))
        model, tokenizer = saved.load_with_tokenizer(AutoModelForCausalLM)
        before_input = set_chat_template(tokenizer, data.template)
        report = DataReport()
        conversations = [write_inputs(row, before_input) for row in load_all_conversations(data, report)]
        context = model.config.max_position_embeddings
        encoded, conversations = encode_conversations(
            conversations, tokenizer, "answers", min(data.max_length or context, context), report
        )
        count_tokens(encoded, unknown_token_id(tokenizer), report, "test")
        metrics = measure_rows(model, tokenizer, encoded, batch_size=8)
        measured = measure_answers(model, tokenizer, conversations, evaluation, console, before=metrics)
        if not evaluation.answers:
            return measured.metrics
        folder = Path(evaluation.answers)
        folder.mkdir(parents=True, exist_ok=True)
        measured.keep(folder)
        return measured.metrics | (measured.judge(folder) if measured.judge else {})

    def describe(self, metrics: Mapping[str, Any]) -> str:
        text = f"test loss {metrics['eval_loss']:.4f} nats per token, perplexity {metrics['eval_perplexity']:.2f} "
        text += f"over {metrics['eval_tokens']:,} answer tokens"
        if "eval_exact_match" in metrics:
            text += (
                f"; exact match {metrics['eval_exact_match']:.2%} over {metrics['eval_answers']:,} answers, "
                f"{metrics['eval_normalised_match']:.2%} ignoring case, punctuation and articles"
            )
        if "eval_judge_score" in metrics:
            text += f"; judge score {metrics['eval_judge_score']:.1f} of 100 over {metrics['eval_judge_scored']:,}"
        if metrics.get("eval_judge_failures"):
            text += f" ({metrics['eval_judge_failures']:,} not judged)"
        return text

    def following(self, folder: str) -> str:
        return f"hfgpt chat {folder}"


def measure_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int, spread: Map = map
) -> dict[str, Any]:
    """Loss and perplexity over the answer tokens."""
    loader = DataLoader(sorted_by_length(rows), batch_size=batch_size, collate_fn=padding_collator(tokenizer))
    return measure_perplexity(model, loader, spread).to_dict()


def measure_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    evaluation: AnswerEvaluationArguments,
    console: Console,
    before: dict[str, Any],
    spread: Map = map,
) -> Measured:
    """Generates greedy answers to the last question of each conversation and scores them.

    Args:
        before: Other metrics, placed first in the result.
        spread: See `generate_answers`.
    """
    chosen = conversations[: evaluation.max_answers]
    with console.status(f"generating {counted(len(chosen), 'answers')}"):
        answers = generate_answers(model, tokenizer, chosen, evaluation.max_new_tokens, evaluation.batch_size, spread)
    flipped = flips(len(answers))
    allowed = dict.fromkeys(("eval_exact_match", "eval_normalised_match"), flipped / len(answers))
    allowed["eval_unfinished_answers"] = flipped

    def judge(folder: Path) -> dict[str, Any]:
        with console.status(f"{evaluation.judge.model} is judging {counted(len(answers), 'answers')}"):
            scores = judge_answers(answers, evaluation.judge, folder / JUDGEMENTS_FILE)
        return {f"eval_{name}": value for name, value in scores.items()}

    return Measured(
        before | match_answers(answers),
        allowed,
        keep=lambda folder: write_answers(answers, folder),
        judge=judge if evaluation.judge.base_url else None,
    )


def ask(prompts: Sequence[str]) -> list[Conversation]:
    """One conversation per prompt, with an empty answer."""
    return [[{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}] for prompt in prompts]


def write_answers(answers: Sequence[Answer], folder: Path):
    """Writes `answers.jsonl`, one object per line."""
    lines = [json.dumps(answer.to_dict(), ensure_ascii=False) + "\n" for answer in answers]
    write_text(folder / ANSWERS_FILE, "".join(lines))


def _training_texts(conversations: Sequence[Conversation], template: str | None) -> Iterator[str]:
    """Texts to train a new tokenizer on: the messages, and the characters of the template."""
    yield render_letters(template or "chat")
    for conversation in conversations:
        yield from (message["content"] for message in write_inputs(conversation, BEFORE_INPUT.get(template, "\n")))
