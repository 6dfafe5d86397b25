"""`hfgpt merge`: merges an adapter into its base model, and compares the logits."""

import shutil
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from hfgpt.adapters import merge_adapter
from hfgpt.data.report import DataReport
from hfgpt.errors import InputError
from hfgpt.hub import HubArguments
from hfgpt.hub.card import describe_architecture, write_card
from hfgpt.hub.folder import explained_records, read_records
from hfgpt.hub.usage import Place
from hfgpt.known_answers import record_answers
from hfgpt.models import TRAINABLE_TYPES, find_model, hash_weights, quiet_bars
from hfgpt.output import stderr_console
from hfgpt.records import ADAPTER, RECIPE_FILE, MergeRecord, is_checkpoint, is_run
from hfgpt.saving import appearing_folder, check_free

TOLERANCE = 1e-5


@torch.no_grad()
def merge(path: str, out: Path, tolerance: float = TOLERANCE, console: Console | None = None) -> MergeRecord:
    """Merges an adapter into its base model in float32, and compares the logits before and after.

    Args:
        path: The adapter's folder or Hub id.
        out: Output folder (must not exist).
        tolerance: Largest allowed difference of the logits, relative to the largest logit if that is above 1.
        console: Where to print the report; None: standard error.

    Raises:
        InputError: There is no adapter or no base model, they do not match, or the logits differ; nothing is written.
    """
    console = console or stderr_console()
    saved = find_model(path)
    if saved.base is None:
        raise InputError(f"'{path}' is not an adapter, locally or on the Hub: pass the run folder of an adapter")
    kind = saved.config.model_type
    if kind not in TRAINABLE_TYPES:
        raise InputError(
            f"'{path}' is an adapter for a model of type {kind}; only those for hfgpt and gpt2 can be merged"
        )
    if not tolerance >= 0:
        raise InputError(f"--tolerance is {tolerance}; it must be at least 0")
    out = check_free(out)
    tokenizer = saved.load_tokenizer()
    saved.base.check_same_tokens(tokenizer)
    adapted = saved.load()
    rows = _rows(adapted.config)
    apart = adapted(rows, use_cache=False).logits
    merged = merge_adapter(adapted, path)
    difference = (merged(rows, use_cache=False).logits - apart).abs().max().item()
    report = MergeRecord(
        adapter=path,
        base_model=saved.base.path,
        difference=difference,
        largest_logit=apart.abs().max().item(),
        tolerance=tolerance,
        tokens=rows.numel(),
    ).stamp()
    console.print(
        f"largest logit difference {report.difference:.1e} on {report.tokens} random tokens (largest logit "
        f"{report.largest_logit:.2f}, tolerance {report.limit:.1e})",
        highlight=False,
    )
    if not report.difference <= report.limit:  # also rejects NaN
        raise InputError(
            f"the merged model's logits differ by {report.difference:.1e}, more than the tolerance of "
            f"{report.limit:.1e}, so nothing was written: use the adapter without merging it, or raise --tolerance"
        )
    with appearing_folder(out) as staging, quiet_bars():
        merged.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        report.weights_sha256 = hash_weights(staging)
        report.write(staging)
        record_answers(merged, tokenizer, report.weights_sha256).write(staging)
        _write_card(Path(path), merged, staging, out)
    console.print(f"saved to {out}", highlight=False)
    return report


def _write_card(adapter: Path, merged: PreTrainedModel, staging: Path, out: Path):
    with explained_records(adapter):
        if adapter.is_dir():
            _keep_records(adapter, staging)
        records = read_records(staging)
        records.run.architecture = describe_architecture(merged)
        write_card(staging, records, HubArguments(), Place.of_folder(out))


def _keep_records(adapter: Path, staging: Path):
    """Copies the records of the adapter's training, but not its metrics, which are of other weights."""
    run_folder = adapter.parent if is_checkpoint(adapter) else adapter
    if not is_run(run_folder):
        return
    for name in (RECIPE_FILE, DataReport.FILE):
        shutil.copyfile(run_folder / name, staging / name)
    read_records(adapter).run.without(ADAPTER).write(staging)


def _rows(config) -> torch.Tensor:
    """Random token ids (2, T) without padding, from a fixed seed."""
    length = min(256, config.max_position_embeddings)
    size, padding = config.vocab_size, config.pad_token_id
    rows = torch.randint(size, (2, length), generator=torch.Generator().manual_seed(0))
    return rows if padding is None else rows.where(rows != padding, (padding + 1) % size)
