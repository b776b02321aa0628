"""Does a checkpoint hold every weight of its model, and does the model read every weight of the checkpoint?

Transformers draws a weight at random that a checkpoint does not hold, and leaves one alone that the model has no place
for; it says so in a report that nobody reads. Scores of such a model are noise. Here either ends the job, before
anything expensive starts: the model is laid out without memory for its weights, and only the headers of the files are
read for it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.integrations import deepspeed

from sepo.errors import UserError, named_error
from sepo.models.folders import read_json_object

# Weights beside the language model, which its logits do not depend on: heads of reward and value models, other
# modalities, layers that predict further tokens.
_BESIDE = re.compile(
    r"(^|\.)(v_head|value_head|score|classifier|classification_head|summary|reward_head|regression_head|(embed_)?vision\w*|visual"
    r"|image\w*|(embed_)?audio\w*|speech\w*|multi_modal_projector|mm_projector|mtp\w*)(\.|$)"
)
# Ends of a base that PEFT may store beside an adapter; they are read into the base.
_ENDS = re.compile(r"(^|\.)(embed\w*|wte|word_embeddings|lm_head|output)(\.base_layer)?\.weight$")
# What PEFT's adapters are called where somebody stored them among the weights of a whole model.
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save|ia3_\w+|hada_\w+|lokr_\w+|oft_\w+)(\.|$)")


def load_whole(folder: Path, name: str, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, of which no weight is drawn at random and none left unread.

    Args:
        folder: in the Transformers layout.
        name: what the user calls the model.
        options: passed on.

    Raises:
        UserError: names the weights that are missing, unread or of another size.
    """
    model, report = _load(AutoModelForCausalLM, folder, name, options)
    _require_whole(report, model, name)
    return model


def load_classifier(folder: Path, name: str, **options: Any) -> PreTrainedModel:
    """`AutoModelForSequenceClassification.from_pretrained` of one output or two, none of its weights drawn at random.

    Raises:
        UserError: names the weights that are missing or of another size (a language model has no such head), or the
            number of outputs.
    """
    model, report = _load(AutoModelForSequenceClassification, folder, name, options)
    what = f"the checkpoint of '{name}'"
    if missing := report["missing_keys"]:
        raise UserError(
            f"{what} lacks {_list(missing)}: they would be drawn at random; is it a reward model "
            "(sequence classification)?"
        )
    if mismatched := report["mismatched_keys"]:
        raise UserError(f"{what} holds {_list(key for key, *_ in mismatched)} in another size than config.json says")
    if unread := [key for key in report["unexpected_keys"] if not _BESIDE.search(key) and not _ENDS.search(key)]:
        raise UserError(f"{what} holds {_list(unread)}, for which {type(model).__name__} has no place")
    if (model.config.num_labels or 0) > 2:
        raise UserError(f"'{name}' has {model.config.num_labels} outputs: expected one (a reward), or two (bad, good)")
    return model


def _load(kind: Any, folder: Path, name: str, options: Mapping[str, Any]) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    load: Any = kind.from_pretrained
    try:
        with _not_by_deepspeed():
            return load(folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged header, a missing shard, an unknown architecture: each its own class
        raise UserError(f"cannot load the model '{name}' from '{folder}' ({named_error(error)})") from None


@contextlib.contextmanager
def _not_by_deepspeed() -> Iterator[None]:
    """While it lasts Transformers loads whole weights, also where DeepSpeed is going to cut them up (ZeRO-3).

    A model is tried out before that, and frozen ones are none of DeepSpeed's business.
    """
    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


def check_weights(folder: Path, name: str) -> PreTrainedModel | None:
    """Check a checkpoint by its headers alone; returns the model without weights (on "meta").

    None where that cannot be told without loading it: weights that are stored quantized.

    Raises:
        UserError: as `load_whole`.
    """
    if "quantization_config" in read_json_object(folder / "config.json"):
        return None
    return load_whole(folder, name, device_map="meta", trust_remote_code=False)


def check_adapter_weights(folder: Path, base: PreTrainedModel) -> PeftModel | None:
    """Check the headers of an adapter against its base, laid out without weights by `check_weights`.

    Returns:
        base and adapter, without weights; None where that needs numbers.

    Raises:
        UserError: no module of the base is adapted, or names of weights that are missing, unread or of another size.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            model = get_peft_model(base, config)
        expected = {key: tuple(value.shape) for key, value in adapter_state(model).items()}
    except (NotImplementedError, RuntimeError):
        return None  # cannot be made without numbers: it is seen when it is loaded
    except Exception as error:
        raise UserError(f"the adapter '{folder}' does not fit its base model ({named_error(error)})") from None
    require_same_weights(folder, expected)
    return model


def adapter_is_idle(folder: Path) -> bool:
    """Is a stored LoRA adapter one that was never trained: all its B matrices zero, and nothing beside them?"""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        keys = set(file.keys())
        after = {key for key in keys if re.search(r"\.lora_(embedding_)?B(\.|$)", key)}
        if not after or any("lora_" not in key for key in keys):
            return False
        return not any(bool(file.get_tensor(key).any()) for key in after)


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a PEFT model's adapter, by the names that its file has for them."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def require_same_weights(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a UserError unless an adapter's file holds exactly the weights that are expected, by name and shape."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    what = f"the adapter '{folder}'"
    if missing := expected.keys() - stored.keys():
        raise UserError(f"{what} lacks {_list(missing)}: they would be drawn at random; save it again")
    unread = {key for key in stored.keys() - expected.keys() if not _ENDS.search(key)}
    if unread:
        raise UserError(
            f"{what} holds {_list(unread)}, for which its base has no place; was it trained on another base?"
        )
    if other := {key for key in expected if stored[key] != expected[key]}:
        key = min(other)
        raise UserError(
            f"{what} holds {_list(other)} in another size than its config says ({stored[key]} against {expected[key]})"
        )


def _require_whole(report: Mapping[str, Any], model: PreTrainedModel, name: str) -> None:
    what = f"the checkpoint of '{name}'"
    if missing := report["missing_keys"]:
        head = model.get_output_embeddings()
        hint = "save the whole model again"
        if head is not None and all(model.get_submodule(key.rpartition(".")[0]) is head for key in missing):
            hint = "is it a reward model or a classifier? a causal language model is needed"
        raise UserError(f"{what} lacks {_list(missing)}: they would be drawn at random; {hint}")
    if mismatched := report["mismatched_keys"]:
        _, stored, expected = min(mismatched)
        raise UserError(
            f"{what} holds {_list(key for key, *_ in mismatched)} in another size than config.json says "
            f"({tuple(stored)} against {tuple(expected)})"
        )
    if errors := report.get("error_msgs"):
        raise UserError(f"{what} cannot be read ({errors})")
    unread = [key for key in report["unexpected_keys"] if not _BESIDE.search(key)]
    if unread:
        hint = "config.json is of another model, or the weights are"
        if any(_ADAPTER.search(key) for key in unread):
            hint = "an adapter among the weights of a whole model: merge it, or save it as an adapter"
        raise UserError(f"{what} holds {_list(unread)}, for which {type(model).__name__} has no place; {hint}")


def _list(names: Iterable[str], shown: int = 3) -> str:
    """The first names of several, and the number of the others."""
    ordered = sorted(names)
    more = f" and {len(ordered) - shown} more" if len(ordered) > shown else ""
    return ", ".join(ordered[:shown]) + more
