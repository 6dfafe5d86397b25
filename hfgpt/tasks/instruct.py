"""Stage 7.2, instructions: from questions and answers to a model that answers, in labelled steps."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hfgpt.building import check_base_model
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
from hfgpt.data.report import DataReport
from hfgpt.data.templates import BEFORE_INPUT, render_letters, set_chat_template
from hfgpt.errors import InputError
from hfgpt.evaluation import AnswerEvaluationArguments
from hfgpt.evaluation.generation import unknown_token_id
from hfgpt.evaluation.instructions import Answer, encode_question, generate_answers, match_answers
from hfgpt.evaluation.judge import check_judge, judge_answers
from hfgpt.evaluation.perplexity import measure_perplexity
from hfgpt.loading import check_vocabulary, load_model, load_model_tokenizer
from hfgpt.recipe import Recipe
from hfgpt.saving import check_writable, quote_path, write_json, write_text
from hfgpt.tasks.messages import describe_answers, describe_choices, render_summary
from hfgpt.tasks.run_folder import begin_run, check_run_folder, holds_run_folder
from hfgpt.tasks.training_run import (
    Training,
    build_recipe_model,
    check_publication,
    context_length,
    describe_run,
    end_run,
    find_tokenizer,
    padding_collator,
    plan_rows,
    publish_run,
    run_training,
    save_run,
    sorted_by_length,
    warn_of_small_vocabulary,
)
from hfgpt.training.callbacks import log_result, plot_loss, stderr_console
from hfgpt.training.hardware import find_device
from hfgpt.training.trainer import HfGPTTrainer

ANSWERS_FILE, JUDGEMENTS_FILE = "answers.jsonl", "judgements.jsonl"


@dataclass
class InstructionData:
    """What a model learns to answer and is measured on.

    Args:
        conversations: Split -> the rows that were kept.
        encoded: Split -> their token ids and targets; those of the training split maybe packed.
        tokenizer: What made them, with its chat template.
        report: What became of the rows.
    """

    conversations: dict[str, list[Conversation]]
    encoded: dict[str, Dataset]
    tokenizer: PreTrainedTokenizerBase
    report: DataReport


@holds_run_folder
def instruct(recipe: Recipe, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Trains a language model to answer and leaves a complete run folder.

    Args:
        recipe: See `hfgpt.recipe.load_recipe`.
        resume: Go on from the last checkpoint in `training.output_dir`.
        console: Where to report; None: standard error.

    Returns:
        The content of `metrics.json`.

    Raises:
        InputError: Something in the recipe, the data or the run folder has to be mended first, or the judge has failed
            at the end: all else is then written.
        Interrupted: Ctrl-C; the run can be resumed.
    """
    console = console or stderr_console(quiet=recipe.training.process_index > 0)
    started = time.perf_counter()

    # 1. The run folder: free, or that of the run to go on with; the Hub and the judge, if they are asked for.
    checkpoint = check_run_folder(recipe, resume, console)
    check_publication(recipe)
    folder = Path(recipe.training.output_dir)
    if recipe.evaluation.judge.base_url:
        check_judge(recipe.evaluation.judge)

    # 2. Conversations to tokens and targets.
    data = load_instruction_data(recipe, folder if resume else None)

    # 3. The model.
    model = build_follower(recipe, data)

    # 4. What it will cost, and what was chosen.
    estimate = plan_rows(model, recipe, data.encoded["train"], seconds=0.5)
    console.print(data.report.summary(), highlight=False)
    console.print(describe_choices(model, recipe, estimate), highlight=False)

    # 5. Train.
    PartialState().wait_for_everyone()  # all have seen the folder free
    if recipe.training.process_index == 0:
        begin_run(recipe, data.tokenizer, data.report, checkpoint)
    trainer = HfGPTTrainer(
        model=model,
        args=recipe.training,
        train_dataset=data.encoded["train"],
        eval_dataset=data.encoded["validation"],
        processing_class=data.tokenizer,
        data_collator=padding_collator(data.tokenizer),
    )
    training = run_training(trainer, estimate, checkpoint, started, console, recipe.hub)
    return finish_run(recipe, training, data, console) if trainer.is_world_process_zero() else {}


