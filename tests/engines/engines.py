"""The engines that `make engines` installs."""

import json
import os
import subprocess
from pathlib import Path

ENGINES = Path(os.environ.get("HFGPT_ENGINES", Path(__file__).parents[2] / ".engines"))


def run_node(script: str, job: object, folder: Path) -> object:
    """Runs a script of this folder with the installed packages; it reads one JSON file and writes another."""
    given, result = folder / f"{script}.job.json", folder / f"{script}.result.json"
    given.write_text(json.dumps(job))
    command = ["node", "--input-type=module", "-", str(given), str(result)]
    source = (Path(__file__).parent / script).read_text()
    done = subprocess.run(command, input=source, cwd=ENGINES, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(result.read_text())
