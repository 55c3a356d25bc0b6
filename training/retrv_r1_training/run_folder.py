"""A run's folder, as every stage keeps it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from retrv_r1_training.processes import is_first

log = logging.getLogger(__name__)
_LAST_WRITTEN = "trainer_state.json"  # by transformers, of all files of a state


def last_state(folder: Path) -> str | None:
    """The last whole state below `folder`, None = start from the beginning. A kill while one is written leaves it without its end."""
    states = [s for s in folder.glob("checkpoint-*") if s.name.removeprefix("checkpoint-").isdigit()]
    for state in sorted(states, key=lambda s: int(s.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((state / _LAST_WRITTEN).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            _say(logging.WARNING, "%s is not whole (a kill while it was saved?) and is passed over: %s", state, error)
            continue
        _say(logging.INFO, "going on from %s", state)
        return str(state)
    if states:
        _say(logging.WARNING, "no state below %s is whole: starting from the beginning", folder)
    return None


def _say(level: int, text: str, *values: object) -> None:
    """Once per launch."""
    if is_first():
        log.log(level, text, *values)
