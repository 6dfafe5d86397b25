"""A recipe that trains in a second, and its finished run, which many tests only inspect."""

import copy
import functools
import gc
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from hfgpt.durations import Budget
from hfgpt.recipe import Recipe, load_recipe
from hfgpt.runs import run as module
from hfgpt.training import estimate
from hfgpt.training.callbacks import ProgressCallback

# Accelerate runs the garbage collector after every training; what is imported by now need not be scanned.
gc.freeze()

# Dropout, so that an exact resume needs the random state, too; the last validation block is short.
RECIPE = """
task: pretrain
tokenizer: {{kind: char}}
model:
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  max_position_embeddings: 32
data: {{path: "synthetic:stories", max_documents: 9, validation_fraction: 0.25, num_proc: 1, cache_dir: {cache}}}
training:
  per_device_train_batch_size: 16
  per_device_eval_batch_size: 8
  num_train_epochs: 2
  learning_rate: 0.01
  lr_scheduler_type: linear
  logging_steps: 1
  eval_strategy: steps
  eval_steps: 8
  save_steps: 4
  use_cpu: true
  bf16: false
evaluation: {{prompts: ["The", ""], max_new_tokens: 8}}
"""


class Run(NamedTuple):
    """A run and its output."""

    recipe: Recipe
    folder: Path
    metrics: dict[str, Any]
    shown: str


@pytest.fixture(scope="session")
def read_keys() -> Callable[..., set[str]]:
    def read_keys(evaluate: Callable[..., Any], **sections: Any) -> set[str]:
        """The keys of the sections that a function reads, such as `data.path`."""
        seen = set()

        def spy_on(section: str, arguments: Any) -> Any:
            class Spy(type(arguments)):
                def __getattribute__(self, name: str) -> Any:
                    seen.add(f"{section}.{name}")
                    return super().__getattribute__(name)

            return Spy(**vars(arguments))

        spies = {section: spy_on(section, arguments) for section, arguments in sections.items()}
        seen.clear()
        evaluate(**spies)
        return seen

    return read_keys


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(cache=folder / "cache"), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def load(recipe_file) -> Callable[..., Recipe]:
    # Reading a recipe takes a third of a second.
    load_once = functools.cache(lambda file, *overrides: load_recipe(str(file), [f"--{text}" for text in overrides]))

    def load(folder: Path, *overrides: str, file: Path = recipe_file) -> Recipe:
        """The recipe with its run in `folder`; overrides are written `section.key=value`."""
        recipe = copy.deepcopy(load_once(file, *overrides))
        recipe.training.output_dir = recipe.values["training"]["output_dir"] = str(folder)
        return recipe

    return load


@pytest.fixture(scope="session")
def train(load) -> Callable[..., Run]:
    def train(
        folder: Path,
        *overrides: str,
        resume: bool = False,
        plot: bool = False,
        budget: Budget | None = None,
        during: Callable[[int], Any] = lambda step: None,
        **options,
    ) -> Run:
        """Trains the recipe in `folder`; `during` is called with the number of each step, from 1, while it runs.

        The curves, which take a third of the time, are only drawn with `plot`.
        """

        def on_step_begin(self, args, state, control, **kwargs):
            during(state.global_step + 1)

        recipe = load(folder, *overrides, **options)
        console = Console(file=io.StringIO(), width=500)
        with pytest.MonkeyPatch.context() as patch:
            probe = estimate.probe_tokens_per_second
            patch.setattr(estimate, "probe_tokens_per_second", lambda *args, **kwargs: probe(*args[:3], seconds=0.02))
            patch.setattr(ProgressCallback, "on_step_begin", on_step_begin)
            if not plot:
                patch.setattr(module, "plot_loss", lambda *args: None)
            metrics = module.run(recipe, resume, console, budget=budget)
        return Run(recipe, folder, metrics, console.file.getvalue())

    return train


@pytest.fixture(scope="session")
def finished(train, tmp_path_factory) -> Run:
    """A finished run. Tests must not change its folder."""
    return train(tmp_path_factory.mktemp("finished") / "it's a run", plot=True)
