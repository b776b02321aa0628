"""The load-balancing loss of mixtures of experts: Transformers' value on the tokens of packed rows, in the loss."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pairs import config, some_pairs
from sepo.cli import main
from sepo.errors import UserError
from sepo.forward.logps import token_logps
from sepo.forward.packing import pack, pad
from sepo.forward.prepare import prepare_model
from sepo.forward.routers import balancing_loss
from sepo.forward.scoring import table_pairs
from sepo.recipe.settings import TrainingSettings
from sepo.training.trainer import PreferenceConfig, PreferenceTrainer
from tiny_models import CONFIGS, tiny_model
from tiny_run import prepare

BASE = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip
MIXTURES = {
    "mixtral": lambda: MixtralConfig(**BASE, num_local_experts=5),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **BASE, head_dim=12, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


def mixture(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MIXTURES[kind]()).eval()


@torch.no_grad()
def own_balance(model, pairs) -> torch.Tensor:
    """The loss over each prompt once and both its responses, from the model's own forward of each text.

    No row reads the last token of a response, which predicts nothing.
    """
    parts = []
    for pair in pairs:
        for number, response in enumerate((pair.chosen_ids, pair.rejected_ids)):
            ids = torch.tensor([[*pair.prompt_ids, *response[:-1]]])
            logits = model(input_ids=ids, output_router_logits=True).router_logits
            skipped = number * len(pair.prompt_ids)
            parts.append([layer[skipped:] for layer in logits])
    layers = tuple(torch.cat(layer) for layer in zip(*parts, strict=True))
    return load_balancing_loss_func(layers, model.num_experts, model.num_experts_per_tok)


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("layout", [pack, pad])
def test_the_loss_is_transformers_own_on_the_same_tokens(kind, layout):
    model = mixture(kind)
    prepare_model(model)
    pairs = list(table_pairs(some_pairs(5)))
    batch, routers = layout(pairs), []
    logps = token_logps(model, batch, routers)
    torch.testing.assert_close(logps, token_logps(model, batch))
    assert len(routers) == 2
    found = balancing_loss(model, tuple(routers), batch)
    if layout is pack:
        torch.testing.assert_close(found, own_balance(model, pairs), rtol=1e-5, atol=0)
    else:
        rows = model(batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True)
        torch.testing.assert_close(found, rows.aux_loss, rtol=1e-5, atol=0)


def trainer_of(tmp_path, model, coefficient, **settings):
    settings = {"objective": "simpo", "tokens_per_row": 4096, "router_aux_loss_coef": coefficient} | settings
    return PreferenceTrainer(model, config(tmp_path, **settings), some_pairs(6), eval_dataset=some_pairs(6))


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_loss_is_added_with_its_weight_and_reaches_the_routers(tmp_path, kind):
    plain, weighted, checkpointed = (
        trainer_of(tmp_path, mixture(kind), coefficient, **more)
        for coefficient, more in ((0.0, {}), (0.5, {}), (0.5, {"gradient_checkpointing": True}))
    )
    balance = float(own_balance(mixture(kind), list(table_pairs(some_pairs(6)))))
    expected = plain.evaluate()["eval_loss"] + 0.5 * balance
    assert weighted.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    grads = []
    for trainer in (plain, weighted, checkpointed):
        trainer.train()
        grads.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    routers = [name for name in grads[0] if name.endswith("gate.weight")]
    assert len(routers) == 2
    assert not any(torch.equal(grads[0][name], grads[1][name]) for name in routers)
    for name, value in grads[1].items():
        torch.testing.assert_close(value, grads[2][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_dense_model_has_no_routers(tmp_path, kind):
    assert kind in CONFIGS
    with pytest.raises(UserError, match="router_aux_loss_coef is for mixtures of experts"):
        trainer_of(tmp_path, tiny_model(kind), 0.01)


def test_objectives_with_a_kl_do_not_go_with_it():
    with pytest.raises(UserError, match="does not go with objective tdpo1"):
        PreferenceConfig("out", objective="tdpo1", router_aux_loss_coef=0.1, use_cpu=True, bf16=False)


@pytest.mark.parametrize("part", ["oracle", "policy"])
def test_a_recipe_is_refused_before_anything_is_trained(tmp_path, part, capsys):
    prepare(tmp_path, f"""
name: dense
output_dir: {tmp_path / "run"}
data: {{source: {tmp_path / "prefs.jsonl"}}}
reference: {{model: {tmp_path / "model"}}}
device: cpu
{part}: {{training: {{router_aux_loss_coef: 0.01}}}}
""")  # fmt: skip
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 2
    assert "router_aux_loss_coef is for mixtures of experts" in capsys.readouterr().err


def test_a_training_without_it_has_the_settings_of_earlier_releases():
    assert "router_aux_loss_coef" not in TrainingSettings().model_dump(mode="json")
    assert TrainingSettings(router_aux_loss_coef=0.1).model_dump()["router_aux_loss_coef"] == 0.1
