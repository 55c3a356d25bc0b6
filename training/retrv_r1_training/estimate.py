"""What a recipe costs, by arithmetic: GB per GPU and GPU-hours. Nothing here was measured on a GPU; every assumption is printed.

Tokens are the language model's. Of a forward pass: 2 operations per weight and token; as many again for the gradient of the input,
for that of a trained weight, and for each time that it is done again (activation checkpointing, gradient caching).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from retrv_r1_retriever.prompt import ADDED_TOKENS
from retrv_r1_training.grpo_config import GrpoRecipe
from retrv_r1_training.rollout import TOGETHER
from retrv_r1_training.sft_recipe import DistillRecipe, Hardware, LoraSettings, SftRecipe, accumulation
from retrv_r1_training.sizes import Size, size_of
from retrv_r1_training.stage_recipe import AlignRecipe, BaseRecipe, EmbedderRecipe

AnyRecipe = SftRecipe | GrpoRecipe | EmbedderRecipe | AlignRecipe | BaseRecipe
GB, TERA = 1e9, 1e12
CONTEXT_GB = 2.0  #: CUDA context, NCCL buffers and fragmentation; a guess
RELATION_TOKENS = 5  #: two compressed tokens and the cue, read once more per candidate by the relation loss
FRAME_TOKENS = 32  #: around a candidate that is described: chat format, question, two tokens
PATCHES = 4  #: of the tower, for one token of the language model


@dataclass(frozen=True, slots=True)
class Job:
    """What a stage asks of its GPUs, in the terms that all stages share.

    trained: parameters; adapters: of them, those beside the model's own; zero: ZeRO stage, 0 = none
    at_once: tokens of one pass that is differentiated, on one GPU; logits: rows of the head kept with them
    gb: what else one GPU holds, by name; seconds: on one GPU, of the whole stage, by part
    assumed: lines for people; before: GB held before training begins, by thoughts that share passes
    """

    size: Size
    hardware: Hardware
    width: int  # bytes of a weight
    zero: int
    checkpointing: bool
    trained: int
    adapters: int
    at_once: float
    logits: float
    gb: Mapping[str, float]
    seconds: Mapping[str, float]
    assumed: Sequence[str]
    before: float = 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """GB on one GPU by part; hours on one GPU of the whole stage, by part."""

    job: Job
    gb: dict[str, float]
    hours: dict[str, float]

    @property
    def total_gb(self) -> float:
        return sum(self.gb.values())

    @property
    def fits(self) -> bool:
        return max(self.total_gb, self.job.before) <= self.job.hardware.gpu_gb

    @property
    def gpu_hours(self) -> float:
        return sum(self.hours.values())


def estimate(recipe: AnyRecipe) -> Estimate:
    """Raises `OptionsError` for a backbone that is not known, and for what the stage would refuse on so many GPUs."""
    _check_batch(recipe, recipe.hardware.gpus)
    size = size_of(recipe)
    if isinstance(recipe, SftRecipe):
        job = _sft(recipe, size)
    elif isinstance(recipe, GrpoRecipe):
        job = _grpo(recipe, size)
    elif isinstance(recipe, EmbedderRecipe):
        job = _embedder(recipe, size)
    elif isinstance(recipe, AlignRecipe):
        job = _align(recipe, size)
    else:
        job = _base(recipe, size)
    gb = _states(job) | _activations(job) | dict(job.gb) | {"context": CONTEXT_GB}
    return Estimate(job, gb, {name: seconds / 3600 for name, seconds in job.seconds.items()})


def only_estimated(recipe: AnyRecipe) -> tuple[str, ...]:
    """Keys of a recipe that nothing but the estimate reads: a run may go on with others."""
    return ("hardware", "length", "thought", *(() if isinstance(recipe, BaseRecipe) else ("backbone",)))


def _check_batch(recipe: AnyRecipe, gpus: int) -> None:
    if isinstance(recipe, GrpoRecipe):
        recipe.grpo.check_world(gpus)
        return
    optim = recipe.optim
    if isinstance(recipe, EmbedderRecipe):  # a GPU's share of the batch is one call, read in parts
        optim = replace(optim, per_device=optim.batch_size // gpus)
    accumulation(optim, gpus)


# -- stages ------------------------------------------------------------------------------------------------------------


def _sft(recipe: SftRecipe, size: Size) -> Job:
    optim, run, speed = recipe.optim, recipe.run, _Speed(size, recipe.hardware)
    width, lora = _width(run.dtype), recipe.tune == "lora"
    relation = recipe.data.top_k * RELATION_TOKENS
    passes = (2 if lora else 3) + run.checkpointing
    of_one = passes * speed.read(recipe.length + relation, recipe.length, recipe.thought + recipe.data.top_k)
    gb = {"frozen copy": size.frozen * width / GB} | (_slot_copies(size) if lora else {})
    seconds = {"training": optim.steps * optim.batch_size * of_one}
    assumed = [
        f"{optim.steps} steps x {optim.batch_size} lists of {recipe.data.top_k}; {recipe.length} tokens each, {recipe.thought} of them "
        f"sampled; {optim.per_device} list(s) at a time per GPU",
        "pictures go through the tower once, while the cache holds them; that time is not counted",
    ]
    before = 0.0
    if isinstance(recipe, DistillRecipe):
        count = recipe.thinking.queries
        before = (size.total + size.frozen) * width / GB + _kv_gb(size, TOGETHER, recipe.length, width) + CONTEXT_GB
        seconds["thinking"] = speed.think(count, min(TOGETHER, count), recipe.length, recipe.thought)
        assumed.append(
            f"one process thinks about {count} queries (thinking.queries; 0 = all of them, which are not counted here), "
            f"{TOGETHER} at a time"
        )
    trained, adapters = _learnt(size, recipe.lora if lora else None)
    return Job(size, recipe.hardware, width, _zero(run.deepspeed), run.checkpointing, trained, adapters,
               optim.per_device * (recipe.length + relation), optim.per_device * recipe.thought, gb, seconds, assumed, before)  # fmt: skip


def _grpo(recipe: GrpoRecipe, size: Size) -> Job:
    config, speed, width = recipe.grpo, _Speed(size, recipe.hardware), _width(recipe.grpo.dtype or "bfloat16")
    lora, thoughts = config.lora_rank > 0, config.batch_size * config.group_size
    own = thoughts // recipe.hardware.gpus  # on one GPU; comes out even, see `_check_batch`
    passes = (2 if lora else 3) + config.gradient_checkpointing + bool(config.beta)  # the reference reads once
    scoring = config.iterations * passes * speed.read(recipe.length, recipe.length, recipe.thought)
    rolling = speed.think(own, min(TOGETHER, own), recipe.length, recipe.thought) * recipe.hardware.gpus
    gb = {"frozen copy": size.frozen * width / GB, "KV cache": _kv_gb(size, min(TOGETHER, own), recipe.length, width)}
    gb |= _slot_copies(size) if lora else {}
    if config.beta and not lora:
        gb["reference"] = size.total * width / GB
    trained, adapters = _learnt(size, LoraSettings(config.lora_rank) if lora else None)
    assumed = [
        f"{config.steps} updates x {config.batch_size} queries x {config.group_size} thoughts, {config.micro_batch} scored at a time per "
        f"GPU; {recipe.length} tokens each, {recipe.thought} of them sampled (the longest decides how long all wait)",
        "every thought of a group reads its own prompt; validation is not counted",
    ]
    logits = 0.0  # TRL's fused head never holds them all
    return Job(size, recipe.hardware, width, _zero(config.deepspeed), config.gradient_checkpointing, trained, adapters,
               config.micro_batch * recipe.length, logits, gb,
               {"rollouts": config.steps * rolling, "training": config.steps * thoughts * scoring}, assumed)  # fmt: skip


def _embedder(recipe: EmbedderRecipe, size: Size) -> Job:
    optim, run, speed, width = recipe.optim, recipe.run, _Speed(size, recipe.hardware), _width(recipe.run.dtype)
    lora, items = recipe.tune == "lora", 2 + recipe.hard_negatives
    passes = 1 + (2 if lora else 3) + run.checkpointing  # once more for gradient caching
    count = optim.steps * optim.batch_size * items
    trained = recipe.lora.rank * size.lora_per_rank if lora else size.matrices + size.tables
    held = optim.batch_size / recipe.hardware.gpus * items * recipe.length * size.hidden * width
    assumed = [
        f"{optim.steps} steps x {optim.batch_size} queries with {items - 1} candidates each, {recipe.length} tokens each, all of a "
        f"picture; {optim.per_device} at a time per GPU",
        "pictures of a step stay on the GPU after the tower, until its gradients are there; validation is not counted",
    ]
    return Job(size, recipe.hardware, width, _zero(run.deepspeed), run.checkpointing, trained, trained if lora else 0,
               optim.per_device * recipe.length, 0, {"pictures": held / GB},
               {"training": count * passes * speed.read(recipe.length, recipe.length, 0), "tower": count * speed.tower(recipe.length)},
               assumed)  # fmt: skip


def _align(recipe: AlignRecipe, size: Size) -> Job:
    optim, run, speed, width = recipe.optim, recipe.run, _Speed(size, recipe.hardware), _width(recipe.run.dtype)
    queries, short = optim.steps * optim.batch_size, FRAME_TOKENS + recipe.tokens
    described = recipe.described * queries
    seconds = {
        "training": described * (2 + run.checkpointing) * speed.read(short, short, recipe.tokens),
        "tower": queries * recipe.top_k * speed.tower(recipe.length),
        "own words": speed.think(described, recipe.described * optim.per_device, recipe.length, recipe.tokens),
    }
    held = optim.per_device * recipe.top_k * recipe.length * size.hidden * width
    assumed = [
        f"{optim.steps} steps x {optim.batch_size} queries of {recipe.top_k} candidates, {recipe.length} tokens each, all of a picture; "
        f"{optim.per_device} at a time per GPU",
        f"{recipe.described} descriptions of {recipe.tokens} tokens per query, none from captions, none said before",
    ]
    per_pass = optim.per_device * recipe.described
    return Job(size, recipe.hardware, width, _zero(run.deepspeed), run.checkpointing, size.module, 0, per_pass * short,
               per_pass * recipe.tokens, {"full tokens": held / GB}, seconds, assumed)  # fmt: skip


def _base(recipe: BaseRecipe, size: Size) -> Job:
    optim, run, speed, length = recipe.optim, recipe.run, _Speed(size, recipe.hardware), recipe.max_text_tokens
    count = optim.steps * optim.batch_size
    passes = 3 + run.checkpointing
    seconds = {"training": count * passes * (speed.read(length, length, length) + speed.tower(length))}
    assumed = [
        f"{optim.steps} steps x {optim.batch_size} captions of {length} tokens; {optim.per_device} at a time per GPU"
    ]
    return Job(size, recipe.hardware, _width(run.dtype), _zero(run.deepspeed), run.checkpointing, size.total - size.module, 0,
               optim.per_device * length, optim.per_device * length, {}, seconds, assumed)  # fmt: skip


def _learnt(size: Size, lora: LoraSettings | None) -> tuple[int, int]:
    """What `sft`, `distill` and `grpo` train, and of it what stands beside the model's own weights."""
    if lora is None:
        return size.matrices + size.tables + size.module, 0
    slots = len(ADDED_TOKENS) * size.hidden * (1 if size.tied else 2)
    adapters = lora.rank * size.lora_per_rank + slots
    return size.module + adapters, adapters


