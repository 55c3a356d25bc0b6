"""Where a call says, while it runs, which step begins and what came of it. Nobody listens unless observers are handed in."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.types import Candidate, Query, RankedResults

log = logging.getLogger(__name__)

StepName = Literal["retrieve", "retrieve_batch", "embed", "search", "rerank", "rerank_batch", "inspect"]

#: What a step found: a ranked list (once per query in a batch), or the first stage's candidates.
Found: TypeAlias = RankedResults | Sequence[Candidate]
Tell: TypeAlias = Callable[[Found], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One step, as it begins.

    candidates: those to be ordered (`rerank`); the opened one (`inspect`)
    index: the opened candidate's label (`inspect`); model: who embeds (`embed`); queries: how many (the batches)
    outermost: no step runs around this one, so what it tells is what the caller gets; set by `observed`
    """

    name: StepName
    query: Query | None = None
    options: RerankOptions | None = None
    candidates: tuple[Candidate, ...] = ()
    index: int | None = None
    model: str | None = None
    queries: int = 1
    outermost: bool = False


class Observer(Protocol):
    """Watches calls, several at the same time. What it raises would end the call it watches: it must not raise."""

    def watch(self, step: Step) -> AbstractContextManager[Tell]:
        """Entered when a step begins, left when it ends, with its exception if it failed."""


Observers: TypeAlias = tuple[Observer, ...]

_inside: ContextVar[bool] = ContextVar("retrv_inside_a_step", default=False)


@contextmanager
def observed(observers: Observers, step: Step) -> Iterator[Tell]:
    """Run a step under the eyes of all observers; call what it gives with what the step found."""
    if not observers:
        yield _nobody
        return
    step = replace(step, outermost=not _inside.get())
    token = _inside.set(True)
    try:
        with ExitStack() as watching:
            tells = [watching.enter_context(observer.watch(step)) for observer in observers]
            yield lambda found: _tell_all(tells, found)
    finally:
        _inside.reset(token)


def _nobody(found: Found) -> None:
    pass


def _tell_all(tells: Sequence[Tell], found: Found) -> None:
    for tell in tells:
        tell(found)


# -- [observe] in retrv.toml -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObserveConfig:
    """otel: spans and metrics; otel_content: with what was asked, found and thought; otel_documents: named in one span

    traces: file that gets a line per call; redact: without what was asked, found and thought
    """

    otel: bool = False
    otel_content: bool = False
    otel_documents: int = 10
    traces: str | None = None
    redact: bool = False


def open_observers(config: ObserveConfig, folder: Path) -> Observers:
    """folder: what a relative path of `traces` starts from. Raises `MissingExtraError`, `InputError`."""
    observers: list[Observer] = []
    if config.otel:
        from retrv_r1_retriever import telemetry

        if telemetry.sends_nothing():
            log.warning("[observe] otel: no OpenTelemetry SDK is set up, so nothing is sent (docs/observability.md)")
        observers.append(telemetry.Telemetry(content=config.otel_content, max_documents=config.otel_documents))
    if config.traces is not None:
        from retrv_r1_retriever.tracelog import TraceLog

        path = folder / Path(config.traces).expanduser()
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            fix = "Fix traces in [observe]."
            raise InputError(explain(f"traces {path}", expected="a file in a writable folder", got="none", fix=fix))
        observers.append(TraceLog(path, redact=config.redact))
    return tuple(observers)
