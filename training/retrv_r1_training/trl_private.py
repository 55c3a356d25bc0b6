"""The only file that knows private parts of TRL: three overridden methods and one helper, checked before a training begins.

What rides with a row (memory, pictures, positions) is no tensor that TRL knows. It travels as a Python list in TRL's batch, which TRL
shuffles and splits with the tensors, and is turned into the model's own keyword arguments when a batch is scored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import torch
import trl
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head

from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Processor, collate
from retrv_r1_training.rollout import Rollout, padded
from retrv_r1_training.stopping import stop_not_finite

#: Method -> its first parameters, as this file relies on them.
RELIED_ON: dict[str, tuple[str, ...]] = {
    "_generate_and_score_completions": ("self", "inputs"),
    "_compute_loss": ("self", "model", "inputs"),
    "_get_per_token_logps_and_entropies": ("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
}
SCORER_CALL = "outputs = model(**model_inputs, labels=labels, fused_lm_head=True)"

#: (prompt numbers, trainer) -> one rollout per number, in order
RolloutSource = Callable[[Sequence[int], "RolloutTrainer"], list[Rollout]]


def check_trl(trainer: type = GRPOTrainer) -> None:
    """Raise `OptionsError` where TRL is not the one this file was written for: a silent change would train on wrong numbers."""
    for name, expected in RELIED_ON.items():
        method = getattr(trainer, name, None)
        got = tuple(inspect.signature(method).parameters) if method else ()
        if got[: len(expected)] != expected:
            raise _changed(f"GRPOTrainer.{name}", expected, got or "no such method")
    if SCORER_CALL not in inspect.getsource(trainer._get_per_token_logps_and_entropies):  # type: ignore[attr-defined]
        raise _changed("GRPOTrainer's scoring call", SCORER_CALL, "another call")


def _changed(what: str, expected: object, got: object) -> OptionsError:
    return OptionsError(
        explain(f"{what} (trl {trl.__version__})", expected=expected, got=got, fix="Install trl>=1.10,<1.17.")
    )


class RolloutTrainer(GRPOTrainer):
    """`GRPOTrainer` whose completions come from `source`, with an exact answer probability and a reference without a path.

    The dataset's `prompt` column holds prompt numbers as text.
    reference: of the KL term when all weights train; None = no KL, or the adapter's own base
    std_floor: see `GrpoConfig`; TRL is then told to scale nothing
    frozen: what must stay without gradients, whatever PEFT switches on in between
    """

    def __init__(
        self, *args: Any, source: RolloutSource, processor: Processor, beta: float,
        reference: nn.Module | None = None, std_floor: float = 0.0, **kwargs: Any,  # TRL's own arguments
    ) -> None:  # fmt: skip
        check_trl()
        self.source, self.processor, self._std_floor = source, processor, std_floor
        self._rows: list[Rollout] = []
        self.frozen: list[nn.Parameter] = []
        super().__init__(*args, processing_class=processor.tokenizer, rollout_func=_rollout, **kwargs)
        head = self.policy.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            head.register_parameter("bias", None)  # PEFT's wrapper of a tied head has none, and TRL asks for it
        if reference is not None:
            add_fused_lm_head(reference, temperature=self.temperature)
            self.ref_model = self._placed(reference.eval())
            self.beta = beta

    def _placed(self, reference: nn.Module) -> nn.Module:
        """As TRL places a reference that it has loaded itself."""
        if self.is_deepspeed_enabled:
            return cast(nn.Module, prepare_deepspeed(reference, self.accelerator))
        return cast(nn.Module, self.accelerator.prepare_model(reference, evaluation_mode=True))

    @property
    def policy(self) -> RetrvR1ForConditionalGeneration:
        """Our model inside whatever wraps it."""
        return _ours(self.accelerator.unwrap_model(self.model))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        scored = super()._generate_and_score_completions(inputs)
        if self._std_floor:
            scored["advantages"] = softened(scored["advantages"], self.num_generations, self._std_floor)
        return {**scored, "rows": self._rows}  # a list: TRL permutes and slices it with the tensors

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._rows = inputs["rows"]  # super() hands on only the tensors that it names
        for (
            parameter
        ) in self.frozen:  # PEFT thaws whole modules when it switches adapters on again after the reference's pass
            parameter.requires_grad_(False)
        loss: Tensor = super()._compute_loss(model, inputs)
        values = self.accelerator.gather(loss.detach()[None])  # all processes see, and stop, together
        if not torch.isfinite(values).all():
            queries = list(dict.fromkeys(r.task.id for r in inputs["rows"]))
            stop_not_finite(self, "grpo", values.tolist(), f"queries {queries}", "grpo.lr")
        return loss

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, *args: Any, **kwargs: Any,  # handed on as they are
    ) -> Any:  # fmt: skip
        rows = iter(self._rows)  # TRL scores them in order, in chunks
        keep = args[2] if len(args) > 2 else kwargs["logits_to_keep"]

        def score(**inputs: Any) -> Any:  # TRL's own call
            part = list(islice(rows, len(inputs["input_ids"])))
            return self._score(model, part, keep, inputs)

        return super()._get_per_token_logps_and_entropies(score, *args, **kwargs)

    def _score(self, model: nn.Module, rows: Sequence[Rollout], keep: int, inputs: dict[str, Any]) -> Any:
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        ours = _ours(self.accelerator.unwrap_model(model))
        width = ids.shape[1]
        pad_id = int(self.processor.tokenizer.pad_token_id)
        batch = collate([padded(r, width - keep, width, pad_id) for r in rows], self.processor, ids.device)
        if not torch.equal(batch.input_ids[mask], ids[mask]):
            raise RuntimeError("a batch and the rows that belong to it came apart: TRL shuffled one without the other")
        with torch.no_grad():  # the tower is frozen
            features = encode_pictures(ours.model, self.processor, batch.pictures)
        seen: list[Tensor] = []
        with _hidden_states(ours.model, seen):
            out = model(
                **inputs, position_ids=batch.positions, image_features=features, image_mask=batch.image_mask,
                compressed=batch.compressed,
            )  # fmt: skip
        out.log_probs = restrict_answers(
            out.log_probs, seen[0], ours.get_output_embeddings(), rows, width - keep, self.temperature
        )
        return out


def softened(centred: Tensor, group: int, floor: float) -> Tensor:
    """(r - mean) / (std + floor) of each group, from r - mean of whole groups, one after another."""
    parts = centred.view(-1, group)
    return (parts / (parts.std(1, keepdim=True) + floor)).flatten()


def restrict_answers(
    log_probs: Tensor, hidden: Tensor, head: nn.Module, rows: Sequence[Rollout], start: int, temperature: float
) -> Tensor:
    """`log_probs` with the answers' entries normalised over the slots they were drawn from, as the sampler did.

    log_probs (B, L - 1): entry c - 1 is of token c, read from hidden (B, L, H) at c - 1. start: column of the first completion token.
    """
    picked = [(b, start + r.answer_at, r) for b, r in enumerate(rows) if r.answer_at is not None]
    if not picked:
        return log_probs
    row = torch.tensor([b for b, _, _ in picked], device=hidden.device)
    column = torch.tensor([c for _, c, _ in picked], device=hidden.device)
    logits = head(hidden[row, column - 1]).float() / temperature
    allowed = torch.full(logits.shape, float("-inf"), device=logits.device)
    chosen = []
    for i, (_, c, r) in enumerate(picked):
        allowed[i, list(r.slots)] = 0
        chosen.append(int(r.chunk.ids[r.prompt_tokens + c - start]))
    values = torch.log_softmax(logits + allowed, -1)[torch.arange(len(picked)), chosen]
    return log_probs.index_put((row, column - 1), values.to(log_probs.dtype))


def _rollout(prompts: list[str], trainer: RolloutTrainer) -> dict[str, list[Any]]:
    """TRL's `RolloutFunc`: one entry per completion, already repeated `num_generations` times."""
    rows = trainer._rows = trainer.source([int(p) for p in prompts], trainer)
    cut = [r.prompt_tokens for r in rows]
    return {
        "prompt_ids": [r.ids[:n] for r, n in zip(rows, cut, strict=True)],
        "completion_ids": [r.ids[n:] for r, n in zip(rows, cut, strict=True)],
        "logprobs": [r.logprobs.tolist() for r in rows],
        "env_mask": [r.scored.astype(int).tolist() for r in rows],
        "row": rows,  # an extra key: the reward function gets it
    }


def _ours(model: nn.Module) -> RetrvR1ForConditionalGeneration:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return cast(RetrvR1ForConditionalGeneration, base)


@contextmanager
def _hidden_states(inner: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """What TRL's fused head reads and does not hand out."""
    hook = inner.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state))
    try:
        yield
    finally:
        hook.remove()
