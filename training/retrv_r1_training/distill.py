"""Stage `distill`: teach the direct read what the thought knows.

The model thinks about every training query through the session and driver that serve; the hybrid order of each list becomes the ranks
of weighted RankNet on the direct read (FIRST, arXiv 2406.15657). Its own thoughts are trained on beside it, so that they stay as they are.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrv_r1_retriever.errors import InputError, OptionsError, explain
from retrv_r1_retriever.model.checkpoint import Checkpoint
from retrv_r1_retriever.parser import parse
from retrv_r1_retriever.prompt import NONE_INDEX
from retrv_r1_retriever.ranking import Order, rank
from retrv_r1_retriever.trace import Full, ReasoningTrace, Segment
from retrv_r1_retriever.types import StopReason
from retrv_r1_training.candidate_reader import CandidateReader
from retrv_r1_training.examples import Source
from retrv_r1_training.mbeir_tasks import Folder, Tasks, checkpoint_folder
from retrv_r1_training.processes import world
from retrv_r1_training.reward import is_correct
from retrv_r1_training.rollout import RolloutRunner, Sampling, Task
from retrv_r1_training.sft import Example, example_of
from retrv_r1_training.sft_recipe import DistillRecipe, Thinking
from retrv_r1_training.trl_sft import load_start, train_on
from retrv_r1_training.waiting import counted

log = logging.getLogger(__name__)
_AGAIN = (
    "Remove the run's thoughts-*.jsonl, and its checkpoint-* folders if there are any, or choose another --run folder."
)


@dataclass(frozen=True, slots=True)
class OwnThought:
    """What the model thought about task `number`. ranks: by slot, see `own_ranks`

    ended: by itself, not cut by its budget or the context; right: it ended so, in a right answer; checkpoint: digest of the weights
    """

    number: int
    query_id: str
    turn: tuple[Segment, ...]
    ranks: tuple[int, ...]
    ended: bool
    right: bool
    checkpoint: str

    def to_json(self) -> str:
        turn = json.loads(ReasoningTrace(self.turn).to_json())  # pictures are left out
        row = {
            "number": self.number,
            "query_id": self.query_id,
            "ranks": self.ranks,
            "ended": self.ended,
            "right": self.right,
            "checkpoint": self.checkpoint,
            "trace": turn,
        }
        return json.dumps(row, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> OwnThought:
        row: dict[str, Any] = json.loads(line)
        turn = ReasoningTrace.from_json(json.dumps(row["trace"])).segments
        ended, checkpoint = row.get("ended", False), row.get("checkpoint", "unknown")  # earlier files named neither
        return cls(row["number"], row["query_id"], turn, tuple(row["ranks"]), ended, row["right"], checkpoint)


def own_ranks(order: Order) -> tuple[int, ...]:
    """Rank of each of the K + 1 slots, 1 = best: the order of the list, with none directly behind the answer, or before all others.

    None is better than what was judged not to be the answer, and how much worse the rest is, the order says among themselves.
    """
    places = list(order.indices)
    places.insert(0 if order.none_chosen else 1, len(places))
    ranks = [0] * len(places)
    for place, slot in enumerate(places, 1):
        ranks[slot] = place
    return tuple(ranks)


def think_ahead(runner: RolloutRunner, tasks: Sequence[Task], thinking: Thinking, file: Path) -> list[OwnThought]:
    """One greedy thought per task, from `file` as far as they are there: a killed run goes on where it was.

    A whole file is only read, so that several processes may. Raises `InputError` for one of other weights.
    """
    checkpoint = runner.engine.versions["checkpoint"]
    known = _read(file, checkpoint)
    if len(known) > len(tasks):
        fix = f"The data changed. {_AGAIN}"
        raise InputError(explain(str(file), expected=f"{len(tasks)} thoughts", got=len(known), fix=fix))
    if len(known) == len(tasks):
        return known
    file.write_text(
        "".join(thought.to_json() + "\n" for thought in known), encoding="utf-8"
    )  # without a half-written line
    rest = range(len(known), len(tasks))
    sampling = Sampling(0.0, thinking.max_inspections, thinking.max_new_tokens)
    left = tasks[rest.start :] if known else tasks
    with file.open("a", encoding="utf-8") as out:
        readings = counted(runner.readings(left, [0] * len(left), sampling), "thoughts", len(left))
        for number, (task, reading) in zip(rest, readings, strict=True):
            if reading.outcome is None:
                raise InputError(
                    explain(f"query {task.id!r}", expected="a thought", got=reading.problem, fix="See there.")
                )
            order = rank(task.prompt.candidates, reading.direct, reading.outcome)
            turn = reading.outcome.segments[len(task.prompt.segments) :]
            ended = reading.outcome.stop_reason is StopReason.ANSWERED
            right = is_correct(reading.outcome, task.right)
            known.append(OwnThought(number, task.id, turn, own_ranks(order), ended, right, checkpoint))
            out.write(known[-1].to_json() + "\n")
            out.flush()
    return known


def _read(file: Path, checkpoint: str) -> list[OwnThought]:
    """Without a line that a kill cut off. Raises `InputError` if other weights thought so."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    thoughts = [OwnThought.from_json(line) for line in lines if line.endswith("\n")]
    if other := next((t.checkpoint for t in thoughts if t.checkpoint != checkpoint), None):
        expected, got = f"thoughts of checkpoint {checkpoint}", f"those of {other}"
        raise InputError(explain(str(file), expected=expected, got=got, fix=_AGAIN))
    return thoughts


