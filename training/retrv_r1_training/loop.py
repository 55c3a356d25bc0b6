"""The optimisation loop that every stage of the miniature shares: AdamW, warm-up and cosine, JSONL log."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from retrv_r1_retriever.errors import explain
from retrv_r1_training.stopping import NotFiniteError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Schedule:
    steps: int
    lr: float
    batch_size: int
    warmup: int = 30
    weight_decay: float = 0.01
    final_lr_share: float = 0.05

    def lr_at(self, step: int) -> float:
        ramp = min(1.0, (step + 1) / self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * ramp * (self.final_lr_share + (1 - self.final_lr_share) * cosine)


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices only. The embedding table is no exception to be decayed: rows whose gradient is masked must not move."""
    marked = [p for p in parameters if p.ndim >= 2 and not getattr(p, "no_decay", False)]
    plain = [p for p in parameters if p.ndim < 2 or getattr(p, "no_decay", False)]
    return [{"params": marked, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def train(
    name: str,
    schedule: Schedule,
    parameters: Iterable[nn.Parameter],
    loss_fn: Callable[[int], tuple[Tensor, dict[str, float]]],
    log_file: Path,
    after_backward: Callable[[], None] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    every: int = 50,
    until: Callable[[dict[str, float]], bool] | None = None,
) -> None:
    """Run `steps` updates of `loss_fn(step) -> (loss, metrics)`, fewer if `until` is content with what `evaluate` found.

    A loss that is not finite stops the run.
    """
    trained = [p for p in parameters if p.requires_grad]
    optimiser = torch.optim.AdamW(_groups(trained, schedule.weight_decay), lr=schedule.lr, betas=(0.9, 0.98))
    started = time.monotonic()
    with log_file.open("a", encoding="utf-8") as out:
        for step in range(schedule.steps):
            for group in optimiser.param_groups:
                group["lr"] = schedule.lr_at(step)
            loss, metrics = loss_fn(step)
            if not torch.isfinite(loss):
                fix = "The stages before it are kept: lower its learning rate and start again."
                raise NotFiniteError(
                    explain(f"{name}: loss at step {step}", expected="a finite number", got=loss.item(), fix=fix)
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
            if after_backward:
                after_backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            if step % every == every - 1 or step == schedule.steps - 1:
                row = {"stage": name, "step": step + 1, "s": round(time.monotonic() - started, 1), "loss": loss.item()}
                row |= metrics
                found = {}
                if evaluate and (step % (2 * every) == 2 * every - 1 or step == schedule.steps - 1):
                    found = evaluate()
                row |= found
                row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                out.write(json.dumps(row) + "\n")
                out.flush()
                log.info("%s", " ".join(f"{k}={v}" for k, v in row.items()))
                if found and until and until(found):
                    return
