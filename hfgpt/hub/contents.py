"""Which files of a folder are published, which are not, and which make publishing fail.

Only safetensors, JSON, plain text, PNG and the model's two Python files are published. A file of another type is an
error rather than skipped: someone put it there, and should know that it would not be published.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token
from safetensors import SafetensorError, safe_open

from hfgpt.errors import InputError
from hfgpt.foreign_code import CODE, find_fault_of_json
from hfgpt.records import ANSWERS_FILE, CARD_FILE, JUDGEMENTS_FILE, is_checkpoint
from hfgpt.saving import CHECKSUMS_FILE

TEXT = (".json", ".jsonl", ".yaml", ".yml", ".md", ".txt", ".jinja")
STAYING = {
    CARD_FILE: "a new card is rendered",
    ANSWERS_FILE: "contains rows of the data",
    JUDGEMENTS_FILE: "contains rows of the data",
    ".gitattributes": "managed by the Hub",
    CHECKSUMS_FILE: "checksums of the local files",
}
# Trainer's files for resuming from a checkpoint; an error outside a checkpoint.
STATE = re.compile(r"(optimizer|scheduler|scaler)\.(pt|bin)|rng_state.*\.pth|training_args\.bin|trainer_state\.json")
# Files below the folder `wandb` that Weights & Biases creates in WANDB_DIR: one folder per run, and links to the last.
WANDB_FILE = re.compile(r"(offline-)?run-\d{8}_\d{6}-\w+/|latest-run|debug(-internal)?\.log$|settings$")
# Each begins with a literal prefix, with which `re` skips quickly through large files. All characters are printable:
# fewer than one match in a thousand gigabytes of random bytes is expected.
SECRETS = (
    ("a Hugging Face token", rb"hf_[A-Za-z0-9]{30,}"),
    ("a Hugging Face token", rb"api_org_[A-Za-z0-9]{30,}"),
    ("a GitHub token", rb"gh[pousr]_[A-Za-z0-9]{36,}"),
    ("a GitHub token", rb"github_pat_[A-Za-z0-9_]{60,}"),
    ("a GitLab token", rb"glpat-[A-Za-z0-9_-]{20,}"),
    ("an OpenAI or Anthropic key", rb"sk-[A-Za-z0-9_-]{36,}"),
    ("an AWS key", rb"AKIA[A-Z0-9]{16}(?![A-Za-z0-9])"),
    ("an AWS key", rb"ASIA[A-Z0-9]{16}(?![A-Za-z0-9])"),
    ("a Google key", rb"AIza[A-Za-z0-9_-]{35}"),
    ("a Slack token", rb"xox[abeoprs]-[A-Za-z0-9-]{20,}"),
    ("a PyPI token", rb"pypi-AgEI[A-Za-z0-9_-]{30,}"),
    ("an npm token", rb"npm_[A-Za-z0-9]{36}"),
    ("a private key", rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"),
    ("a private key", rb"PuTTY-User-Key-File-\d"),
    ("a password in a URL", rb"://(?<=[a-z]{2}://)[!#-&(-.0-9;-?A-~]{1,64}:[!#-&(-.0-9;-?A-~]{3,128}@"),
)
PATTERNS = [(kind, re.compile(pattern)) for kind, pattern in SECRETS]
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HFGPT_JUDGE_API_KEY")
CHUNK, OVERLAP = 2**24, 2**10  # bytes; no pattern is longer than the overlap


@dataclass
class Contents:
    """The files of a folder.

    Args:
        going: Names of the files to publish.
        staying: Name -> why it is not published.
    """

    going: list[str]
    staying: dict[str, str]


def sort_contents(folder: Path) -> Contents:
    """Decides which files of a folder are published.

    Raises:
        InputError: The folder has files that must not be published; names each with the reason.
    """
    going, staying, refused = [], {}, {}
    for path in sorted(folder.iterdir()):
        if fault := _find_fault(path):
            refused[path.name] = fault
        elif reason := _reason_to_stay(path):
            staying[path.name] = reason
        else:
            going.append(path.name)
    if refused:
        named = "; ".join(f"'{name}' {fault}" for name, fault in refused.items())
        raise InputError(f"'{folder}' contains files that cannot be published: {named}; remove them")
    return Contents(going, staying)


def find_secrets(folder: Path, names: Iterable[str]) -> list[str]:
    """Finds what looks like a token, a key or a password in files.

    Args:
        folder: The folder of the files.
        names: Their names, relative to the folder.

    Returns:
        A description of each match, without the secret itself.
    """
    own = [value.encode() for value in (get_token(), *map(os.environ.get, TOKEN_VARIABLES)) if value]
    found = []
    for name in names:
        tail, offset = b"", 0
        with open(folder / name, "rb") as file:
            while chunk := file.read(CHUNK):
                text = tail + chunk
                matches = ((kind, pattern.search(text)) for kind, pattern in PATTERNS)
                if hit := next(((kind, match) for kind, match in matches if match), None):
                    place = offset - len(tail) + hit[1].start()
                    found.append(f"'{name}' contains {hit[0]} at byte {place:,}")
                    break
                if any(secret in text for secret in own):
                    found.append(f"'{name}' contains a token that is in use on this machine")
                    break
                tail, offset = text[-OVERLAP:], offset + len(chunk)
    return found


def _find_fault(path: Path) -> str | None:
    """Why a file or folder cannot be published; None: it can, or it is known and skipped."""
    name = path.name
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        return "is a symbolic link that points outside the folder"
    if name in STAYING or (STATE.fullmatch(name) and is_checkpoint(path.parent)):
        return None
    if name.startswith("."):
        return "is hidden (settings and caches are not published)"
    if path.is_dir():
        return None if _kind_of_folder(path) else "is a folder (a model is published without subfolders)"
    if name in CODE or re.fullmatch(r"LICEN[CS]E|NOTICE", name):
        return None
    if path.suffix == ".safetensors":
        return _fault_of_tensors(path)
    if path.suffix == ".png":
        with open(path, "rb") as file:
            return None if file.read(8) == b"\x89PNG\r\n\x1a\n" else "is not a PNG file"
    if path.suffix in TEXT:
        return _fault_of_text(path)
    return "is not safetensors, JSON, plain text or PNG"


def _reason_to_stay(path: Path) -> str | None:
    if path.is_dir():
        return _kind_of_folder(path)
    return STAYING.get(path.name) or ("training state, for resuming" if STATE.fullmatch(path.name) else None)


def _kind_of_folder(path: Path) -> str | None:
    """What a subfolder is, such as the model that a first pass saves; None: unknown."""
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json", "trainer_state.json")):
        return "a checkpoint" if re.fullmatch(r"checkpoint-\d+", path.name) else "another model"
    files = [file.relative_to(path) for file in path.rglob("*") if not file.is_dir()]
    if files and all(file.name.startswith("events.out.tfevents.") for file in files):
        return "TensorBoard logs"
    is_wandb = path.name == "wandb" and all(WANDB_FILE.match(file.as_posix()) for file in files)
    return "W&B logs" if is_wandb and files else None


def _fault_of_tensors(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            return None if list(file.keys()) else "contains no tensors"
    except (OSError, SafetensorError):
        return "is not a safetensors file"


def _fault_of_text(path: Path) -> str | None:
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "is not UTF-8 text"
    if path.suffix == ".json" and (fault := find_fault_of_json(content)):
        return fault
    return "is not plain text (it contains NUL bytes)" if b"\0" in content else None
