"""The engines that `make engines` installs."""

import json
import os
import shutil
import subprocess
from pathlib import Path

ENGINES = Path(os.environ.get("HFGPT_ENGINES", Path(__file__).parents[2] / ".engines"))

# Spaces, contractions, numbers, scripts, emoji, combining marks, rare spaces, special tokens, and long words.
TEXTS = [
    "Once upon a time, there was a little fox.",
    " leading and trailing spaces  ",
    "two  spaces,   three,    four\n\nlines\r\n\ttabs\t\t \n \n",
    "don't, I'll, we've, they'RE, it's 'quoted' o'clock",
    "12345 3.14 1e-9 x² ½ ④ Ⅷ ٣٤",
    "naïve café, Straße, ñandú, Ωμέγα, Ünïcödé",
    "Привет, мир! 你好,世界。こんにちは 안녕하세요 สวัสดี नमस्ते مرحبا שלום",
    "😀👍🏽👩‍👩‍👧‍👦🇺🇳❤️",
    "e\u0301 a\u0308\u0323 \u0301alone z\u0335\u0336",
    "\u00a0\u2003\u2009\u200b\u200d\u2028\u3000\ufeff\u0085\x0b\x0c\x1c\x01",
    "<|endoftext|>Once<|endoftext|><|pad|> <|unk|><|endoftext",
    "### User:\nHello\n\n### Assistant:\n",
    "def f(x):\n    return x**2  # $%^&*()_+{}|:<>?[];',./`~",
    "a" * 300,
    "",
]


def run_node(script: str, job: object, folder: Path) -> object:
    """Runs a script of this folder with the installed packages."""
    # Node looks for packages next to a script.
    return run_jobs(["node", shutil.copy(Path(__file__).parent / script, ENGINES)], job, folder)


def run_jobs(command: list[str], job: object, folder: Path, environment: dict[str, str] | None = None) -> object:
    """Runs a program that reads one JSON file and writes another."""
    given, result = folder / "job.json", folder / "result.json"
    given.write_text(json.dumps(job))
    done = subprocess.run([*command, str(given), str(result)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(result.read_text())


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def known_part(tokenizer, text: str) -> str:
    """The characters of a text that a character vocabulary has; other engines do not have its token for others."""
    known = tokenizer.get_vocab()
    return "".join(letter for letter in text if letter in known)
