"""A policy generates the same responses during its training as a copy of it does afterwards.

The trainer changes the forward that generation calls (packed batches, autocast), and generation reads the signature of
that forward. The prompts have several lengths, since errors appear with padding.
"""

import pytest
import torch
from transformers import TrainerCallback

from pairs import config, some_pairs
from sepo.evaluate.generate import generate_responses
from sepo.models.adapters import causal_lm, new_adapter
from sepo.recipe.settings import LoraSettings
from sepo.training.trainer import PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer

START = [1, *range(20, 32)]  # long enough that generation reads it once for all prompts
PROMPTS = {
    "common start": [[*START, 40], [*START, 41, 42, 43, 44, 45, 46], [*START, 47, 48]],
    "apart": [[5], [9, 8, 7, 6, 5, 4]],
}


def write(model, prompts):
    responses = generate_responses(model, tiny_tokenizer(), prompts, max_new_tokens=5, temperature=0, progress=False)
    return [list(row.response_ids) for row in responses], torch.tensor([sum(row.logps) for row in responses])


class Writes(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen = {name: write(model, prompts) for name, prompts in PROMPTS.items()}
        self.read_once = causal_lm(model).sepo_reads_start_once
        self.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}


# In the ordinary run every pair of two settings comes once, in the nightly run all three.
CASES = [
    pytest.param(name, lora, bf16, marks=[] if (number + lora + bf16) % 2 == 0 else pytest.mark.nightly)
    for number, name in enumerate(("llama", "gpt2", "gpt_neox", "gemma3"))
    for lora in (False, True)
    for bf16 in (False, True)
]


@pytest.mark.parametrize(("name", "lora", "bf16"), CASES)
@pytest.mark.daily(3)
def test_a_policy_writes_in_training_as_a_copy_of_it_does(tmp_path, name, lora, bf16):
    def made():
        model = tiny_model(name)
        if lora:
            return new_adapter(model, LoraSettings(r=2, alpha=4, target_modules="all-linear"), seed=0)
        return model

    writes = Writes()
    settings = config(tmp_path, bf16=bf16, max_steps=1, learning_rate=1e-2, per_device_train_batch_size=4)
    PreferenceTrainer(made(), settings, train_dataset=some_pairs(4), callbacks=[writes]).train()
    copy = made().eval()
    copy.load_state_dict(writes.weights)
    for part, prompts in PROMPTS.items():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            ids, logps = write(copy, prompts)
        assert writes.seen[part][0] == ids
        torch.testing.assert_close(writes.seen[part][1], logps, atol=0.3 if bf16 else 1e-4, rtol=0)
    assert writes.read_once == causal_lm(copy).sepo_reads_start_once == (name != "gemma3")  # which has a window
