"""Devices without float64 (Apple's GPUs): imposed on a CPU, where any tensor of that type is an error."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny_run
from sepo.cli import main
from sepo.judging.scorers import _RewardModel
from sepo.models.adapters import new_adapter
from sepo.models.saving import save_model
from sepo.recipe.settings import LoraSettings
from tiny_models import tiny_model, tiny_tokenizer


class NoFloat64(TorchDispatchMode):
    """Raise as MPS does for an operation that reads or returns float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"{func}: this device has no float64")
        return result


@pytest.mark.parametrize("objective", ["sepo", "dpo", "tdpo2"])
@pytest.mark.daily(1)
def test_a_whole_run_needs_no_float64_on_the_device(tmp_path, monkeypatch, objective):
    monkeypatch.chdir(tmp_path)
    tiny_run.prepare(
        tmp_path,
        """
output_dir: run
data: {source: prefs.jsonl, held_out: 4}
reference: {model: model}
device: cpu
oracle: {training: {batch_size: 8, max_steps: 2}}
policy: {training: {batch_size: 8, max_steps: 2}}
eval: {gold: vader, prompts: 2, samples: 2, max_new_tokens: 4}
""",
    )
    with NoFloat64():
        assert main(["run", "recipe.yaml", f"policy.objective={objective}"]) == 0


def test_merging_an_adapter_and_a_reward_model_need_no_float64_on_the_device(tmp_path):
    adapted = new_adapter(tiny_model("llama"), LoraSettings(r=2))
    with NoFloat64():
        save_model(adapted, None, tmp_path / "merged", merge_adapter=True)
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    small = LlamaConfig(
        vocab_size=101, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    model = _RewardModel(AutoModelForSequenceClassification.from_config(small).eval(), tiny_tokenizer(), False)
    with NoFloat64(), torch.no_grad():
        assert model._read([[5, 6, 7], [8, 9]]).dtype == "float64"
