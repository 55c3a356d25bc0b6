"""What a run tells: RUN/log.jsonl for programs, a progress bar with a line per row for people; transformers feeds TensorBoard."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer

Logs = dict[str, Any]  # what transformers hands to a callback


class RunLog(ProgressCallback):
    """A row per log line and evaluation. A resumed run drops its stage's rows after the state that it starts from.

    only: the keys that are kept, as a regular expression
    """

    def __init__(self, file: Path, stage: str, only: str = ".*") -> None:
        super().__init__()
        self._file, self._stage, self._only = file, stage, only

    def watch(self, trainer: Trainer) -> None:
        """In the place of transformers' own progress bar and printer."""
        for other in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(other)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # transformers' signature
        if state.is_world_process_zero:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            old = self._file.read_text(encoding="utf-8").splitlines(keepends=True) if self._file.exists() else []
            whole = [line for line in old if line.endswith("\n")]
            self._file.write_text(
                "".join(x for x in whole if not self._is_later(json.loads(x), state.global_step)), "utf-8"
            )
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Logs | None = None, **kwargs: Any) -> None:  # as above
        kept = {k: v for k, v in (logs or {}).items() if v is not None and re.fullmatch(self._only, k)}
        if not state.is_world_process_zero or not kept:
            return
        row = {"stage": self._stage, "step": state.global_step, **kept}
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        if self.training_bar is not None:
            self.training_bar.write(
                " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
            )

    def _is_later(self, row: Logs, step: int) -> bool:
        return bool(row["stage"] == self._stage and row["step"] > step)
