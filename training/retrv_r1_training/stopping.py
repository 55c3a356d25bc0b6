"""A run whose loss is not finite ends: its state is kept apart, and the message says where and what to do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from retrv_r1_retriever.errors import RetrvR1Error, explain

if TYPE_CHECKING:
    from transformers import Trainer


class NotFiniteError(RetrvR1Error, FloatingPointError):
    """The loss is NaN or infinite; what was good is saved: a state, or the stage before."""


def stop_not_finite(trainer: Trainer, stage: str, values: Sequence[float], seen: str, rate: str) -> NoReturn:
    """Save below `stopped` in the trainer's folder, then raise. Every process calls it, or none.

    values: the loss of each process; seen: what it was computed of; rate: the recipe's key of the learning rate
    """
    folder = Path(trainer.args.output_dir) / "stopped"
    trainer.args.output_dir = str(folder)  # apart from the good checkpoints, which a new start resumes from
    trainer._save_checkpoint(trainer.model, None)
    sys.stderr.write("\n")  # below the progress bar
    raise NotFiniteError(
        explain(f"{stage}: loss at step {trainer.state.global_step}, {seen}", expected="a finite number", got=list(values),
                fix=f"State saved below {folder}. Lower {rate} or look at these, and start again in a new --run folder.")
    )  # fmt: skip
