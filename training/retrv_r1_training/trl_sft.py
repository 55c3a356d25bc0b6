"""Stage `sft` on TRL's SFTTrainer, for any size of backbone: the miniature's loss, with everything around it from TRL.

One process, DDP, ZeRO-2 and ZeRO-3 give the same losses (tests/training/test_trl_distributed.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.model.checkpoint import Checkpoint, Manifest, load_checkpoint
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import EncodedImage, Processor
from retrv_r1_training.adapters import (
    load_trained,
    merged,
    prepare_deepspeed,
    prepare_zero3,
    raise_precision,
    slot_rows,
    trainable,
    trained_state,
)
from retrv_r1_training.examples import Source, trace_examples
from retrv_r1_training.mbeir_tasks import Folder, checkpoint_folder
from retrv_r1_training.processes import device, world
from retrv_r1_training.run_folder import finish, last_state
from retrv_r1_training.run_log import RunLog
from retrv_r1_training.sft import Example, SftLoss, Totals, losses
from retrv_r1_training.sft_recipe import SftRecipe, accumulation
from retrv_r1_training.stage_checkpoint import save_stage
from retrv_r1_training.stage_recipe import StageRecipe
from retrv_r1_training.stopping import stop_not_finite

log = logging.getLogger(__name__)
TRAINED = "trained.safetensors"
T = TypeVar("T")


class SftModel(RetrvR1ForConditionalGeneration):
    """Runs a loss inside `forward`, the only method that PEFT, DDP and DeepSpeed hook."""

    def forward(
        self,
        *args: Any,
        objective: Callable[[SftModel], T] | None = None,
        **kwargs: Any,  # transformers' own
    ) -> T | Any:
        return super().forward(*args, **kwargs) if objective is None else objective(self)

    @classmethod
    def of(cls, model: RetrvR1ForConditionalGeneration) -> SftModel:
        """The same object with this forward: nothing is copied."""
        model.__class__ = cls
        return model


class OnTrl(SFTTrainer):
    """What the stages share on TRL: how their figures are shown, and how what they train is saved and loaded."""

    stage: str

    def __init__(
        self,
        processor: Processor,
        **kwargs: Any,  # SFTTrainer's own
    ) -> None:
        super().__init__(processing_class=processor.tokenizer, **kwargs)
        self.processor = processor

    def observe(self, loss: Tensor, metrics: dict[str, float], numbers: Sequence[int]) -> None:
        """Note the metrics for the next log line; stop if the loss of any process is not finite."""
        row = torch.tensor([[loss.item(), *metrics.values()]], device=loss.device)
        rows = self.accelerator.gather(row)  # all processes see, and stop, together
        training = self.model.training
        if training and not torch.isfinite(rows[:, 0]).all():
            stop_not_finite(self, self.stage, rows[:, 0].tolist(), f"examples {list(numbers)}", "optim.lr")
        for name, value in zip(metrics, rows[:, 1:].nanmean(0).tolist(), strict=True):
            if value == value:  # no such token in any of these examples is NaN
                self._metrics["train" if training else "eval"][name].append(value)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Not the embedding table: decay would move rows that stored memory is made of."""
        return [name for name in super().get_decay_parameter_names(model) if "embed_tokens" not in name]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What was trained, by name; `export` merges it into a checkpoint."""
        state, folder = trained_state(self.model), Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.model, load_file(Path(resume_from_checkpoint) / TRAINED))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:  # TRL's signature
        """None: the exported checkpoint has its own."""


class SftOnTrl(OnTrl):
    stage = "sft"

    def __init__(
        self,
        processor: Processor,
        loss: SftLoss,
        **kwargs: Any,  # SFTTrainer's own
    ) -> None:
        super().__init__(processor, **kwargs)
        self.parts = loss
        self.loss_is_scaled_for_ga = True  # `Totals` of the whole step already do it
        self._hits: dict[int, float] = {}  # of an evaluation: number of the example -> its direct read is right

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """`Totals` of an optimiser step, over its micro-batches and all processes."""
        own = torch.tensor([s["totals"] for s in batch_samples], device=device).sum(0)
        totals: Tensor = self.accelerator.gather(own[None]).sum(0)
        return totals

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        totals = None if num_items_in_batch is None else Totals(*num_items_in_batch.tolist())
        examples: Sequence[Example] = inputs["examples"]
        loss: Tensor
        loss, metrics, hits = model(objective=lambda net: losses(net, self.processor, examples, self.parts, totals))
        self.observe(loss, metrics, inputs["numbers"])
        if not self.model.training:
            rows = torch.stack([torch.tensor(inputs["numbers"], device=hits.device), hits.long()], dim=1)
            self._hits |= {number: float(hit) for number, hit in self.accelerator.gather(rows).tolist()}
        # gradients are averaged over processes, and `totals` already are of all of them
        return loss if totals is None else loss * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._hits:  # batches differ in size, and processes fill theirs up with examples seen before
            self._metrics["eval"]["direct"] = [sum(self._hits.values()) / len(self._hits)]
            self._hits = {}
        super().log(logs, start_time)


class Collator:
    """Numbers of the data set -> examples, and what their losses are divided by."""

    def __init__(
        self, processor: Processor, loss: SftLoss, train: Source, held_out: Source, encoded_only: bool
    ) -> None:
        self._processor, self._loss, self._encoded_only = processor, loss, encoded_only
        self._sources = {False: train, True: held_out}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        examples = [self._sources[row["held_out"]][row["number"]] for row in rows]
        pictures = [p for e in examples for p in (*e.prompt.pictures, *e.turn.pictures)]
        if self._encoded_only and not all(isinstance(p, EncodedImage) for p in pictures):
            raise InputError(
                explain("pictures under ZeRO-3", expected="tower tokens (EncodedImage)", got="pixels",
                        fix="Pass them through a `CandidateReader`, or use zero2: a process without pictures in its batch would "
                        "never meet the others in the tower.")
            )  # fmt: skip
        totals = astuple(Totals.of(examples, self._processor, self._loss))
        return {"examples": examples, "totals": totals, "numbers": [row["number"] for row in rows]}


def numbers(count: int, held_out: bool) -> Dataset:
    return Dataset.from_dict({"number": list(range(count)), "held_out": [held_out] * count})


def deepspeed_config(stage: str | None, dtype: str) -> dict[str, Any] | None:
    """ZeRO-2 shards gradients and optimiser states; ZeRO-3 also parameters. "auto" is filled in by transformers."""
    if stage is None:
        return None
    zero: dict[str, Any] = {"stage": 2 if stage == "zero2" else 3, "overlap_comm": torch.cuda.is_available(),
                            "contiguous_gradients": True}  # fmt: skip
    return {
        "zero_optimization": zero, "bf16": {"enabled": dtype == "bfloat16"}, "gradient_clipping": "auto",
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,  # torch's AdamW, the same as without DeepSpeed
    }  # fmt: skip


def training_arguments(recipe: SftRecipe | StageRecipe, run: Path, evaluate: bool) -> SFTConfig:
    optim, running = recipe.optim, recipe.run
    micro_batches = accumulation(optim, world())
    return SFTConfig(
        output_dir=str(run), seed=recipe.seed, data_seed=recipe.seed, max_steps=optim.steps,
        per_device_train_batch_size=optim.per_device, per_device_eval_batch_size=optim.per_device,
        gradient_accumulation_steps=micro_batches, learning_rate=optim.lr, lr_scheduler_type="cosine",
        warmup_steps=round(optim.warmup * optim.steps), weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm, optim="adamw_torch", bf16=running.dtype == "bfloat16",
        gradient_checkpointing=running.checkpointing, deepspeed=deepspeed_config(running.deepspeed, running.dtype),
        use_cpu=not torch.cuda.is_available(), report_to=list(running.report_to) or "none",
        logging_steps=running.every, logging_first_step=True, save_strategy="steps", save_steps=running.save or optim.steps,
        save_total_limit=running.keep, eval_strategy="steps" if evaluate else "no",
        eval_on_start=evaluate and recipe.stage == "distill",  # what was the direct read worth before?
        eval_steps=running.evaluate or optim.steps, remove_unused_columns=False, max_length=None, packing=False,
        dataset_kwargs={"skip_prepare_dataset": True}, ddp_find_unused_parameters=False, disable_tqdm=None,
        logging_nan_inf_filter=False, train_sampling_strategy="sequential",  # the examples have their own order
    )  # fmt: skip


def build(recipe: SftRecipe, run: Path, start: Checkpoint, train: Source, held_out: Source) -> SftOnTrl:
    """The trainer. The model is wrapped before the arguments exist: they switch transformers to ZeRO-3's partitioned loading."""
    torch.manual_seed(recipe.seed)  # LoRA's start
    model = trainable(SftModel.of(start.model), start.processor, recipe)
    if recipe.run.deepspeed is None:
        raise_precision(model)
    else:
        prepare_deepspeed(model)
    args = training_arguments(recipe, run, evaluate=len(held_out) > 0)
    if recipe.run.deepspeed == "zero3":
        prepare_zero3(model)
    collator = Collator(start.processor, recipe.loss, train, held_out, recipe.run.deepspeed == "zero3")
    trainer = SftOnTrl(
        start.processor, recipe.loss, model=model, args=args, data_collator=collator,
        train_dataset=numbers(len(train), False),
        eval_dataset=numbers(len(held_out), True) if len(held_out) else None,
    )  # fmt: skip
    RunLog(run / "log.jsonl", recipe.stage).watch(trainer)
    return trainer


