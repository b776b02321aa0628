"""Does a checkpoint hold every weight of its model, and does the model read every weight of the checkpoint?

Transformers initialises missing weights at random and ignores unexpected ones, and only logs a report. Scores of such a
model are noise. Here both cases raise an error before any expensive work: the model is created on the device "meta",
and only the headers of the files are read.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.integrations import deepspeed

from sepo.errors import UserError, named_error, one_line
from sepo.models.folders import read_json_object
from sepo.processes import log_once

# Weights that do not affect the logits: heads of reward and value models, other modalities, multi-token prediction.
BESIDE = re.compile(
    r"(^|\.)(v_head|value_head|score|classifier|classification_head|summary|reward_head|regression_head|(embed_)?vision\w*|visual"
    r"|image\w*|(embed_)?audio\w*|speech\w*|multi_modal_projector|mm_projector|mtp\w*)(\.|$)"
)
# Embeddings and head of a base that PEFT may store with an adapter; they are read into the base.
ENDS = re.compile(r"(^|\.)(embed\w*|wte|word_embeddings|lm_head|output)(\.base_layer)?\.weight$")
# Names of PEFT adapters stored among the weights of a whole model.
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save|ia3_\w+|hada_\w+|lokr_\w+|oft_\w+)(\.|$)")


def load_whole(folder: Path, name: str, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` that fails on missing and on unexpected weights.

    Args:
        folder: model folder in the Transformers layout.
        name: the user's name for the model, for messages.
        options: passed on to Transformers.

    Raises:
        UserError: names the weights that are missing, unexpected or of another size.
    """
    _require_numbers(folder, name)
    model, report = load_reported(AutoModelForCausalLM, folder, name, options)
    _require_whole(report, model, name)
    if model.can_generate():
        model.generation_config = savable(model.generation_config, name)
    return model


def _require_numbers(folder: Path, name: str) -> None:
    """Raise a UserError for matrices of whole numbers that no quantization explains: they would be read as weights."""
    config = folder / "config.json"
    if not config.is_file() or read_json_object(config).get("quantization_config") is not None:
        return
    for path in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                stored = file.get_slice(key)
                if key.endswith("weight") and len(stored.get_shape()) > 1 and stored.get_dtype()[0] in "IU":
                    raise UserError(
                        f"the checkpoint of '{name}' holds {key} as whole numbers ({stored.get_dtype()}), but "
                        "config.json has no quantization_config: a quantized model without it cannot be read"
                    )


