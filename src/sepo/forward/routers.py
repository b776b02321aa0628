"""The load-balancing loss of a mixture of experts, over the tokens of a packed row."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from sepo.errors import UserError
from sepo.forward.packing import PackedBatch


def check_routers(config: PreTrainedConfig, name: str) -> None:
    """Raise a UserError unless a model's config says that it can return the logits of routers."""
    if not hasattr(config.get_text_config(), "output_router_logits"):
        raise UserError(f"router_aux_loss_coef is for mixtures of experts whose routers can be read: '{name}' is none")


def balancing_loss(lm: PreTrainedModel, logits: tuple[Tensor, ...], batch: PackedBatch) -> Tensor:
    """Transformers' own loss of the model's architecture: experts · Σ (share of tokens · mean probability).

    Switch Transformer, arXiv 2101.03961, equations 4 to 6, over all layers together.

    Args:
        logits: of each layer `[tokens, experts]`, for every token of the batch.

    Raises:
        UserError: the architecture has no such loss.
    """
    module: Any = sys.modules[type(lm).__module__]
    loss = getattr(module, "load_balancing_loss_func", None)
    experts, chosen = (getattr(lm, name, None) for name in ("num_experts", "num_experts_per_tok"))
    if loss is None or experts is None or chosen is None or not logits:
        raise UserError(f"router_aux_loss_coef: {type(lm).__name__} has no load-balancing loss; leave it at 0")
    return loss(tuple(logits), experts, chosen, batch.attention_mask)
