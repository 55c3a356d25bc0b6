"""Where this process stands among those of a launch (torchrun, accelerate, deepspeed), before any trainer exists to ask."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes files."""
    return rank() == 0


def device() -> str:
    """This process's own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def from_all(value: T) -> list[T]:
    """The values of all processes, by rank. Collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
