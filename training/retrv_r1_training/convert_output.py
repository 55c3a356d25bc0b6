"""Where a conversion writes: files that appear in one step at its end, and beside them the list of what was left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from retrv_r1_retriever.errors import InputError, OptionsError, explain
from retrv_r1_retriever.evaluation.offsets import MAX_BAD_SHARE, Skipped
from retrv_r1_training.checks import check_ranges
from retrv_r1_training.sources import SourceRow

_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Target:
    """name, dataset_id: how the data set is called in files and ids; M-BEIR's own ids are 0 to 9
    max_bad_share: of the rows of a table; above it nothing is written
    """

    out: Path
    name: str
    dataset_id: int = 100
    overwrite: bool = False
    max_bad_share: float = MAX_BAD_SHARE

    def __post_init__(self) -> None:
        check_name("--name", self.name)
        check_ranges(self, {"0 or more": "dataset_id", "a share, 0 to 1": "max_bad_share"}, fix="Pass such a number.")

    @property
    def pool(self) -> Path:
        return self.out / "cand_pool" / "local" / f"mbeir_{self.name}_cand_pool.jsonl"

    def queries(self, split: str) -> Path:
        return self.out / "query" / split / f"mbeir_{self.name}_{split}.jsonl"

    def qrels(self, split: str) -> Path:
        return self.out / "qrels" / split / f"mbeir_{self.name}_{split}_qrels.txt"

    def id(self, id: str) -> str:
        return f"{self.dataset_id}:{id}"


def check_name(option: str, name: str) -> None:
    """It becomes part of a path that must not leave the output. Raises `OptionsError`."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise OptionsError(explain(option, expected="letters, digits, - and _", got=repr(name), fix="Rename it."))


@dataclass
class Report:
    """What a conversion wrote and left out. notes: counts of things that are no errors but worth knowing

    judgements: those left out, None = there was no table of them; as there may be many to a query, they are no part of `skipped`
    """

    files: list[Path] = field(default_factory=list)
    written: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    skipped: Skipped = field(default_factory=Skipped)
    judgements: Skipped | None = None


class Skips:
    """Counts the rows of one table; the ones left out are written to a file and never kept."""

    def __init__(self, listed: IO[str]) -> None:
        self._listed = listed
        self.total = self.count = 0
        self.examples: list[str] = []

    @property
    def skipped(self) -> Skipped:
        return Skipped(self.count, self.total, tuple(self.examples))

    def of_another_table(self) -> Skips:
        """With counts of its own, listed in the same file."""
        return Skips(self._listed)

    def broken(self, row: SourceRow) -> bool:
        """Counts a row that was just read. True for one that is none: it is left out already."""
        self.total += row.lines
        if row.problem is not None:
            self(row, row.problem)
        return row.problem is not None

    def __call__(self, row: SourceRow, reason: str) -> None:
        self.count += row.lines
        self._listed.write(f"{row.where}: {reason}\n")
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{row.where}: {reason}")


@contextmanager
def output(target: Target, paths: Sequence[Path]) -> Iterator[tuple[list[IO[str]], Skips, Report]]:
    """Files that appear under their names only if all went well, with a list of skipped rows beside them."""
    for path in paths:
        if path.exists() and not target.overwrite:
            raise InputError(explain(str(path), expected="no such file yet", got="one", fix="Pass --overwrite."))
    skipped_path = target.out / "skipped" / f"{paths[0].stem}.txt"
    for path in (*paths, skipped_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    report = Report()
    parts = [path.with_name(f".{path.name}.part") for path in paths]
    files: list[IO[str]] = [part.open("w", encoding="utf-8") for part in parts]
    with skipped_path.open("w", encoding="utf-8") as listed:
        skip = Skips(listed)
        try:
            yield files, skip, report
            report.skipped = skip.skipped
            report.skipped.check(str(target.out), target.max_bad_share)
            for file, part, path in zip(files, parts, paths, strict=True):
                file.close()
                part.replace(path)
                report.files.append(path)
        finally:
            for file, part in zip(files, parts, strict=True):
                file.close()
                part.unlink(missing_ok=True)
    report.notes = +report.notes
    if report.skipped.count or (report.judgements and report.judgements.count):
        report.files.append(skipped_path)
    else:
        skipped_path.unlink()
