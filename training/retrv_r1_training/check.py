"""What is in a folder of M-BEIR files: counts, bad rows, missing pictures and answers, and a few samples to look at."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from retrv_r1_retriever import _sync
from retrv_r1_retriever.errors import ImageError, InputError, explain
from retrv_r1_retriever.evaluation.mbeir import (
    INSTRUCTIONS,
    Instructions,
    JudgedQuery,
    Limits,
    Pool,
    Qrels,
    Queries,
    find_files,
    iterate,
    modality_of,
)
from retrv_r1_retriever.evaluation.offsets import LineIndex, Skipped
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.types import Content, Document
from retrv_r1_training.checks import check_ranges
from retrv_r1_training.waiting import counted

_SEED = 0
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class CheckConfig:
    """queries, pools: files relative to the folder; () = all of them
    pictures: how many pictures per file are opened (decoded, as in training), drawn at random; None = all
    samples: rows shown per file
    """

    queries: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()
    pictures: int | None = 1000
    samples: int = 2
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        counts = "samples" if self.pictures is None else "pictures samples"
        check_ranges(self, {"0 or more": counts}, fix="Pass such a number.")


@dataclass
class FileReport:
    """problems: what must be repaired, with examples; notes: what is worth knowing"""

    file: str
    rows: int
    skipped: Skipped
    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)


def check(root: Path, config: CheckConfig) -> Iterator[FileReport]:
    """A report per file as it is finished. Files with too many bad rows end it with `InputError`."""
    pool_files = config.pools or tuple(find_files(root, "cand_pool/**/*.jsonl"))
    query_files = config.queries or tuple(find_files(root, "query/**/*.jsonl"))
    if not pool_files or not query_files:
        got = "no pool" if query_files else "no queries" if pool_files else "neither"
        expected = "cand_pool/**/*.jsonl and query/**/*.jsonl"
        raise InputError(explain(str(root), expected=expected, got=got, fix="See docs/training-data.md."))
    pools = {file: Pool(root / file, config.limits) for file in pool_files}
    for file, pool in pools.items():
        yield _check_pool(root, file, pool, config)
    table = root / INSTRUCTIONS
    instructions = Instructions.read(table) if table.is_file() else Instructions({})
    yield _check_instructions(instructions, table.is_file())
    for file in query_files:
        yield _QueryCheck(root, file, pools, instructions, config).report()


def _check_pool(root: Path, file: str, pool: Pool, config: CheckConfig) -> FileReport:
    report = _started(file, pool.lines)
    modalities: Counter[str] = Counter()
    pictures = _Pictures(root, config.pictures)
    characters = 0
    for number in counted(range(len(pool)), file, len(pool)):
        document = pool[number]
        modalities[modality_of(document)] += 1
        characters += len(document.content.text or "")
        pictures.offer(document.content.image)
    report.facts["modalities"] = _counts(modalities)
    if texts := len(pool) - modalities["image"]:
        report.facts["text"] = f"{characters / texts:.0f} characters on average"
    pictures.describe(report)
    rng = random.Random(_SEED)
    for number in sorted(rng.sample(range(len(pool)), min(config.samples, len(pool)))):
        report.samples.append(_document(pool[number]))
    return report


def _check_instructions(instructions: Instructions, there: bool) -> FileReport:
    report = FileReport(str(INSTRUCTIONS), len(instructions.prompts), instructions.skipped)
    if not there:
        report.notes.append("no such file: queries go without an instruction unless their rows have one")
    for (dataset, query, candidate), prompts in list(instructions.prompts.items())[:5]:
        report.samples.append(f"dataset {dataset}, {query} -> {candidate}: {' | '.join(prompts)}")
    return report


class _Tally:
    """How often something happened and the first few cases: never a list of all."""

    def __init__(self) -> None:
        self.count = 0
        self.examples: list[str] = []

    def add(self, case: str) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(case)


class _QueryCheck:
    """One query file against the pools, its qrels and the instructions."""

    def __init__(
        self, root: Path, file: str, pools: dict[str, Pool], instructions: Instructions, config: CheckConfig
    ) -> None:
        self.pools, self.instructions, self.config = pools, instructions, config
        self.queries = Queries(root / file, config.limits)
        self.file = _started(file, self.queries.lines)
        self.pictures = _Pictures(root, config.pictures)
        path = qrels_of(root, file)
        self.qrels = Qrels(path, config.limits) if path is not None else None
        self.qrels_name = "none" if path is None else path.relative_to(root).as_posix()
        self.positives: Counter[int] = Counter()
        self.grades: Counter[int] = Counter()
        self.shapes: Counter[str] = Counter()
        self.found: Counter[str] = Counter()  # positives, by pool
        self.problems: defaultdict[str, _Tally] = defaultdict(_Tally)
        self.notes: defaultdict[str, _Tally] = defaultdict(_Tally)

    def report(self) -> FileReport:
        for query in counted(iterate(self.queries), self.file.file, len(self.queries)):
            self._query(query)
            self.pictures.offer(query.query.content.image)
        report = self.file
        per_query = Counter({"1": self.positives[1], "none": self.positives[0]})
        per_query["several"] = len(self.queries) - per_query["1"] - per_query["none"]
        report.facts["tasks"] = _counts(self.shapes)
        report.facts["positives per query"] = f"{_counts(per_query)}; most {max(self.positives, default=0)}"
        report.facts["grades"] = f"{_counts(self.grades)} (qrels: {self.qrels_name})"
        total = sum(n * count for n, count in self.positives.items())
        report.facts["positives found in"] = "; ".join(
            f"{pool} {self.found[pool]:,} of {total:,}" for pool in self.pools if self.found[pool]
        ) or "no pool"  # fmt: skip
        self.pictures.describe(report)
        for where, target in ((self.problems, report.problems), (self.notes, report.notes)):
            target += [f"{t.count:,} queries {what}: {', '.join(t.examples)}" for what, t in where.items()]
        rng = random.Random(_SEED)
        for number in sorted(rng.sample(range(len(self.queries)), min(self.config.samples, len(self.queries)))):
            report.samples.append(self._sample(self.queries[number]))
        return report

    def _query(self, query: JudgedQuery) -> None:
        judged = self.qrels.grades(query.id) if self.qrels is not None else {}
        positives = [did for did, grade in judged.items() if grade > 0]
        if judged and set(positives) != set(query.grades):
            self.notes["whose row and qrels name different positives"].add(query.id)
        elif self.qrels is not None and not judged and query.grades:
            self.notes["have no line in the qrels"].add(query.id)
        grades = {did: judged.get(did, 1) for did in query.grades}
        self.positives[len(grades)] += 1
        self.grades.update(grades.values())
        documents = [self._candidate(did) for did in grades]
        there = [document for document in documents if document is not None]
        if not grades:
            self.notes["have no positive (they train <|none|>)"].add(query.id)
        elif not there:
            self.problems["have no positive in any pool"].add(query.id)
        elif len(there) < len(grades):
            self.notes["have some positives in no pool"].add(query.id)
        target = modality_of(there[0]) if there else "?"
        self.shapes[f"{query.modality} -> {target}"] += 1
        known = self.instructions.choose(query.id, query.modality, target, random.Random(_SEED))
        if there and known is None and query.query.instruction is None:
            self.notes[f"have no instruction ({query.modality} -> {target})"].add(query.id)

    def _candidate(self, did: str) -> Document | None:
        found = None
        for name, pool in self.pools.items():
            document = pool.get(did)
            self.found[name] += document is not None
            found = found or document
        return found

    def _sample(self, query: JudgedQuery) -> str:
        there = [document for document in map(self._candidate, query.grades) if document is not None]
        instruction = query.query.instruction
        if instruction is None and there:
            target = modality_of(there[0])
            instruction = self.instructions.choose(query.id, query.modality, target, random.Random(_SEED))
        lines = [f"{query.id}  {instruction or '(no instruction)'}", f"  asks  {_content(query.query.content)}"]
        lines += [f"  right {_document(document)}" for document in there[:2]]
        return "\n".join(lines)


def qrels_of(root: Path, query_file: str) -> Path | None:
    """M-BEIR's name for the judgements of `query/<split>/<name>.jsonl`."""
    folder, _, rest = query_file.partition("/")
    path = root / "qrels" / f"{rest.removesuffix('.jsonl')}_qrels.txt"
    return path if folder == "query" and path.is_file() else None


