"""The model card: typed data out of what a folder holds, rendered by the template in `model_cards/`.

Every number on it stands in the folder's metrics.json, run.json, data_report.json or recipe.yaml; one that was not
measured is absent.

Sources: Mitchell et al., "Model Cards for Model Reporting" (2019); huggingface_hub's `ModelCardData` for the metadata.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from transformers import PreTrainedModel

from hfgpt.adapters import base_of
from hfgpt.data.report import counted
from hfgpt.hub import HubArguments
from hfgpt.hub.folder import FolderRecords
from hfgpt.hub.usage import Place, pipeline_tag, usage_code
from hfgpt.records import CARD_FILE, Environment, RunRecord, TrainingRecord, is_hub_id, public_name
from hfgpt.saving import write_text

Rows = list[tuple[str, str]]
# Name in metrics.json -> what it is, and the Hub's name of such a result; None: of no result, but of its size.
METRICS = {
    "eval_accuracy": ("accuracy", "accuracy"),
    "eval_accuracy_low": ("accuracy, lower bound (Wilson interval)", None),
    "eval_accuracy_high": ("accuracy, upper bound (Wilson interval)", None),
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
SHARE = re.compile(r".*accuracy|.*match|eval_(precision|recall)_")
ARCHITECTURE = {
    "parameters": "parameters",
    "num_hidden_layers": "layers",
    "num_attention_heads": "attention heads",
    "hidden_size": "hidden size",
    "intermediate_size": "MLP size",
    "max_position_embeddings": "context length, tokens",
    "vocab_size": "vocabulary size",
    "hidden_act": "activation",
    "qkv_bias": "biases of query, key and value",
    "tie_word_embeddings": "tied input and output embeddings",
}
SPLIT_BY = {
    "given": "the source has its own splits",
    "documents": "whole documents",
    "rows": "rows; identical texts stay in one split",
    "order": "order; the first rows are for training",
    "position": "position in a single text",
}
PICTURES = {
    "loss.png": "Training and validation loss",
    "confusion.png": "Confusion matrix: true classes in rows, predicted classes in columns",
}


@dataclass
class Card:
    """A model card before it is text: `model_cards/card.md.jinja` says where each part goes.

    Args:
        title: Its heading.
        task: What the model was trained for; None: not known.
        metadata: What the Hub reads.
        summary: What the model is, in a sentence or two.
        usage: Python that loads the model and uses it.
        loading: What that needs.
        architecture, training_data, procedure, evaluation: Rows of tables, each a name and a value.
        measured_on: What the evaluation was measured on, and with which weights.
        relations: Sentences on the base model, on merging and on conversion.
        recipe: In YAML.
        pictures: File in the folder -> what it shows.
        samples: Texts of the model.
        sampling: How they came about.
        citation: BibTeX.
        versions: Of the packages it was made with.
    """

    title: str
    task: str | None
    metadata: ModelCardData
    summary: str
    usage: str
    loading: str
    architecture: Rows
    training_data: Rows
    procedure: Rows
    evaluation: Rows
    measured_on: str
    relations: list[str]
    recipe: str
    pictures: dict[str, str]
    samples: list[str]
    sampling: str
    citation: str
    versions: str

    def render(self) -> str:
        """The text of README.md."""
        template = (card_folder() / "card.md.jinja").read_text(encoding="utf-8")
        text = ModelCard.from_template(self.metadata, template_str=template, card=self).content
        return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def card_folder() -> Path:
    """The template and the examples: beside the modules in an installed wheel, at the root of a checkout."""
    package = Path(__file__).parent.parent
    return package / "model_cards" if (package / "model_cards").is_dir() else package.parent / "model_cards"


def describe_architecture(model: PreTrainedModel) -> dict[str, Any]:
    """The entry `architecture` of run.json, which the table of the card shows; of the base model below an adapter."""
    network = base_of(model)
    with torch.device("meta"):  # without the adapter that the model at hand may carry
        parameters = type(network)(network.config).num_parameters()
    settings = [name for name in ARCHITECTURE if name != "parameters"]
    return {"parameters": parameters} | {name: getattr(network.config, name) for name in settings}


def write_card(folder: Path, records: FolderRecords, hub: HubArguments, place: Place):
    """Writes README.md into a folder; arguments as of `build_card`."""
    write_text(folder / CARD_FILE, build_card(records, hub, place).render())


def build_card(records: FolderRecords, hub: HubArguments, place: Place) -> Card:
    """Collects what a card says.

    Args:
        records: Of the model's folder.
        hub: What no run can know.
        place: Where the card says to load the model from.
    """
    run, recipe = records.run, {key: value for key, value in records.recipe.items() if key != "hub"}
    title = place.name.rpartition("/")[2]
    return Card(
        title=title,
        task=records.task,
        metadata=_metadata(records, hub, title),
        summary=_summary(records),
        usage=usage_code(records, place),
        loading=_loading(records, place.native),
        architecture=[(ARCHITECTURE[name], _format(value)) for name, value in (run.architecture or {}).items()],
        training_data=_training_data(records, hub),
        procedure=_procedure(run, hub),
        evaluation=[(label, _format(value, key)) for key, label, _, value in _results(records.metrics)],
        measured_on=_measured_on(records),
        relations=_relations(records, hub),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip() if recipe else "",
        pictures={file: what for file, what in PICTURES.items() if (records.folder / file).is_file()},
        samples=[text.replace("```", "'''") for text in (run.samples.texts if run.samples else [])],
        sampling=_sampling(records),
        citation=_citation(title, records),
        versions=", ".join(f"{package} {version}" for package, version in _versions(records.origin).items()),
    )


def evaluation_results(records: FolderRecords) -> list[dict[str, Any]]:
    """What was measured, in the form of the Hub's `.eval_results/*.yaml`."""
    sha = records.run.weights_sha256
    weights = f"; {'converted from ' if _is_exported(records) else ''}weights with SHA-256 {sha}" if sha else ""
    entries = [
        EvalResultEntry(
            dataset_id=records.data_name,
            task_id=kind,
            value=value,
            date=records.run.measured_again or records.run.finished,
            notes=f"{label}, on {records.measured_on}; hfgpt evaluate{weights}",
        )
        for _, label, kind, value in _results(records.metrics)
        if kind
    ]
    return eval_result_entries_to_yaml(entries)


