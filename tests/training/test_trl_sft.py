"""`sft` on TRL: only sampled tokens are learnt, accumulation and resuming change nothing, memory stays valid, NaN stops."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from retrv_r1_training import trl_sft
from retrv_r1_training.cli import main
from retrv_r1_training.examples import TraceExamples, trace_examples
from retrv_r1_training.loss import TokenWeights
from retrv_r1_training.mbeir_tasks import Folder
from retrv_r1_training.overrides import load
from retrv_r1_training.sft import SftLoss, Totals, losses
from retrv_r1_training.sft_recipe import ExampleSettings, Optimisation, SftRecipe, accumulation
from retrv_r1_training.stage_checkpoint import with_list_lengths, write_manifest

from retrv_r1_retriever.errors import InputError, OptionsError
from retrv_r1_retriever.model.checkpoint import Manifest, load_checkpoint, read_manifest
from retrv_r1_retriever.prompt import ADDED_TOKENS
from tests.tiny import picture

PLAIN = SftLoss(TokenWeights(1, 1, 1, 1, 1, 1, 1, 1), answer=0, direct=0, relation=0)
DONE = ["optim.steps=4", "run.save=2", "data.validation_queries=4", "run.evaluate=2", "run.report_to=[tensorboard]"]


def sft(material, run, *sets):
    overrides = [part for text in sets for part in ("--set", text)]
    return main(["sft", str(material / "recipe.yaml"), "--run", str(run), "--threads", "1", *overrides])


def logged(run, key="loss"):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.fixture(scope="module")
def source(material):
    recipe = load(SftRecipe, material / "recipe.yaml", ["data.validation_queries=4"])
    start = load_checkpoint(recipe.checkpoint, device="cpu")
    folder = Folder(recipe.data, material / "start", recipe.seed)
    return start, *trace_examples(recipe, start, folder)[:2]


@pytest.fixture(scope="module")
def done(material, tmp_path_factory):
    """A finished run of four steps with a state after every second."""
    run = tmp_path_factory.mktemp("done") / "run"
    assert sft(material, run, *DONE) == 0
    return run


@pytest.fixture(scope="module")
def opening(source):
    """An example whose thought opens candidates, so that it has injected tokens."""
    start, train, _ = source
    example = next(e for e in (train[n] for n in range(len(train))) if e.turn.pictures)
    assert (~example.turn.sampled).sum() > 10
    return start, example


def test_loss_is_plain_cross_entropy_on_sampled_tokens_and_nothing_flows_through_injected_ones(opening):
    """Own masked cross-entropy on stock logits; the head's gradient is zero wherever the next token was not sampled."""
    start, example = opening
    model, seen = start.model, []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out))
    loss, _, _ = losses(model, start.processor, [example], PLAIN)
    handle.remove()
    sampled = int(example.turn.sampled.sum())
    assert seen[0].shape[0] == sampled, "no other position reaches the head"
    chunk = type(example.prompt).join([example.prompt, example.turn])
    from retrv_r1_training.loss import hidden_states

    hidden, batch = hidden_states(model, start.processor, [chunk])
    logits = model.lm_head(hidden)
    logits.retain_grad()
    by_token = -torch.log_softmax(logits[0, :-1].float(), -1).gather(-1, batch.input_ids[0, 1:, None])[:, 0]
    mask = batch.sampled[0, 1:]
    want = by_token[mask].mean()
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    want.backward()
    moved = logits.grad[0].abs().amax(-1)
    assert (moved[:-1][mask] > 0).all()
    assert moved[:-1][~mask].max() == 0
    assert moved[-1] == 0


def test_drawn_examples_depend_on_seed_and_number_alone(source):
    _, train, held_out = source
    assert len(train) == 8
    assert len(held_out) == 4
    assert (train[5].turn.ids == train[5].turn.ids).all()
    assert any(
        len(train[5].turn) != len(train[n].turn) or (train[5].turn.ids != train[n].turn.ids).any() for n in (1, 2)
    )
    with pytest.raises(IndexError):
        train[8]