class _Pictures:
    """Counts pictures and opens a sample of them (reservoir sampling: the number is not known beforehand)."""

    def __init__(self, root: Path, limit: int | None) -> None:
        self.limit, self.count = limit, 0
        self._images = LocalImages(root)
        self.opened = 0
        self.missing = _Tally()
        self._sample: list[str] = []
        self._rng = random.Random(_SEED)

    def offer(self, image: object) -> None:
        if not isinstance(image, str):
            return
        self.count += 1
        if self.limit is None:
            self._open(image)
        elif len(self._sample) < self.limit:
            self._sample.append(image)
        elif (place := self._rng.randrange(self.count)) < self.limit:
            self._sample[place] = image

    def describe(self, report: FileReport) -> None:
        for image in self._sample:
            self._open(image)
        if self.count:
            report.facts["pictures"] = f"{self.count:,}, {self.opened:,} opened"
        if self.missing.count:
            examples = "; ".join(self.missing.examples)
            report.problems.append(f"{self.missing.count:,} of {self.opened:,} pictures cannot be opened: {examples}")

    def _open(self, image: str) -> None:
        """As training will: decoded, for a file that was cut off has a sound header."""
        self.opened += 1
        try:
            _sync.run(self._images.load(image))
        except ImageError as error:
            found = re.search(r", got (.*)\. ", str(error))  # what `explain` puts there; the rest goes without saying
            self.missing.add(f"{image} ({found[1] if found else error})")


def _started(file: str, lines: LineIndex) -> FileReport:
    return FileReport(file, len(lines), lines.skipped)


def _counts(counts: Counter[str] | Counter[int]) -> str:
    shown: Sequence[tuple[object, int]] = [(name, count) for name, count in counts.most_common() if count]
    return ", ".join(f"{name}: {count:,}" for name, count in shown) or "none"


def _document(document: Document) -> str:
    return f"{document.id}  {_content(document.content)}"


def _content(content: Content) -> str:
    parts = (content.text, f"[{content.image!s}]" if content.image else None)
    return " ".join(part for part in parts if part)
