"""Benchmarks of lm-evaluation-harness, which this file imports (pip install 'hfgpt[benchmarks]').

The harness does not handle every request that a small context allows; `FittedLM` does. All other results are those of
the harness.

Source: Gao et al., "A framework for few-shot language model evaluation" (github.com/EleutherAI/lm-evaluation-harness).
"""

import datetime
import difflib
import importlib.metadata
import logging
import math
import re
import unittest.mock
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import evaluate
import torch
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfgpt.errors import InputError
from hfgpt.evaluation import BenchmarkArguments
from hfgpt.evaluation.generation import unknown_token_id
from hfgpt.records import Benchmark

TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "max_length")
BOOTSTRAP_SAMPLES = 1_000  # for the standard error of metrics that are not means; the harness's 100,000 take minutes
Ids = list[int]


class FittedLM(HFLM):
    """A model in the harness, with every request fitted to the context, and a count of what was cut or is unknown.

    - No special tokens are added to a text, as in training; an empty context is the end-of-text token.
    - A context that is too long is truncated from the left. A continuation that is longer than the model's context is
      predicted in pieces, each with the tokens before it as context.
    - If the text up to the continuation ends inside a token, context and continuation are encoded separately.
    - New tokens are limited to what fits after the prompt, or a quarter of the context if the prompt leaves less; the
      prompt is then truncated from the left.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with an end-of-text token.
        batch_size: Requests per batch.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        context = model.config.max_position_embeddings
        end = tokenizer.eos_token_id
        options = {"max_length": context, "add_bos_token": False, "prefix_token_id": end, "batch_size": batch_size}
        super().__init__(model, backend="causal", tokenizer=tokenizer, **options)
        self.unknown_id = unknown_token_id(tokenizer)
        self.truncated, self.shortened, self.unknown_tokens = Counter(), Counter(), Counter()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding gives it."""
        pieces = [list(self._divide(request)) for request in requests]
        parts = [(request.args, *part) for request, parts in zip(requests, pieces, strict=True) for part in parts]
        scores = iter(self._loglikelihood_tokens(parts, disable_tqdm=disable_tqdm))
        found = [[next(scores) for _ in parts] for parts in pieces]
        return [(sum(score for score, _ in parts), all(greedy for _, greedy in parts)) for parts in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        for request in requests:
            self._count_unknown(request, self.tok_encode(request.args[0]))
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        # A rolling text has no strings here, and would show a progress bar for each batch.
        quiet = disable_tqdm or requests[0][0] is None
        return super()._loglikelihood_tokens(requests, disable_tqdm=quiet, override_bs=override_bs)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each prompt, up to a stop sequence or the limit of new tokens."""
        return super().generate_until([self._fit(request) for request in requests], disable_tqdm=disable_tqdm)

    def _divide(self, request: Instance) -> Iterator[tuple[Ids, Ids]]:
        """The ids of a request's context and continuation, in pieces that fit the model."""
        before, after = self._encode_parts(*request.args)
        if not after:
            raise InputError(f"benchmark '{request.task_name}' has an empty answer (row {request.doc_id}): remove it")
        self._count_unknown(request, before + after)
        most = self.max_length + 1  # the last token is predicted, but not read
        self.truncated[request.task_name] += len(before) + len(after) > most
        size = len(after) if len(after) < most else self.max_length // 2 or 1
        for start in range(0, len(after), size):
            piece = after[start : start + size]
            yield (before + after[:start])[len(piece) - most :], piece

    def _encode_parts(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        whole = self.tok_encode(context + continuation)
        before = self.tok_encode(context.rstrip())  # as in the harness: spaces belong to the continuation
        if whole[: len(before)] != before:
            return self.tok_encode(context), self.tok_encode(continuation)
        return before or [self.prefix_token_id], whole[len(before) :]

    def _fit(self, request: Instance) -> Instance:
        """A request to generate, with a prompt and a number of new tokens that fit the context together."""
        prompt, settings = request.args
        ids = self.tok_encode(prompt) or [self.prefix_token_id]
        self._count_unknown(request, ids)
        asked = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
        asked = min(asked, settings.get("max_length", math.inf))
        count = min(asked, max(self.max_length - len(ids), self.max_length // 4, 1))
        self.shortened[request.task_name] += count < asked
        self.truncated[request.task_name] += len(ids) + count > self.max_length
        settings = {name: value for name, value in settings.items() if name not in TOKEN_LIMITS}
        return replace(request, arguments=(prompt or self.tokenizer.eos_token, {**settings, "max_gen_toks": count}))

    def _count_unknown(self, request: Instance, ids: Ids):
        self.unknown_tokens[request.task_name] += ids.count(self.unknown_id)


def find_benchmarks(arguments: BenchmarkArguments) -> list[Task | Group]:
    """The benchmarks that the arguments name, with their data.

    Raises:
        InputError: A benchmark is unknown or named twice, cannot be loaded, would run code of the Hub or of the model,
            or does not take examples.
    """
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    paths = {name: _find_files(Path(name)) for name in arguments.names if _is_path(name)}
    files = [file for found in paths.values() for file in found]
    groups = [file for file in files if re.search(rb"^group\s*:", file.read_bytes(), re.MULTILINE)]
    # The harness's own index takes many seconds; a group may name tasks of it, and of its folder.
    needs_index = groups or len(paths) < len(arguments.names)
    manager = TaskManager(include_path=[file.parent for file in groups], include_defaults=bool(needs_index))
    # The harness loads a group by its name only.
    indexed = {entry.yaml_path: name for name, entry in manager.task_index.items() if entry.yaml_path in groups}
    found, names = [], Counter()
    for name in arguments.names:
        if name not in paths and name not in manager.task_index:
            nearest = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            hint = f"nearest: {', '.join(nearest)}" if nearest else "lm_eval ls tasks lists them"
            raise InputError(f"no benchmark is named '{name}' ({hint}); for a task of your own, give its YAML file")
        entry = manager.task_index.get(name)
        if entry and (entry.cfg or {}).get("unsafe_code"):  # loading it may already need code of the Hub
            _refuse_unsafe(name)
        for spec in paths.get(name, [name]):
            with _explained(str(spec)):
                loaded = manager.load([indexed.get(spec, str(spec))])
            for task in loaded["tasks"].values():
                _check_task(task, arguments)
            names.update({**loaded["tasks"], **loaded["groups"]}.keys())
            found += loaded["groups"].values() or loaded["tasks"].values()
    if repeated := [name for name, count in names.items() if count > 1]:
        raise InputError(f"the benchmark '{repeated[0]}' is named twice: name it once, alone or in a group")
    return found


def run_benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: list[Task | Group],
    arguments: BenchmarkArguments,
) -> dict[str, Benchmark]:
    """Runs benchmarks on a model.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        benchmarks: See `find_benchmarks`.
        arguments: The options.

    Returns:
        Name -> result, of tasks and of groups with a metric of their own.

    Raises:
        InputError: The tokenizer has no end-of-text token or no chat template, or a benchmark fails.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "benchmarks need a tokenizer with an end-of-text token, after which a text starts: this one has none"
        )
    if arguments.chat_template and not tokenizer.chat_template:
        raise InputError("--chat-template needs a tokenizer with a chat template, which this one does not have")
    lm = FittedLM(model, tokenizer, arguments.batch_size)
    # The harness would spend seconds on a description of this machine, and call git.
    unneeded = {"add_env_info": lambda results: None, "get_git_commit_hash": lambda: None}
    patched = unittest.mock.patch.multiple("lm_eval.evaluator", **unneeded)
    with _explained(", ".join(arguments.names)), torch.inference_mode(), patched:
        results = simple_evaluate(
            lm,
            tasks=benchmarks,
            task_manager=TaskManager(include_defaults=False),  # they are loaded; its index would take seconds
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            apply_chat_template=arguments.chat_template,
            bootstrap_iters=BOOTSTRAP_SAMPLES,
            log_samples=False,
        )
    return {
        name: _read_result(name, results, lm, arguments)
        for name, metrics in results["results"].items()
        if any("," in key for key in metrics)  # a group without a metric of its own has none
    }


def _read_result(name: str, results: dict[str, Any], lm: FittedLM, arguments: BenchmarkArguments) -> Benchmark:
    """One result of the harness, whose keys are `metric,filter`, as a record."""
    found, config = results["results"][name], results["configs"].get(name, {})
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in found.items()
        if "," in key and isinstance(value, int | float) and math.isfinite(value)
    }
    if config.get("output_type") == "loglikelihood_rolling" and lm.unknown_tokens[name]:
        metrics = {}  # the characters that unknown tokens stand for were not predicted
    rows = results["n-samples"].get(name, {})
    return Benchmark(
        metrics=metrics,
        dataset=_find_source(config),
        subset=config.get("dataset_name"),
        rows=rows.get("effective", found.get("sample_len")),
        of_rows=rows.get("original"),
        num_fewshot=results["n-shot"].get(name),
        chat_template=arguments.chat_template or None,
        truncated=lm.truncated[name] or None,
        shortened=lm.shortened[name] or None,
        unknown_tokens=lm.unknown_tokens[name] or None,
        version=str((config.get("metadata") or {}).get("version") or "") or None,
        lm_eval=importlib.metadata.version("lm_eval"),
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _find_source(config: dict[str, Any]) -> str | None:
    """The Hub id or the file of a task's data."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    while isinstance(files, dict | list) and files:
        split = config.get("test_split") or config.get("validation_split")
        files = files.get(split, next(iter(files.values()))) if isinstance(files, dict) else files[0]
    return files or config.get("dataset_path")


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or "/" in name or Path(name).is_dir()


def _find_files(path: Path) -> list[Path]:
    """The YAML file at a path, or those in a folder, without parts of tasks, whose names start with `_`."""
    files = [path] if path.is_file() else sorted(path.glob("[!_]*.yaml"))
    if not files:
        raise InputError(f"'{path}' has no benchmark: give a YAML file, or a folder with YAML files")
    return files


def _check_task(task: Task, arguments: BenchmarkArguments):
    if getattr(task, "UNSAFE_CODE", False):
        _refuse_unsafe(task.task_name)
    if arguments.num_fewshot and task.get_config("num_fewshot") == 0:
        raise InputError(f"the benchmark '{task.task_name}' is defined without examples: leave out --num-fewshot")


def _refuse_unsafe(name: str) -> NoReturn:
    raise InputError(
        f"the benchmark '{name}' runs code that the model writes, which hfgpt never does: in a sandbox, use lm_eval "
        "--confirm_run_unsafe_code"
    )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Reports the errors of a benchmark in one line, and refuses metrics whose code would come from the Hub."""
    refused, load = [], evaluate.load

    def load_local(path: str, *arguments: Any, **options: Any) -> Any:
        if Path(path).exists():
            return load(path, *arguments, **options)
        refused.append(path)
        raise InputError(path)

    error = None
    try:
        with unittest.mock.patch.object(evaluate, "load", load_local):
            yield
    except (InputError, MemoryError, torch.OutOfMemoryError) as raised:
        if not refused:
            raise
        error = raised
    # Benchmarks are code and templates of their own, which can raise anything.
    except Exception as raised:
        error = raised
    if refused:  # the harness may have gone on without the metric
        raise InputError(
            f"the benchmark '{name}' needs the metric '{refused[0]}', whose code is on the Hub and is not run: use "
            "another benchmark or metric"
        ) from error
    if error:
        fact = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"the benchmark '{name}' cannot be run ({type(error).__name__}: {fact}): check its file and data, and the "
            "network if they are on the Hub"
        ) from error