def public_base(records: FolderRecords, hub: HubArguments) -> str | None:
    """The Hub id of the base model; None: it has none, or lies on this machine alone."""
    return hub.base_model or (records.base if records.base and is_hub_id(records.base) else None)


def _metadata(records: FolderRecords, hub: HubArguments, title: str) -> ModelCardData:
    base, data = public_base(records, hub), records.data_name
    results = [
        EvalResult(
            task_type=pipeline_tag(records),
            dataset_type=data,
            dataset_name=f"{data}, {records.measured_on}",
            metric_type=kind,
            metric_name=label,
            metric_value=value,
        )
        for _, label, kind, value in _results(records.metrics)
        if kind
    ]
    return ModelCardData(
        library_name="peft" if records.adapter else "transformers",
        pipeline_tag=pipeline_tag(records),
        license=hub.license,
        language=hub.language,
        base_model=base,
        base_model_relation=("adapter" if records.adapter else "finetune") if base else None,
        datasets=[data] if records.recipe and is_hub_id(data) else None,
        tags=["hfgpt", *filter(None, [records.task]), *(["lora"] if records.adapter else [])],
        model_name=title if results else None,
        eval_results=results or None,
    )


def _summary(records: FolderRecords) -> str:
    labels = list(records.labels.values())
    purposes = {"classify": f"classifies texts as {_enumerate(labels)}", "instruct": "follows instructions"}
    purpose = purposes.get(records.task, "generates text")
    parameters = (records.run.architecture or {}).get("parameters")
    size = f" of {parameters:,} parameters" if parameters else ""
    data = f" It was trained on `{records.data_name}`." if records.recipe else ""
    if not records.adapter:
        return f"A GPT{size} that {purpose}.{data}"
    saved = records.run.saved_parameters
    own = f" ({saved:,} parameters)" if saved else ""
    return f"A LoRA adapter{own} for `{public_name(records.base)}`, a GPT{size}, that {purpose}.{data}"