class OwnExamples:
    """`count` examples out of own thoughts, in rounds; number n says the same each time.

    Trained on, the direct read learns the thought's order; for validation (`judged`) it is measured by the right answers.
    """

    def __init__(
        self, tasks: Sequence[Task], thoughts: Sequence[OwnThought], reader: CandidateReader, count: int, judged: bool
    ) -> None:
        self._tasks, self._thoughts, self._reader = tasks, thoughts, reader
        self._count, self._judged = count, judged

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Example:
        if not 0 <= number < self._count:
            raise IndexError(number)
        thought = self._thoughts[number % len(self._thoughts)]
        task = self._tasks[thought.number]
        if task.id != thought.query_id:
            fix = f"The data changed. {_AGAIN}"
            raise InputError(explain(f"thought {thought.number}", expected=task.id, got=thought.query_id, fix=fix))
        contents = [c.document.content for c in task.prompt.candidates]
        turn = [
            replace(s, content=self._reader.open(contents[s.index])) if isinstance(s, Full) else s for s in thought.turn
        ]
        said = parse(turn)
        if not self._judged:
            example = example_of(self._reader.processor, task.prompt, said, turn)
            return replace(example, ranks=thought.ranks)
        best, *also = task.right
        truth = replace(said, answer=best)
        return example_of(self._reader.processor, task.prompt, truth, turn, tuple(a for a in also if a != NONE_INDEX))


def train_distill(recipe: DistillRecipe, run: Path, think_only: bool = False) -> Path:
    """Think, then train or resume in folder `run` and export; returns the checkpoint's folder (`think_only`: the thoughts' folder)."""
    start = load_start(recipe)
    folder = Folder(recipe.data, checkpoint_folder(recipe.checkpoint), recipe.seed)
    reader = CandidateReader(start, folder.images, recipe.data.cache_gb)
    tasks = folder.training(reader, 0.0, "none")
    if recipe.thinking.queries:
        tasks = tasks.spread(recipe.thinking.queries)
    train, held_out = _sources(recipe, start, tasks, folder.validation(reader), reader, run)
    if think_only:
        return run
    out = train_on(recipe, run, start, train, held_out, {})
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    if figures := [row["eval_direct"] for row in rows if "eval_direct" in row]:
        log.info("distill: right answers of the direct read %.3f before, %.3f after", figures[0], figures[-1])
    return out


def _sources(
    recipe: DistillRecipe, start: Checkpoint, tasks: Tasks, held_out: Sequence[Task], reader: CandidateReader, run: Path
) -> tuple[Source, Source]:
    thinking = recipe.thinking
    files = run / "thoughts-train.jsonl", run / "thoughts-validation.jsonl"
    _one_process(start.manifest.checkpoint_digest, {files[0]: len(tasks), files[1]: len(held_out)})
    runner = RolloutRunner(start, reader)
    own = think_ahead(runner, tasks, thinking, files[0])
    taught = _taught(own, thinking, recipe.seed)
    count = recipe.optim.steps * recipe.optim.batch_size
    if count < len(taught):
        log.info("distill: %d steps of %d see %d of them", recipe.optim.steps, recipe.optim.batch_size, count)
    measured = think_ahead(runner, held_out, thinking, files[1])
    return (
        OwnExamples(tasks, taught, reader, count, judged=False),
        OwnExamples(held_out, measured, reader, len(measured), judged=True),
    )


def _taught(own: Sequence[OwnThought], thinking: Thinking, seed: int) -> list[OwnThought]:
    """In random order; never one that was cut: the model would learn to stop in the middle, at an answer that it did not come to."""
    ended = [thought for thought in own if thought.ended]
    right = [thought for thought in ended if thought.right]
    taught = right if thinking.right_only else ended
    random.Random(seed).shuffle(taught)
    cut = len(own) - len(ended)
    log.info(
        "distill: %d thoughts, %d cut by their budget, %d right, %d taught", len(own), cut, len(right), len(taught)
    )
    if not taught:
        expected = "some that end by themselves" + (" in a right answer" if thinking.right_only else "")
        got = f"{len(own)}, {cut} of them cut by their budget"
        fix = "Raise thinking.max_new_tokens if they are cut; set thinking.right_only to false, or train a better model first."
        raise InputError(explain("thoughts", expected=expected, got=got, fix=fix))
    return taught


def _one_process(checkpoint: str, wanted: Mapping[Path, int]) -> None:
    """Raises `OptionsError` in a launch of several while thoughts are missing: only one may write them."""
    for file, count in wanted.items() if world() > 1 else ():
        if (found := len(_read(file, checkpoint))) < count:
            expected, got = "all thoughts before several processes start", f"{found} of {count} in {file}"
            fix = "Run the same command without a launcher and `--think-only` first."
            raise OptionsError(explain("distill", expected=expected, got=got, fix=fix))
