"""Attention that is given more than the packed function uses: by models with a choice of keys, and by made-up ones."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from pairs import attention_inputs, awkward_pairs, pairs_table, plain_logps, random_ids
from sepo.errors import UserError
from sepo.forward.attention import packed_attention_forward
from sepo.forward.logps import token_logps
from sepo.forward.packing import Pair, pack
from sepo.forward.prepare import prepare_model
from sepo.forward.scoring import dataset_logps
from tiny_models import tiny_model

KEYS = 16  # that a token reads
# Sixteen heads of the indexer: no two keys have the same score.
SPARSE = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "index_topk": KEYS, "index_n_heads": 16, "index_head_dim": 16,
    "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MINIMAX = {
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 8, "index_topk_blocks": 2, "index_block_size": 8,
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], "dense_intermediate_size": 64,
    "shared_intermediate_size": 32,
}  # fmt: skip
KINDS = {"glm_moe_dsa": {}, "deepseek_v32": {}, "axk2": {}, "hy_v4": {}, "minimax_m3_vl_text": MINIMAX}


def long_pairs():
    rng = np.random.default_rng(0)
    return [Pair(0, *(random_ids(rng, size) for size in (60, 140, 20))), Pair(1, (5, 6, 7), (8, 9), (10, 11, 12))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.daily(2)
def test_a_model_that_chooses_its_keys_gives_what_its_own_forward_gives_beyond_that_number(kind):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this release of Transformers has no {kind}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SPARSE, **KINDS[kind]})).eval()
    with torch.no_grad():
        expected = plain_logps(model, long_pairs())
    rows = dataset_logps(model, pairs_table(long_pairs())).to_pylist()
    got = torch.tensor([value for row in rows for side in ("chosen", "rejected") for value in row[f"{side}_logps"]])
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


class Choosing(modeling_llama.LlamaAttention):
    """Llama's attention with a choice of keys that begins beyond `KEYS` tokens, which a short trial does not see."""

    gives = "indices"

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        length = hidden_states.shape[1]
        if length > KEYS:
            near = (torch.arange(length)[:, None] - torch.arange(length)).abs() < KEYS
            if self.gives == "mask":
                causal = near.tril()[None, None]
                attention_mask = causal if attention_mask is None else causal & attention_mask
            else:
                kwargs[self.gives] = [near] if self.gives == "choices" else near
        return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)


@pytest.mark.parametrize("gives", ["indices", "block_indices", "choices", "mask"])
def test_a_choice_of_keys_that_begins_in_a_long_row_is_refused_in_one_line(gives):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = type("ChoosingAttention", (Choosing,), {"gives": gives})
    assert prepare_model(model, tokens_per_row=512) == "packed"
    with torch.no_grad(), pytest.raises(UserError, match="use layout=padded") as refused:
        token_logps(model, pack(long_pairs()))
    assert "\n" not in str(refused.value)


UNUSED = {
    "indices": torch.zeros(1), "block_indices": [torch.zeros(1)], "s_aux": torch.zeros(1),
    "anything": {"a": torch.ones(1)},
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSED)
@pytest.mark.parametrize("packed", [True, False])
def test_an_attention_function_refuses_every_tensor_that_it_does_not_use(name, packed):
    query, key, value, layout = attention_inputs(awkward_pairs())
    with pytest.raises(UserError, match=name):
        packed_attention_forward(
            nn.Identity(), query, key, value, None, layout=layout if packed else None, **{name: UNUSED[name]}
        )


def test_a_mask_that_was_not_passed_in_is_refused_and_positions_are_not():
    query, key, value, layout = attention_inputs(awkward_pairs())
    length = query.shape[2]
    known = {"position_ids": torch.arange(length)[None], "position_embeddings": (torch.ones(1), torch.ones(1))}
    dummy = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    packed_attention_forward(nn.Identity(), query, key, value, dummy, layout=layout, is_causal=True, **known)
    for shape in ((1, 1, length, length), (1, 4, 1, 1), (1, 1, 1, length)):
        with pytest.raises(UserError, match="a mask of its own"):
            packed_attention_forward(nn.Identity(), query, key, value, torch.ones(shape).bool(), layout=layout)
