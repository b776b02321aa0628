"""The last block's MLP runs on the rows that predict a target; nobody reads the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel


def last_mlp(lm: PreTrainedModel) -> nn.Module | None:
    """The MLP of the last decoder block, or None where the model names it otherwise."""
    layers = lm.config.get_text_config().num_hidden_layers
    for module in lm.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            mlp = getattr(module[-1], "mlp", None)
            return mlp if isinstance(mlp, nn.Module) else None
    return None


@contextlib.contextmanager
def rows_only(mlp: nn.Module | None, rows: Tensor) -> Iterator[None]:
    """While it lasts, `mlp` computes only the given rows of its `[1, T, hidden]` input; the others come out as zero.

    Args:
        rows: ascending row indices, `[N]`.
    """
    if mlp is None:
        yield
        return

    length = 0

    def gather(module, inputs):
        nonlocal length
        length = inputs[0].shape[1]
        return inputs[0].index_select(1, rows), *inputs[1:]

    def scatter(module, inputs, output):
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(module).__name__} returns more than its output")
        return output.new_zeros(1, length, output.shape[-1]).index_copy_(1, rows, output)

    handles = [mlp.register_forward_pre_hook(gather), mlp.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
