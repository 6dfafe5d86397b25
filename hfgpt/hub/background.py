"""Checkpoints on their way to the Hub while training goes on.

Trainer's own pushes leave out the Python files of the model, hide errors, and read files that the next save writes
over. These send a copy, one after another, with the code beside the weights; what fails is told at the end.
"""

import contextlib
import queue
import shutil
import tempfile
import threading
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from rich.console import Console
from transformers import TrainerCallback

from hfgpt.errors import InputError
from hfgpt.hub import HubArguments
from hfgpt.hub.card import describe_architecture
from hfgpt.hub.contents import find_secrets, sort_contents
from hfgpt.hub.folder import read_records
from hfgpt.hub.staging import files_in, stage
from hfgpt.hub.upload import Target, upload
from hfgpt.hub.usage import Place


class CheckpointPushes(TrainerCallback):
    """Sends each checkpoint as a commit of its own; where they come faster than the network, only the newest waits.

    Args:
        hub: Where to.
        console: Where to say that a push has failed; training goes on.
    """

    def __init__(self, hub: HubArguments, console: Console):
        self.hub, self.console = hub, console
        self.failures: dict[int, str] = {}  # step -> why
        self.copies = tempfile.TemporaryDirectory(prefix="hfgpt-push-", ignore_cleanup_errors=True)  # gone at exit
        # One place: a newer checkpoint takes that of one which still waits.
        self.waiting: queue.Queue[tuple[int, Path] | None] = queue.Queue(maxsize=1)
        # A daemon: where training is stopped, nobody waits for the network; a commit is whole or not there.
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def on_save(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        copy = Path(self.copies.name) / checkpoint.name
        try:
            records = read_records(checkpoint)
            records.run.architecture = describe_architecture(model)
            copy.mkdir()
            going = sort_contents(checkpoint).going
            stage(checkpoint, copy / "links", going, records, self.hub, Place(self.hub.repo_id))
            # The checkpoint itself may be rotated away before it is sent.
            shutil.copytree(copy / "links", copy / "files")
        # Whatever it is, here and below: training is not stopped by it, and it is told at the end.
        except Exception as error:
            shutil.rmtree(copy, ignore_errors=True)
            self._fail(state.global_step, error)
            return
        self._drop_waiting()
        self.waiting.put((state.global_step, copy))

    def stop(self):
        """Takes no more, and drops what waits: training has ended and can be published, or resumed."""
        self._drop_waiting()
        self.waiting.put(None)

    def finish(self) -> dict[int, str]:
        """Waits, after `stop`, for what is on its way; returns step -> why its push failed."""
        self.thread.join()
        return self.failures

    def _drop_waiting(self):
        with contextlib.suppress(queue.Empty):
            _, copy = self.waiting.get_nowait()
            shutil.rmtree(copy, ignore_errors=True)

    def _work(self):
        while (item := self.waiting.get()) is not None:
            step, copy = item
            try:
                self._push(step, copy / "files")
            finally:
                shutil.rmtree(copy, ignore_errors=True)

    def _push(self, step: int, folder: Path):
        names = files_in(folder)
        disable_progress_bars()  # they would tear training's
        try:
            if secrets := find_secrets(folder, names):
                raise InputError("; ".join(secrets))
            upload(folder, names, Target(self.hub.repo_id, self.hub.private, message=f"Step {step}"))
        except Exception as error:
            self._fail(step, error)
        finally:
            enable_progress_bars()

    def _fail(self, step: int, error: Exception):
        self.failures[step] = str(error)
        self.console.print(f"checkpoint {step} was not pushed: {error}", highlight=False, markup=False)
