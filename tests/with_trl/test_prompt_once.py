"""`prompt_once`: TRL's own trainers give the same losses, metrics and weights with one line more."""

from __future__ import annotations

import datasets
import peft
import pytest
import torch
import trl
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from sepo.errors import UserError
from sepo.trl import prompt_once
from tiny_models import tiny_model, tiny_tokenizer

ROWS = [
    {
        "prompt": f"Tell me about number {i // 2}, and " * (1 + i % 3),
        "chosen": f" it is {i}" + "!" * (3 * i % 7),
        "rejected": f" never {i} at" + " all" * (i % 4),
    }
    for i in range(16)
]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]}
METRICS = ("loss", "grad_norm", "entropy", "logits/", "logps/", "mean_token_accuracy", "rewards/", "nll_loss")


def rarely(*values):
    """Parameters of the nightly run alone."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.nightly) for v in values]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of weights for each architecture that is asked for: TRL loads the reference by name."""
    made = {}

    def folder(name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny_model(name).save_pretrained(made[name])
            tiny_tokenizer().save_pretrained(made[name])
        return str(made[name])

    return folder


def common(tmp_path, **more):
    return {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1,
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.02, "optim": "sgd", "save_strategy": "no",
        "lr_scheduler_type": "constant", "gradient_checkpointing": False, "max_length": 60, "disable_tqdm": True,
    } | more  # fmt: skip


def dpo(folder, tmp_path, lora=False, **settings):
    args = DPOConfig(**common(tmp_path, **settings))
    return DPOTrainer(
        folder, args=args, train_dataset=datasets.Dataset.from_list(ROWS), processing_class=tiny_tokenizer(),
        eval_dataset=datasets.Dataset.from_list(ROWS[:5]),
        peft_config=peft.LoraConfig(**LORA) if lora else None,
    )  # fmt: skip


def cpo(folder, tmp_path, lora=False, **settings):
    args = CPOConfig(**common(tmp_path, **{"max_length": 200, **settings}))
    tokenizer = tiny_tokenizer()
    return CPOTrainer(
        folder, args=args, train_dataset=datasets.Dataset.from_list(ROWS), processing_class=tokenizer,
        eval_dataset=datasets.Dataset.from_list(ROWS[:5]),
        peft_config=peft.LoraConfig(**LORA) if lora else None,
    )  # fmt: skip


def logged(trainer) -> list[dict[str, float]]:
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


def compare(make, folder, tmp_path, without=(), tolerance=1e-5, **settings):
    """Train with and without the line; every metric of every step is the same."""
    plain = make(folder, tmp_path / "a", **settings)
    once = prompt_once(make(folder, tmp_path / "b", **settings))
    expected, got = logged(plain), logged(once)
    assert [row.keys() for row in got] == [row.keys() for row in expected]
    for step, (before, after) in enumerate(zip(expected, got, strict=True)):
        for logged_as, value in before.items():
            name = logged_as.removeprefix("eval_")
            if not name.startswith(METRICS) or name in without:
                continue
            if step == 0 and name == "rewards/accuracies" and settings.get("precompute_ref_log_probs"):
                continue  # rounding alone decides which of two rewards of 0 is higher
            # Updates amplify rounding, which shows in what is no loss first.
            allowed = tolerance if step == 0 or name == "loss" else 20 * tolerance
            assert after[logged_as] == pytest.approx(value, abs=allowed * max(1, abs(value))), (step, logged_as)
    for (name, p), q in zip(plain.model.named_parameters(), once.model.parameters(), strict=True):
        torch.testing.assert_close(q, p, atol=1e-4, rtol=0, msg=name)
    return expected


@pytest.mark.parametrize(("lora", "precompute"), [(False, True), (True, False), *rarely((False, False), (True, True))])
def test_dpo_is_the_same_with_one_line_more(folders, tmp_path, lora, precompute):
    rows = compare(dpo, folders("llama"), tmp_path, lora=lora, precompute_ref_log_probs=precompute)
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert rows[3]["loss"] < 0.68


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["ipo"]},
        {"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.2], "ld_alpha": 0.5},
        {"truncation_mode": "keep_end", "max_length": 24},
        *rarely(
            {"loss_type": ["sigmoid_norm"], "use_weighting": True, "f_divergence_type": "js_divergence"},
            {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "sync_ref_model": True},
            {"max_length": 30, "pad_to_multiple_of": 8, "per_device_train_batch_size": 1},
        ),
    ],
    ids=str,
)
def test_every_loss_and_option_of_dpo_comes_along(folders, tmp_path, settings):
    compare(dpo, folders("llama"), tmp_path, max_steps=3, **{**settings})


@pytest.mark.parametrize("architecture", ["gemma2", *rarely("cohere", "gpt_neox")])
def test_caps_scales_windows_and_biases_of_other_models(folders, tmp_path, architecture):
    compare(dpo, folders(architecture), tmp_path, max_steps=2, tolerance=1e-4)


