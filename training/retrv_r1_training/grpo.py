"""Stage `grpo`: curriculum GRPO on TRL. Rewards for right answers, less for every candidate that had to be opened.

Frozen: tower, embedding table (slot rows excepted) and the module's in_proj, so that stored memories stay valid.
"""

from __future__ import annotations

import copy
import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig

from retrv_r1_retriever.images import ImageSource
from retrv_r1_retriever.model.checkpoint import Checkpoint
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Processor
from retrv_r1_retriever.prompt import ADDED_TOKENS, NONE_INDEX
from retrv_r1_retriever.ranking import rank as ranked
from retrv_r1_retriever.types import StopReason
from retrv_r1_training.adapters import TARGETS, freeze_folded, freeze_memory, prepare_deepspeed, raise_precision
from retrv_r1_training.grpo_config import GrpoConfig
from retrv_r1_training.memory_training import learns_memory
from retrv_r1_training.processes import from_all, rank, world
from retrv_r1_training.reward import penalty_at, progress, reward
from retrv_r1_training.rollout import TOGETHER, Rollout, RolloutRunner, Sampling, Task
from retrv_r1_training.run_folder import last_state
from retrv_r1_training.run_log import RunLog
from retrv_r1_training.sft import freeze_for_sft
from retrv_r1_training.trl_private import RolloutTrainer
from retrv_r1_training.trl_sft import deepspeed_config

log = logging.getLogger(__name__)

#: Refused requests per opened candidate, over the first updates, above which a run is warned of. Ours: all three miniatures that began
#: with more stopped opening, whatever the price; of nine with less, two did (docs/experiments.md).
TOO_MANY_REFUSED, FIRST_UPDATES = 1.5, 5


def train_grpo(
    checkpoint: Checkpoint, tasks: Sequence[Task], held_out: Sequence[Task], config: GrpoConfig, seed: int, run: Path,
    log_file: Path, images: ImageSource | None = None,
) -> RetrvR1ForConditionalGeneration:  # fmt: skip
    """Train `checkpoint.model`; returns the merged model. `run` keeps the states to resume from: call it again and it goes on.

    images: see `RolloutRunner`. Every process of a launch calls this.
    """
    trainer = make_trainer(checkpoint, tasks, config, seed, run, images, held_out)
    RunLog(log_file, "grpo", _SHOWN).watch(trainer)
    trainer.train(resume_from_checkpoint=last_state(run))
    model = trainer.accelerator.unwrap_model(trainer.model)
    merged = model.merge_and_unload() if config.lora_rank else model
    merged.__dict__.pop("forward", None)  # TRL's fused head, and Accelerate's precision
    merged.eval()
    return merged  # type: ignore[no-any-return]


def sampling_of(config: GrpoConfig, temperature: float) -> Sampling:
    return Sampling(temperature, config.max_inspections, config.max_new_tokens)


def make_trainer(
    checkpoint: Checkpoint, tasks: Sequence[Task], config: GrpoConfig, seed: int, run: Path,
    images: ImageSource | None = None, held_out: Sequence[Task] = (),
) -> RolloutTrainer:  # fmt: skip
    os.environ.setdefault(
        "TRL_EXPERIMENTAL_SILENCE", "1"
    )  # `rollout_func` is experimental in TRL, which is why we guard it
    model, processor = checkpoint.model, checkpoint.processor
    torch.manual_seed(seed)  # LoRA's start
    full, learns = config.lora_rank == 0, learns_memory(model)  # asked before PEFT wraps the module
    if config.deepspeed:
        prepare_deepspeed(model)
    reference = copy.deepcopy(model).requires_grad_(False) if full and config.beta else None
    if full:
        freeze_for_sft(model)
        train_slot_rows_only(model, processor)
    order = prompt_order(len(tasks), config.steps * config.batch_size, seed)
    trainer = _Trainer(
        held_out, config, model=model, args=_arguments(config, seed, run), reward_funcs=_reward_function(config),
        source=_Source(tasks, config, seed), train_dataset=Dataset.from_dict({"prompt": order}), processor=processor, beta=config.beta,
        reference=reference, peft_config=None if full else adapter(model, processor, config.lora_rank),
    )  # fmt: skip
    if not full and not learns:
        freeze_memory(trainer.policy)
    freeze_folded(trainer.policy)
    trainer.frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    mixed = dtype_of(config) == "bfloat16" and not config.deepspeed  # DeepSpeed keeps float32 masters of its own
    if mixed:
        raise_precision(trainer.model)
    policy = replace(checkpoint, model=trainer.policy)
    own = config.batch_size * config.group_size // world()  # validation at most as many: the KV pool never shrinks
    trainer.runner = RolloutRunner(policy, images, min(TOGETHER, own), torch.bfloat16 if mixed else None)
    return trainer


