"""Attention over packed rows: within each document, without a `[T, T]` mask.

A row of documents `[prompt | branch | branch ...]` needs three kinds of block (see `packing.py`):

    prompt and first branch   causal, contiguous
    a later branch on itself  causal, contiguous
    a later branch on prompt  full, no mask

On a CPU each block is one kernel call (`kernels/attention_cpu.py`); on a GPU one call
covers the row (`kernels/attention_cuda.py`).
Elsewhere (soft-capping on a CPU, an unknown device) one masked softmax per document computes the same; the tests
compare the fast paths with it.

The functions are registered in Transformers' attention interface as `ATTENTION`. They refuse any tensor that they do
not use, such as the keys that a sparse layer chose. A forward without a `layout` (generation, evaluation by other code)
uses ordinary SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sepo.errors import UserError
from sepo.kernels.attention_cpu import BlockAttention, lse_dtype
from sepo.kernels.layout import Layout

ATTENTION = "sepo_packed"

# Tensors that models pass to their attention function and that change nothing here: a row's layout has the positions.
_WITHOUT_EFFECT = ("position_ids", "position_embeddings", "cache_position")
_NAMES = {"s_aux": "attention sinks (s_aux)", "position_bias": "position biases (position_bias)"}


class UnsupportedAttention(UserError, NotImplementedError):
    """A model passes something to its attention function that this function does not use."""


def packed_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Transformers attention function: `query` `[1, heads, T, dim]`, `key`/`value` `[1, kv_heads, T, dim]`.

    Returns `[1, T, heads, dim]` and None. Without a `layout` this is SDPA (or a plain softmax with soft-capping).

    Raises:
        UnsupportedAttention: the layer passes a tensor that is not used here (attention sinks, position biases, the
            keys that a sparse layer chose), a mask of its own, or attention dropout. In its trial of the packed layout
            `prepare.prepare_model` then picks the padded one, where the model's own attention runs.
    """
    _refuse_unused(module, attention_mask, dropout, layout, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None:
        if softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        allowed = _causal_mask(query.shape[2], query.device) if attention_mask is None else attention_mask
        return _softmax_attention(query, key, value, allowed, scaling, softcap).transpose(1, 2), None

    kind = query.device.type
    # Under autocast, rotary embeddings leave queries and keys in float32 beside lower-precision values.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if kind == "cuda":
        from sepo.kernels.attention_cuda import packed_attention

        window = sliding_window if _windowed(layout, sliding_window) else None
        output = packed_attention(query, key, value, layout, scaling, window, softcap)
    elif kind == "cpu" and softcap is None and not _windowed(layout, sliding_window):
        output = BlockAttention.apply(query, key, value, layout, scaling)
    else:
        output = plain_packed_attention(query, key, value, layout, scaling, sliding_window, softcap)
    return output.transpose(1, 2), None


def _refuse_unused(
    module: torch.nn.Module, mask: Tensor | None, dropout: float, layout: Layout | None, rest: dict[str, Any]
) -> None:
    """Raise an UnsupportedAttention for anything that would change the result and that would be ignored."""
    given = sorted(name for name, value in rest.items() if name not in _WITHOUT_EFFECT and _has_tensor(value))
    unused = [_NAMES.get(name, name) for name in given]
    if layout is not None:
        # `target_hidden` passes a mask of one element. One that a layer made, or changed, has one for each key.
        unused += ["a mask of its own"] if mask is not None and mask.numel() > 1 else []
        unused += ["attention dropout"] if dropout else []
    if unused:
        raise UnsupportedAttention(
            f"the attention of {type(module).__name__} uses {', '.join(unused)}, which packed rows do not support: "
            "use layout=padded, or lower tokens_per_row where only long rows have them"
        )


def _has_tensor(value: object) -> bool:
    if isinstance(value, dict):
        value = tuple(value.values())
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_has_tensor, value)))


AttentionInterface.register(ATTENTION, packed_attention_forward)


AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _windowed(layout: Layout, sliding_window: int | None) -> bool:
    """Whether the window hides a token from another token of its document."""
    if sliding_window is None:
        return False
    longest = max(doc.prompt + max(doc.branches, default=0) for doc in layout.documents)
    return longest > sliding_window


def plain_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The same attention as one masked softmax per document; returns `[1, heads, T, dim]`.

    A document's mask is `[length, length]`: memory grows with the longest document, not with the row.
    """
    sizes = [doc.length for doc in layout.documents]
    masks = _document_masks(layout, sliding_window, query.device)
    outputs = [
        _softmax_attention(q, k, v, allowed, scaling, softcap)
        for q, k, v, allowed in zip(
            query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), masks, strict=True
        )
    ]
    return torch.cat(outputs, dim=2)


def _softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.tanh(query @ key.transpose(-1, -2) * (scaling / softcap)) * softcap
    if allowed.dtype == torch.bool:
        # The lowest finite number, not -inf: a padding row may attend to nothing and must not become NaN.
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    else:
        scores = scores + allowed
    return torch.softmax(scores, dim=-1, dtype=lse_dtype(query)).to(value.dtype) @ value


def _causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _document_masks(layout: Layout, sliding_window: int | None, device: torch.device) -> list[Tensor]:
    key = ("masks", sliding_window, device)
    if key not in layout.cache:
        _, branch, position = (torch.from_numpy(x).to(device) for x in layout.token_coordinates())
        masks = []
        for doc in layout.documents:
            span = slice(doc.start, doc.start + doc.length)
            b, p = branch[span], position[span]
            allowed = (b[None] < 0) | (b[None] == b[:, None])
            allowed &= p[None] <= p[:, None]
            if sliding_window is not None:
                allowed &= p[:, None] - p[None] < sliding_window
            masks.append(allowed)
        layout.cache[key] = masks
    return layout.cache[key]
