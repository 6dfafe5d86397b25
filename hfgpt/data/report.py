"""What became of the data: rows read, kept, dropped and why; tokens and blocks of each split.

Every stage counts into one `DataReport`; `data_report.json` of a run and `hfgpt inspect` are this object, written out.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hfgpt.records import PLACE, PRIVATE, REQUIRED, Record

# What a split needs at least for its figures to say something. Losses of single tokens spread by about 3 nats, so the
# standard error of the mean of 1,000 is 0.1 nats; that of a share of 100 rows is up to 5 points.
FEWEST = {"tokens": 1000, "rows": 100}


def counted(count: int, plural: str) -> str:
    """`3 rows`, but `1 row`."""
    return f"{count:,} {plural.removesuffix('s') if count == 1 else plural}"


@dataclass
class SplitReport(Record):
    """Sizes of one split; what was not measured (the split was never tokenized, say) stays 0.

    Args:
        documents: Documents, or rows.
        characters: Unicode characters of their text.
        bytes: Bytes of their text in UTF-8.
        tokens: Tokens of the whole stream.
        unknown_tokens: Those among them that stand for text the tokenizer cannot express.
        blocks: Blocks an epoch goes through.
        predicted_tokens: Tokens an epoch predicts: the targets that are not ignored, overlaps counted each time.
        tail_tokens: Tokens at the end of the stream that no block predicts.
        labels: Label -> rows that have it.
    """

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    blocks: int = 0
    predicted_tokens: int = 0
    tail_tokens: int = 0
    labels: dict[str, int] = field(default_factory=dict)


@dataclass
class DataReport(Record):
    """What was read from a source and what was done with it.

    Args:
        source: Where the data comes from: the path, the Hub id, `synthetic:stories` or the like.
        sha256: Of the content. One file: of its bytes, as `sha256sum` prints it; several: of the lines `sha256sum`
            prints for them in their folder; Hub and synthetic data: of the texts read.
        rows_read: Rows read from the source.
        rows_kept: Rows that became documents.
        dropped: Reason -> rows that did not.
        truncated: Rows that lost tokens because they were too long.
        duplicated: Kept rows whose text was already there; they are counted, not removed.
        kept_together: Kept rows whose text other rows have too: all rows of a text are on one side of the division.
        near_duplicates: Test rows that are almost a training row; they are counted, not removed.
        near_duplicate_examples: Such pairs, the test row first.
        leaked: Documents of a given validation split that are also in the training split; 0 where hfgpt divides.
        split_by: How validation was separated: `given` (by the source), `documents` (whole documents), `rows`, `order`
            (the first rows train), `position` (one long document was cut: its parts do not end with an end of
            document) or "" (not split).
        unused_files: Files of the folder that belong to neither split.
        splits: Split name -> its sizes.
        warnings: What is otherwise than a reader of the recipe would expect, a line each.
    """

    FILE: ClassVar[str] = "data_report.json"

    source: Annotated[str, PLACE] = ""
    sha256: Annotated[str, REQUIRED] = ""
    rows_read: Annotated[int, REQUIRED] = 0
    rows_kept: Annotated[int, REQUIRED] = 0
    dropped: Annotated[dict[str, int], REQUIRED] = field(default_factory=dict)
    truncated: int = 0
    duplicated: int = 0
    kept_together: int = 0
    near_duplicates: int = 0
    near_duplicate_examples: Annotated[list[list[str]], PRIVATE] = field(default_factory=list)
    leaked: int = 0
    split_by: str = ""
    unused_files: Annotated[list[str], PRIVATE] = field(default_factory=list)
    splits: Annotated[dict[str, SplitReport], REQUIRED] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def drop(self, reason: str, rows: int = 1) -> None:
        """Counts rows that are left out.

        Args:
            reason: Why, in a few words, such as `empty`.
            rows: How many.
        """
        self.dropped[reason] = self.dropped.get(reason, 0) + rows

    @property
    def reasons(self) -> str:
        """What was read and left out, for a message: `3 rows read; left out: 2 empty`."""
        left_out = ", ".join(f"{rows} {reason}" for reason, rows in self.dropped.items()) or "none"
        return f"{counted(self.rows_read, 'rows')} read; left out: {left_out}"

    def split(self, name: str) -> SplitReport:
        """The sizes of a split, made on first use.

        Args:
            name: Such as `train`.

        Returns:
            The split's report, to be filled in place.
        """
        return self.splits.setdefault(name, SplitReport())

    def warn_if_small(self, name: str, unit: str) -> None:
        """Warns of a split too small to be measured.

        Args:
            name: Of the split.
            unit: What it is measured over: `tokens`, those that are predicted, or `rows`.
        """
        split = self.split(name)
        count = split.predicted_tokens if unit == "tokens" else split.documents
        if count < FEWEST[unit]:
            self.warnings.append(
                f"the {name} split has {counted(count, unit)} to measure on; the figures of fewer than "
                f"{FEWEST[unit]:,} say little: add data, or raise data.{name}_fraction where it divides them"
            )

    def summary(self) -> str:
        """A few lines for the terminal; zeros are left out."""
        lines = [f"{self.source}: {counted(self.rows_read, 'rows')} read, {self.rows_kept:,} kept"]
        lines += [f"  dropped {rows:,}: {reason}" for reason, rows in sorted(self.dropped.items())]
        notes = {
            "truncated": self.truncated,
            "duplicated (kept)": self.duplicated,
            "rows that share their text with others (kept on one side)": self.kept_together,
            "test rows that are almost a training row": self.near_duplicates,
            "rows of validation or test that are also in train": self.leaked,
            "files in neither split": len(self.unused_files),
        }
        lines += [f"  {what}: {count:,}" for what, count in notes.items() if count]
        for name, split in self.splits.items():
            counts = dataclasses.asdict(split)
            labels = counts.pop("labels").items()
            sizes = [counted(size, what.replace("_", " ")) for what, size in counts.items() if size]
            sizes += [f"{size:,} {label}" for label, size in labels if size]
            lines.append(f"  {name}: {', '.join(sizes) or 'empty'}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)