def finish_run(recipe: Recipe, training: Training, data: InstructionData, console: Console) -> dict[str, Any]:
    """Saves the trained model, measures it, and writes down what happened; returns the content of `metrics.json`."""
    folder, trainer = Path(recipe.training.output_dir), training.trainer

    # 6. Save, then measure the weights as they were saved, and let them answer the test rows.
    save_run(trainer, folder)
    saved = load_model(str(folder)).to(recipe.training.device)
    evaluation, batch_size = recipe.evaluation, recipe.training.per_device_eval_batch_size
    metrics = measure(saved, data.tokenizer, data.encoded["test"], batch_size)
    answers = answer(saved, data.tokenizer, data.conversations["test"], evaluation, console)
    metrics |= match_answers(answers)
    write_answers(answers, folder)
    write_json(folder / "metrics.json", metrics)
    tested = {re.sub("^eval_", "test_", name): value for name, value in metrics.items()}  # eval_ is validation's there
    log_result(folder, {"step": trainer.state.global_step, "epoch": trainer.state.epoch, **tested})
    plot_loss(folder, saved.config.vocab_size)
    samples = sample(saved, data.tokenizer, recipe)

    # 7. What happened, for whoever repeats it or asks; the judge last, for he may fail.
    tokens = round(trainer.state.epoch * sum(data.encoded["train"]["length"]))
    write_json(folder / "run.json", describe_run(recipe, training, tokens, samples))
    if evaluation.judge.base_url:
        try:
            metrics |= judge(answers, evaluation, folder, console)
            write_json(folder / "metrics.json", metrics)
        except InputError as error:
            # Without its README.md the run is not finished: --resume goes on here, and asks only for what is missing.
            raise InputError(f"{error}; all else is written: go on with the same command and --resume") from error
    measured = f"on the test split {describe_answers(metrics)}"
    end_run(recipe)
    following = f"hfgpt chat {quote_path(folder)}"
    console.print(render_summary(folder, measured, samples["texts"], training, following), highlight=False)
    publish_run(recipe, training, console)
    return metrics


def load_instruction_data(recipe: Recipe, tokenizer_folder: Path | None = None) -> InstructionData:
    """Reads the rows, divides them, trains or loads the tokenizer (with a model its own), and encodes them.

    Args:
        recipe: Its sections `data`, `tokenizer` and `model`.
        tokenizer_folder: A run to resume, whose tokenizer is taken rather than trained again.

    Raises:
        InputError: The rows or the tokenizer cannot be used, or nothing is learned.
    """
    if tokenizer_folder is None:
        check_base_model(recipe.model)
    report, arguments = DataReport(), recipe.data
    # A trained tokenizer needs the rows first, and the rows the template, whose name is enough for a new tokenizer.
    before_input = _before_input(recipe, tokenizer_folder)
    conversations = load_conversations(arguments, before_input, recipe.training.seed, report)
    texts = [message["content"] for conversation in conversations["train"] for message in conversation]
    # A new tokenizer is to know the letters of the template, too.
    tokenizer = find_tokenizer(recipe, tokenizer_folder, [render_letters(arguments.template or "chat"), *texts])
    warn_of_small_vocabulary(recipe, tokenizer, report)
    set_chat_template(tokenizer, arguments.template)
    context = context_length(recipe)
    length = arguments.max_length or context
    if length > context:
        raise InputError(f"data.max_length is {length}, but the context of the model is {context}: lower it")
    tokenizer.model_max_length = context
    encoded = {}
    for split in SPLITS:
        learn = "answers" if split == "test" else arguments.learn  # what is measured at the end are answers
        encoded[split], conversations[split] = encode_conversations(
            conversations[split], tokenizer, learn, length, report
        )
        count_tokens(encoded[split], unknown_token_id(tokenizer), report, split)
    for split, unit in (("validation", "tokens"), ("test", "tokens"), ("test", "rows")):
        report.warn_if_small(split, unit)
    if arguments.packing:
        encoded["train"] = pack_rows(encoded["train"], length)
        report.split("train").blocks = len(encoded["train"])
    return InstructionData(conversations, encoded, tokenizer, report)


def build_follower(recipe: Recipe, data: InstructionData) -> PreTrainedModel:
    """The model to train, checked against the prompts it will be given; its generation ends where answers do."""
    set_seed(recipe.training.seed)
    model = build_recipe_model(recipe, data.tokenizer)
    for conversation in ask(recipe.evaluation.prompts):
        encode_question(conversation, data.tokenizer, model.config.max_position_embeddings)
    model.generation_config.eos_token_id = data.tokenizer.eos_token_id
    return model


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int
) -> dict[str, Any]:
    """Loss and perplexity over the answers of rows."""
    loader = DataLoader(sorted_by_length(rows), batch_size=batch_size, collate_fn=padding_collator(tokenizer))
    return measure_perplexity(model, loader).to_dict()


