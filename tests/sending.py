"""What a process that is to be killed does: a module of its own, so that it imports nothing else."""

from pathlib import Path

from hfgpt.hub.upload import Target, upload


def send(folder: Path):
    upload(folder, sorted(path.name for path in folder.iterdir()), Target("me/model"))
