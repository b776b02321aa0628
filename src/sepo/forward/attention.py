"""Attention over packed rows: within each document, without a `[T, T]` mask.

A row of documents `[prompt | branch | branch ...]` needs three kinds of block (see `packing.py`):

    prompt and first branch   causal, contiguous
    a later branch on itself  causal, contiguous
    a later branch on prompt  full, no mask

On a CPU each block is one kernel call (`attention_cpu.py`); on a GPU one call covers the row (`attention_cuda.py`).
Elsewhere (soft-capping on a CPU, an unknown device) one masked softmax per document computes the same; the tests
compare the fast paths with it.

The functions are registered in Transformers' attention interface as `ATTENTION`. A forward without a `layout`
(generation, evaluation by other code) uses ordinary SDPA.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sepo.forward.attention_cpu import BlockAttention, lse_dtype
from sepo.forward.attention_cuda import packed_attention
from sepo.forward.packing import Layout

ATTENTION = "sepo_packed"


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
        NotImplementedError: the layer uses attention sinks, position biases or attention dropout, which packed rows do
            not support; `prepare.prepare_model` then picks the padded layout.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None:
        if softcap is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        allowed = _causal_mask(query.shape[2], query.device) if attention_mask is None else attention_mask
        return _softmax_attention(query, key, value, allowed, scaling, softcap).transpose(1, 2), None
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None or dropout:
        raise NotImplementedError("packed rows support no attention sinks, position biases or attention dropout")

    kind = query.device.type
    # Under autocast, rotary embeddings leave queries and keys in float32 beside lower-precision values.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if kind == "cuda":
        window = sliding_window if _windowed(layout, sliding_window) else None
        output = packed_attention(query, key, value, layout, scaling, window, softcap)
    elif kind == "cpu" and softcap is None and not _windowed(layout, sliding_window):
        output = BlockAttention.apply(query, key, value, layout, scaling)
    else:
        output = plain_packed_attention(query, key, value, layout, scaling, sliding_window, softcap)
    return output.transpose(1, 2), None


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