def _loading(records: FolderRecords, native: bool) -> str:
    if native:
        return "This is a standard transformers GPT-2; no custom code is needed to load it."
    whose = "the base model's" if records.adapter else "its"
    return (
        f"`trust_remote_code=True` lets transformers run {whose} two Python files, `configuration_hfgpt.py` and "
        "`modeling_hfgpt.py`. If hfgpt is installed, write `import hfgpt` first and omit it."
    )


def _training_data(records: FolderRecords, hub: HubArguments) -> Rows:
    data = records.data
    if data is None:
        return []
    rows = [("source", f"`{records.data_name}`"), ("SHA-256 of the content", f"`{data.sha256}`")]
    rows += [("license", hub.data_license)] if hub.data_license else []
    rows += [("rows read", _format(data.rows_read)), ("rows kept", _format(data.rows_kept))]
    rows += [(f"rows dropped: {reason}", _format(count)) for reason, count in sorted(data.dropped.items())]
    found = {
        "truncated": "rows truncated to the context",
        "duplicated": "rows with duplicate text (kept)",
        "kept_together": "rows with identical text (kept in one split)",
        "near_duplicates": "test rows that are near duplicates of training rows",
        "leaked": "validation or test rows that are also in the training split",
    }
    rows += [(label, _format(value)) for name, label in found.items() if (value := getattr(data, name))]
    rows += [("split by", SPLIT_BY[data.split_by])] if data.split_by else []
    # A task that reads rows counts them as documents.
    names = {"predicted_tokens": "predicted tokens", "tail_tokens": "tokens left over (dropped)"}
    names |= {} if records.task == "pretrain" else {"documents": "rows"}
    for split, sizes in data.splits.items():
        sizes = vars(sizes).copy()
        labels = sizes.pop("labels")
        counts = [counted(size, names.get(name, name)) for name, size in sizes.items() if size]
        counts += [f"{size:,} `{label}`" for label, size in labels.items()]
        rows.append((split, ", ".join(counts) or "empty"))
    return rows


def _procedure(run: TrainingRecord, hub: HubArguments) -> Rows:
    facts, first = _facts_of(run), run.first_pass if isinstance(run, RunRecord) else None
    peak_of = facts.get("peak_memory_of")
    names = {
        "steps": "optimizer steps",
        "tokens": "tokens seen",
        "seed": "seed",
        "trained_parameters": "trained parameters",
        "device": "hardware",
        "processes": "processes",
        "precision": "precision",
        "training_seconds": "training time, s",
        "total_seconds": "total time with data and evaluation, s",
        "tokens_per_second": "tokens per second",
        "peak_memory_bytes": f"peak memory of the {peak_of}, bytes" if peak_of else "peak memory, bytes",
    }
    for name in names.keys() & (_facts_of(first) if first else {}).keys():
        names[name] = f"second pass: {names[name]}"
    times = {name: f"{value:,.1f}" for name, value in (run.actual or {}).items() if "second" in name}
    if step := run.resumed_from_step:
        for name in times:
            names[name] += f", since the run was resumed at step {step:,}"
    rows = [(label, times.get(name, _format(facts[name]))) for name, label in names.items() if name in facts]
    before = [(f"first pass: {label}", value) for label, value in _procedure(first, HubArguments())] if first else []
    return before + rows + ([("metered energy, kWh", f"{hub.energy_kwh:g}")] if hub.energy_kwh else [])


def _facts_of(training: TrainingRecord) -> dict[str, Any]:
    return training.to_dict() | (training.actual or {})


