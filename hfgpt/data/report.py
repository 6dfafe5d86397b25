"""The data report: rows read, kept and dropped, with reasons; tokens and blocks of each split.

Every stage adds to one `DataReport`; a run writes it to `data_report.json`, and `hfgpt inspect` prints it.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Self

from hfgpt.records import PLACE, PRIVATE, REQUIRED, Record

# Minimum sizes for meaningful metrics. Losses of single tokens have a standard deviation of about 3 nats, so the mean
# of 1,000 has a standard error of 0.1 nats; an accuracy over 100 rows has one of up to 5 points.
FEWEST = {"tokens": 1000, "rows": 100}


def counted(count: int, plural: str) -> str:
    """`3 rows`, but `1 row` (and `1 batch`, `1 process`)."""
    return f"{count:,} {re.sub('(?<=ch|ss)es$|s$', '', plural) if count == 1 else plural}"


@dataclass
class SplitReport(Record):
    """Sizes of one split; 0 where not measured (before tokenization, for example).

    Args:
        documents: Number of documents, or rows.
        characters: Unicode characters of text.
        bytes: UTF-8 bytes of text.
        tokens: Total number of tokens.
        unknown_tokens: How many of these are the unknown token.
        blocks: Blocks per epoch.
        predicted_tokens: Tokens predicted per epoch: targets that are not ignored, counting overlaps each time.
        tail_tokens: Tokens at the end of the stream that no block predicts.
        labels: Label -> number of rows.
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
class ShareReport(Record):
    """The share of one source in the training blocks of a mixture.

    Args:
        source: Its name, without a path.
        tokens: Tokens of its training text.
        weight: Its share of the blocks, from 0 to 1.
        blocks: Its blocks per epoch.
        repeats: How often each of them occurs in an epoch, on average.
    """

    source: str = ""
    tokens: int = 0
    weight: float = 1.0
    blocks: int = 0
    repeats: float = 1.0


@dataclass
class DataReport(Record):
    """What was read from a source and what was done with it.

    Args:
        source: Source of the data: a path, a Hub id, `synthetic:stories`, ...
        sha256: SHA-256 of the content. One file: of its bytes, as `sha256sum` prints it; several: of the output of
            `sha256sum` in their folder; Hub and synthetic data: of the texts read; prepared data: of the output of
            `sha256sum` for its token files.
        rows_read: Rows read from the source.
        rows_kept: Rows kept as documents.
        dropped: Reason -> rows dropped.
        truncated: Rows truncated to the maximum length.
        duplicated: Kept rows whose text is a duplicate of an earlier row; counted, not removed.
        kept_together: Kept rows that share their text with other rows, and therefore a split.
        near_duplicates: Test rows that are near-duplicates of a training row; counted, not removed.
        near_duplicate_examples: Such pairs, the test row first.
        leaked: Validation or test rows that are also in the training split.
        split_by: How validation was split off: `given` (by the source), `documents` (whole documents), `rows`, `order`
            (the first rows are for training), `position` (one long document was cut; no end-of-text token is added) or
            "" (not split).
        unused_files: Files of the folder that are not in any split.
        splits: Split name -> sizes.
        mixture: Number of a source, from 1 -> its share of the training blocks; empty: there is one source.
        warnings: Anything that may surprise the author of the recipe, one line each.
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
    mixture: dict[str, ShareReport] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def drop(self, reason: str, rows: int = 1) -> None:
        """Counts dropped rows.

        Args:
            reason: The reason in a few words, such as `empty`.
            rows: Number of rows.
        """
        self.dropped[reason] = self.dropped.get(reason, 0) + rows

    @property
    def reasons(self) -> str:
        """Rows read and dropped, for error messages: `3 rows read; dropped: 2 empty`."""
        dropped = ", ".join(f"{rows} {reason}" for reason, rows in self.dropped.items()) or "none"
        return f"{counted(self.rows_read, 'rows')} read; dropped: {dropped}"

    def split(self, name: str) -> SplitReport:
        """The sizes of a split, created on first use.

        Args:
            name: Name of the split, such as `train`.

        Returns:
            The split's report, to be updated in place.
        """
        return self.splits.setdefault(name, SplitReport())

    def merge(self, names: Sequence[str], name: str) -> Self:
        """A copy in which splits are one split.

        Args:
            names: The splits.
            name: Name of the new split; the copy has no other.
        """
        merged = SplitReport()
        for size in set(vars(merged)) - {"labels"}:
            setattr(merged, size, sum(getattr(self.split(split), size) for split in names))
        return dataclasses.replace(self, splits={name: merged})

    def warn_if_small(self, name: str, unit: str) -> None:
        """Adds a warning if a split is too small for reliable metrics.

        Args:
            name: Name of the split.
            unit: What metrics are computed over: `tokens` (predicted ones) or `rows`.
        """
        split = self.split(name)
        count = split.predicted_tokens if unit == "tokens" else split.documents
        if count < FEWEST[unit]:
            self.warnings.append(
                f"the {name} split has only {counted(count, unit)}, and metrics on fewer than {FEWEST[unit]:,} are "
                f"unreliable: add data, or raise data.{name}_fraction if hfgpt makes the split"
            )

    def summary(self) -> str:
        """A few lines for the terminal; zeros are left out."""
        lines = [f"{self.source}: {counted(self.rows_read, 'rows')} read, {self.rows_kept:,} kept"]
        lines += [f"  dropped {rows:,}: {reason}" for reason, rows in sorted(self.dropped.items())]
        notes = {
            "truncated": self.truncated,
            "duplicates (kept)": self.duplicated,
            "rows whose text occurs more than once (all in one split)": self.kept_together,
            "test rows that are near-duplicates of a training row": self.near_duplicates,
            "validation or test rows also in train": self.leaked,
            "files not in any split": len(self.unused_files),
        }
        lines += [f"  {what}: {count:,}" for what, count in notes.items() if count]
        for name, split in self.splits.items():
            counts = dataclasses.asdict(split)
            labels = counts.pop("labels").items()
            # Only the texts of pre-training are documents; labeled texts and conversations are rows.
            rows = "documents" if split.characters and not labels else "rows"
            counts = {rows: counts.pop("documents"), **counts}
            tail = counts.pop("tail_tokens")
            sizes = [counted(size, what.replace("_", " ")) for what, size in counts.items() if size]
            sizes += [f"{counted(tail, 'tokens')} left over (dropped)"] if tail else []
            sizes += [f"{size:,} {label}" for label, size in labels if size]
            lines.append(f"  {name}: {', '.join(sizes) or 'empty'}")
        for name, share in self.mixture.items():
            lines.append(
                f"  source {name}, {share.source}: {share.weight:.1%} of the training blocks, {share.blocks:,} per "
                f"epoch from {counted(share.tokens, 'tokens')}, each {share.repeats:.2f} times"
            )
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)
