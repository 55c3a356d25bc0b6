"""Slot rows and LoRA: nothing changes at step 0, TRL's fused head agrees, only the right tensors learn, merging is exact."""

from __future__ import annotations

import copy

import pytest
import torch
from retrv_r1_training.adapters import load_trained, merged, slot_rows, train_fully, trained_state, with_lora
from retrv_r1_training.sft_recipe import LoraSettings
from trl.trainer.utils import add_fused_lm_head

LORA = LoraSettings(rank=4, alpha=8)


@pytest.fixture(params=["tied", "untied"])
def model(request, checkpoint):
    model = copy.deepcopy(checkpoint.model)
    if request.param == "untied":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, 0))
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    return model


@pytest.fixture
def ids(checkpoint):
    rows = slot_rows(checkpoint.processor)
    return torch.tensor([checkpoint.processor.tokenise("which card is red") + rows[:4] + rows[-6:]])


def log_probs(model, ids):
    return torch.log_softmax(model(input_ids=ids).logits.float(), -1)


def stir(model):
    """Adapters away from where they start, where they do nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "trainable_tokens" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def test_kl_is_zero_before_the_first_step(model, checkpoint, ids):
    before = log_probs(model, ids)
    wrapped = with_lora(model, checkpoint.processor, LORA)
    after = log_probs(wrapped, ids)
    kl = (after.exp() * (after - before)).sum(-1)
    assert kl.abs().max() == 0
    stir(wrapped)
    assert (log_probs(wrapped, ids) - before).abs().max() > 1e-2, "the adapters do something"
    with wrapped.disable_adapter():
        torch.testing.assert_close(log_probs(wrapped, ids), before, atol=0, rtol=0)


def test_trls_fused_head_gives_the_plain_log_probabilities(model, checkpoint, ids):
    wrapped = with_lora(model, checkpoint.processor, LORA)
    stir(wrapped)
    plain = log_probs(wrapped, ids)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    add_fused_lm_head(wrapped.get_base_model())
    fused = wrapped(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(fused[:, -plain.shape[1] :], plain, atol=1e-5, rtol=1e-5)
    names = [n for n, p in wrapped.named_parameters() if "trainable_tokens" in n]
    tied = model.config.text_config.tie_word_embeddings
    assert len(names) == (1 if tied else 2), "slot rows of the head too when it is untied"
    gradients = []
    for value in (plain, fused):
        wrapped.zero_grad()
        value.sum().backward()
        gradients.append([dict(wrapped.named_parameters())[n].grad.clone() for n in names])
    for a, b in zip(*gradients, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_lora_trains_language_model_slot_rows_and_module_only(model, checkpoint):
    wrapped = with_lora(model, checkpoint.processor, LORA)
    names = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "trainable_tokens" in n or ".icm." in n for n in names)
    assert not any(".visual." in n or ".in_proj." in n for n in names)
    assert sum("lora_A" in n for n in names) == 7 * model.config.text_config.num_hidden_layers
    assert any(".icm.att1." in n for n in names)


def test_full_training_moves_only_our_rows_of_the_table(model, checkpoint, ids):
    full = train_fully(model, checkpoint.processor)
    log_probs(full, ids).sum().backward()
    gradient = full.get_input_embeddings().weight.grad
    rows = slot_rows(checkpoint.processor)
    assert gradient[rows].abs().max() > 0
    others = torch.ones(len(gradient), dtype=torch.bool)
    others[rows] = False
    assert gradient[others].abs().max() == 0
    names = [n for n, p in full.named_parameters() if p.requires_grad]
    assert not any(".visual." in n or ".in_proj." in n for n in names)


@torch.no_grad()
def test_merging_and_reloading_keep_the_model(model, checkpoint, ids):
    fresh = copy.deepcopy(model)
    wrapped = with_lora(model, checkpoint.processor, LORA)
    stir(wrapped)
    want = log_probs(wrapped, ids)
    again = with_lora(fresh, checkpoint.processor, LORA)
    load_trained(again, trained_state(wrapped))
    torch.testing.assert_close(log_probs(again, ids), want, atol=0, rtol=0)
    plain = merged(again)
    torch.testing.assert_close(log_probs(plain, ids), want, atol=1e-4, rtol=1e-4)
    tied = plain.lm_head.weight.data_ptr() == plain.get_input_embeddings().weight.data_ptr()
    assert tied == model.config.text_config.tie_word_embeddings


def test_a_state_of_another_model_is_refused(model, checkpoint):
    wrapped = with_lora(model, checkpoint.processor, LORA)
    state = trained_state(wrapped)
    state.popitem()
    with pytest.raises(ValueError, match=r"trained state: expected .* tensors, got"):
        load_trained(wrapped, state)
