"""Tiny random decoders, one for each model feature that the forward path must support; no files, no downloads.

Each has two or three layers and about 100 tokens, so a float64 forward takes milliseconds. Weights have a large
variance, and biases and norms are not 0 and 1, so that logits are far from flat: a missing scale, cap, bias, window or
position then changes the third digit instead of the eighth.

>>> model = TINY_MODELS["mistral"](dtype=torch.float64)
>>> model.config.sliding_window
8
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers import decoders as token_decoders
from tokenizers import models as token_models
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 101  # as many as tiny_tokenizer has
SLIDING_WINDOW = 8

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Gemma's head width is independent of hidden_size / heads: 16 is not 48 / 4.
_GEMMA: dict[str, Any] = {
    **_BASE,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": SLIDING_WINDOW,
}


def _no_kv_heads(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "num_key_value_heads"}


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    # grouped-query attention; LM head separate from the embedding, or tied to it
    "llama": lambda: LlamaConfig(**_BASE, tie_word_embeddings=False),
    "llama_tied": lambda: LlamaConfig(**_BASE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_BASE, tie_word_embeddings=True),  # biases in q, k, v
    "qwen3": lambda: Qwen3Config(**_BASE, head_dim=16, tie_word_embeddings=True),  # norms on q and k
    "mistral": lambda: MistralConfig(**_BASE, sliding_window=SLIDING_WINDOW),  # a window in every layer
    # caps on attention scores and on logits, low enough to change both; alternating windows
    "gemma2": lambda: Gemma2Config(**_GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=8.0),
    # two rotary bases, one for window layers and one for full layers
    "gemma3": lambda: Gemma3TextConfig(
        **{**_GEMMA, "num_hidden_layers": 3},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    # attention and MLP in parallel, a quarter of each head rotated
    "gpt_neox": lambda: GPTNeoXConfig(
        **_no_kv_heads({**_BASE, "hidden_size": 64}),
        use_parallel_residual=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
    ),
    # learned positions: a wrong position id is a wrong embedding
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=512,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "phi3": lambda: Phi3Config(**_BASE, sliding_window=None),  # fused q, k, v and fused gate, up
    "olmo2": lambda: Olmo2Config(**_BASE),  # norms after attention and MLP
    "cohere": lambda: CohereConfig(**_BASE, logit_scale=0.4, use_qk_norm=True),  # logits times a scale
    # logits divided by a scale, and multipliers on embeddings, residuals and attention
    "granite": lambda: GraniteConfig(
        **_BASE,
        logits_scaling=2.5,
        embedding_multiplier=3.0,
        residual_multiplier=0.6,
        attention_multiplier=0.2,
    ),
}


def tiny_model(
    architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config_changes: Any
) -> PreTrainedModel:
    """Build a tiny random model in evaluation mode (no dropout anywhere, gradients on).

    Args:
        architecture: a key of `CONFIGS`.
        dtype: dtype of the weights; the same seed draws the same float32 weights for every dtype.
        seed: of the weights; the global random state does not change.
        config_changes: attributes to set on the config before the weights are drawn.
    """
    config = CONFIGS[architecture]()
    for name, value in config_changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases and norm weights, which start at 0 or 1
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


TINY_MODELS: dict[str, Callable[..., PreTrainedModel]] = {name: partial(tiny_model, name) for name in CONFIGS}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of `VOCAB_SIZE` tokens, one for each printable ASCII character, with a chat template.

    Ids: `<pad>` 0, `<s>` 1 (BOS), `</s>` 2 (EOS and end of turn), `<unk>` 3, `<|user|>` 4, `<|assistant|>` 5,
    then space to `~`.
    """
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
    vocabulary = special + [chr(code) for code in range(32, 127)]
    assert len(vocabulary) == VOCAB_SIZE
    core = Tokenizer(token_models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = token_decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
        "{{ message['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer
