"""The folder to upload: links to unchanged files, and records rewritten without local paths."""

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from hfgpt.foreign_code import CODE
from hfgpt.hub import HubArguments
from hfgpt.hub.card import evaluation_results, write_card
from hfgpt.hub.folder import FolderRecords, read_records, without_paths
from hfgpt.hub.usage import Place
from hfgpt.records import LOG_FILE, RECIPE_FILE, Benchmark, write_metrics
from hfgpt.saving import write_json, write_text

# Keys of the section hub that describe the model; the others describe where it is published.
DESCRIBING = ("license", "author", "url", "language", "base_model", "base_revision", "data_license", "energy_kwh")
# Files of hfgpt's layout, which a native GPT-2 must not have.
NOT_NATIVE = re.compile(
    r".*\.safetensors(\.index\.json)?|.*_hfgpt\.py|adapter_config\.json|labels\.json|known_answers\.json"
)
RESULTS_FILE = ".eval_results/hfgpt.yaml"


def stage(folder: Path, staging: Path, names: Sequence[str], records: FolderRecords, hub: HubArguments, place: Place):
    """Makes the folder to upload, with the installed model code, the records and the card.

    Args:
        folder: The model's folder.
        staging: The folder to make.
        names: The files in `folder` to publish, see `hfgpt.hub.contents.sort_contents`.
        records: The model's records, with the metrics to publish.
        hub: Details for the card, and the public base model of an adapter.
        place: Where users will load the model from.
    """
    staging.mkdir()
    _link(folder, staging, [name for name in names if name not in CODE])
    if records.adapter:
        base = {"base_model_name_or_path": hub.base_model, "revision": hub.base_revision} if hub.base_model else {}
        write_json(staging / "adapter_config.json", records.adapter | base)
    else:
        _add_code(staging)
    _stage_records(staging, records, hub, place)


def stage_base(folder: Path, staging: Path, names: Sequence[str]):
    """Makes a folder with the base model of an adapter, to load it without network; arguments as for `stage`."""
    staging.mkdir()
    _link(folder, staging, [name for name in names if not name.endswith(".py")])
    if json.loads((staging / "config.json").read_bytes()).get("model_type") == "hfgpt":
        _add_code(staging)


def stage_native(
    folder: Path, staging: Path, names: Sequence[str], records: FolderRecords, hub: HubArguments, place: Place
):
    """Adds the other files and the card to the folder that `hfgpt export` made; arguments as for `stage`."""
    _link(folder, staging, [name for name in names if not NOT_NATIVE.fullmatch(name)])
    run = dataclasses.replace(records.run, architecture=read_records(staging).conversion.architecture)
    _stage_records(staging, dataclasses.replace(records, run=run), hub, place)


def _stage_records(staging: Path, records: FolderRecords, hub: HubArguments, place: Place):
    staged = read_records(staging)
    for record in (records.run, records.data, records.merge, staged.conversion):
        if record and (content := record.publishable()):
            write_json(staging / record.FILE, content)
    if records.metrics or records.benchmarks:
        benchmarks = {name: Benchmark(**result.publishable()) for name, result in records.benchmarks.items()}
        write_metrics(staging, records.metrics, benchmarks)
    recipe = without_paths(records.recipe)
    if recipe:
        described = {name: getattr(hub, name) for name in DESCRIBING if getattr(hub, name) is not None}
        text = yaml.safe_dump({**recipe, "hub": described}, sort_keys=False, allow_unicode=True)
        write_text(staging / RECIPE_FILE, text)
    if (staging / LOG_FILE).is_file():  # failed uploads are left out of the published log
        lines = (staging / LOG_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(staging / LOG_FILE, "".join(line for line in lines if "hub_error" not in json.loads(line)))
    # Not the records of the copy, where a local base model could look like a Hub id.
    final = dataclasses.replace(
        records, folder=staging, recipe=recipe, adapter=staged.adapter, conversion=staged.conversion
    )
    write_card(staging, final, hub, place)
    if results := evaluation_results(final):
        (staging / RESULTS_FILE).parent.mkdir(exist_ok=True)
        write_text(staging / RESULTS_FILE, yaml.safe_dump(results, sort_keys=False, allow_unicode=True))


def files_in(folder: Path) -> list[str]:
    """The paths of all files in a folder, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _add_code(staging: Path):
    """Adds the model's Python files, as installed."""
    for name, path in CODE.items():
        shutil.copyfile(path, staging / name)


def _link(folder: Path, staging: Path, names: Sequence[str]):
    for name in names:
        if not (staging / name).exists():
            (staging / name).symlink_to((folder / name).resolve())
