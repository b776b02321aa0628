"""The trainer over packed pairs: exact means, learning, checkpoints, and losses that are not finite."""

import datasets
import numpy as np
import pytest
import torch

from pairs import config, some_pairs, weights
from sepo.errors import UserError
from sepo.training.trainer import NonFiniteLossError, PreferenceTrainer
from tiny_models import tiny_model, tiny_tokenizer


def train(folder, table, resume=None, **settings):
    trainer = PreferenceTrainer(
        tiny_model("llama"), config(folder, **settings), train_dataset=table, eval_dataset=table
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
def test_accumulation_over_micro_batches_gives_the_same_update(tmp_path):
    table = some_pairs(10)
    whole = train(tmp_path, table, per_device_train_batch_size=10, num_train_epochs=2)
    parts = train(
        tmp_path,
        table,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        num_train_epochs=2,
        tokens_per_row=24,
    )  # 10 pairs: micro-batches of 4, 4 and 2
    assert whole.state.global_step == parts.state.global_step == 2
    torch.testing.assert_close(weights(whole.model), weights(parts.model), atol=1e-5, rtol=0)
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, parts)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "sepo"])
def test_training_learns_the_preferences_it_is_shown(tmp_path, objective):
    table = some_pairs(8)
    trainer = train(tmp_path, table, objective=objective, num_train_epochs=15, learning_rate=3e-3)
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["rewards/accuracies"] == 1.0
    if objective == "dpo":
        assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
        with pytest.raises(UserError, match="pass eval_dataset"):
            trainer.evaluate(table)  # the reference would be the trained model itself
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/accuracies"] == 1.0
    assert metrics["eval_loss"] < history[0]["loss"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_seed_another_order(tmp_path):
    runs = [train(tmp_path, some_pairs(), seed=seed).model for seed in (0, 0, 1)]
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert not torch.equal(weights(runs[0]), weights(runs[2]))


@pytest.mark.slow
def test_a_run_continued_from_a_checkpoint_ends_where_an_unbroken_one_does(tmp_path):
    table = some_pairs()
    settings = {"num_train_epochs": 2, "lr_scheduler_type": "cosine"}
    unbroken = train(tmp_path / "a", table, **settings)
    train(tmp_path / "b", table, **settings, save_strategy="steps", save_steps=4)
    resumed = train(tmp_path / "b", table, **settings, resume=str(tmp_path / "b" / "checkpoint-4"))
    torch.testing.assert_close(weights(resumed.model), weights(unbroken.model), atol=1e-7, rtol=0)
    assert resumed.state.global_step == 6


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing_but_memory(tmp_path):
    plain = train(tmp_path, some_pairs(4), max_steps=2)
    checkpointed = train(tmp_path, some_pairs(4), max_steps=2, activation_checkpointing=True)
    torch.testing.assert_close(weights(plain.model), weights(checkpointed.model), atol=1e-6, rtol=0)


def test_the_dropout_of_a_model_is_off_in_training(tmp_path):
    losses = []
    for dropout in (0.0, 0.4):
        model = tiny_model("gpt2", attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout)
        trainer = PreferenceTrainer(model, config(tmp_path, max_steps=2), some_pairs(4))
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_mixed_precision_trains_and_stays_near_float32(tmp_path, architecture):
    losses = []
    for bf16 in (False, True):
        trainer = PreferenceTrainer(
            tiny_model(architecture, initializer_range=0.1), config(tmp_path, bf16=bf16, max_steps=4), some_pairs(8)
        )
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.1)
    assert losses[0] != losses[1]


def test_a_loss_that_is_not_finite_stops_training_and_names_the_pair(tmp_path):
    model = tiny_model("llama")
    trainer = PreferenceTrainer(model, config(tmp_path), train_dataset=some_pairs(4))
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteLossError, match=r"loss of pair \d+ .* step 0"):
        trainer.train()


def test_text_is_tokenised_with_the_processing_class(tmp_path):
    rows = [
        {"prompt": "Say", "chosen": " yes please", "rejected": " no"},
        {"prompt": "Go", "chosen": " on", "rejected": " off"},
    ]
    dataset = datasets.Dataset.from_list(rows)
    trainer = PreferenceTrainer(
        tiny_model("llama"), config(tmp_path, max_steps=1), train_dataset=dataset, processing_class=tiny_tokenizer()
    )
    pair, reference = trainer.train_dataset[0]
    assert tiny_tokenizer().decode(pair.chosen_ids) == " yes please</s>"
    assert reference is None
    trainer.train()
    with pytest.raises(UserError, match="processing_class"):
        PreferenceTrainer(tiny_model("llama"), config(tmp_path), train_dataset=dataset)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"objective": "dpoo"}, "did you mean 'dpo'"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"layout": "x"}, "layout"),
    ],
)
def test_impossible_settings_are_refused_by_name(tmp_path, setting, match):
    with pytest.raises(UserError, match=match):
        config(tmp_path, **setting)


def test_the_saved_model_loads_anywhere_and_says_nothing_of_packing(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = train(tmp_path, some_pairs(4), max_steps=1)
    trainer.save_model(str(tmp_path / "saved"))
    assert "sepo" not in (tmp_path / "saved" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(weights(loaded), weights(trainer.model))
