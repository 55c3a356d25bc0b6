"""Stage `grpo`: curriculum GRPO on TRL. Rewards for right answers, less for every candidate that had to be opened.

Frozen: tower, embedding table (slot rows excepted) and the module's in_proj, so that stored memories stay valid.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig

from retrv_r1_retriever.images import ImageSource
from retrv_r1_retriever.model.checkpoint import Checkpoint
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Processor
from retrv_r1_retriever.prompt import ADDED_TOKENS, NONE_INDEX
from retrv_r1_retriever.ranking import rank
from retrv_r1_retriever.types import StopReason
from retrv_r1_training.grpo_config import GrpoConfig
from retrv_r1_training.reward import penalty_at, progress, reward
from retrv_r1_training.rollout import Rollout, RolloutRunner, Sampling, Task
from retrv_r1_training.sft import freeze_for_sft
from retrv_r1_training.trl_private import RolloutTrainer

log = logging.getLogger(__name__)


def train_grpo(
    checkpoint: Checkpoint, tasks: Sequence[Task], held_out: Sequence[Task], config: GrpoConfig, seed: int, run: Path,
    log_file: Path, images: ImageSource | None = None,
) -> RetrvR1ForConditionalGeneration:  # fmt: skip
    """Train `checkpoint.model`; returns the merged model. `run` keeps the states to resume from: call it again and it goes on.

    images: see `RolloutRunner`
    """
    trainer = make_trainer(checkpoint, tasks, config, seed, run, images)
    trainer.add_callback(_Log(log_file, trainer, held_out, config))
    last = get_last_checkpoint(str(run)) if run.is_dir() else None
    if last:
        log.info("grpo: going on from %s", last)
    trainer.train(resume_from_checkpoint=last)
    model = trainer.accelerator.unwrap_model(trainer.model)
    merged = model.merge_and_unload() if config.lora_rank else model
    merged.__dict__.pop("forward", None)  # TRL's fused head, and Accelerate's precision
    merged.eval()
    return merged  # type: ignore[no-any-return]


def sampling_of(config: GrpoConfig, temperature: float) -> Sampling:
    return Sampling(temperature, config.max_inspections, config.max_new_tokens)


def make_trainer(
    checkpoint: Checkpoint, tasks: Sequence[Task], config: GrpoConfig, seed: int, run: Path,
    images: ImageSource | None = None,
) -> RolloutTrainer:  # fmt: skip
    os.environ.setdefault(
        "TRL_EXPERIMENTAL_SILENCE", "1"
    )  # `rollout_func` is experimental in TRL, which is why we guard it
    model, processor = checkpoint.model, checkpoint.processor
    full = config.lora_rank == 0
    reference = copy.deepcopy(model).requires_grad_(False) if full and config.beta else None
    if full:
        freeze_for_sft(model)
        train_slot_rows_only(model, processor)
    order = prompt_order(len(tasks), config.steps * config.batch_size, seed)
    trainer = RolloutTrainer(
        model=model, args=_arguments(config, seed, run), reward_funcs=_reward_function(config), source=_Source(tasks, config, seed),
        train_dataset=Dataset.from_dict({"prompt": order}), processor=processor, beta=config.beta,
        reference=reference, peft_config=None if full else adapter(model, processor, config.lora_rank),
    )  # fmt: skip
    if not full:
        freeze_memory(trainer.policy)
    trainer.remove_callback(PrinterCallback)  # every figure twice; `_Log` writes ours
    trainer.runner = RolloutRunner(replace(checkpoint, model=trainer.policy), images)
    return trainer


def prompt_order(tasks: int, length: int, seed: int) -> list[str]:
    """Prompt numbers for the whole run, every task once before any comes again.

    One epoch as far as TRL knows: its own shuffling starts from the seed again in a run that is resumed in a later epoch.
    """
    rng = random.Random(seed)
    rounds = [rng.sample(range(tasks), tasks) for _ in range(-(-length // tasks))]
    return [str(n) for numbers in rounds for n in numbers][:length]


def _arguments(config: GrpoConfig, seed: int, run: Path) -> GRPOConfig:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = config.batch_size * config.group_size // (config.micro_batch * ranks)
    cuda = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=str(run), max_steps=config.steps, shuffle_dataset=False, learning_rate=config.lr, warmup_steps=config.warmup, seed=seed,
        lr_scheduler_type="constant_with_warmup", weight_decay=0.0, max_grad_norm=config.max_grad_norm,
        per_device_train_batch_size=config.micro_batch, gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation, num_generations=config.group_size, num_iterations=config.iterations,
        max_completion_length=config.max_new_tokens, temperature=config.temperature, loss_type=config.loss_type,
        beta=config.beta if config.lora_rank else 0.0,  # without an adapter TRL would look for the reference by its path
        epsilon=config.epsilon, scale_rewards=config.scale_rewards, gradient_checkpointing=config.gradient_checkpointing,
        bf16=cuda, use_cpu=not cuda, logging_steps=1, report_to=config.report_to, disable_tqdm=True,
        save_strategy="steps" if config.save_every else "no", save_steps=config.save_every or config.steps, save_total_limit=2,
    )  # fmt: skip


def train_slot_rows_only(model: nn.Module, processor: Processor) -> None:
    """Candidate memory is made from all other rows of the table: their gradient is dropped before any optimiser sees it."""
    for table in {
        id(t.weight): t.weight for t in (model.get_input_embeddings(), model.get_output_embeddings())
    }.values():  # type: ignore[operator]
        kept = torch.zeros(len(table), 1, device=table.device, dtype=table.dtype)
        kept[[processor.token_id(t) for t in ADDED_TOKENS]] = 1
        table.register_hook(lambda gradient, kept=kept: gradient * kept)


def adapter(model: RetrvR1ForConditionalGeneration, processor: Processor, lora_rank: int) -> LoraConfig:
    """LoRA in the language model, the slot rows, and the whole module. No dropout: rollouts have none, and the ratios would be off."""
    rows = [processor.token_id(t) for t in ADDED_TOKENS]
    tables = ["embed_tokens"] if model.config.text_config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    return LoraConfig(
        r=lora_rank, lora_alpha=2 * lora_rank, lora_dropout=0.0, modules_to_save=["icm"],
        target_modules=r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        trainable_token_indices=dict.fromkeys(tables, rows),
    )  # fmt: skip


def freeze_memory(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".in_proj." in name:
            parameter.requires_grad_(False)


class _Source:
    """Prompt numbers to rollouts. The seed of each is made of the step, its place and its rank: a resumed run draws the same."""

    def __init__(self, tasks: Sequence[Task], config: GrpoConfig, seed: int) -> None:
        self._tasks, self._sampling, self._seed = tasks, sampling_of(config, config.temperature), seed

    def __call__(self, numbers: Sequence[int], trainer: Any) -> list[Rollout]:
        where = f"{self._seed}/{trainer.state.global_step}/{trainer.accelerator.process_index}"
        seeds = [random.Random(f"{where}/{i}").getrandbits(48) for i in range(len(numbers))]
        made = {n: self._tasks[n] for n in dict.fromkeys(numbers)}  # one for each group
        return trainer.runner.run([made[n] for n in numbers], seeds, self._sampling)  # type: ignore[no-any-return]


def _reward_function(config: GrpoConfig) -> Callable[..., list[float]]:
    def total(
        row: list[Rollout], trainer_state: Any, log_metric: Any, **_: Any,  # TRL passes every column
    ) -> list[float]:  # fmt: skip
        penalty = penalty_at(config.penalty, progress(trainer_state.global_step, config.steps))
        parts = [reward(r.outcome, r.task.right, r.task.top_k, penalty, config.format_weight) for r in row]
        metrics = {"lambda": penalty, "format": float(np.mean([p.format > 0 for p in parts]))}
        for name, value in (metrics | summary(row) | groups(row, [p.total for p in parts])).items():
            log_metric(name, value)
        return [p.total for p in parts]

    return total


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
    """Greedy, as served with `hybrid`: R@1 and opened candidates per query, by stratum. A positive not in the list is a miss."""
    rows: dict[str, list[tuple[bool, int]]] = {"all": []}
    for task, reading in runner.readings(tasks, [0] * len(tasks), replace(sampling, temperature=0.0)):
        first = rank(task.prompt.candidates, reading.direct, reading.outcome).indices[0]
        row = (first in task.right, len(reading.outcome.inspected) if reading.outcome else 0)
        rows["all"].append(row)
        rows.setdefault(task.stratum, []).append(row)
    out = {}
    for stratum, pairs in rows.items():
        out[f"R@1_{stratum}"] = float(np.mean([hit for hit, _ in pairs]))
        out[f"opened_{stratum}"] = float(np.mean([opened for _, opened in pairs]))
    return out


class _Log(TrainerCallback):  # type: ignore[misc]
    """One JSON line per update, with validation figures where they are due."""

    def __init__(self, file: Path, trainer: RolloutTrainer, held_out: Sequence[Task], config: GrpoConfig) -> None:
        self._file, self._trainer, self._held_out, self._config = file, trainer, held_out, config

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any,  # transformers' signature
    ) -> None:  # fmt: skip
        logs = logs or {}
        if not state.is_world_process_zero or "reward" not in logs:
            return
        step, every = state.global_step, self._config.evaluate_every
        row = {"stage": "grpo", "step": step}
        row |= {name: logs[name] for name in _SHOWN if logs.get(name) is not None}
        due = step == state.max_steps or (every and step % every == 0)
        if self._held_out and due:
            figures = measure(self._trainer.runner, self._held_out, sampling_of(self._config, 0.0))
            row |= {f"val_{k}": v for k, v in figures.items()}
        row = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        log.info("%s", " ".join(f"{k}={v}" for k, v in row.items()))


_SHOWN = (
    "loss", "grad_norm", "learning_rate", "reward", "reward_std", "lambda", "correct", "format", "inspections", "refused",
    "unreadable", "forced", "none", "tokens", "groups_equal", "groups_all_right", "groups_all_wrong", "kl", "entropy", "step_time",
)  # fmt: skip
