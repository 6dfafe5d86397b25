"""The model card: typed data from a model's folder, rendered by the template `model_cards/card.md.jinja`.

Every number on the card is from metrics.json, run.json, data_report.json or recipe.yaml in the folder (memory in MiB
instead of bytes); what was not measured is left out.

Sources: Mitchell et al., "Model Cards for Model Reporting" (2019); huggingface_hub's `ModelCardData` for the metadata.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from transformers import PreTrainedModel

from hfgpt.adapters import base_of
from hfgpt.data.report import counted
from hfgpt.hub import HubArguments
from hfgpt.hub.folder import FolderRecords, without_paths
from hfgpt.hub.usage import Place, pipeline_tag, serving_command, usage_code, verifying_code
from hfgpt.records import CARD_FILE, Benchmark, is_hub_id, public_name
from hfgpt.saving import write_text

TEMPLATE = "card.md.jinja"
PICTURES = ("loss.png", "confusion.png")
# Fields of the configuration that the card shows.
ARCHITECTURE = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
    "hidden_act",
    "qkv_bias",
    "tie_word_embeddings",
)
# Name in metrics.json -> label on the card, and the Hub's name of the metric; None: not listed as a result.
METRICS = {
    "eval_accuracy": ("accuracy", "accuracy"),
    "eval_accuracy_low": ("accuracy, 95% confidence interval (Wilson), lower bound", None),
    "eval_accuracy_high": ("accuracy, 95% confidence interval (Wilson), upper bound", None),
    "eval_macro_f1": ("macro F1", "f1"),
    "eval_loss": ("loss, nats", "loss"),
    "eval_perplexity": ("perplexity", "perplexity"),
    "eval_bits_per_byte": ("bits per byte", "bits_per_byte"),
    "eval_exact_match": ("exact match", "exact_match"),
    "eval_normalised_match": ("match ignoring case, punctuation and articles", "normalised_match"),
    "eval_judge_score": ("mean judge score, at the end of the run", "judge_score"),
    "eval_judge_scored": ("answers judged", None),
    "eval_judge_failures": ("answers the judge failed to score", None),
    "majority_accuracy": ("majority-class baseline", None),
    "baseline_accuracy": ("baseline: logistic regression on character n-grams", None),
    "validation_accuracy": ("accuracy on the validation split", None),
    "eval_tokens": ("predicted tokens", None),
    "eval_bytes": ("bytes of text", None),
    "eval_unknown_tokens": ("unknown tokens", None),
    "eval_rows": ("rows", None),
    "eval_answers": ("answers", None),
    "eval_unfinished_answers": ("unfinished answers", None),
    "eval_truncated": ("rows truncated to the context", None),
}
OF_CLASS = re.compile(r"eval_(precision|recall)_(.*)", re.DOTALL)
SHARE = re.compile(r".*accuracy|.*match|eval_(precision|recall)_")


class Result(NamedTuple):
    """A metric: its label on the card, its name on the Hub or None, its value, and whether that is a fraction."""

    label: str
    kind: str | None
    value: Any
    is_share: bool


@dataclass(frozen=True)
class Card:
    """A model card, as the template reads it.

    Args:
        records: The records in the model's folder.
        hub: Details that are not recorded.
        place: Where users load the model from.
    """

    records: FolderRecords
    hub: HubArguments
    place: Place

    def render(self) -> str:
        """The text of README.md."""
        return _template().render(card=self).strip() + "\n"

    @property
    def title(self) -> str:
        return self.place.name.rpartition("/")[2]

    @property
    def citation_key(self) -> str:
        return re.sub(r"\W+", "-", self.title).strip("-").lower()

    @property
    def base(self) -> str | None:
        """The public name of the base model; None: there is none."""
        return self.hub.base_model or (public_name(self.records.base) if self.records.base else None)

    @property
    def usage(self) -> str:
        return usage_code(self.records, self.place)

    @property
    def verifying(self) -> str:
        """Code that compares the model with its known answers; empty if there are none."""
        return verifying_code(self.records, self.place) if self.records.has_answers else ""

    @property
    def serving(self) -> str | None:
        return serving_command(self.records, self.place)

    @property
    def recipe(self) -> str:
        """The recipe as YAML without local paths; empty if there is none."""
        recipe = {key: without_paths(value) for key, value in self.records.recipe.items() if key != "hub"}
        return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip() if recipe else ""

    @property
    def results(self) -> list[Result]:
        return _results(self.records.metrics)

    @property
    def pictures(self) -> list[str]:
        """The pictures in the folder."""
        return [name for name in PICTURES if (self.records.folder / name).is_file()]

    @property
    def versions(self) -> dict[str, str]:
        """Versions of Python and of the packages that the model was made with."""
        origin = self.records.origin
        versions = {"hfgpt": origin.hfgpt, "python": origin.python} | (origin.versions or {})
        return {package: version for package, version in versions.items() if version}

    @property
    def metadata(self) -> ModelCardData:
        """The card's YAML header."""
        records, base, data = self.records, public_base(self.records, self.hub), self.records.data_name
        results = [
            EvalResult(
                task_type=pipeline_tag(records),
                dataset_type=data,
                dataset_name=f"{data}, {records.measured_on}",
                metric_type=result.kind,
                metric_name=result.label,
                metric_value=result.value,
            )
            for result in self.results
            if result.kind
        ]
        results += [
            EvalResult(
                task_type=pipeline_tag(records),
                dataset_type=_dataset_of(name, benchmark),
                dataset_name=name,
                dataset_config=benchmark.subset,
                metric_type=metric.partition(",")[0],
                metric_name=f"{metric}; {describe_benchmark(benchmark)}",
                metric_value=value,
            )
            for name, benchmark in records.benchmarks.items()
            for metric, value, _ in benchmark.measured
        ]
        return ModelCardData(
            library_name="peft" if records.adapter else "transformers",
            pipeline_tag=pipeline_tag(records),
            license=self.hub.license,
            language=self.hub.language,
            base_model=base,
            base_model_relation=("adapter" if records.adapter else "finetune") if base else None,
            datasets=[data] if records.recipe and is_hub_id(data) else None,
            tags=["hfgpt", *filter(None, [records.task]), *(["lora"] if records.adapter else [])],
            model_name=self.title if results else None,
            eval_results=results or None,
        )


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(card_folder())
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "counted": counted,
        "number": _format,
        "public_name": public_name,
        "described": describe_benchmark,
    }
    return environment.get_template(TEMPLATE)