class _Trainer(RolloutTrainer):
    """With held-out figures among the others, so that they go wherever the others go."""

    runner: RolloutRunner

    def __init__(
        self, held_out: Sequence[Task], config: GrpoConfig, **kwargs: Any,  # RolloutTrainer's own
    ) -> None:  # fmt: skip
        super().__init__(std_floor=config.std_floor, **kwargs)
        self._held_out, self._config = held_out, config

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        step, every = self.state.global_step, self._config.evaluate_every
        if self._held_out and "loss" in logs and (step == self.state.max_steps or (every and step % every == 0)):
            figures = measure(self.runner, self._held_out, sampling_of(self._config, 0.0))
            logs |= {f"val_{name}": value for name, value in figures.items()}
        super().log(logs, start_time)


def dtype_of(config: GrpoConfig) -> str:
    return config.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")


def prompt_order(tasks: int, length: int, seed: int) -> list[str]:
    """Prompt numbers for the whole run, every task once before any comes again.

    One epoch as far as TRL knows: its own shuffling starts from the seed again in a run that is resumed in a later epoch.
    """
    rng = random.Random(seed)
    rounds = [rng.sample(range(tasks), tasks) for _ in range(-(-length // tasks))]
    return [str(n) for numbers in rounds for n in numbers][:length]


def _arguments(config: GrpoConfig, seed: int, run: Path) -> GRPOConfig:
    accumulation = config.batch_size * config.group_size // (config.micro_batch * world())
    dtype = dtype_of(config)
    return GRPOConfig(
        output_dir=str(run), max_steps=config.steps, shuffle_dataset=False, learning_rate=config.lr, warmup_steps=config.warmup, seed=seed,
        lr_scheduler_type="constant_with_warmup", weight_decay=0.0, max_grad_norm=config.max_grad_norm,
        per_device_train_batch_size=config.micro_batch, gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation, num_generations=config.group_size, num_iterations=config.iterations,
        max_completion_length=config.max_new_tokens, temperature=config.temperature, loss_type=config.loss_type,
        beta=config.beta if config.lora_rank else 0.0,  # without an adapter TRL would look for the reference by its path
        epsilon=config.epsilon, scale_rewards="none" if config.std_floor else config.scale_rewards,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=dtype == "bfloat16", use_cpu=not torch.cuda.is_available(), deepspeed=deepspeed_config(config.deepspeed, dtype),
        logging_steps=1, report_to=list(config.report_to) or "none", disable_tqdm=None, ddp_find_unused_parameters=False,
        save_strategy="steps", save_steps=config.save_every or config.steps, save_total_limit=2,
    )  # fmt: skip


def train_slot_rows_only(model: RetrvR1ForConditionalGeneration, processor: Processor) -> None:
    """Candidate memory is made from all other rows of the table: their gradient is dropped before any optimiser sees it."""
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for table in {id(t): t for t in tables}.values():
        kept = torch.zeros(len(table), 1, device=table.device, dtype=table.dtype)
        kept[[processor.token_id(t) for t in ADDED_TOKENS]] = 1
        table.register_hook(lambda gradient, kept=kept: gradient * kept)


def adapter(model: RetrvR1ForConditionalGeneration, processor: Processor, lora_rank: int) -> LoraConfig:
    """LoRA in the language model, the slot rows, and the whole module. No dropout: rollouts have none, and the ratios would be off."""
    rows = [processor.token_id(t) for t in ADDED_TOKENS]
    tables = ["embed_tokens"] if model.config.text_config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    return LoraConfig(
        r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=0.0, modules_to_save=["icm"],
        target_modules=TARGETS, trainable_token_indices=dict.fromkeys(tables, rows),
    )  # fmt: skip


class _Source:
    """Prompt numbers to rollouts. The seed of each is made of the step and its place among those of all processes: a resumed run
    draws the same, and so does one on another number of GPUs."""

    def __init__(self, tasks: Sequence[Task], config: GrpoConfig, seed: int) -> None:
        self._tasks, self._sampling, self._seed = tasks, sampling_of(config, config.temperature), seed

    def __call__(self, numbers: Sequence[int], trainer: Any) -> list[Rollout]:
        before = trainer.accelerator.process_index * len(numbers)
        where = [f"{self._seed}/{trainer.state.global_step}/{before + i}" for i in range(len(numbers))]
        seeds = [random.Random(place).getrandbits(48) for place in where]
        made = {n: self._tasks[n] for n in dict.fromkeys(numbers)}  # one for each group
        return trainer.runner.run([made[n] for n in numbers], seeds, self._sampling)  # type: ignore[no-any-return]


def _reward_function(config: GrpoConfig) -> Callable[..., list[float]]:
    start = _Start()

    def total(
        row: list[Rollout], trainer_state: Any, log_metric: Any, **_: Any,  # TRL passes every column
    ) -> list[float]:  # fmt: skip
        penalty = penalty_at(config.penalty, progress(trainer_state.global_step, config.steps))
        parts = [reward(r.outcome, r.task.right, r.task.top_k, penalty, config.format_weight) for r in row]
        metrics = {"lambda": penalty, "format": float(np.mean([p.format > 0 for p in parts]))}
        metrics |= summary(row)
        if config.batch_size % world() == 0:  # else groups are cut between processes, and none sees a whole one
            metrics |= groups(row, [p.total for p in parts])
        start.see(trainer_state.global_step, metrics)
        for name, value in metrics.items():
            log_metric(name, value)
        return [p.total for p in parts]

    return total


class _Start:
    """Warns of a start whose requests to open a candidate are mostly refused."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, float]] = []

    def see(self, update: int, metrics: Mapping[str, float]) -> None:
        if len(self._seen) == FIRST_UPDATES or (update and not self._seen):  # over, or a run that goes on
            return
        self._seen.append((metrics["refused"], metrics["inspections"]))
        refused, opened = np.mean(self._seen, axis=0)
        if len(self._seen) == FIRST_UPDATES and refused > TOO_MANY_REFUSED * opened:
            log.warning(
                "grpo: %.1f refused requests a thought so far, %.1f opened candidates. A refused one costs the format reward and often the "
                "answer, so that opening itself is unlearned, even without a price. Train sft longer first.", refused, opened,
            )  # fmt: skip


def summary(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Shares and means over rollouts."""
    outcomes = [r.outcome for r in rollouts]
    return {
        "correct": float(np.mean([r.correct for r in rollouts])),
        "inspections": float(np.mean([len(o.inspected) for o in outcomes])),
        "refused": float(np.mean([o.refused for o in outcomes])),
        "unreadable": float(np.mean([len(o.unreadable) for o in outcomes])),
        "forced": float(np.mean([o.stop_reason is not StopReason.ANSWERED for o in outcomes])),
        "none": float(np.mean([o.answer == NONE_INDEX for o in outcomes])),
        "tokens": float(np.mean([o.sampled_tokens for o in outcomes])),
    }


def groups(rollouts: Sequence[Rollout], rewards: Sequence[float]) -> dict[str, float]:
    """Shares of groups that teach nothing, since all rewards are equal, and of those all right and all wrong."""
    members: dict[int, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        members.setdefault(id(rollout.task), []).append(i)
    parts = list(members.values())
    return {
        "groups_equal": float(np.mean([len({round(rewards[i], 9) for i in p}) == 1 for p in parts])),
        "groups_all_right": float(np.mean([all(rollouts[i].correct for i in p) for p in parts])),
        "groups_all_wrong": float(np.mean([not any(rollouts[i].correct for i in p) for p in parts])),
    }


def measure(runner: RolloutRunner, tasks: Sequence[Task], sampling: Sampling) -> dict[str, float]:
    """Greedy, as served with `hybrid`: R@1 and opened candidates per query, by stratum. A positive not in the list is a miss.

    The processes of a launch share the tasks; all get all figures.
    """
    own, rows = tasks[rank() :: world()], []
    for task, reading in runner.readings(own, [0] * len(own), replace(sampling, temperature=0.0)):
        first = ranked(task.prompt.candidates, reading.direct, reading.outcome).indices[0]
        rows.append((task.stratum, first in task.right, len(reading.outcome.inspected) if reading.outcome else 0))
    of: dict[str, list[tuple[bool, int]]] = {"all": []}
    for stratum, hit, opened in (row for part in from_all(rows) for row in part):
        of["all"].append((hit, opened))
        of.setdefault(stratum, []).append((hit, opened))
    out = {}
    for stratum, pairs in of.items():
        out[f"R@1_{stratum}"] = float(np.mean([hit for hit, _ in pairs]))
        out[f"opened_{stratum}"] = float(np.mean([opened for _, opened in pairs]))
    return out


#: What of TRL's figures goes into log.jsonl; TensorBoard and its like have all.
_SHOWN = (
    "loss|grad_norm|learning_rate|reward|reward_std|lambda|correct|format|inspections|refused|unreadable|forced|none|tokens"
    "|groups_.*|kl|entropy|step_time|val_.*"
)