# -- memory and time ---------------------------------------------------------------------------------------------------


def _states(job: Job) -> dict[str, float]:
    """Weights, gradients and Adam (fp32 copy, two moments); ZeRO-2 shards the last two, ZeRO-3 all three."""
    weights, gpus = (job.size.total + job.adapters) * job.width, job.hardware.gpus
    if job.zero == 0:
        upcast = job.trained * (4 - job.width)  # what is trained is kept in fp32
        return {
            "weights": (weights + upcast) / GB,
            "gradients": job.trained * 4 / GB,
            "optimiser": job.trained * 8 / GB,
        }
    gradients = job.trained * (job.width + 4) / GB  # as they come, and in fp32 for the step
    return {"weights": weights / GB / (gpus if job.zero == 3 else 1), "gradients": gradients / gpus,
            "optimiser": job.trained * 12 / GB / gpus}  # fmt: skip


def _activations(job: Job) -> dict[str, float]:
    size = job.size
    layer = job.at_once * (10 * size.hidden + 4 * size.intermediate) * 2  # a layer with nothing recomputed
    kept = size.layers * job.at_once * size.hidden * 2 + layer if job.checkpointing else size.layers * layer
    parts = {"activations": kept / GB}
    if job.logits:
        parts["logits"] = job.logits * size.vocab * 12 / GB  # fp32 logits, log-softmax, gradient
    if job.zero == 3:  # gathered for use: the tables, and two layers
        parts["gathered"] = (size.tables + 2 * size.matrices / size.layers) * 2 / GB
    return parts