def test_direct_share_mutes_the_direct_read_of_some(source):
    start, train, _ = source
    some = TraceExamples(train._parts, train._reader, 40, ExampleSettings(direct_share=0.5), 0)
    flags = [some[n].direct for n in range(40)]
    assert 8 < sum(flags) < 32
    examples = [train[0], train[1]]
    muted = [replace(examples[0], direct=False), examples[1]]
    only = SftLoss(PLAIN.tokens, answer=0, direct=1, relation=0)
    plain = [losses(start.model, start.processor, e, PLAIN)[0].item() for e in (examples, muted)]
    both, one = (losses(start.model, start.processor, e, only)[0].item() - plain[0] for e in (examples, muted))
    second = losses(start.model, start.processor, examples[1:], only)[0].item()
    second -= losses(start.model, start.processor, examples[1:], PLAIN)[0].item()
    assert plain[0] == pytest.approx(plain[1], rel=1e-5)
    assert one == pytest.approx(second, rel=1e-3), "the mean is over those that take part"
    assert both != pytest.approx(one, rel=1e-3)


def test_ranknet_joins_the_direct_read(source):
    start, train, _ = source
    examples = [train[n] for n in range(4)]
    with_rank = SftLoss(PLAIN.tokens, 0, direct=1, relation=0, ranknet=10)
    without = SftLoss(PLAIN.tokens, 0, direct=1, relation=0)
    a, b = (losses(start.model, start.processor, examples, w)[0].item() for w in (with_rank, without))
    assert a > b


