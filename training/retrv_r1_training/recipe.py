"""Recipes: YAML into frozen values; an unknown key is an error that names the known ones."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.model.configuration import IcmConfig
from retrv_r1_training.backbone import BackboneSize
from retrv_r1_training.grpo_config import GrpoConfig
from retrv_r1_training.loop import Schedule

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """In the order they run in. None: the recipe has no such stage."""

    captions: Schedule
    episodes: Schedule
    embedder: Schedule
    align: Schedule
    pointwise: Schedule | None = None
    direct: Schedule
    eliminate: Schedule
    sft: Schedule
    polish: Schedule | None = None
    in_full: Schedule | None = None
    grpo: GrpoConfig | None = None

    def __post_init__(self) -> None:
        if self.in_full and self.grpo and self.grpo.steps:
            fix = "Set grpo.steps to 0, or leave in_full out."
            raise OptionsError(
                explain("in_full", expected="no grpo behind it", got=f"{self.grpo.steps} steps", fix=fix)
            )


@dataclass(frozen=True, slots=True)
class Recipe:
    """top_k: K of the training lists; embedder_dim: of the first stage, small on purpose; embedder_recall: validation R@20 at which its
    training stops, so that every seed gets a first stage of the same strength; pairs_per_query: candidates that
    `align` describes per query; comparisons, rehearsal: text-only sequences beside `episodes` and beside `eliminate`, `sft`;
    direct_weight: of the direct read's loss

    What a model can be without, for the ablation: max_inspections 0 = thoughts that open nothing; candidates "full" = no compressed
    tokens, every candidate in full, "single" = one of them at a time, as `pointwise` trains it; freeze_memory false = in_proj learns
    after `align`, too, and stored memory would not stay valid. A stage `in_full` is `polish` once more on candidates in full.
    A stage of 0 steps is left out: the next one begins where the one before it ended.
    """

    seed: int
    top_k: int
    embedder_dim: int
    embedder_recall: float
    pairs_per_query: int
    comparisons: int
    rehearsal: int
    direct_weight: float
    stages: Stages
    backbone: BackboneSize = field(default_factory=BackboneSize)
    icm: IcmConfig = field(default_factory=IcmConfig)
    max_inspections: int = 4
    candidates: Literal["compressed", "full", "single"] = "compressed"
    freeze_memory: bool = True


def build(kind: type[T], data: dict[str, Any], where: str) -> T:
    """A nested frozen dataclass from nested dictionaries."""
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - known, key=str)  # YAML has numbers for keys, too
    if unknown:
        raise OptionsError(
            explain(where, expected=f"keys {sorted(known)}", got=unknown[0], fix="Fix or remove the key.")
        )
    values = {k: _nested(hints[k], v, f"{where}: {k}") for k, v in data.items()}
    needed = (f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING)  # type: ignore[arg-type]
    if absent := [name for name in needed if name not in values]:
        raise OptionsError(explain(where, expected=f"a value for {absent[0]}", got="none", fix="Add the key."))
    try:
        return kind(**values)
    except OptionsError as error:  # of a range: the class knows the field, not where it stands
        raise OptionsError(f"{where}: {error}") from None


def _nested(hint: Any, value: Any, where: str) -> Any:
    """A dataclass, or a tuple of them, from plain values; everything else as it is."""
    kind = next((t for t in (hint, *get_args(hint)) if is_dataclass(t)), None)
    if kind is None or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return tuple(build(kind, v, f"{where}[{n}]") for n, v in enumerate(value))  # type: ignore[arg-type]
    return build(kind, value, where)  # type: ignore[arg-type]