def ask(prompts: Sequence[str]) -> list[Conversation]:
    """Conversations that ask what a recipe's prompts say, and whose answer nobody knows."""
    return [[{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}] for prompt in prompts]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    evaluation: AnswerEvaluationArguments,
    console: Console,
) -> list[Answer]:
    """The model's greedy answers to the last questions of conversations."""
    chosen = conversations[: evaluation.max_answers]
    with console.status(f"answering {len(chosen):,} test rows"):
        return generate_answers(model, tokenizer, chosen, evaluation.max_new_tokens, evaluation.batch_size)


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> dict[str, Any]:
    """The recipe's prompts, answered."""
    evaluation = recipe.evaluation
    replies = generate_answers(
        model, tokenizer, ask(evaluation.prompts), evaluation.max_new_tokens, evaluation.batch_size
    )
    texts = [f"{prompt}\n{reply.answer}" for prompt, reply in zip(evaluation.prompts, replies, strict=True)]
    return {"texts": texts}


def judge(
    answers: Sequence[Answer], evaluation: AnswerEvaluationArguments, folder: Path, console: Console
) -> dict[str, Any]:
    """The judge's scores, under the names of `metrics.json`."""
    with console.status(f"{evaluation.judge.model} judges {len(answers):,} answers"):
        scores = judge_answers(answers, evaluation.judge, folder / JUDGEMENTS_FILE)
    return {f"eval_{name}": value for name, value in scores.items()}


def write_answers(answers: Sequence[Answer], folder: Path):
    """Writes `answers.jsonl`, an object a line."""
    lines = [json.dumps(answer.to_dict(), ensure_ascii=False) + "\n" for answer in answers]
    write_text(folder / ANSWERS_FILE, "".join(lines))


def evaluate_follower(
    path: str, data: InstructionDataArguments, evaluation: AnswerEvaluationArguments, console: Console | None = None
) -> dict[str, Any]:
    """Measures a saved model that follows instructions on all rows of a source.

    Args:
        path: A folder or Hub id.
        data: The source; `test_split`, if named, restricts it.
        evaluation: How to let it answer; with `answers`, where to keep what it says and how it is judged.
        console: Where to show progress; None: standard error.

    Returns:
        Metrics under the names of `metrics.json`.

    Raises:
        InputError: No model, no rows with answers, or the judge has failed.
    """
    console = console or stderr_console()
    if evaluation.judge.base_url:
        if not evaluation.answers:
            raise InputError("judgements have to be kept somewhere: name a folder in --evaluation.answers")
        check_judge(evaluation.judge)
    if evaluation.answers:
        check_writable(Path(evaluation.answers))
    tokenizer = load_model_tokenizer(path)
    before_input = set_chat_template(tokenizer, data.template)
    model = load_model(path).to(find_device())
    check_vocabulary(model, tokenizer)
    report = DataReport()
    conversations = load_all_conversations(data, before_input, report)
    context = model.config.max_position_embeddings
    encoded, conversations = encode_conversations(
        conversations, tokenizer, "answers", min(data.max_length or context, context), report
    )
    count_tokens(encoded, unknown_token_id(tokenizer), report, "test")
    metrics = measure(model, tokenizer, encoded, batch_size=8)
    answers = answer(model, tokenizer, conversations, evaluation, console)
    metrics |= match_answers(answers)
    if evaluation.answers:
        folder = Path(evaluation.answers)
        folder.mkdir(parents=True, exist_ok=True)
        write_answers(answers, folder)
        if evaluation.judge.base_url:
            metrics |= judge(answers, evaluation, folder, console)
    return metrics


def _before_input(recipe: Recipe, tokenizer_folder: Path | None) -> str:
    """What stands between an instruction and its input, before there is a tokenizer to train on both."""
    trains = recipe.model.path is None and recipe.tokenizer.path is None and tokenizer_folder is None
    if trains:
        return BEFORE_INPUT.get(recipe.data.template, "\n")
    return set_chat_template(find_tokenizer(recipe, tokenizer_folder, ()), recipe.data.template)