def test_two_times_four_is_eight(source):
    """Gradients of two micro-batches, each divided by the totals of both, are those of one batch."""
    start, train, _ = source
    weights = SftLoss(ranknet=10)
    examples = [train[n] for n in range(8)]
    totals = Totals.of(examples, start.processor, weights)
    assert totals.tokens > 0

    def gradients(parts):
        start.model.zero_grad()
        value = 0.0
        for part in parts:
            loss, _, _ = losses(start.model, start.processor, part, weights, totals)
            loss.backward()
            value += loss.item()
        return value, [p.grad.clone() for p in start.model.model.icm.att1.parameters() if p.grad is not None]

    (one, whole), (two, halves) = gradients([examples]), gradients([examples[:4], examples[4:]])
    assert one == pytest.approx(two, rel=1e-5)
    assert len(whole) == 7  # of 8: the folded key's bias drops out
    for a, b in zip(whole, halves, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    start.model.zero_grad()


def test_accumulation_of_a_run_is_its_large_batch(material, tmp_path):
    sets = ["optim.batch_size=8", "optim.steps=3"]
    assert sft(material, tmp_path / "large", *sets, "optim.per_device=8") == 0
    assert sft(material, tmp_path / "small", *sets, "optim.per_device=4") == 0
    large, small = logged(tmp_path / "large"), logged(tmp_path / "small")
    assert len(large) == 3
    assert large == pytest.approx(small, rel=1e-4)
    assert len(set(large)) == 3


@pytest.mark.parametrize("left", ["no state", "half a state"])
def test_resumed_run_is_the_uninterrupted_one(material, done, tmp_path, left):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    if left == "no state":
        shutil.rmtree(run / "checkpoint-4")
    else:
        (run / "checkpoint-4" / "trainer_state.json").unlink()
    shutil.rmtree(run / "checkpoint")
    assert sft(material, run, *DONE) == 0
    for key in ("loss", "grad_norm", "eval_loss", "learning_rate"):
        assert logged(run, key) == logged(done, key), key
    assert len(logged(run)) == 4
    states = [trl_sft.load_file(folder / "checkpoint-4" / trl_sft.TRAINED) for folder in (run, done)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.parametrize("changed", ["traces", "start"])
def test_a_run_does_not_go_on_with_other_inputs(material, done, tmp_path, capsys, changed):
    """The recipe names the same files; one of them is another by now."""
    run, recipe = tmp_path / "run", yaml.safe_load((done / "recipe.yaml").read_text())
    shutil.copytree(done, run)
    shutil.rmtree(run / "checkpoint")
    digest = read_manifest(material / "start").checkpoint_digest
    if changed == "traces":
        file = Path(recipe["data"]["train"][0]["traces"])
        before, said = file.read_text(), f"{file} was {file.stat().st_size:,} bytes, "
        other = before[: len(before) // 2]
    else:
        file = material / "start" / "retrv" / "manifest.json"
        before, said = file.read_text(), f"start was checkpoint {digest}, embedder "
        other = before.replace(digest, "0" * 16)
    file.write_text(other)
    try:
        assert sft(material, run, *DONE) == 1
    finally:
        file.write_text(before)
    message = capsys.readouterr().err
    assert "inputs.yaml: expected the data this folder was started with, got another one: " + said in message
    assert sft(material, run, *DONE) == 0, "they are back"


def test_a_finished_run_is_left_alone(material, done, tmp_path, caplog):
    """`calibrate` has written into its manifest since."""
    run = tmp_path / "run"
    shutil.copytree(done, run)
    write_manifest(run / "checkpoint", replace(read_manifest(run / "checkpoint"), think_margin=0.5))
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file() and file.name != ".lock"}
    with caplog.at_level("INFO"):
        assert sft(material, run, *DONE) == 0
    assert "is finished" in caplog.text
    assert read_manifest(run / "checkpoint").think_margin == 0.5
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_exported_checkpoint_keeps_memory_valid_and_has_learnt(material, done):
    before, after = read_manifest(material / "start"), read_manifest(done / "checkpoint")
    assert after.memory_digest == before.memory_digest
    assert after.embedder_digest == before.embedder_digest
    assert after.checkpoint_digest != before.checkpoint_digest
    assert after.trained_top_k == 3
    weights = [f / "retrv" / "embedder" / "model.safetensors" for f in (material / "start", done / "checkpoint")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    old, new = (load_checkpoint(f, device="cpu", dtype="float32") for f in (material / "start", done / "checkpoint"))
    rows = [old.processor.token_id(t) for t in ADDED_TOKENS]
    tables = [c.model.get_input_embeddings().weight for c in (old, new)]
    moved = (tables[0] != tables[1]).any(1)
    assert moved[rows].any()
    assert moved.sum() == moved[rows].sum()
    layer = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(old.model.state_dict()[layer], new.model.state_dict()[layer]), "LoRA is merged"


@pytest.mark.parametrize(
    ("before", "stated", "after"), [(5, None, 5), (12, None, 8), (0, None, 0), (5, 0, 0), (0, 4, 4)]
)
def test_the_shortest_list_is_that_of_the_start_unless_the_recipe_says_one(material, before, stated, after):
    data = replace(load(SftRecipe, material / "recipe.yaml").data, top_k=8, min_k=stated)
    assert with_list_lengths(Manifest("x", trained_top_k=20, trained_min_k=before), data).trained_min_k == after


def test_run_leaves_logs_and_the_resolved_recipe(material, done):
    assert load(SftRecipe, done / "recipe.yaml").optim.steps == 4
    assert len(logged(done)) == 4
    assert len(logged(done, "eval_direct")) == 2, "R@1 of the direct read on the validation slice"
    assert all(0 <= v <= 1 for v in logged(done, "direct"))
    assert list(done.rglob("events.out.tfevents.*"))


def test_the_direct_reads_recall_counts_every_held_out_list_once(source, material, tmp_path, monkeypatch):
    """Three lists in batches of two: two right and one wrong are two thirds, not the mean of 1 and 0."""
    recipe = load(SftRecipe, material / "recipe.yaml", ["data.validation_queries=3", "optim.per_device=2"])
    start, train, held_out = source
    few = [held_out[n] for n in range(3)]
    trainer = trl_sft.build(recipe, tmp_path, replace(start, model=copy.deepcopy(start.model)), train, few)

    def judged(net, processor, examples, *more):
        loss, metrics, _ = losses(net, processor, examples, *more)
        hits = torch.tensor([e is not few[2] for e in examples])
        return loss, metrics | {"direct": hits.float().mean().item()}, hits

    monkeypatch.setattr(trl_sft, "losses", judged)
    logged = []
    monkeypatch.setattr(trl_sft.SFTTrainer, "log", lambda self, logs, *a: logged.append(dict(self._metrics["eval"])))
    trainer.evaluate()
    assert logged[0]["direct"] == [pytest.approx(2 / 3)]


@pytest.mark.parametrize(("tune", "dtype"), [("full", "float32"), ("full", "bfloat16"), ("lora", "bfloat16")])
def test_memory_stays_valid_in_every_mode(material, tmp_path, tune, dtype):
    assert sft(material, tmp_path / "run", f"tune={tune}", f"run.dtype={dtype}", "run.checkpointing=true") == 0
    assert all(math.isfinite(v) for v in logged(tmp_path / "run"))
    assert (
        read_manifest(tmp_path / "run" / "checkpoint").memory_digest == read_manifest(material / "start").memory_digest
    )


def test_a_loss_that_is_not_finite_stops_with_a_saved_state(material, tmp_path, monkeypatch, capsys):
    calls = []

    def broken(*args):
        calls.append(1)
        loss, metrics, hits = losses(*args)
        return (loss * float("nan") if len(calls) == 2 else loss), metrics, hits

    monkeypatch.setattr(trl_sft, "losses", broken)
    assert sft(material, tmp_path / "run") == 1
    message = capsys.readouterr().err
    assert "loss at step 1, examples [" in message
    assert "expected a finite number, got [nan]" in message
    saved = tmp_path / "run" / "stopped" / "checkpoint-1"
    assert (saved / trl_sft.TRAINED).exists()
    assert (saved / "optimizer.pt").exists()
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_pixels_under_zero3_are_refused(source):
    start, train, held_out = source
    example = train[0]
    raw = replace(example, prompt=replace(example.prompt, pictures=(picture(0),)))
    collator = trl_sft.Collator(start.processor, PLAIN, [raw], held_out, True)
    with pytest.raises(InputError, match="pictures under ZeRO-3: expected tower tokens"):
        collator([{"number": 0, "held_out": False}])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("data.root=nowhere", "data.root nowhere: expected a folder of M-BEIR files, got none"),
        ("data.top_k=2", "3 candidates, data.top_k is 2"),
        ("data.train=[{queries: q.jsonl, pool: p.jsonl}]", "traces of q.jsonl: expected a file, got none"),
        ("optim.per_device=3", "optim.batch_size: expected a multiple of per_device x processes = 3 x 1, got 4"),
        ("checkpoint=nowhere", "checkpoint 'nowhere': expected a folder or a hub id, got no folder"),
    ],
)
def test_a_recipe_that_cannot_run_says_why(material, tmp_path, capsys, sets, message):
    assert sft(material, tmp_path / "run", sets) == 1
    assert message in capsys.readouterr().err


def test_zero_is_only_at_the_end(material, tmp_path):
    assert sft(material, tmp_path, "run.evaluate=0", "run.save=0", "data.validation_queries=4") == 0
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2]
    assert [state.name for state in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_recipe_that_could_not_run_can_be_mended_in_its_folder(material, tmp_path, capsys):
    run = tmp_path / "run"
    assert sft(material, run, "data.root=nowhere") == 1
    assert sft(material, run, "optim.steps=1") == 0
    assert sft(material, run, "optim.steps=3") == 1
    assert "recipe this folder was started with, got another one: optim.steps was 1, is 3." in capsys.readouterr().err


def test_trajectory_does_not_depend_on_the_number_of_gpus():
    optim = Optimisation(steps=1, batch_size=64, per_device=2)
    assert [accumulation(optim, world) for world in (1, 8)] == [32, 4]
    with pytest.raises(OptionsError, match="= 2 x 64, got 64"):
        accumulation(optim, 64)
