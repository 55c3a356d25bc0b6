"""Which thoughts may be trained on: those that a session replays, word for word, to a right answer, and that do not contradict
what is known. A rejection is a short stable name; docs/synthesize.md explains each.
"""

from __future__ import annotations

from retrv_r1_retriever.driver import read
from retrv_r1_retriever.engines.scripted import ScriptedEngine, ScriptedHandle
from retrv_r1_retriever.errors import EngineError
from retrv_r1_retriever.images import ImageSource
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.parser import Thought, render
from retrv_r1_retriever.prompt import INSPECT_END, KEEP, NONE_INDEX, THINK_END, build_prompt
from retrv_r1_retriever.session import GenerateParams, Generation
from retrv_r1_retriever.trace import Sampled
from retrv_r1_retriever.types import StopReason
from retrv_r1_training.labelled import LabelledList

_CHARS_PER_TOKEN = 4  # of English text; for the budget only, and never fewer tokens than words


async def rejection(thought: Thought, task: LabelledList, options: RerankOptions, images: ImageSource) -> str | None:
    """Why `thought` is not admitted, or None. Replays it through the driver that serves; opened pictures are really loaded."""
    return contradiction(thought, task) or await _replay(thought, task, options, images)


def contradiction(thought: Thought, task: LabelledList) -> str | None:
    """What is wrong with a thought in itself, before any session sees it."""
    verdicts = {v.index: v.text for v in thought.verdicts}
    checks = {c.index: c.match for c in thought.checks}
    if set(verdicts) != set(range(len(task.candidates))):
        return "missing_verdicts"
    if thought.answer not in (task.right or (NONE_INDEX,)):
        return "wrong_answer"
    if any(match is None for match in checks.values()):
        return "unclear_check"
    if any(match != (i in task.right) for i, match in checks.items()):
        return "wrong_check"
    if thought.answer == NONE_INDEX:
        kept = {i for i, text in verdicts.items() if text == KEEP}
        return "none_unexplained" if kept - set(checks) else None
    return None if verdicts[thought.answer] == KEEP else "answer_eliminated"


async def _replay(thought: Thought, task: LabelledList, options: RerankOptions, images: ImageSource) -> str | None:
    prompt = build_prompt(task.query, task.candidates)
    turn = render(thought)
    script = [_generation(s.text) for s in turn if isinstance(s, Sampled)]
    try:
        outcome = (await read(_Replay(script), prompt, options, images=images)).outcome
    except EngineError:  # the session asks for more, or for something else, than the thought has
        outcome = None
    if outcome is None:
        return "not_reproduced"
    if outcome.stop_reason is not StopReason.ANSWERED:
        return outcome.stop_reason.value
    if outcome.unreadable:
        return "unreadable_picture"
    if outcome.refused:
        return "refused_inspection"
    same = outcome.segments == (*prompt.segments, *turn) and outcome.thought == thought
    return None if same and outcome.answer == thought.answer else "not_reproduced"


class _Replay(ScriptedEngine):
    """Gives the answer whenever it is asked for, so that a thought cut by its budget is told from one that went wrong."""

    async def generate(self, handle: ScriptedHandle, params: GenerateParams) -> Generation:
        assert isinstance(self.script, list)
        return self.script[-1] if params.allowed else await super().generate(handle, params)


def _generation(text: str) -> Generation:
    tokens = max(len(text.split()), len(text) // _CHARS_PER_TOKEN, 1)
    return Generation(text, tokens, next((tag for tag in (INSPECT_END, THINK_END) if text.endswith(tag)), None))
