"""Uploads checkpoints to the Hub in the background while training continues.

Trainer's own pushes omit the model's Python files, hide errors, and read files that the next save overwrites. These
upload a copy of each checkpoint with its code, one after another; failures are reported at the end of the run.
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
    """Uploads each checkpoint in its own commit; if the uploads are slower than training, only the newest one waits.

    Args:
        hub: Where to publish.
        console: Where to report a failed upload; training continues.
    """

    def __init__(self, hub: HubArguments, console: Console):
        self.hub, self.console = hub, console
        self.failures: dict[int, str] = {}  # step -> reason
        self.copies = tempfile.TemporaryDirectory(prefix="hfgpt-push-", ignore_cleanup_errors=True)  # removed at exit
        # One slot: a newer checkpoint replaces one that is still waiting.
        self.waiting: queue.Queue[tuple[int, Path] | None] = queue.Queue(maxsize=1)
        # A daemon thread: an interrupted training does not wait for the network, and commits are atomic.
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
            # Trainer may delete the checkpoint before it is uploaded.
            shutil.copytree(copy / "links", copy / "files")
        # Here and below: no error stops the training, and each is reported at the end.
        except Exception as error:
            shutil.rmtree(copy, ignore_errors=True)
            self._fail(state.global_step, error)
            return
        self._drop_waiting()
        self.waiting.put((state.global_step, copy))

    def stop(self):
        """Accepts no more checkpoints and drops the waiting one, after training has ended."""
        self._drop_waiting()
        self.waiting.put(None)

    def finish(self) -> dict[int, str]:
        """Waits for the current upload, after `stop`; returns step -> reason why its upload failed."""
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
        disable_progress_bars()  # they would interfere with that of training
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
        self.console.print(f"checkpoint {step} was not uploaded: {error}", highlight=False, markup=False)