def card_folder() -> Path:
    """The template's folder: inside the package when installed from a wheel, else in the root of the checkout."""
    package = Path(__file__).parent.parent
    return package / "model_cards" if (package / "model_cards").is_dir() else package.parent / "model_cards"


def describe_architecture(model: PreTrainedModel) -> dict[str, Any]:
    """The entry `architecture` of run.json, for the card; for an adapter, that of its base model."""
    network = base_of(model)
    with torch.device("meta"):  # a new instance, since the model may have an adapter
        parameters = type(network)(network.config).num_parameters()
    return {"parameters": parameters} | {name: getattr(network.config, name) for name in ARCHITECTURE}


def write_card(folder: Path, records: FolderRecords, hub: HubArguments, place: Place):
    """Writes README.md into a folder; arguments as for `Card`."""
    write_text(folder / CARD_FILE, Card(records, hub, place).render())


def evaluation_results(records: FolderRecords) -> list[dict[str, Any]]:
    """The results in the format of the Hub's `.eval_results/*.yaml`."""

    def weights(sha: str | None) -> str:
        return f"; {'converted from ' if records.is_exported else ''}weights with SHA-256 {sha}" if sha else ""

    entries = [
        EvalResultEntry(
            dataset_id=records.data_name,
            task_id=result.kind,
            value=result.value,
            date=records.run.measured_again or records.run.finished,
            notes=f"{result.label}, on {records.measured_on}; hfgpt evaluate{weights(records.run.weights_sha256)}",
        )
        for result in _results(records.metrics)
        if result.kind
    ]
    entries += [
        EvalResultEntry(
            dataset_id=_dataset_of(name, benchmark),
            task_id=f"{name}/{metric}",
            value=value,
            date=benchmark.finished,
            notes=f"{describe_benchmark(benchmark)}{weights(benchmark.weights_sha256)}",
        )
        for name, benchmark in records.benchmarks.items()
        for metric, value, _ in benchmark.measured
    ]
    return eval_result_entries_to_yaml(entries)


def describe_benchmark(benchmark: Benchmark) -> str:
    """How a benchmark was run, and what was cut for the model's context, in one line."""
    rows = benchmark.rows and counted(benchmark.rows, "rows")
    is_limited = benchmark.of_rows and benchmark.of_rows != benchmark.rows
    statements = [
        benchmark.num_fewshot is not None and counted(benchmark.num_fewshot, "examples") + " per prompt",
        rows and f"{rows} of {benchmark.of_rows:,}" if is_limited else rows,
        benchmark.chat_template and "with the chat template",
        benchmark.truncated and counted(benchmark.truncated, "requests") + " truncated to the context",
        benchmark.shortened and counted(benchmark.shortened, "answers") + " limited to what fits in the context",
        benchmark.unknown_tokens and counted(benchmark.unknown_tokens, "unknown tokens"),
        not benchmark.metrics and "not measured, as unknown tokens do not predict their characters",
        benchmark.lm_eval and f"lm_eval {benchmark.lm_eval}",
    ]
    return "; ".join(statement for statement in statements if statement)


def _dataset_of(name: str, benchmark: Benchmark) -> str:
    """The public name of a benchmark's data; a group has none of its own."""
    return public_name(benchmark.dataset or name)


def public_base(records: FolderRecords, hub: HubArguments) -> str | None:
    """Hub id of the base model; None: there is none, or it is only a local folder."""
    return hub.base_model or (records.base if records.base and is_hub_id(records.base) else None)


def _results(metrics: dict[str, Any]) -> list[Result]:
    named = {name: METRICS[name] for name in METRICS if name in metrics}
    of_class = {name: OF_CLASS.fullmatch(name) for name in metrics}
    named |= {name: (f"{found[1]} of `{found[2]}`", None) for name, found in of_class.items() if found}
    return [Result(*named[name], metrics[name], bool(SHARE.match(name))) for name in named]


def _format(value: Any, digits: int | None = None, share: bool = False) -> Any:
    """Formats numbers for the card, fractions in percent; returns other values unchanged."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) or (digits is not None and isinstance(value, int)):
        digits = digits if digits is not None else 4 if abs(value) < 100 else 1
        return f"{value:.2%}" if share else f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else value
