"""The folder that is sent: links to what goes as it is, and written anew what names places of this machine."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import yaml

from hfgpt import configuration_hfgpt, modeling_hfgpt
from hfgpt.hub import HubArguments
from hfgpt.hub.card import PICTURES, evaluation_results, write_card
from hfgpt.hub.contents import sort_contents
from hfgpt.hub.records import Records, read_records, without_paths
from hfgpt.hub.usage import Place
from hfgpt.saving import write_json, write_text

# Entries of data_report.json that are texts of the data.
ROWS_OF_DATA = ("near_duplicate_examples",)
RESULTS_FILE = ".eval_results/hfgpt.yaml"


def stage(folder: Path, staging: Path, records: Records, hub: HubArguments, place: Place):
    """Makes the folder that is sent, with the code that runs here, the records and the card.

    Args:
        folder: Of the model.
        staging: The folder to make.
        records: Of the model, with the metrics to publish.
        hub: For the card; the public base model of an adapter.
        place: Where it is sent to, for the card.
    """
    staging.mkdir()
    _link(folder, staging, sort_contents(folder).going)
    if records.adapter:
        base = {"base_model_name_or_path": hub.base_model, "revision": hub.base_revision} if hub.base_model else {}
        write_json(staging / "adapter_config.json", records.adapter | base)
    else:
        # As they are installed here, whatever lay in the folder.
        for module in (configuration_hfgpt, modeling_hfgpt):
            path = Path(module.__file__)
            write_text(staging / path.name, path.read_text(encoding="utf-8"))
    _stage_records(staging, records, hub, place)


def stage_native(folder: Path, staging: Path, records: Records, hub: HubArguments, place: Place):
    """Adds records, pictures and the card to what `hfgpt export` made of a folder; arguments as of `stage`."""
    _link(folder, staging, [name for name in PICTURES if (folder / name).is_file()])
    _stage_records(staging, records, hub, place)


def _stage_records(staging: Path, records: Records, hub: HubArguments, place: Place):
    kept = {"run.json": records.run, "metrics.json": records.metrics, "merge.json": records.merge}
    kept["data_report.json"] = {key: value for key, value in records.data.items() if key not in ROWS_OF_DATA}
    kept["conversion.json"] = read_records(staging).conversion
    for name, content in kept.items():
        if content:
            write_json(staging / name, without_paths(content))
    recipe = without_paths(records.recipe)
    if recipe:
        said = {key: value for key, value in vars(hub).items() if value is not None}
        text = yaml.safe_dump({**recipe, "hub": said}, sort_keys=False, allow_unicode=True)
        write_text(staging / "recipe.yaml", text)
    final = dataclasses.replace(read_records(staging), recipe=recipe)
    write_card(staging, final, hub, place)
    if results := evaluation_results(final):
        (staging / RESULTS_FILE).parent.mkdir(exist_ok=True)
        write_text(staging / RESULTS_FILE, yaml.safe_dump(results, sort_keys=False, allow_unicode=True))


def files_in(folder: Path) -> list[str]:
    """The names of all files below a folder, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _link(folder: Path, staging: Path, names: Sequence[str]):
    for name in names:
        if not (staging / name).exists():
            (staging / name).symlink_to((folder / name).resolve())