def _results(metrics: dict[str, Any]) -> list[tuple[str, str, str | None, Any]]:
    """What metrics.json holds: the name there, what it is, the Hub's name if it is a result, and the value."""
    named = [(name, *METRICS[name], metrics[name]) for name in METRICS if name in metrics]
    for name, value in metrics.items():
        if found := re.fullmatch(r"eval_(precision|recall)_(.*)", name, re.DOTALL):
            named.append((name, f"{found[1]} of `{found[2]}`", None, value))
    return named


def _measured_on(records: FolderRecords) -> str:
    sha, again, finished = records.run.weights_sha256, records.run.measured_again, records.run.finished
    weights = f", with weights of SHA-256 `{sha}`" if sha else ""
    if sha and _is_exported(records):
        weights += " (converted to the weights here)"
    when = (
        f", before it was published ({again})"
        if again
        else f", at the end of the run ({finished})"
        if finished
        else ""
    )
    return f"Measured on {records.measured_on} of `{records.data_name}`{weights}{when}.{records.caution}"


def _is_exported(records: FolderRecords) -> bool:
    return bool(records.conversion) and records.conversion.format.startswith("to ")


def _relations(records: FolderRecords, hub: HubArguments) -> list[str]:
    relations, merge, conversion = [], records.merge, records.conversion
    base = hub.base_model or (public_name(records.base) if records.base else None)
    if records.adapter:
        sha = records.run.base_weights_sha256
        weights = f" (SHA-256 of its weights: `{sha}`)" if sha else ""
        relations.append(f"The adapter works only with its own base model: `{base}`{weights}.")
    elif records.recipe and not merge:
        merged = ", as a LoRA adapter that was merged into it" if "adapters" in records.recipe else ""
        relations.append(f"Trained from `{base}`{merged}." if base else "Trained from random weights.")
    if records.run.checkpoint:
        relations.append("This is a checkpoint from before the end of the run.")
    if "pretraining" in records.recipe:
        relations.append("A first pass trained a language model on the texts of the training split.")
    if records.recipe.get("model", {}).get("load_in_4bit"):
        relations.append("Trained with a quantized base model, evaluated in float32.")
    if merge:
        relations.append(
            f"The adapter `{public_name(merge.adapter)}`, merged into `{base}` in float32: the largest difference "
            f"of logits from the unmerged model is {merge.difference:.1e} over {merge.tokens:,} random tokens, where "
            f"the largest logit is {merge.largest_logit:.2f}."
        )
    if conversion:
        largest = max(row["absolute"] for row in conversion.differences)
        form = conversion.format
        relations.append(
            f"Converted {form if form.startswith('to ') else f'from {form}'}, out of "
            f"`{public_name(conversion.source)}`; the largest difference of logits between them is {largest:.1e}."
        )
    return relations


def _sampling(records: FolderRecords) -> str:
    if records.task == "classify":
        return "Texts with the most likely class and its probability."
    if records.task == "instruct":
        return "Instructions with the model's greedy answers."
    if not (samples := records.run.samples):
        return ""
    return (
        f"Sampled with seed {samples.seed}, temperature {samples.temperature:g}, top_k {samples.top_k} and "
        f"at most {samples.max_new_tokens} new tokens: the first sample for each prompt."
    )


def _citation(title: str, records: FolderRecords) -> str:
    key = re.sub(r"\W+", "-", title).strip("-").lower()
    note = f"{'Trained' if records.recipe else 'Converted'} with hfgpt"
    fields = {"title": title, "note": note, "year": (records.origin.finished or "")[:4]}
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@misc{{{key},", *lines, "}"])


def _versions(origin: Environment) -> dict[str, str]:
    own = {"hfgpt": origin.hfgpt, "python": origin.python}
    return {name: version for name, version in own.items() if version} | (origin.versions or {})


def _format(value: Any, name: str = "") -> str:
    """A value for people: shares in per cent, at most four digits after the point."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2%}" if SHARE.match(name) else f"{value:,.4f}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _enumerate(words: Sequence[str]) -> str:
    words = [f"`{word}`" for word in words] or ["one of its classes"]
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
