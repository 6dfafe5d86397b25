"""Checkpoints of a run: which of them are complete and undamaged, which one to resume from, which to keep."""

import shutil
from pathlib import Path

from rich.console import Console

from hfgpt.errors import InputError
from hfgpt.saving import CHECKSUMS_FILE, hash_file, read_checksums

# A run resumed without one of these would go on with a fresh optimizer, schedule or random state.
STATE = ("optimizer", "scheduler", "rng_state", "trainer_state")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders of a run's checkpoints, complete or not, in the order of their steps."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was saved after."""
    return int(checkpoint.name.rpartition("-")[2])


def find_last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run folder; None if there is none."""
    complete = [path for path in list_checkpoints(output_dir) if read_checksums(path)]
    return complete[-1] if complete else None


def choose_checkpoint(output_dir: str | Path, console: Console) -> Path | None:
    """The newest checkpoint that a run can resume from, every file of it compared with its checksum.

    Args:
        output_dir: The run folder.
        console: Where to name the checkpoints that are damaged.

    Returns:
        The checkpoint; None if none was ever completed.

    Raises:
        InputError: There are checkpoints, and all are damaged; or the newest was saved without checksums.
    """
    damage = {}
    for checkpoint in reversed(list_checkpoints(output_dir)):
        if not (checkpoint / CHECKSUMS_FILE).exists() and (checkpoint / "trainer_state.json").exists():
            raise InputError(
                f"'{checkpoint}' has no {CHECKSUMS_FILE}: saved by an earlier version, or not copied completely; "
                "move it away to resume from the checkpoint before it, or start another run"
            )
        if not read_checksums(checkpoint):
            console.print(f"{checkpoint} is incomplete: the run was stopped while saving it", markup=False)
            continue
        fault = find_damage(checkpoint)
        if fault is None:
            return checkpoint
        damage[checkpoint] = fault
        console.print(f"{checkpoint} is damaged: {fault}; trying the one before it", highlight=False, markup=False)
    if damage:
        named = "; ".join(f"{checkpoint.name}: {fault}" for checkpoint, fault in damage.items())
        raise InputError(
            f"no checkpoint in '{output_dir}' can be resumed from ({named}): restore one, or start another run"
        )
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Why a complete checkpoint cannot be resumed from; None: it can."""
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
    """Removes checkpoints past the step that a run resumes from: incomplete or damaged ones, which it saves again."""
    for checkpoint in list_checkpoints(output_dir):
        if step_of(checkpoint) > step:
            remove_checkpoint(checkpoint)


def remove_old_checkpoints(output_dir: str | Path, limit: int | None, best: str | None, keep_newest: bool = True):
    """Removes the oldest checkpoints past a limit, as Trainer does, but by their steps and each at once.

    Args:
        output_dir: The run folder.
        limit: How many to keep; None: all.
        best: The checkpoint of the best model, which is kept; None: none is.
        keep_newest: Whether the newest is kept beside the best if the limit is 1: a finished run needs it no more.
    """
    checkpoints = list_checkpoints(output_dir)
    if limit is None or not checkpoints:
        return
    kept = {Path(best).name} if best else set()
    if keep_newest or limit > 1 or not best:
        kept.add(checkpoints[-1].name)
    others = [checkpoint for checkpoint in checkpoints if checkpoint.name not in kept]
    for checkpoint in others[: max(len(checkpoints) - max(limit, len(kept)), 0)]:
        remove_checkpoint(checkpoint)


def remove_checkpoint(checkpoint: Path):
    """Removes a checkpoint at once: what a process killed meanwhile leaves of it is a leftover, and not damaged."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".staging-{checkpoint.name}")), ignore_errors=True)