def _slot_copies(size: Size) -> dict[str, float]:
    """PEFT writes the slot rows into a copy of the head at each of three reads, and its gradient."""
    return {"slot rows": 4 * size.vocab * size.hidden * 2 / GB}


def _kv_gb(size: Size, thoughts: int, length: int, width: int) -> float:
    """The local engine's pool: rows and columns grow by doubling."""
    rows, columns = 4, 512
    while rows < thoughts:
        rows *= 2
    while columns < length:
        columns *= 2
    return rows * columns * size.layers * 2 * size.kv_width * width / GB


@dataclass(frozen=True, slots=True)
class _Speed:
    """Seconds on one GPU."""

    size: Size
    hardware: Hardware

    def read(self, tokens: float, length: float, said: float) -> float:
        """One forward pass over `tokens`, of sequences of `length`, with the logits of `said`."""
        attention = 2 * tokens * length * self.size.hidden * self.size.layers
        return self._compute(2 * (self.size.matrices * tokens + self.size.vocab * self.size.hidden * said + attention))

    def tower(self, tokens: float) -> float:
        return self._compute(2 * self.size.tower * PATCHES * tokens)

    def think(self, count: int, together: int, length: int, said: int) -> float:
        """`count` greedy or drawn thoughts, `together` at a time: prompts are read, then each step reads all weights once."""
        if not count:
            return 0.0
        weights = 2 * self.size.total / (self.hardware.bandwidth * TERA * self.hardware.use)
        step = max(weights, together * self.read(1, length, 1))
        return count * self.read(length, length, 0) + count / together * said * step

    def _compute(self, operations: float) -> float:
        return operations / (self.hardware.tflops * TERA * self.hardware.use)


