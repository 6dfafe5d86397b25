"""Checkpoints of a run: verify them, choose one to resume from, and remove old ones."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hfgpt.errors import InputError
from hfgpt.saving import CHECKSUMS_FILE, hash_file, read_checksums

# Without one of these, a resumed run would continue with a new optimizer, schedule or random state.
STATE = ("optimizer", "scheduler", "rng_state", "trainer_state")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, complete or not, sorted by step."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run folder; None if there is none."""
    complete = [path for path in list_checkpoints(output_dir) if read_checksums(path)]
    return complete[-1] if complete else None


def choose_checkpoint(output_dir: str | Path, console: Console) -> Path | None:
    """The newest checkpoint that a run can resume from, after verifying the checksums of all its files.

    Args:
        output_dir: The run folder.
        console: Reports damaged checkpoints.

    Returns:
        The checkpoint; None if there is no complete one.

    Raises:
        InputError: All complete checkpoints are damaged, or the newest one was saved without checksums.
    """
    damage = {}
    for checkpoint in reversed(list_checkpoints(output_dir)):
        if not (checkpoint / CHECKSUMS_FILE).exists() and (checkpoint / "trainer_state.json").exists():
            raise InputError(
                f"'{checkpoint}' has no {CHECKSUMS_FILE} (saved by an earlier version, or copied incompletely): "
                "remove it to resume from the previous checkpoint, or start a new run"
            )
        if not read_checksums(checkpoint):
            console.print(f"{checkpoint} is incomplete: the run stopped while saving it", markup=False)
            continue
        fault = find_damage(checkpoint)
        if fault is None:
            return checkpoint
        damage[checkpoint] = fault
        console.print(f"{checkpoint} is damaged: {fault}; trying the previous one", highlight=False, markup=False)
    if damage:
        named = "; ".join(f"{checkpoint.name}: {fault}" for checkpoint, fault in damage.items())
        raise InputError(
            f"cannot resume from any checkpoint in '{output_dir}' ({named}): restore one, or start a new run"
        )
    return None


def find_damage(checkpoint: Path) -> str | None:
    """The reason why a complete checkpoint cannot be resumed from; None if it can."""
    checksums = read_checksums(checkpoint)
    for name, checksum in checksums.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if hash_file(checkpoint / name) != checksum:
            return f"{name} does not match its checksum"
    for state in STATE:
        if not any(name.startswith(state) for name in checksums):
            return f"it was saved without its {state} (training.save_only_model)"
    return None


def remove_later_checkpoints(output_dir: str | Path, step: int):
    """Removes checkpoints after the step to resume from: incomplete or damaged ones, which will be saved again."""
    for checkpoint in list_checkpoints(output_dir):
        if step_of(checkpoint) > step:
            remove_checkpoint(checkpoint)


def remove_old_checkpoints(
    output_dir: str | Path, limit: int | None, needed: Sequence[str | Path] = (), keep_newest: bool = True
):
    """Removes the oldest checkpoints beyond a limit, like Trainer, but ordered by step and each one atomically.

    Args:
        output_dir: The run folder.
        limit: Number of checkpoints to keep; None: all.
        needed: Checkpoints that are always kept, such as that of the best model.
        keep_newest: Whether to keep the newest in addition to these if the limit is 1; a finished run does not need
            it.
    """
    checkpoints = list_checkpoints(output_dir)
    if limit is None or not checkpoints:
        return
    kept = {Path(checkpoint).name for checkpoint in needed}
    if keep_newest or limit > 1 or not kept:
        kept.add(checkpoints[-1].name)
    others = [checkpoint for checkpoint in checkpoints if checkpoint.name not in kept]
    for checkpoint in others[: max(len(checkpoints) - max(limit, len(kept)), 0)]:
        remove_checkpoint(checkpoint)


def remove_checkpoint(checkpoint: Path):
    """Removes a checkpoint atomically: a killed process leaves a staging folder, not a damaged checkpoint."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".staging-{checkpoint.name}")), ignore_errors=True)
