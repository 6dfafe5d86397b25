"""Runs a function on many inputs in several processes, which never outlive this one."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import TypeVar

from hfgpt.errors import InputError

Input, Output = TypeVar("Input"), TypeVar("Output")


def run_in_processes(
    function: Callable[[Input], Output], inputs: Sequence[Input], num_proc: int
) -> Iterator[tuple[Input, Output]]:
    """Yields each input with its output, in the order in which they are finished.

    Processes that are stopped, by an error or Ctrl-C, end at once and do not clean up.

    Args:
        function: A function of a module; with its inputs and outputs, it is pickled.
        inputs: The inputs.
        num_proc: Number of processes; 1: this process.

    Raises:
        InputError: A process ended unexpectedly; or as `function`, whose first error stops all processes.
    """
    if num_proc < 2:
        yield from ((value, function(value)) for value in inputs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of running threads
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(num_proc, context, _follow, (reader,))
    try:
        waiting = {pool.submit(function, value): value for value in inputs}
        for finished in as_completed(waiting):
            yield waiting[finished], finished.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise InputError(
            "a process ended unexpectedly, perhaps because memory ran out: lower data.num_proc, and run this again"
        ) from error
    finally:
        writer.close()  # ends processes that are still busy
        pool.shutdown(cancel_futures=True)


def _follow(parent: Connection):
    """Ends this process when the other end of the pipe is closed, which happens also when its process is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, but the first one ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def wait():
        parent.poll(None)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
