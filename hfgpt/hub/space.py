"""A Gradio Space that runs a published model: a page to try it in a browser.

Its app.py is `model_cards/space_app.py` with the model's name and commit.
"""

import importlib.metadata
import json
import platform
from pathlib import Path

import yaml
from packaging.version import Version

from hfgpt.hub.card import card_folder
from hfgpt.hub.usage import Place
from hfgpt.records import CARD_FILE
from hfgpt.saving import write_text

APP = "space_app.py"
GRADIO = "6.31.0"  # app.py was tested with it
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")


def write_space(folder: Path, place: Place, license: str | None, private: bool):
    """Writes the files of a Space.

    Args:
        folder: The folder to make.
        place: The published model; its revision should be a commit.
        license: License of the model, as a Hub identifier.
        private: Whether the model is private, so that the Space needs a token.
    """
    folder.mkdir()
    app = (card_folder() / APP).read_text(encoding="utf-8")
    for line, value in {
        'MODEL = "user/name"': f"MODEL = {json.dumps(place.name)}",
        '"revision": "main"': f'"revision": {json.dumps(place.revision or "main")}',
        '"trust_remote_code": True': f'"trust_remote_code": {not place.native}',
    }.items():
        app = app.replace(line, value)
    write_text(folder / "app.py", app)
    # Without the part after +, which names a build that is not on PyPI.
    versions = {name: Version(importlib.metadata.version(name)).public for name in PACKAGES}
    write_text(folder / "requirements.txt", "".join(f"{name}=={value}\n" for name, value in versions.items()))
    title = place.name.rpartition("/")[2]
    metadata = {
        "title": title,
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": ".".join(platform.python_version_tuple()[:2]),
        "app_file": "app.py",
        "models": [place.name],
        "tags": ["hfgpt"],
        **({"license": license} if license else {}),
    }
    about = f"A page to try the model [{place.name}](https://huggingface.co/{place.name}).\n"
    if private:
        about += "\nThe model is private: add a token that can read it to the Space's secrets, as `HF_TOKEN`.\n"
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    write_text(folder / CARD_FILE, f"---\n{front}---\n\n# {title}\n\n{about}")
