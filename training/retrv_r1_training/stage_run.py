"""What `base`, `embedder` and `align` share: one trainer around any objective, resumable, with logs and a stop at NaN.

Saving, resuming and stopping are those of the SFT trainer; transformers' Trainer, Accelerate and DeepSpeed do the rest.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from retrv_r1_retriever.model.checkpoint import Checkpoint, create_checkpoint, load_checkpoint
from retrv_r1_retriever.model.processing import Processor
from retrv_r1_training.adapters import prepare_deepspeed, raise_precision, trained_state
from retrv_r1_training.draws import Draws
from retrv_r1_training.processes import device as own_device
from retrv_r1_training.run_folder import last_state
from retrv_r1_training.run_log import RunLog
from retrv_r1_training.stage_checkpoint import stored_dtype
from retrv_r1_training.stage_recipe import AlignRecipe, EmbedderRecipe, StageRecipe, Start
from retrv_r1_training.trl_sft import OnTrl, SftModel, numbers, training_arguments

log = logging.getLogger(__name__)
Figures: TypeAlias = dict[str, float]


@dataclass(frozen=True)
class Work:
    """model: with exactly that trainable which the stage trains, wrapped by PEFT or not
    objective(net, examples) -> (loss, metrics); measure(net) -> figures on held-out data, None = no validation
    """

    processor: Processor
    model: nn.Module
    draws: Draws[Any]
    objective: Callable[[SftModel, Sequence[Any]], tuple[Tensor, Figures]]
    measure: Callable[[SftModel], Figures] | None = None


class StageTrainer(OnTrl):
    control: Any  # transformers' own

    def __init__(
        self,
        stage: str,
        work: Work,
        **kwargs: Any,  # SFTTrainer's own
    ) -> None:
        super().__init__(work.processor, model=work.model, **kwargs)
        self.stage, self._work = stage, work
        self.skipped: Counter[str] = Counter()
        self.loss_is_scaled_for_ga = False  # a mean over the examples at hand

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        """Nothing to divide by."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        loss: Tensor
        loss, metrics = model(objective=lambda net: self._work.objective(net, inputs["examples"]))
        self.observe(loss, metrics, inputs["numbers"])
        self.skipped.update(inputs["skipped"])
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> Figures:  # transformers' signature
        """The stage's own figures; every process computes all of them."""
        net = self.accelerator.unwrap_model(self.model)
        net = cast(SftModel, net.get_base_model() if isinstance(net, PeftModel) else net)
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            assert self._work.measure is not None
            figures = {f"eval_{name}": value for name, value in self._work.measure(net).items()}
        self.log(figures)
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures


def train(recipe: StageRecipe, run: Path, work: Work, per_device: int | None = None) -> dict[str, Tensor]:
    """Train, or go on in folder `run`; returns what was trained, by name. Every process of a launch calls this.

    per_device: examples in one forward call, where that is not the recipe's `optim.per_device`
    """
    if recipe.run.deepspeed is None:
        raise_precision(work.model)
    else:
        prepare_deepspeed(work.model)
    optim = recipe.optim if per_device is None else replace(recipe.optim, per_device=per_device)
    args = training_arguments(replace(recipe, optim=optim), run, evaluate=work.measure is not None)
    args.dataloader_num_workers = recipe.data.workers
    trainer = StageTrainer(
        recipe.stage, work, args=args, data_collator=lambda rows: _collate(work.draws, rows),
        train_dataset=numbers(len(work.draws), False), eval_dataset=numbers(1, True) if work.measure else None,
    )  # fmt: skip
    RunLog(run / "log.jsonl", recipe.stage).watch(trainer)
    trainer.train(resume_from_checkpoint=last_state(run))
    for reason, count in trainer.skipped.items():
        log.info("skipped %d x %s", count, reason)
    return trained_state(trainer.model)


def _collate(draws: Draws[Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    places = [row["number"] for row in rows]
    draws.skipped.clear()  # told batch by batch: a process that reads ahead has counts of its own
    return {"examples": [draws[n] for n in places], "numbers": places, "skipped": dict(draws.skipped)}


def load_start(start: Start, dtype: str, device: str | None = None) -> Checkpoint:
    """The checkpoint, or a fresh one around a backbone. device None = this process's own."""
    device = device or own_device()
    if is_checkpoint(start):
        return load_checkpoint(start.path, device=device, dtype=dtype)
    return create_checkpoint(
        start.path, icm=start.icm, revision=start.revision, licence=start.licence, device=device, dtype=dtype,
        max_text_tokens=start.max_text_tokens, max_pixels=start.max_pixels,
    )  # fmt: skip


def is_checkpoint(start: Start) -> bool:
    return (Path(start.path) / "retrv" / "manifest.json").is_file()


def dtype_of(recipe: EmbedderRecipe | AlignRecipe) -> torch.dtype:
    """What the result is stored in: as the start is, or as it was trained."""
    found: torch.dtype = (
        stored_dtype(Path(recipe.start.path)) if is_checkpoint(recipe.start) else getattr(torch, recipe.run.dtype)
    )
    return found
