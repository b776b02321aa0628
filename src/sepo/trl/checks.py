"""What `prompt_once` refuses before training: other trainers and versions of TRL, options that it does not support."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sepo.errors import UserError

# Releases whose trainers call the model as `prompt_once` expects.
SUPPORTED = "1.16"


def kind_of(trainer: Any) -> str:
    """ "dpo" or "cpo".

    Raises:
        UserError: TRL is missing or of another version, or the trainer is another one.
    """
    try:
        import trl
    except ImportError:
        raise UserError("prompt_once needs TRL: pip install 'sepo[sft]'") from None
    version = str(trl.__version__)
    if version.split(".")[:2] != SUPPORTED.split("."):
        raise UserError(
            f"TRL {version} is installed, prompt_once fits TRL {SUPPORTED}: pip install 'trl=={SUPPORTED}.*', or leave "
            "prompt_once out"
        )
    from trl import DPOTrainer
    from trl.experimental.cpo import CPOTrainer

    for kind, trainer_class in (("dpo", DPOTrainer), ("cpo", CPOTrainer)):
        if isinstance(trainer, trainer_class):
            return kind
    raise UserError(
        f"prompt_once takes a DPOTrainer or a CPOTrainer of TRL, not a {type(trainer).__name__}: other trainers have "
        "no pairs that share a prompt"
    )


def check_trainer(trainer: Any, kind: str) -> None:
    """Raise a UserError for the first option of a trainer that the packed forward does not support."""
    for problem in _problems(trainer, kind):
        raise UserError(f"prompt_once does not support {problem}")


def _problems(trainer: Any, kind: str) -> Iterator[str]:
    args = trainer.args
    if not args.disable_dropout:
        yield "disable_dropout=False, since a token that is read once has one dropout mask: set it to True"
    if args.use_liger_kernel:
        yield "use_liger_kernel, which replaces the layers that it packs: leave it out"
    if args.torch_compile:
        yield "torch_compile, which would compile anew for every row: leave it out"
    if getattr(args, "activation_offloading", False):
        yield "activation_offloading: leave it out"
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        yield "gradient_checkpointing_kwargs={'use_reentrant': True}: leave it out"
    if getattr(trainer, "aux_loss_enabled", False):
        yield "the router loss of a mixture of experts: set router_aux_loss_coef=0 (CPO: output_router_logits=False)"
    if getattr(trainer, "_is_vlm", False) or getattr(trainer, "_is_vision_dataset", False):
        yield "models that read images: pass a text model and its tokenizer"
    if getattr(trainer, "is_encoder_decoder", False):
        yield "encoder-decoder models: their prompt is not part of the sequence"
    yield from _problems_of_placement(trainer)


def _problems_of_placement(trainer: Any) -> Iterator[str]:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        yield "FSDP and DeepSpeed: train with one process a GPU (DDP), or with sepo's PreferenceTrainer"
    if getattr(trainer.accelerator, "parallelism_config", None) is not None:
        yield "a parallelism_config: leave it out"
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if getattr(model, "is_quantized", False) or getattr(model, "is_loaded_in_4bit", False):
            yield "quantised weights: load the model without a quantization_config"
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            yield "a model that is split over devices (device_map): put it on one device"
        if any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values()):
            yield "adapters that add virtual tokens: use peft.LoraConfig(...)"
