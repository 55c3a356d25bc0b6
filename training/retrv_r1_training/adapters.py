"""What a stage trains on a real backbone: LoRA or the whole language model, our slot rows, the compression module without in_proj.

Everything else is frozen, so that stored candidate memory stays valid. Slot rows learn through PEFT's `trainable_token_indices` beside
LoRA, and through a masked gradient when the whole language model learns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Processor
from retrv_r1_retriever.prompt import ADDED_TOKENS
from retrv_r1_training.sft_recipe import LoraSettings, SftRecipe

TARGETS = r".*\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def slot_rows(processor: Processor) -> list[int]:
    """Rows of the embedding matrix that are ours."""
    return [processor.token_id(token) for token in ADDED_TOKENS]


def trainable(
    model: RetrvR1ForConditionalGeneration, processor: Processor, recipe: SftRecipe
) -> PeftModel | RetrvR1ForConditionalGeneration:
    """The model with exactly that trainable which `recipe.tune` says."""
    if recipe.tune == "full":
        return train_fully(model, processor)
    return with_lora(model, processor, recipe.lora, one_dtype=recipe.run.deepspeed is not None)


def with_lora(
    model: RetrvR1ForConditionalGeneration, processor: Processor, settings: LoraSettings, one_dtype: bool = False
) -> PeftModel:
    """LoRA on the language model, trainable slot rows (on the head too when untied), compression module without in_proj.

    one_dtype: adapters in the model's dtype, as DeepSpeed wants it (it keeps fp32 masters); else they are float32.
    """
    rows = slot_rows(processor)
    tied = model.config.text_config.tie_word_embeddings
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=TARGETS,
        trainable_token_indices={"embed_tokens": rows} if tied else {"embed_tokens": rows, "lm_head": rows},
    )  # fmt: skip
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=not one_dtype)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        head.register_parameter("bias", None)  # TRL's fused head reads `head.bias`; PEFT's wrapper has none
    _train_module(model)
    return wrapped


def language_model_only(
    model: RetrvR1ForConditionalGeneration, tune: str, settings: LoraSettings, one_dtype: bool = False
) -> PeftModel | RetrvR1ForConditionalGeneration:
    """For `embedder`: LoRA, or the whole language model; no slot rows, which no embedded text has. one_dtype: see `with_lora`."""
    if tune == "lora":
        config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=TARGETS)
        return get_peft_model(model, config, autocast_adapter_dtype=not one_dtype)
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)
    return model


def train_fully(model: RetrvR1ForConditionalGeneration, processor: Processor) -> RetrvR1ForConditionalGeneration:
    """The whole language model; of the embedding table our rows only, by a hook that works under ZeRO too."""
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)
    model.lm_head.requires_grad_(True)
    rows = slot_rows(processor)

    def ours_only(gradient: Tensor) -> Tensor:
        kept = torch.zeros_like(gradient)
        kept[rows] = gradient[rows]
        return kept

    model.get_input_embeddings().weight.register_hook(ours_only)
    _train_module(model)
    return model


def _train_module(model: RetrvR1ForConditionalGeneration) -> None:
    model.model.icm.requires_grad_(True)
    model.model.icm.in_proj.requires_grad_(False)
    freeze_folded(model)


def freeze_memory(model: nn.Module) -> None:
    """Of a module that PEFT trains as a whole."""
    for name, parameter in model.named_parameters():
        if ".in_proj." in name:
            parameter.requires_grad_(False)


def freeze_folded(model: nn.Module) -> None:
    """The key's bias adds one constant to all scores of a softmax, so it never gets a gradient, and DDP waits for one of each."""
    for name, parameter in model.named_parameters():
        if name.endswith(".att1.k.bias"):
            parameter.requires_grad_(False)


def raise_precision(model: nn.Module) -> None:
    """Float32 for everything trained, or the updates of a small learning rate vanish in bfloat16; the module as a whole."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".icm." in name:
            parameter.data = parameter.data.float()


def prepare_deepspeed(model: nn.Module) -> None:
    """DeepSpeed cannot send a parameter without dimensions to the other processes; one of length 1 means the same."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 0:
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))


def prepare_zero3(model: nn.Module) -> None:
    """Let ZeRO-3 gather an embedding or head together with its slot rows: PEFT reads both past their own modules' forward.

    Not as leaf modules: those reduce gradients once per call, and the head is called several times.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            for parameter in (layer.base_layer.weight, *layer.trainable_tokens_delta.values()):
                register_external_parameter(layer, parameter)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Every trained tensor on the CPU, by name. Collective: under ZeRO-3 all ranks must call it."""
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gather_params_ctx([parameter], modifier_rank=None):
                state[name] = parameter.detach().cpu().clone().contiguous()
    return state


@torch.no_grad()
def load_trained(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The reverse, into a model wrapped the same way. A name too many or too few is an error."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(parameters) != set(state):
        odd = sorted(set(parameters) ^ set(state))
        raise ValueError(
            f"trained state: expected {len(parameters)} tensors, got {len(state)}; first odd one: {odd[0]}"
        )
    for name, parameter in parameters.items():
        parameter.copy_(state[name].reshape(parameter.shape))


@torch.no_grad()
def onto(
    start: RetrvR1ForConditionalGeneration, trained: RetrvR1ForConditionalGeneration, processor: Processor
) -> RetrvR1ForConditionalGeneration:
    """`start` with what `trained` has learnt. What stored memory is made of stays bit by bit, whatever dtype it was trained in."""
    rows, values = slot_rows(processor), dict(trained.named_parameters())
    tables = {id(start.get_input_embeddings().weight), id(start.get_output_embeddings().weight)}
    for name, parameter in start.named_parameters():
        if ".visual." in name or ".in_proj." in name:
            continue
        value = values[name].to(parameter).reshape(parameter.shape)  # DeepSpeed's scalars have a dimension
        if id(parameter) in tables:
            parameter[rows] = value[rows]
        else:
            parameter.copy_(value)
    return start


def merged(model: PeftModel | RetrvR1ForConditionalGeneration) -> RetrvR1ForConditionalGeneration:
    """A plain model: LoRA and slot rows written into the weights they belong to."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model
