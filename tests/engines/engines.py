"""The engines that `make engines` installs."""

import json
import os
import shutil
import subprocess
from pathlib import Path

ENGINES = Path(os.environ.get("HFGPT_ENGINES", Path(__file__).parents[2] / ".engines"))


def run_node(script: str, job: object, folder: Path) -> object:
    """Runs a script of this folder with the installed packages; it reads one JSON file and writes another."""
    given, result = folder / f"{script}.job.json", folder / f"{script}.result.json"
    given.write_text(json.dumps(job))
    # Node looks for packages next to a script.
    copied = shutil.copy(Path(__file__).parent / script, ENGINES)
    done = subprocess.run(["node", copied, str(given), str(result)], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(result.read_text())