def _width(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


def _zero(deepspeed: str | None) -> int:
    return {None: 0, "zero2": 2, "zero3": 3}[deepspeed]


# -- for people --------------------------------------------------------------------------------------------------------


def table(recipe: AnyRecipe, result: Estimate) -> str:
    job, hardware = result.job, result.job.hardware
    verdict = "fits" if result.fits else "DOES NOT FIT"
    before = f"\n  {'before it':<12}{job.before:8.1f}   while it thinks" if job.before else ""
    gb = "\n".join(f"  {name:<12}{value:8.1f}" for name, value in result.gb.items())
    hours = "\n".join(f"  {name:<12}{value:8.1f}" for name, value in result.hours.items())
    assumed = "\n".join(f"  {line}" for line in job.assumed)
    zero = f"ZeRO-{job.zero}" if job.zero else "no ZeRO"
    return f"""stage {recipe.stage}, {zero}, {hardware.gpus} GPU(s) of {hardware.gpu_gb:.0f} GB
parameters: {job.size.total / 1e9:.2f} B, trained {job.trained / 1e6:.1f} M
GB per rank:
{gb}
  {"total":<12}{result.total_gb:8.1f}   {verdict} {hardware.gpu_gb:.0f} GB{before}
GPU-hours:
{hours}
  {"total":<12}{result.gpu_hours:8.1f}   ({result.gpu_hours / hardware.gpus:.1f} hours on {hardware.gpus})
assumed, not measured:
{assumed}
  activation checkpointing {"on" if job.checkpointing else "off"}; {CONTEXT_GB:.0f} GB for CUDA and fragmentation
  {hardware.tflops:.0f} TFLOP/s and {hardware.bandwidth} TB/s per GPU by data sheet, {hardware.use:.0%} of both reached
"""
