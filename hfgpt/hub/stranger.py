"""Checks that files load without hfgpt and compute the same results.

hfgpt computes logits in this process; a fresh Python process without hfgpt then loads the files to be published and
must get the same logits, bit for bit, and the same greedy continuation.
"""

import dataclasses
import json
import os
import re
import site
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hfgpt.data.templates import encode_chat
from hfgpt.errors import InputError
from hfgpt.foreign_code import find_foreign_code
from hfgpt.hub.folder import FolderRecords, read_records
from hfgpt.hub.staging import files_in
from hfgpt.hub.usage import Place, usage_code, verifying_code
from hfgpt.models import quiet_bars
from hfgpt.records import KnownAnswers
from hfgpt.saving import write_json

SCRIPT = Path(__file__).with_name("fresh_process.py")
ROWS, LENGTH, NEW_TOKENS = 2, 32, 16
TIMEOUT = 1800  # seconds, for the largest GPT-2 on few cores
# Environment variables passed to the fresh process: those Python needs to start, and those that may change results.
PASSED_ON = re.compile(
    r"PATH|PYTHON(PATH|HOME|UTF8)|LANG|LC_[A-Z]+|TZ|TMPDIR|TEMP|TMP|SYSTEMROOT|LD_LIBRARY_PATH|DYLD_LIBRARY_PATH|"
    r"(OMP|KMP|MKL|ONEDNN|DNNL|ATEN|OPENBLAS)_[A-Z_]+"
)


@dataclass
class Expected:
    """What a model computes in this process.

    Args:
        rows: Token ids (B, T).
        logits: The logits of each row, (B, T, V) or, of a classifier, (B, labels).
        greedy: The first half of the first row, continued by `new_tokens` tokens; None for a classifier.
        new_tokens: How many tokens to generate.
        text, ids: A text and its token ids; None if the model does not have a tokenizer.
    """

    rows: list[list[int]]
    logits: torch.Tensor
    greedy: list[int] | None
    new_tokens: int
    text: str | None
    ids: list[int] | None


