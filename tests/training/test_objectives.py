"""Losses against the published formulas in float64, and the whole step against TRL."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from pairs import awkward_pairs, pairs_table
from sepo.data.tables import make_table
from sepo.forward.logps import segment_sums, segment_weights, token_logps
from sepo.forward.packing import Pair, pack
from sepo.forward.prepare import prepare_model
from sepo.forward.scoring import dataset_logps
from sepo.training import objectives
from sepo.training.batches import PairCollator, PairDataset
from sepo.training.trainer import PreferenceConfig, PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer

TEXTS = [
    ("What is up?", " Not much, and you", " Nothing."),
    ("Say a", " b", " c"),
    ("What is up?", " All is well", " Not much, and you"),
    ("Count:", " one two three four five six seven eight", " 12"),
]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -30 else x


def test_sepo_is_the_contrast_of_mean_log_probabilities():
    chosen, rejected = [-3.0, -40.0, -0.5], [-8.0, -2.0, -0.5]
    counts, other_counts = [2.0, 5.0, 1.0], [4.0, 1.0, 1.0]
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
    losses = objectives.sepo(tensors, (torch.tensor(counts), torch.tensor(other_counts)), gamma=2.3, margin=0.4)
    for i in range(3):
        u = 2.3 * chosen[i] / counts[i] - 2.3 * rejected[i] / other_counts[i] - 0.4
        assert losses[i].item() == pytest.approx(-log_sigmoid(u), rel=1e-9)
    losses.sum().backward()
    u = 2.3 * (-3.0 / 2 + 8.0 / 4) - 0.4
    assert tensors[0].grad[0].item() == pytest.approx(-(1 - 1 / (1 + math.exp(-u))) * 2.3 / 2, rel=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_the_published_formula(smoothing):
    values = [torch.tensor(x, dtype=torch.float64) for x in ([-3.0, -40.0], [-8.0, -2.0], [-3.5, -30.0], [-7.0, -2.0])]
    losses = objectives.dpo(values[:2], values[2:], beta=0.3, label_smoothing=smoothing)
    for i in range(2):
        policy_chosen, policy_rejected, ref_chosen, ref_rejected = (v[i].item() for v in values)
        h = 0.3 * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
        assert losses[i].item() == pytest.approx(
            -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h), rel=1e-9
        )


def test_equal_responses_carry_no_signal():
    model = tiny_model("llama")
    prepare_model(model)
    pair = awkward_pairs()[3]
    assert pair.chosen_ids == pair.rejected_ids
    batch = pack([pair])
    sums = segment_sums(token_logps(model, batch), batch)
    loss = objectives.sepo(sums, segment_weights(batch)).sum()
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-6


def test_losses_stay_finite_far_from_balance():
    far = torch.tensor([-1e4, 1e4])
    assert objectives.sepo((far, -far), (torch.ones(2), torch.ones(2))).isfinite().all()
    assert objectives.dpo((far, -far), (torch.zeros(2), torch.zeros(2)), beta=1.0).isfinite().all()


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().clamp(min=1e-4)
        torch.testing.assert_close(got[name] / scale, expected[name] / scale, atol=2e-4, rtol=0)


def our_step(model, pairs, reference=None, **settings):
    """Loss and gradients of one `PreferenceTrainer` step over all pairs, split over several packed rows."""
    config = PreferenceConfig(
        "unused", use_cpu=True, report_to="none", per_device_train_batch_size=len(pairs), tokens_per_row=48, **settings
    )
    trainer = PreferenceTrainer(model, config, train_dataset=pairs_table(pairs), reference_logps=reference)
    inputs = next(iter(trainer.get_train_dataloader()))
    assert len(inputs["batches"]) > 1
    trainer.create_optimizer()
    model.zero_grad()
    loss = trainer.training_step(model, inputs, torch.tensor(float(len(pairs))))
    return loss.item(), gradients_of(model)


def test_dpo_step_agrees_with_trl(tmp_path):
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        str(tmp_path), beta=0.3, max_length=None, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    model = tiny_model("llama")
    dataset = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in TEXTS])
    theirs = DPOTrainer(
        model, tiny_model("llama", seed=1), args=config, train_dataset=dataset, processing_class=tiny_tokenizer()
    )
    rows = list(theirs.train_dataset)
    model.train()
    expected = theirs.compute_loss(model, theirs._prepare_inputs(theirs.data_collator(rows)))
    expected.backward()
    expected_gradients = gradients_of(model)
    assert abs(expected.item() - math.log(2)) > 0.01  # reference and policy differ

    pairs = [
        Pair(i, *(tuple(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))) for i, row in enumerate(rows)
    ]
    reference = dataset_logps(tiny_model("llama", seed=1), pairs_table(pairs))
    loss, gradients = our_step(tiny_model("llama"), pairs, reference, objective="dpo", beta=0.3)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert_same_gradients(gradients, expected_gradients)


def test_policy_step_with_all_tokens_agrees_with_trl_simpo(tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    config = CPOConfig(
        str(tmp_path), loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.0, beta=2.5, max_length=256,
        per_device_train_batch_size=4, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    model = tiny_model("llama")
    dataset = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in TEXTS])
    theirs = CPOTrainer(model, args=config, train_dataset=dataset, processing_class=tiny_tokenizer())
    rows = list(theirs.train_dataset)
    expected, _ = theirs.get_batch_loss_metrics(model, theirs.data_collator(rows))
    expected.backward()
    expected_gradients = gradients_of(model)

    pairs = []
    for index, row in enumerate(rows):
        prompt = len(row["prompt_input_ids"])
        pairs.append(
            Pair(
                index,
                tuple(row["prompt_input_ids"]),
                tuple(row["chosen_input_ids"][prompt:]),
                tuple(row["rejected_input_ids"][prompt:]),
            )
        )
    loss, gradients = our_step(tiny_model("llama"), pairs, objective="sepo", gamma=2.5)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert_same_gradients(gradients, expected_gradients)


def test_the_loss_is_the_mean_over_pairs_however_they_fall_into_rows():
    pairs = awkward_pairs()
    table = make_table(
        "selection",
        {
            "pair_id": [p.pair_id for p in pairs],
            "prompt_ids": [p.prompt_ids for p in pairs],
            "chosen_ids": [p.chosen_ids for p in pairs],
            "rejected_ids": [p.rejected_ids for p in pairs],
            "chosen_positions": [list(range(len(p.chosen_ids)))[::2] for p in pairs],
            "rejected_positions": [[len(p.rejected_ids) - 1] for p in pairs],
            "chosen_weights": [[0.5] * len(p.chosen_ids[::2]) for p in pairs],
            "rejected_weights": [[1.0] for p in pairs],
        },
    )
    dataset = PairDataset(table)
    items = [dataset[i] for i in range(len(dataset))]
    losses = []
    for layout, budget in (("packed", 16), ("packed", 60), ("packed", 10_000), ("padded", 60)):
        model = tiny_model("qwen3")
        prepare_model(model, layout)
        total = 0.0
        for batch in PairCollator(layout, budget)(items)["batches"]:
            sums = segment_sums(token_logps(model, batch), batch, weighted=True)
            total += objectives.sepo(sums, segment_weights(batch)).sum().item()
        losses.append(total / len(items))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
