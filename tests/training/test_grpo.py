"""GRPO: what is rewarded, what is scored, that sampler and scorer agree, what stays frozen, and that a resumed run is the same run."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("trl")

import torch
from retrv_r1_training import grpo, trl_private
from retrv_r1_training.grpo import make_trainer, measure, train_grpo
from retrv_r1_training.grpo_config import GrpoConfig
from retrv_r1_training.rollout import RolloutRunner, Sampling
from retrv_r1_training.stopping import NotFiniteError
from trl import GRPOTrainer

from retrv_r1_retriever.config import Config, checkpoint_path
from retrv_r1_retriever.errors import OptionsError
from retrv_r1_retriever.model.checkpoint import load_checkpoint, memory_digest
from retrv_r1_retriever.prompt import ADDED_TOKENS
from retrv_r1_retriever.trace import Sampled
from retrv_r1_retriever.types import StopReason
from tests.training.grpo_tasks import make_tasks, miniature

CONFIG = GrpoConfig(
    steps=4, lr=1e-3, batch_size=2, group_size=4, beta=0.0, loss_type="grpo", temperature=0.9, micro_batch=4,
    max_new_tokens=100, warmup=0, save_every=2,
)  # fmt: skip
SAMPLING = Sampling(0.9, 4, 100)


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(1)
    checkpoint = miniature()
    return checkpoint, make_tasks(checkpoint)


@pytest.fixture
def trainer(loaded, tmp_path):
    return make_trainer(miniature(), loaded[1], CONFIG, 0, tmp_path)


def test_validation_holds_no_more_thoughts_at_once_than_training(trainer, loaded, monkeypatch):
    """What `estimate` counts on: the KV pool never shrinks."""
    sizes, inner = [], RolloutRunner._all

    def spy(self, tasks, *rest):
        sizes.append(len(tasks))
        return inner(self, tasks, *rest)

    monkeypatch.setattr(RolloutRunner, "_all", spy)
    measure(trainer.runner, [*loaded[1]] * 3, Sampling(0.0, 0, 20))
    assert sizes == [8, 4]


def generated(trainer):
    inputs = [{"prompt": str(n)} for n in (0, 1) for _ in range(4)]
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer._generate_and_score_completions(inputs)


def test_a_rollout_scores_what_was_drawn_and_nothing_else(loaded):
    checkpoint, tasks = loaded
    rows = RolloutRunner(checkpoint).run([t for t in tasks for _ in range(4)], list(range(16)), SAMPLING)
    assert any(r.outcome.inspected for r in rows), "no inspection: this test would see nothing"
    rows += RolloutRunner(checkpoint).run(tasks, [0] * 4, replace(SAMPLING, max_new_tokens=12))
    assert {r.outcome.stop_reason for r in rows} >= {StopReason.ANSWERED, StopReason.FORCED_BY_BUDGET}
    for row in rows:
        ids = np.asarray(row.ids[row.prompt_tokens :])
        turn = row.outcome.segments[len(row.task.prompt.segments) :]
        drawn = [s.token_ids for s in turn if isinstance(s, Sampled)]
        if row.outcome.stop_reason is not StopReason.ANSWERED:
            drawn = drawn[:-1]  # an arg-max, no draw
            assert row.answer_at is None
            assert not forced_right(row).correct, "the reward does not count it"
        assert ids[row.scored].tolist() == [i for part in drawn for i in part]
        assert (row.logprobs[~row.scored] == 0).all() or row.answer_at is None
        assert not row.chunk.image[row.prompt_tokens :][row.scored].any(), "an opened picture is scored"


def forced_right(row):
    return replace(row, task=replace(row.task, right=(row.outcome.answer,)))


def test_no_figure_counts_a_forced_answer_as_correct(loaded):
    checkpoint, tasks = loaded
    rows = list(
        map(forced_right, RolloutRunner(checkpoint).run(tasks[:2], [0] * 2, replace(SAMPLING, max_new_tokens=12)))
    )
    assert grpo.summary(rows)["correct"] == 0
    assert grpo.summary(rows)["forced"] == grpo.groups(rows, [0.0, 0.0])["groups_all_wrong"] == 1


@pytest.mark.parametrize(("start", "refused", "warned"), [(0, 1.6, True), (0, 1.4, False), (3, 1.6, False)])
def test_a_start_whose_inspections_are_refused_is_warned_of(loaded, caplog, monkeypatch, start, refused, warned):
    monkeypatch.setattr(grpo, "summary", lambda rows: {"refused": refused, "inspections": 1.0})
    rewards, rows = grpo._reward_function(CONFIG), RolloutRunner(loaded[0]).run(loaded[1][:1], [0], SAMPLING)
    for update in range(start, start + 4):
        rewards(rows, SimpleNamespace(global_step=update), lambda name, value: None)
    assert not caplog.text, "too early to say"
    for update in range(start + 4, start + 9):
        rewards(rows, SimpleNamespace(global_step=update), lambda name, value: None)
    assert caplog.text.count("1.6 refused requests a thought so far, 1.0 opened candidates") == warned


def test_the_same_seed_draws_the_same_thought_in_any_company(loaded):
    checkpoint, tasks = loaded
    runner = RolloutRunner(checkpoint)
    together = runner.run(tasks, [7] * 4, SAMPLING)
    alone = runner.run(tasks[2:3], [7], SAMPLING)
    assert together[2].ids == alone[0].ids
    assert runner.run(tasks[2:3], [8], SAMPLING)[0].ids != alone[0].ids


def test_sampler_and_scorer_agree(trainer):
    batch = generated(trainer)
    logps = scores(trainer, batch)
    rows = batch["rows"]
    assert any(r.answer_at is not None for r in rows)
    for row, values in zip(rows, logps.detach().numpy(), strict=True):
        got, want = values[: len(row.scored)][row.scored], row.logprobs[row.scored]
        np.testing.assert_allclose(got, want, atol=1e-4)


def scores(trainer, batch, at_once=3):
    trainer._rows = batch["rows"]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    keep = batch["completion_ids"].shape[1]
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, keep, batch_size=at_once)[0]


def test_no_gradient_through_injected_tokens_and_the_loss_is_the_formula(trainer, monkeypatch):
    batch = generated(trainer)
    batch["advantages"] = torch.linspace(-1.0, 1.0, len(batch["rows"]))  # whatever these weights earn
    seen = []
    inner = GRPOTrainer._get_per_token_logps_and_entropies

    def spy(self, *args, **kwargs):
        out = inner(self, *args, **kwargs)
        out[0].retain_grad()
        seen.append(out[0])
        return out

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", spy)
    trainer._compute_loss(trainer.model, batch).backward()
    scored = torch.zeros_like(seen[0], dtype=torch.bool)
    for mask, row in zip(scored, batch["rows"], strict=True):
        mask[: len(row.scored)] = torch.from_numpy(row.scored)
    gradient = seen[0].grad
    assert (gradient[~scored] == 0).all(), "injected tokens carry gradient"
    # loss_type grpo, one update per rollout: d loss / d log p = -advantage / tokens of the row / rows
    want = -batch["advantages"][:, None] / scored.sum(1, keepdim=True) / len(scored) * scored
    torch.testing.assert_close(gradient, want.expand_as(gradient), atol=1e-7, rtol=1e-5)
    assert (want != 0).any()


def test_rows_that_come_apart_from_their_batch_are_noticed(trainer):
    batch = generated(trainer)
    batch["rows"] = batch["rows"][::-1]
    with pytest.raises(RuntimeError, match="came apart"):
        trainer._compute_loss(trainer.model, batch)


def test_a_loss_that_is_not_finite_stops_with_a_saved_state(loaded, tmp_path, monkeypatch):
    advantages = iter([1.0, 1.0, float("nan")])  # two micro-batches an update
    inner = GRPOTrainer._compute_loss

    def broken(self, model, inputs):
        return inner(self, model, {**inputs, "advantages": inputs["advantages"] * next(advantages)})

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", broken)
    with pytest.raises(
        NotFiniteError, match=r"grpo: loss at step 1, queries \[.*: expected a finite number, got \[nan\]"
    ):
        train_grpo(miniature(), loaded[1], [], CONFIG, 0, tmp_path / "states", tmp_path / "log.jsonl")
    saved = tmp_path / "states" / "stopped" / "checkpoint-1"
    assert (saved / "optimizer.pt").exists()
    assert (saved / "model.safetensors").exists()


def untied(checkpoint):
    """The same model with a head of its own."""
    model = checkpoint.model
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    return checkpoint


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("start", [miniature, lambda: untied(miniature())], ids=["tied", "untied"])
def test_before_the_first_step_kl_is_zero_and_the_scorer_says_what_the_sampler_said(loaded, tmp_path, start, lora_rank):
    trainer = make_trainer(start(), loaded[1], replace(CONFIG, beta=0.1, lora_rank=lora_rank), 0, tmp_path)
    batch = generated(trainer)
    got = scores(trainer, batch)
    for row, values in zip(batch["rows"], got.detach().numpy(), strict=True):
        np.testing.assert_allclose(values[: len(row.scored)][row.scored], row.logprobs[row.scored], atol=1e-4)
    mask = batch["completion_mask"].bool()
    alike = scores(
        trainer, batch, CONFIG.micro_batch
    )  # as many at once as TRL read the reference with: sums in the same order
    assert (alike - batch["ref_per_token_logps"])[mask].abs().max() == 0
    assert (got - batch["ref_per_token_logps"])[mask].abs().max() < 1e-5
    heads = [n for n, p in trainer.model.named_parameters() if p.requires_grad and ("lm_head" in n)]
    assert bool(heads) == (start is not miniature), "slot rows of the head learn too when it is untied"


def test_trained_weights_are_float32_beside_frozen_ones_in_bfloat16(loaded, tmp_path):
    """Updates of a small learning rate vanish in bfloat16; rollouts and scores agree as far as its 8 bits go."""
    start = load_checkpoint(checkpoint_path(Config()), device="cpu", dtype="bfloat16")
    config = replace(CONFIG, dtype="bfloat16", lora_rank=4, lr=1e-6, steps=1, save_every=0)
    trainer = make_trainer(start, loaded[1], config, 0, tmp_path)
    learnt = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in learnt.values()} == {torch.float32}
    assert trainer.policy.model.visual.dtype == trainer.policy.get_input_embeddings().weight.dtype == torch.bfloat16
    with trainer.compute_loss_context_manager():
        batch = generated(trainer)
        got = scores(trainer, batch).detach()
    apart = np.concatenate([
        values[: len(row.scored)][row.scored] - row.logprobs[row.scored]
        for row, values in zip(batch["rows"], got.float().numpy(), strict=True)
    ])  # fmt: skip
    assert np.abs(apart).mean() < 0.02
    before = {n: p.detach().clone() for n, p in learnt.items()}
    trainer.train()
    assert sum(not torch.equal(before[n], p) for n, p in learnt.items()) > len(learnt) / 2


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_frozen_weights_get_no_gradient_that_clipping_would_count(loaded, tmp_path, lora_rank):
    """PEFT thaws a module as a whole when its adapter is switched on again, as after the reference's pass."""
    trainer = make_trainer(miniature(), loaded[1], replace(CONFIG, beta=0.1, lora_rank=lora_rank), 0, tmp_path)
    learnt = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer._compute_loss(trainer.model, generated(trainer)).backward()
    found = {n for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert found == learnt
    assert not any(".in_proj." in n for n in learnt)


def test_lora_starts_from_the_seed(loaded, tmp_path):
    config = replace(CONFIG, lora_rank=4)
    one, same, other = (
        {
            n: p
            for n, p in make_trainer(miniature(), loaded[1], config, seed, tmp_path).model.named_parameters()
            if "lora_A" in n
        }
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_only_what_may_move_moves_and_kl_starts_at_zero(loaded, tmp_path, lora_rank):
    checkpoint, tasks = loaded
    config = replace(CONFIG, steps=2, beta=0.1, lora_rank=lora_rank, save_every=0)
    before = {k: v.clone() for k, v in checkpoint.model.state_dict().items()}
    model = train_grpo(miniature(), tasks, tasks[:1], config, 0, tmp_path / "states", tmp_path / "log.jsonl")
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[0]["kl"] == pytest.approx(0.0, abs=1e-7)
    assert log[1]["kl"] > 0
    assert 0 <= log[1]["val_R@1_all"] <= 1
    after = model.state_dict()
    processor, manifest = checkpoint.processor, checkpoint.manifest
    assert memory_digest(before, processor, manifest) == memory_digest(after, processor, manifest)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert any("self_attn" in k for k in moved)
    assert any("icm.att2" in k for k in moved)
    assert not any(".visual." in k or ".in_proj." in k for k in moved)
    table = "model.language_model.embed_tokens.weight"
    rows = (before[table] != after[table]).any(1).nonzero().flatten().tolist()
    assert rows
    assert set(rows) <= {processor.token_id(t) for t in ADDED_TOKENS}
    RolloutRunner(replace(checkpoint, model=model)).run(tasks[:1], [0], SAMPLING)  # what comes out serves


def test_a_resumed_run_is_the_uninterrupted_one(loaded, tmp_path, monkeypatch):
    _, tasks = loaded

    def train(name):
        return train_grpo(miniature(), tasks, [], CONFIG, 3, tmp_path / name, tmp_path / f"{name}.jsonl").state_dict()

    whole = train("whole")
    rollouts = grpo._Source.__call__

    def killed(self, numbers, trainer):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return rollouts(self, numbers, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(grpo._Source, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            train("parts")
    resumed = train("parts")
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, atol=0, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    figures = [[json.loads(line) for line in (tmp_path / f"{n}.jsonl").open()] for n in ("whole", "parts")]
    whole_rows, parts = ([(r["step"], r["lambda"], r["reward"]) for r in rows] for rows in figures)
    assert [lam for _, lam, _ in whole_rows] == [0.0, 0.25, 0.5, 0.75]
    assert parts == whole_rows, "a resumed run drops the rows after its state"


def test_another_trl_is_refused():
    trl_private.check_trl()

    class Changed(GRPOTrainer):
        def _compute_loss(self, inputs):
            return None

    with pytest.raises(OptionsError, match=r"GRPOTrainer\._compute_loss.*expected \('self', 'model', 'inputs'\)"):
        trl_private.check_trl(Changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"micro_batch": 3}, "whole micro-batches"), ({"penalty": "rising"}, "progress"), ({"iterations": 2, "save_every": 3}, "multiple"),
     ({"std_floor": 0.15, "scale_rewards": "batch"}, "a group's own deviation, got scale_rewards 'batch'")],
)  # fmt: skip
def test_bad_settings_are_refused(change, message):
    with pytest.raises(OptionsError, match=message):
        replace(CONFIG, **change)


def test_groups_that_are_cut_between_processes_are_not_reported(monkeypatch, loaded):
    def told(processes):
        monkeypatch.setattr(grpo, "world", lambda: processes)
        seen: dict[str, float] = {}
        rollouts = RolloutRunner(miniature()).run(list(loaded[1][:1]) * 2, [0, 1], Sampling(1.0, 2, 40))
        grpo._reward_function(CONFIG)(
            row=rollouts, trainer_state=SimpleNamespace(global_step=0), log_metric=seen.__setitem__
        )
        return set(seen)

    assert told(1) - told(4) == {"groups_equal", "groups_all_right", "groups_all_wrong"}


def test_a_floor_keeps_small_differences_small():
    """Four right answers, one of which opened more; and half wrong. Divided by the deviation alone, both groups weigh alike."""
    rewards = torch.tensor([1.2, 1.2, 1.2, 1.15, 1.2, 0.2, 1.2, 0.2]).view(2, 4)
    centred = (rewards - rewards.mean(1, keepdim=True)).flatten()
    alike, soft = (trl_private.softened(centred, 4, floor).view(2, 4).abs().amax(1) for floor in (1e-4, 0.15))
    assert alike[0] > alike[1] > 0.8
    assert soft[0] < 0.25 < 0.65 < soft[1]
    want = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 0.15)
    torch.testing.assert_close(trl_private.softened(centred, 4, 0.15), want.flatten())


def test_the_trainer_softens_its_advantages(loaded, tmp_path):
    config = replace(CONFIG, std_floor=0.15)
    made = make_trainer(miniature(), loaded[1], config, 0, tmp_path)
    batch = generated(made)
    rewards = torch.tensor(
        [made.reward_funcs[0](row=[r], trainer_state=made.state, log_metric=lambda *_: None)[0] for r in batch["rows"]]
    )
    parts = rewards.view(-1, 4)
    want = (parts - parts.mean(1, keepdim=True)) / (parts.std(1, keepdim=True) + 0.15)
    torch.testing.assert_close(batch["advantages"], want.flatten(), atol=1e-5, rtol=1e-4)
