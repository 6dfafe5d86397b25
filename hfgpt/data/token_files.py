"""Token files that datatrove's `DocumentTokenizer` wrote -> token streams, memory-mapped.

Each NAME.ds has the ids as uint16 or uint32, NAME.ds.index the end of each document as uint64, and NAME.ds.metadata
the name of the tokenizer and the bytes per id (datatrove, pipeline/tokens/tokenizer.py).
"""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from hfgpt.data.streams import TokenStream
from hfgpt.errors import InputError


class TokenFiles(TokenStream):
    """The documents of token files, or some of each, as one stream.

    Args:
        pieces: File, and its first and last document, exclusive.
    """

    def __init__(self, pieces: Sequence[tuple[Path, int, int]]):
        self._places = pieces
        super().__init__(datasets.Dataset(pa.concat_tables([_open(*piece) for piece in pieces])))

    def __reduce__(self) -> tuple:
        return TokenFiles, (self._places,)  # a worker process maps the files again


def _open(path: Path, first: int, last: int) -> pa.Table:
    ends = np.memmap(f"{path}.index", "<u8", "r")
    tokens = np.memmap(path, f"<u{int(_token_width(path))}", "r")
    start = int(ends[first - 1]) if first else 0
    offsets = np.concatenate([[0], ends[first:last].astype(np.int64) - start])
    values = pa.array(tokens[start : start + offsets[-1]])
    return pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), values)})


def open_token_files(files: list[Path], fraction: float) -> dict[str, TokenFiles]:
    """Opens token files; the last documents of each are for validation, since datatrove shuffles within files.

    Args:
        files: From `find_token_files`.
        fraction: Fraction of the documents of each file for validation.

    Returns:
        Splits `train` and `validation`.

    Raises:
        InputError: A file has no index, is damaged, or has too few documents.
    """
    files = [file for file in files if file.stat().st_size]  # tasks without documents leave empty files
    splits: dict[str, list[tuple[Path, int, int]]] = {"train": [], "validation": []}
    for file in files:
        documents = _count_documents(file)
        held_out = round(documents * fraction) or int(documents > 1)
        cut = documents - held_out
        for split, first, last in (("train", 0, cut), ("validation", cut, documents)):
            if first < last:
                splits[split].append((file, first, last))
    for split, pieces in splits.items():
        if not pieces:
            raise InputError(f"the token files of data.path have too few documents for a {split} split: add text")
    for what, values in (("bytes per id", map(_token_width, files)), ("tokenizers", map(named_tokenizer, files))):
        if len(different := sorted(set(values))) > 1:
            raise InputError(f"the token files of data.path have different {what}: {', '.join(map(str, different))}")
    return {split: TokenFiles(pieces) for split, pieces in splits.items()}


def _count_documents(file: Path) -> int:
    index = Path(f"{file}.index")
    if not index.is_file():
        raise InputError(f"{file} does not have its index {index.name}: tokenize with save_index=True")
    size = index.stat().st_size
    if not size or size % 8:
        raise InputError(f"{index} is empty or damaged: tokenize the text again")
    ends = np.memmap(index, "<u8", "r")
    widths = (2, 4) if (width := _read_metadata(file)[1]) is None else (width,)
    if not ends[-1] or _token_width(file) not in widths or np.any(ends[1:] < ends[:-1]):
        raise InputError(
            f"{file} has {file.stat().st_size:,} bytes, but its index says {int(ends[-1]):,} tokens of "
            f"{' or '.join(map(str, widths))} bytes: tokenize the text again"
        )
    return len(ends)


def _token_width(file: Path) -> float:
    """Bytes per id, from the sizes of a token file and its index."""
    return file.stat().st_size / int(np.memmap(f"{file}.index", "<u8", "r")[-1])


def named_tokenizer(file: Path) -> str:
    """The name of the tokenizer of a token file; "" if it is unknown."""
    return _read_metadata(file)[0]


def _read_metadata(file: Path) -> tuple[str, int | None]:
    """The name of the tokenizer, and the bytes per id."""
    metadata = Path(f"{file}.metadata")
    lines = metadata.read_text(encoding="utf-8").splitlines() if metadata.is_file() else []
    name, _, width = (lines or [""])[0].rpartition("|")
    return name, int(width) if width in ("2", "4") else None