@torch.no_grad()
def compute_expected(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, records: FolderRecords
) -> Expected:
    """Computes on the CPU what the fresh process must reproduce.

    Args:
        model: A model in float32.
        tokenizer: The tokenizer saved with it; None: there is none.
        records: The records in its folder.

    Raises:
        InputError: The tokenizer's chat template fails.
    """
    rows = _draw_rows(model.to("cpu").config)
    text = None if tokenizer is None else next(filter(None, records.prompts), "The")
    if text is not None and records.task == "instruct":  # the fresh process renders it without limits
        encode_chat(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
    prompt = rows[:1, : rows.shape[1] // 2]
    new_tokens = min(NEW_TOKENS, model.config.max_position_embeddings - prompt.shape[1])
    greedy = None
    if records.task != "classify":
        settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        greedy = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)[0].tolist()
    return Expected(
        rows=rows.tolist(),
        logits=torch.cat([model(input_ids=row, use_cache=False).logits for row in rows.split(1)]),
        greedy=greedy,
        new_tokens=new_tokens,
        text=text,
        ids=None if text is None else tokenizer(text)["input_ids"],
    )


def compute_native(folder: Path, expected: Expected) -> Expected:
    """As `compute_expected`, for the native GPT-2 in a folder; its tokenizer must produce the original ids."""
    records = read_records(folder)
    auto_class = AutoModelForSequenceClassification if records.task == "classify" else AutoModelForCausalLM
    with quiet_bars():
        model = auto_class.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    return dataclasses.replace(compute_expected(model, None, records), text=expected.text, ids=expected.ids)


def check_as_stranger(folder: Path, expected: Expected, native: bool = False, base: Path | None = None):
    """Loads a folder in a fresh process without hfgpt and compares what it computes.

    Args:
        folder: The exact files to be published.
        expected: What they must compute.
        native: Whether they are a native GPT-2, which loads without remote code.
        base: The base model of an adapter, as users will load it, see `hfgpt.hub.staging.stage_base`.

    Raises:
        InputError: The files do not load, compute different results, or contain code that is not hfgpt's.
    """
    for place in filter(None, (folder, base)):
        if fault := find_foreign_code(place, files_in(place)):
            raise InputError(
                f"the files contain code that is not hfgpt's and is not run: {fault}; save the model again"
            )
    records = read_records(folder)
    job = {
        "classify": records.task == "classify",
        "adapter": bool(records.adapter),
        "labels": records.labels,
        "remote_code": not native,
        "threads": torch.get_num_threads(),
        **{name: getattr(expected, name) for name in ("rows", "text", "new_tokens")},
    }
    with tempfile.TemporaryDirectory(prefix="hfgpt-stranger-") as temporary:
        place = Path(temporary)
        loaded = folder.resolve() if base is None else _join(folder, base, place / "adapter")
        local = Place(str(loaded), native=native)
        job["verifying"] = verifying_code(records, local) if records.has_answers else ""
        answer, logits = _ask(job | {"folder": str(loaded), "code": usage_code(records, local)}, place)
    if logits.shape != expected.logits.shape or not torch.equal(logits, expected.logits):
        same_shape = logits.shape == expected.logits.shape
        difference = f" (difference up to {(logits - expected.logits).abs().max():.1e})" if same_shape else ""
        raise InputError(
            f"a fresh Python process without hfgpt computes different logits from these files{difference}: save the "
            "model again"
        )
    if answer.get("ids") != expected.ids:
        raise InputError(
            "a fresh Python process without hfgpt tokenizes a text differently with these files: save the model again"
        )
    if answer.get("greedy") != expected.greedy:
        raise InputError(
            "a fresh Python process without hfgpt generates different text from these files: save the model again"
        )
    if fault := answer.get("fault"):
        raise InputError(
            f"these files do not compute the answers in {KnownAnswers.FILE} ({fault}): restore the files saved with it"
        )


def _join(folder: Path, base: Path, copy: Path) -> Path:
    """Copies an adapter's folder and points it to the local base model, so that no network is needed."""
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path.resolve())
    adapter = json.loads((folder / "adapter_config.json").read_bytes())
    here = {"base_model_name_or_path": str(base.resolve()), "revision": None}
    write_json(copy / "adapter_config.json", adapter | here)
    return copy


def _draw_rows(config) -> torch.Tensor:
    """Random token ids (B, T) without padding, always the same."""
    size, padding = config.vocab_size, config.pad_token_id
    length = max(2, min(LENGTH, config.max_position_embeddings))
    rows = torch.randint(size, (ROWS, length), generator=torch.Generator().manual_seed(0))
    return rows if padding is None else rows.where(rows != padding, (padding + 1) % size)


def _ask(job: dict[str, Any], place: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """Runs the job in a fresh process; returns its answer and its logits."""
    job |= {"logits": str(place / "logits.safetensors"), "answer": str(place / "answer.json")}
    (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = {
        **{name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)},
        "HOME": str(place),
        "PYTHONUSERBASE": site.getuserbase(),  # which Python would otherwise look for in HOME
        "HF_HOME": str(place / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(place / "modules"),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # -P: do not import from the script's own folder, which belongs to hfgpt.
    command = [sys.executable, "-P", str(SCRIPT), str(place / "job.json")]
    # Without a terminal, a question such as whether to trust remote code fails instead of waiting for an answer.
    quiet = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    try:
        done = subprocess.run(command, cwd=place, env=environment, check=False, timeout=TIMEOUT, **quiet)
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"a fresh Python process without hfgpt did not load and run these files within {TIMEOUT // 60} minutes: "
            "publish from a faster or less busy machine"
        ) from error
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise InputError(
            "a fresh Python process without hfgpt cannot load these files "
            f"({said[-1] if said else 'no reason given'}): save the model again"
        )
    return json.loads((place / "answer.json").read_text(encoding="utf-8")), load_file(job["logits"])["logits"]