# TRL averages the logits over the prompt and the padding too.
LOGITS = ("logits/chosen", "logits/rejected")


SIMPO, SIMPO_NLL, CPO = (
    {"loss_type": "simpo", "cpo_alpha": 0.0},
    {"loss_type": "simpo", "simpo_gamma": 1.0},
    {"loss_type": "sigmoid"},
)


@pytest.mark.parametrize(
    ("settings", "lora"),
    [(SIMPO, False), (CPO, True), *rarely((SIMPO, True), (SIMPO_NLL, False), (SIMPO_NLL, True), (CPO, False))],
    ids=str,
)
def test_cpo_and_simpo_are_the_same(folders, tmp_path, lora, settings):
    compare(cpo, folders("llama"), tmp_path, without=LOGITS, lora=lora, **settings)


@pytest.mark.parametrize(
    ("make", "settings"),
    [(cpo, {**SIMPO, "lora": True}), *rarely((dpo, {}), (dpo, {"lora": True}), (cpo, SIMPO))],
    ids=["simpo-lora", "dpo", "lora", "simpo"],
)
def test_losses_of_twenty_steps_are_the_same(folders, tmp_path, make, settings):
    rows = compare(make, folders("llama"), tmp_path, without=LOGITS, max_steps=20, learning_rate=2e-3, **settings)
    assert len([row for row in rows if "loss" in row]) == 20


def test_a_prompt_is_read_once(folders, tmp_path, monkeypatch):
    """Two pairs of one prompt: the model reads the prompt's tokens once, and no padding."""
    trainer = prompt_once(dpo(folders("llama"), tmp_path, precompute_ref_log_probs=True, max_length=None))
    read = []
    layers = trainer.model.model.layers[0]
    layers.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator([*trainer.train_dataset][:2])))
    rows = [*trainer.train_dataset][:2]
    assert rows[0]["prompt_ids"] != rows[1]["prompt_ids"]  # the second one is longer
    responses = sum(len(row[f"{side}_ids"]) - 1 for row in rows for side in ("chosen", "rejected"))
    assert read == [sum(len(row["prompt_ids"]) for row in rows) + responses]


def test_callbacks_checkpoints_and_generation_stay(folders, tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    trainer = prompt_once(dpo(folders("llama"), tmp_path, max_steps=1, save_strategy="steps", save_steps=1))
    assert prompt_once(trainer) is trainer
    trainer.add_callback(Watch())
    trainer.train()
    assert "rewards/margins" in seen[0]
    saved = tmp_path / "checkpoint-1"
    assert (saved / "model.safetensors").is_file()
    assert "sepo" not in (saved / "config.json").read_text()
    ids = trainer.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    plain = (
        type(trainer.model)
        .from_pretrained(saved)
        .generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    )
    assert torch.equal(ids, plain)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("disable_dropout", False), ("activation_offloading", True), ("torch_compile", True),
        ("use_liger_kernel", True), ("gradient_checkpointing_kwargs", {"use_reentrant": True}),
    ],
)  # fmt: skip
def test_an_option_that_it_does_not_do_is_named_in_one_line(folders, tmp_path, name, value):
    trainer = cpo(folders("llama"), tmp_path, gradient_checkpointing=True)
    setattr(trainer.args, name, value)
    with pytest.raises(UserError, match=f"prompt_once does not support {name}") as caught:
        prompt_once(trainer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("aux_loss_enabled", "router"), ("_is_vlm", "images"), ("is_fsdp_enabled", "FSDP"), ("is_encoder_decoder", "enc")],
)
def test_a_model_or_launch_that_it_does_not_take_is_named_in_one_line(folders, tmp_path, name, message):
    trainer = dpo(folders("llama"), tmp_path)
    setattr(trainer, name, True)
    with pytest.raises(UserError, match=message):
        prompt_once(trainer)


def test_other_versions_and_trainers_are_named_in_one_line(folders, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="a DPOTrainer or a CPOTrainer of TRL, not a str"):
        prompt_once("trainer")
    monkeypatch.setattr(trl, "__version__", "1.10.2")
    with pytest.raises(UserError, match=r"TRL 1\.10\.2 is installed, prompt_once fits TRL 1\.16"):
        prompt_once("trainer")


def test_a_collator_that_pads_on_the_left_is_refused(folders, tmp_path):
    trainer = prompt_once(dpo(folders("llama"), tmp_path))
    batch = trainer.data_collator([*trainer.train_dataset][:2])
    with pytest.raises(UserError, match="pads on the left"):
        trainer.compute_loss(trainer.model, {name: values.flip(1) for name, values in batch.items()})


def test_importing_the_package_does_not_import_trl():
    import subprocess
    import sys

    code = "import sepo, sepo.trl, sys; assert 'trl' not in sys.modules and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
