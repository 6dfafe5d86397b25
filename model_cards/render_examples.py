"""Renders the example cards again, from the records beside each: python model_cards/render_examples.py

An example is a published folder without its weights, its tokenizer and its code; no run is needed to render it.
"""

from pathlib import Path

from hfgpt.hub import HubArguments
from hfgpt.hub.card import Card
from hfgpt.hub.folder import read_records
from hfgpt.hub.usage import Place

FOLDERS = sorted(path.parent for path in Path(__file__).parent.glob("examples/*/README.md"))


def render(folder: Path) -> str:
    """The card of an example, as it is published under its own name."""
    records = read_records(folder)
    hub = HubArguments(**records.recipe.get("hub", {}))
    return Card(records, hub, Place(f"user/{folder.name}")).render()


if __name__ == "__main__":
    for folder in FOLDERS:
        (folder / "README.md").write_text(render(folder), encoding="utf-8")