def train_sft(recipe: SftRecipe, run: Path) -> Path:
    """Train or resume in folder `run` and export; returns the checkpoint's folder. Every process of a launch calls this."""
    start = load_start(recipe)
    train, held_out, teachers = trace_examples(
        recipe, start, Folder(recipe.data, checkpoint_folder(recipe.checkpoint), recipe.seed)
    )
    return train_on(recipe, run, start, train, held_out, teachers)


def load_start(recipe: SftRecipe) -> Checkpoint:
    return load_checkpoint(checkpoint_folder(recipe.checkpoint), device=device(), dtype=recipe.run.dtype)


def train_on(
    recipe: SftRecipe, run: Path, start: Checkpoint, train: Source, held_out: Source, teachers: Mapping[str, str]
) -> Path:
    """The loop of `sft` and `distill`, whatever the examples are."""
    trainer = build(recipe, run, start, train, held_out)
    log.info("%d process(es), %d lists each per step", world(), recipe.optim.batch_size // world())
    trainer.train(resume_from_checkpoint=last_state(run))
    state, out = trained_state(trainer.model), run / "checkpoint"
    unset_hf_deepspeed_config()  # or transformers would load the starting checkpoint partitioned
    if trainer.is_world_process_zero():
        finish(out, lambda aside: export(recipe, state, aside, teachers))
    trainer.accelerator.wait_for_everyone()
    return out


def export(recipe: SftRecipe, state: dict[str, Tensor], out: Path, teachers: Mapping[str, str]) -> Manifest:
    """What was trained, merged into the starting checkpoint. Frozen weights are taken from there, bit by bit."""
    folder = checkpoint_folder(recipe.checkpoint)
    start = load_checkpoint(folder, device="cpu", dtype="float32")
    table = start.model.get_input_embeddings().weight.detach().clone()
    model = trainable(start.model, start.processor, recipe)
    load_trained(model, state)
    plain = merged(model)
    with torch.no_grad():
        rows = slot_rows(start.processor)
        table[rows] = plain.get_input_embeddings().weight[rows]
        plain.get_input_embeddings().weight.copy_(table)
    trained = replace(start, model=plain)
    return save_stage(folder, out, trained, data=recipe.data, teachers=teachers)