def load_reported(
    kind: Any, folder: Path, name: str, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A model, and Transformers' report of missing, unexpected and mismatched weights."""
    load: Any = kind.from_pretrained
    try:
        with _not_by_deepspeed():
            return load(folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged headers, missing shards and unknown architectures raise different classes
        raise UserError(f"cannot load the model '{name}' from '{folder}' ({named_error(error)})") from None


@contextlib.contextmanager
def _not_by_deepspeed() -> Iterator[None]:
    """Let Transformers load whole weights even if DeepSpeed shards models (ZeRO-3).

    Models are checked on whole weights before DeepSpeed shards them, and frozen models are not sharded by DeepSpeed.
    """
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def savable(config: GenerationConfig, name: str) -> GenerationConfig:
    """A generation config without the values that Transformers refuses to save, which it does after the training.

    Published models have such values: sampling settings with `do_sample=False`, `pad_token_id` -1, settings of beams
    without beams. Sampling settings are kept, with `do_sample=True`; a line names the values that are left out.
    """
    changed: GenerationConfig = config
    left_out: dict[str, Any] = {}
    if not _can_be_saved(config):
        as_published, sampling = _largest_savable(config), _largest_savable(config, do_sample=True)
        changed, left_out = min(as_published, sampling, key=lambda result: len(result[1]))
    if left_out:
        values = ", ".join(f"{key}={value!r}" for key, value in left_out.items())
        log_once(f"  generation_config.json of '{name}': {one_line(values)} cannot be saved and is left out")
    return changed


def _can_be_saved(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except Exception:  # values of a wrong type raise any class
        return False
    return True


def _largest_savable(config: GenerationConfig, **changes: Any) -> tuple[GenerationConfig, dict[str, Any]]:
    """A copy of the config with `changes` and with as many of its values as can be saved, and the other values."""
    defaults = type(config)()
    values = {key: getattr(config, key) for key in vars(config) if not key.startswith("_")} | changes
    kept = copy.deepcopy(config)
    left_out: dict[str, Any] = {}
    for key in values:
        setattr(kept, key, getattr(defaults, key, None))
    # The settings on which the validity of others depends come first.
    for key in sorted(values, key=lambda key: key not in ("do_sample", "num_beams", "use_cache")):
        setattr(kept, key, values[key])
        if not _can_be_saved(kept):
            left_out[key] = values[key]
            setattr(kept, key, getattr(defaults, key, None))
    return kept, left_out


def adapter_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config that is stored with an adapter, `savable`.

    Raises:
        UserError: the file holds no generation config.
    """
    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return savable(GenerationConfig.from_pretrained(folder), str(folder))
    except Exception as error:  # values of a wrong type raise any class
        raise UserError(f"cannot read '{folder / 'generation_config.json'}' ({named_error(error)})") from None


def check_weights(folder: Path, name: str) -> PreTrainedModel | None:
    """Check the headers of a checkpoint; return the model on the device "meta".

    None for weights that are stored quantized: they can only be checked when they are loaded.

    Raises:
        UserError: as `load_whole`.
    """
    if read_json_object(folder / "config.json").get("quantization_config") is not None:
        return None
    return load_whole(folder, name, device_map="meta", trust_remote_code=False)


def check_adapter_weights(folder: Path, base: PreTrainedModel) -> PeftModel | None:
    """Check the headers of an adapter against its base on "meta" (from `check_weights`).

    Returns:
        base and adapter on "meta"; None if PEFT cannot create the adapter without weights.

    Raises:
        UserError: no module of the base is adapted, or names the weights that are missing, unexpected or of another
            size.
    """
    adapter_generation_config(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            model = get_peft_model(base, config)
        expected = {key: tuple(value.shape) for key, value in adapter_state(model).items()}
    except (NotImplementedError, RuntimeError):
        return None  # cannot be created on "meta"; loading checks it
    except Exception as error:
        raise UserError(f"the adapter '{folder}' does not fit its base model ({named_error(error)})") from None
    require_same_weights(folder, expected)
    _require_ends_of(folder, base)
    return model


def _require_ends_of(folder: Path, base: PreTrainedModel) -> None:
    """Raise a UserError if embeddings or head that are stored with an adapter are of another vocabulary."""
    modules = (base.get_input_embeddings(), base.get_output_embeddings())
    sizes = {len(cast(Any, module).weight) for module in modules if module is not None}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for key in filter(ENDS.search, file.keys()):
            size = file.get_slice(key).get_shape()[0]
            if size not in sizes:
                raise UserError(
                    f"the adapter '{folder}' holds {key} of {size} tokens, but its base has {min(sizes)}: it was "
                    "trained on a base with another vocabulary; name that one in adapter_config.json, or merge them "
                    "there"
                )


def adapter_is_idle(folder: Path) -> bool:
    """Is a stored LoRA adapter untrained: all B matrices zero, and no other weights?"""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        keys = set(file.keys())
        after = {key for key in keys if re.search(r"\.lora_(embedding_)?B(\.|$)", key)}
        if not after or any("lora_" not in key for key in keys):
            return False
        return not any(bool(file.get_tensor(key).any()) for key in after)


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a PEFT model's adapter, by their names in the file."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def require_same_weights(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a UserError unless an adapter's file holds exactly the expected weights, by name and shape."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    what = f"the adapter '{folder}'"
    if missing := expected.keys() - stored.keys():
        raise UserError(f"{what} lacks {listed(missing)}: they would be drawn at random; save it again")
    unread = {key for key in stored.keys() - expected.keys() if not ENDS.search(key)}
    if unread:
        raise UserError(
            f"{what} holds {listed(unread)}, for which its base has no place; was it trained on another base?"
        )
    if mismatched := {key for key in expected if stored[key] != expected[key]}:
        key = min(mismatched)
        raise UserError(
            f"{what} holds {listed(mismatched)} in another size than its config says "
            f"({stored[key]} against {expected[key]})"
        )


def _require_whole(report: Mapping[str, Any], model: PreTrainedModel, name: str) -> None:
    what = f"the checkpoint of '{name}'"
    if missing := report["missing_keys"]:
        head = model.get_output_embeddings()
        hint = "save the whole model again"
        if head is not None and all(model.get_submodule(key.rpartition(".")[0]) is head for key in missing):
            hint = "is it a reward model or a classifier? a causal language model is needed"
        raise UserError(f"{what} lacks {listed(missing)}: they would be drawn at random; {hint}")
    if mismatched := report["mismatched_keys"]:
        _, stored, expected = min(mismatched)
        raise UserError(
            f"{what} holds {listed(key for key, *_ in mismatched)} in another size than config.json says "
            f"({tuple(stored)} against {tuple(expected)})"
        )
    if errors := report.get("error_msgs"):
        raise UserError(f"{what} cannot be read ({errors})")
    unread = [key for key in report["unexpected_keys"] if not BESIDE.search(key)]
    if unread:
        hint = "config.json and weights belong to different models"
        if any(_ADAPTER.search(key) for key in unread):
            hint = "an adapter among the weights of a whole model: merge it, or save it as an adapter"
        raise UserError(f"{what} holds {listed(unread)}, for which {type(model).__name__} has no place; {hint}")


def listed(names: Iterable[str]) -> str:
    """The first three names, and the number of further names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more
