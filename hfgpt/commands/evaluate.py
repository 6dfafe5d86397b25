"""`hfgpt evaluate --benchmarks`: runs benchmarks of lm-evaluation-harness and records the results with the model."""

from pathlib import Path

from transformers import AutoModelForCausalLM

from hfgpt.errors import InputError
from hfgpt.evaluation import BenchmarkArguments
from hfgpt.hub import HubArguments
from hfgpt.hub.card import describe_benchmark, write_card
from hfgpt.hub.folder import explained_records, read_records
from hfgpt.hub.usage import Place
from hfgpt.models import find_model, hash_weights
from hfgpt.records import CARD_FILE, OF_WEIGHTS, Benchmark, read_benchmarks, read_metrics, write_metrics


def evaluate_benchmarks(path: str, arguments: BenchmarkArguments) -> dict[str, Benchmark]:
    """Runs benchmarks on a saved language model; for a folder, adds the results to metrics.json and the model card.

    Args:
        path: A folder or Hub id.
        arguments: The options.

    Returns:
        Name -> result.

    Raises:
        InputError: lm-evaluation-harness is not installed, the model is a classifier, or a benchmark cannot be run.
    """
    saved = find_model(path)
    if saved.is_classifier:
        raise InputError(f"'{path}' is a classifier; benchmarks need a language model (evaluate it on --data.path)")
    try:
        from hfgpt.evaluation import harness
    except ModuleNotFoundError as error:
        raise InputError(f"--benchmarks needs the package {error.name}: pip install 'hfgpt[benchmarks]'") from error
    benchmarks = harness.find_benchmarks(arguments)  # before the weights are read
    model, tokenizer = saved.load_with_tokenizer(AutoModelForCausalLM)
    results = harness.run_benchmarks(model, tokenizer, benchmarks, arguments)
    if saved.is_local:
        record_benchmarks(Path(path), results)
    return results


def record_benchmarks(folder: Path, results: dict[str, Benchmark]):
    """Adds results to metrics.json, without those of other weights, and renders the model card of the folder again."""
    weights = hash_weights(folder)
    for result in results.values():
        result.weights_sha256 = weights
    known = {name: old for name, old in read_benchmarks(folder).items() if old.weights_sha256 == weights}
    write_metrics(folder, read_metrics(folder), known | results)
    if not (folder / CARD_FILE).is_file() or not any((folder / kind.FILE).is_file() for kind in OF_WEIGHTS):
        return  # no card, or not one of hfgpt
    records = read_records(folder)
    with explained_records(folder):
        hub = HubArguments(**records.recipe.get("hub") or {})
        write_card(folder, records, hub, Place.of_folder(folder, native=records.is_exported))


def render_benchmarks(results: dict[str, Benchmark]) -> str:
    """The metrics of each benchmark in aligned lines, and below them how they were measured."""
    lines = []
    for name, result in results.items():
        for metric, value, error in result.measured:
            lines.append(f"{name:24} {metric:20} {value:10.4f}" + ("" if error is None else f" +- {error:.4f}"))
        lines.append(f"{name:24} {describe_benchmark(result)}")
    return "\n".join(lines)
