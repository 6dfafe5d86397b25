"""`hfgpt classify`: predicts the class of texts from the command line, a file or standard input."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hfgpt.errors import InputError
from hfgpt.evaluation.classification import Prediction, predict
from hfgpt.models import find_model, load_classifier


def classify(path: str, texts: Sequence[str], file: Path | None) -> list[Prediction]:
    """Classifies texts with a saved classifier.

    Args:
        path: A folder or Hub id.
        texts: Texts from the command line; without these and a file, standard input is read unless it is a terminal.
        file: A file with one text per line; `-` is standard input.

    Raises:
        InputError: There is no classifier or no text, or a text is empty.
    """
    if not texts and file is None and sys.stdin and not sys.stdin.isatty():
        file = Path("-")
    texts = read_texts(texts, file)
    model, tokenizer, _ = load_classifier(find_model(path), changed_weights="warn")
    return predict(model, tokenizer, texts)


def read_texts(texts: Sequence[str], file: Path | None) -> list[str]:
    """The texts from the command line, then the lines of a file; `-` is standard input.

    Raises:
        InputError: There is no text, a text is empty, or the file is not UTF-8.
    """
    named = [(f"text {number}", text) for number, text in enumerate(texts, start=1)]
    if file is not None:
        place = "standard input" if file == Path("-") else file
        content = sys.stdin.buffer.read() if file == Path("-") else file.read_bytes()
        try:
            lines = content.decode().replace("\r\n", "\n").rstrip("\n").split("\n") if content.strip() else []
        except UnicodeDecodeError as error:
            raise InputError(f"{place} is not valid UTF-8 at byte {error.start}: convert it to UTF-8") from error
        named += [(f"{place}, line {number}", line) for number, line in enumerate(lines, start=1)]
    if not named:
        raise InputError("no text to classify: pass texts, or a file with one text per line (--file)")
    for place, text in named:
        if not text.strip():
            raise InputError(f"{place} is empty: leave it out")
    return [text for _, text in named]
