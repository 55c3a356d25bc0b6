"""The recipe of `retrv-r1-train sft` as frozen values. Defaults are ours unless a docstring says whose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_training.lists import ListConfig
from retrv_r1_training.sft import SftLoss
from retrv_r1_training.teacher import TeacherStyle


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """LamRA's sizes (its code, as the closest open system); the paper says LoRA and no number."""

    rank: int = 128
    alpha: int = 256


@dataclass(frozen=True, slots=True)
class SftData:
    """folder: M-BEIR files; train, held_out: splits; examples: drawn for validation; direct_share: of the training examples, also
    teach the direct read (all validation examples do)
    """

    folder: str
    train: tuple[str, ...] = ("train",)
    held_out: str = "val"
    examples: int = 200
    direct_share: float = 1.0


@dataclass(frozen=True, slots=True)
class Optimisation:
    """steps: optimiser steps; batch_size: examples per step over all GPUs; per_device: of them at once on one GPU (the rest is
    accumulated); warmup: share of the steps
    """

    steps: int
    batch_size: int
    per_device: int = 1
    lr: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True, slots=True)
class Running:
    """deepspeed: ZeRO stage, None = one process or DDP; every: steps between log lines; save, evaluate: between those

    report_to: passed on to transformers ("tensorboard", "wandb", ...); RUN/log.jsonl is always written
    """

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    deepspeed: Literal["zero2", "zero3"] | None = None
    checkpointing: bool = True
    every: int = 10
    save: int = 200
    evaluate: int = 200
    keep: int = 2
    report_to: tuple[str, ...] = ("tensorboard",)


@dataclass(frozen=True, slots=True)
class Hardware:
    """For `retrv-r1-train estimate` only. tflops: of one GPU at `dtype`, dense, by its data sheet; use: the share reached."""

    gpus: int = 8
    gpu_gb: float = 80.0
    tflops: float = 989.0
    use: float = 0.3


@dataclass(frozen=True, slots=True)
class SftRecipe:
    """checkpoint: where to start, a Retrv-R1 checkpoint after `align`; lora None: the whole language model learns

    backbone: sizes for the estimate while `checkpoint` does not exist yet; length, thought: tokens, for the estimate
    """

    checkpoint: str
    data: SftData
    optim: Optimisation
    stage: Literal["sft"] = "sft"
    seed: int = 0
    tune: Literal["lora", "full"] = "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    lists: ListConfig = field(default_factory=ListConfig)
    teacher: TeacherStyle = field(default_factory=TeacherStyle)
    loss: SftLoss = field(default_factory=SftLoss)
    run: Running = field(default_factory=Running)
    hardware: Hardware = field(default_factory=Hardware)
    backbone: str = ""
    length: int = 2048
    thought: int = 600


def accumulation(optim: Optimisation, world: int) -> int:
    """Micro-batches per optimiser step, so that the trajectory does not depend on the number of GPUs."""
    steps, rest = divmod(optim.batch_size, optim.per_device * world)
    if rest or not steps:
        raise OptionsError(
            explain("optim.batch_size", expected=f"a multiple of per_device x processes = {optim.per_device} x {world}",
                    got=optim.batch_size, fix="Change batch_size or per_device.")
        )  # fmt: skip
    return steps
