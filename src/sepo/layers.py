"""What a step costs beside attention and the LM head: linear layers, embeddings, the last block, the allocator.

Everything here leaves the model's numbers as they are (the tests hold values and gradients against the untouched model)
and is put in place by `logps.prepare_model`. docs/performance.md has the figures.

- On a CPU, float32 linear layers go through oneDNN instead of MKL: 200 against 170 GFLOP/s on the shapes of SmolLM2.
- Inside `gradients_in_place` the gradient of a weight is added to `weight.grad` by the matmul itself. Autograd would
  write it to a temporary first; for an embedding that is a dense `[vocabulary, hidden]` of zeros a row, 0.7 GB for
  Gemma 3, of which a few hundred lines are used.
- The last block's MLP runs on the rows that predict a target; nobody reads the others.
- glibc gives large tensors back to the system when they are freed and pages them in anew a moment later; it can keep
  them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from inspect import signature

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from sepo import layers_cuda

# Below this many rows (a generation step) oneDNN's set-up costs more than it saves.
_FEW_ROWS = 16


# --- matmul ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _has_onednn() -> bool:
    """Does this build of PyTorch offer oneDNN's float32 linear layer?"""
    if not torch.backends.mkldnn.is_available():
        return False
    # oneDNN keeps the machine code of the last 1,024 shapes, half a gigabyte, and packed rows have many lengths, of
    # which one needs a dozen shapes. The limits are read when the first product is made; those set outside stay.
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "32")
    x = torch.ones(2, 3)
    try:
        got = torch.ops.mkldnn._linear_pointwise(x, torch.ones(4, 3), None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(got, torch.full((2, 4), 3.0))


def matmul_nt(x: Tensor, w: Tensor) -> Tensor:
    """`x @ w.T` for `x` `[n, k]` and `w` `[m, k]`, by whichever library is faster on this device."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and len(x) >= _FEW_ROWS and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.mm(x, w.t())


# --- gradients in place ---------------------------------------------------------------------------------------------

# Lower-precision copies of the weights of one training step, or None outside of `gradients_in_place`. One for all
# threads: on a GPU the backward pass, and with it what activation checkpointing computes again, has a thread of its own.
_step_copies: dict[int, Tensor] | None = None


@contextlib.contextmanager
def gradients_in_place(enabled: bool = True) -> Iterator[None]:
    """While it lasts, forwards of prepared models add the gradients of large weights to `weight.grad` themselves.

    For the forwards and backwards of one optimizer step: weights must not change inside it. Autograd does not see those
    gradients: hooks on them do not run and `torch.autograd.grad` does not return them. `may_accumulate_in_place` says
    whether a model can do with that.
    """
    global _step_copies
    before, _step_copies = _step_copies, {} if enabled else None
    try:
        yield
    finally:
        _step_copies = before


def in_place() -> bool:
    """Is `gradients_in_place` on?"""
    return _step_copies is not None


def may_accumulate_in_place(model: nn.Module) -> bool:
    """Does nothing wait for the gradients of this model through autograd (several processes, hooks on weights)?"""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    return not any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


def add_gradient(weight: Tensor, left: Tensor, right: Tensor, rows: slice = slice(None)) -> None:
    """`weight.grad[rows] += left.T @ right`, without a temporary where the types allow it."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    add_product(weight.grad[rows], left.t(), right)


def add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """`target += left @ right`."""
    if left.dtype == target.dtype:
        target.addmm_(left, right)
    elif left.is_cuda and target.dtype == torch.float32:
        torch.addmm(target, left, right, out_dtype=torch.float32, out=target)
    else:
        target += left @ right


def compute_copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the type that is computed with; converted once a step inside `gradients_in_place`."""
    if weight.dtype == dtype:
        return weight
    copies = _step_copies
    if copies is None:
        return weight.to(dtype)
    if id(weight) not in copies:
        copies[id(weight)] = weight.detach().to(dtype)
    return copies[id(weight)]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type of matmuls with this tensor: autocast's where it is on, else the tensor's own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class _Normed:
    """The output of a norm, formed anew in the backward pass for the linear layers that read it.

    A linear layer needs its input for the gradient of its weight. A norm's output is an elementwise product of what the
    norm keeps anyway, so nothing more is kept of it. The first reader to come forms it, the last one drops it.
    """

    def __init__(self) -> None:
        self.readers = self.left = 0
        self.rows: Tensor | None = None

    def form(self, x: Tensor, inverse: Tensor, scale: Tensor) -> Tensor:
        rows = (x * inverse).mul_(scale).flatten(0, -2) if self.rows is None else self.rows
        self.left = (self.left or self.readers) - 1
        self.rows = rows if self.left else None
        return rows


# What a norm's output was made of, `(_Normed, x, inverse, scale)`, and the attribute of the output that says so.
_MadeOf = tuple[_Normed, Tensor, Tensor, Tensor]
_MADE_OF = "_sepo_made_of"


def _to_keep(rows: Tensor, made_of: _MadeOf | None, needed: bool) -> tuple[_Normed | None, tuple[Tensor, ...]]:
    """What the backward pass of a linear layer has to keep of its input; `_kept_rows` makes the input of it."""
    if not needed:
        return None, ()
    if made_of is None:
        return None, (rows,)
    made_of[0].readers += 1
    return made_of[0], made_of[1:]


def _kept_rows(normed: _Normed | None, kept: list[Tensor]) -> Tensor:
    return kept[0] if normed is None else normed.form(*kept)


def _weight_gradient(weight: Tensor, grad: Tensor, rows: Tensor, add: bool) -> Tensor | None:
    """`grad.T @ rows`, returned, or added to `weight.grad`."""
    if not add:
        return (grad.t() @ rows).to(weight.dtype)
    add_gradient(weight, grad, rows)
    return None


class _LinearFunction(torch.autograd.Function):
    """y = x W^T (+ b); `x` `[..., in]`, `W` `[out, in]`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, made_of: _MadeOf | None) -> Tensor:
        dtype = compute_dtype(weight)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        low = compute_copy(weight, dtype)
        output = matmul_nt(rows, low)
        if bias is not None:
            output += bias.to(dtype)
        need_x, need_weight, *_ = ctx.needs_input_grad
        ctx.normed, kept = _to_keep(rows, made_of, need_weight)
        ctx.save_for_backward(low if need_x else None, *kept)
        # The parameter itself: a saved tensor comes back as an alias (under checkpointing), whose .grad nobody reads.
        ctx.weight = weight
        ctx.in_place, ctx.shape, ctx.x_dtype, ctx.dtype = in_place(), x.shape, x.dtype, dtype
        return output.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        low, *kept = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        d_x = matmul_nt(grad, low.t()).to(ctx.x_dtype).view(ctx.shape) if need_x else None
        d_weight = None
        if need_weight:
            d_weight = _weight_gradient(ctx.weight, grad, _kept_rows(ctx.normed, kept).to(ctx.dtype), ctx.in_place)
        return d_x, d_weight, grad.sum(0).to(ctx.weight.dtype) if need_bias else None, None


class FastLinear(nn.Linear):
    """A linear layer of float32 weights whose gradient is added in place where that is on; on a CPU by oneDNN.

    On a GPU under autocast the weight is cast once a step instead of once a row, and the gradient of a row is summed
    into the float32 one by the matmul itself, where autograd would round it, cast it back and add it up.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _ours(x, self.weight):
            return super().forward(x)
        return _LinearFunction.apply(x, self.weight, self.bias, getattr(x, _MADE_OF, None))


class _EmbeddingFunction(torch.autograd.Function):
    """`weight[ids]`, whose gradient goes to the lines that were read."""

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (ids,) = ctx.saved_tensors
        weight = ctx.weight
        ids, grad = ids.flatten(), grad.flatten(0, -2).to(weight.dtype)
        if ctx.padding_idx is not None:
            grad = grad * (ids != ctx.padding_idx).unsqueeze(1)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids, grad)
        return None, None, None


class FastEmbedding(nn.Embedding):
    """An embedding without a dense gradient of its own, inside `gradients_in_place`."""

    def forward(self, input: Tensor) -> Tensor:
        plain = not in_place() or not self.weight.requires_grad or not torch.is_grad_enabled()
        if plain or self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
            return super().forward(input)
        return _EmbeddingFunction.apply(input, self.weight, self.padding_idx)


class _RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * (weight + offset); keeps x and one number a row for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
        scale = weight + offset  # a tensor of its own, since it is returned
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, scale)
        ctx.mark_non_differentiable(inverse, scale)
        ctx.set_materialize_grads(False)
        return (x * inverse).mul_(scale), inverse, scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        x, inverse, scale = ctx.saved_tensors
        normed = x * inverse
        product = (grad * normed).flatten(0, -2)
        d_weight = product.sum(0) if ctx.needs_input_grad[1] else None
        # The part of the gradient along x changes its length, which the norm undoes.
        along = torch.mv(product, scale).div_(x.shape[-1]).view_as(inverse)
        d_x = (grad * scale).addcmul_(normed, along, value=-1).mul_(inverse)
        return d_x, d_weight, None, None


class _FusedRMSNormFunction(torch.autograd.Function):
    """The same on a GPU, by one kernel each way; the output is of the type that matmuls are computed in."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        output, inverses = layers_cuda.norm_forward(x, weight, eps, offset, dtype)
        ctx.save_for_backward(x, weight, inverses)
        ctx.offset = offset
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, inverses = ctx.saved_tensors
        d_x, d_weight = layers_cuda.norm_backward(x, weight, inverses, grad.contiguous(), ctx.offset)
        return d_x, d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None, None, None


class FastRMSNorm(nn.Module):
    """Stands before a model's own RMSNorm class; float32 on a CPU and every type on a GPU go through the above."""

    weight: nn.Parameter
    weight_offset: float  # 1 where the model keeps the weight's distance from 1 (Gemma)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if layers_cuda.available(hidden_states):
            dtype = hidden_states.dtype
            if torch.is_autocast_enabled("cuda") and hidden_states.shape[-1] >= _HIDDEN:
                dtype = torch.get_autocast_dtype("cuda")
            return _FusedRMSNormFunction.apply(hidden_states, self.weight, _eps(self), self.weight_offset, dtype)
        if hidden_states.device.type != "cpu" or hidden_states.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return super().forward(hidden_states)
        output, *parts = _RMSNormFunction.apply(hidden_states, self.weight, _eps(self), self.weight_offset)
        if torch.is_grad_enabled():
            setattr(output, _MADE_OF, (_Normed(), hidden_states.detach(), *parts))
        return output


def _eps(norm: nn.Module) -> float:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return torch.finfo(torch.float32).eps if eps is None else float(eps)  # None is PyTorch's name for that


# Norms of at least this width are those of the residual stream, which linear layers read; narrower ones are of queries
# and keys, which are rotated in float32.
_HIDDEN = 512

# By name: the activation, and its derivative times the gradient of its output.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (nn.functional.silu, torch.ops.aten.silu_backward),
    "gelu_tanh": (
        lambda x: nn.functional.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
}


def _gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """`act(gate) * up`."""
    if layers_cuda.available(gate):
        return layers_cuda.gated_forward(activation, gate, up)
    return _ACTIVATIONS[activation][0](gate).mul_(up)


def _gated_backward(
    activation: str, gate: Tensor, up: Tensor, grad: Tensor, product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `gate` and `up`, and `act(gate) * up` anew if asked; `grad` is used up."""
    if layers_cuda.available(gate):
        return layers_cuda.gated_backward(activation, gate, up, grad, product)
    activate, activation_backward = _ACTIVATIONS[activation]
    activated = activate(gate)
    again = activated * up if product else None
    d_gate = activation_backward(grad * up, gate)
    return d_gate, grad.mul_(activated), again


class _GatedFunction(torch.autograd.Function):
    """`act(gate) * up`, between linear layers of any kind (adapters, quantised) on a GPU."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _gated(activation, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        d_gate, d_up, _ = _gated_backward(ctx.activation, gate, up, grad.contiguous(), product=False)
        return d_gate, d_up, None


class _GatedMLPFunction(torch.autograd.Function):
    """(act(x G^T) * (x U^T)) D^T; keeps both products with x, and forms their product anew in the backward pass."""

    @staticmethod
    def forward(
        ctx, x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor, activation: str,
        made_of: _MadeOf | None,
    ) -> Tensor:  # fmt: skip
        dtype = compute_dtype(gate_weight)
        weights = gate_weight, up_weight, down_weight
        low = tuple(compute_copy(weight, dtype) for weight in weights)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        gate, up = matmul_nt(rows, low[0]), matmul_nt(rows, low[1])
        output = matmul_nt(_gated(activation, gate, up), low[2])
        ctx.normed, kept = _to_keep(rows, made_of, any(ctx.needs_input_grad[1:3]))
        ctx.save_for_backward(gate, up, *low, *kept)
        ctx.weights, ctx.activation, ctx.in_place = weights, activation, in_place()
        ctx.shape, ctx.x_dtype, ctx.dtype = x.shape, x.dtype, dtype
        return output.view(*x.shape[:-1], len(down_weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up, low_gate, low_up, low_down, *kept = ctx.saved_tensors
        need_x, *need_weights = ctx.needs_input_grad[:4]
        grad = grad.flatten(0, -2).to(ctx.dtype)
        d_product = matmul_nt(grad, low_down.t())
        d_weights: list[Tensor | None] = [None, None, None]
        d_gate, d_up, product = _gated_backward(ctx.activation, gate, up, d_product, need_weights[2])
        if product is not None:
            d_weights[2] = _weight_gradient(ctx.weights[2], grad, product, ctx.in_place)
            del product
        if any(need_weights[:2]):
            rows = _kept_rows(ctx.normed, kept).to(ctx.dtype)
            for i, d_linear in enumerate((d_gate, d_up)):
                if need_weights[i]:
                    d_weights[i] = _weight_gradient(ctx.weights[i], d_linear, rows, ctx.in_place)
        d_x = None
        if need_x:
            d_x = matmul_nt(d_gate, low_gate.t()).to(ctx.x_dtype)
            add_product(d_x, d_up, low_up)
            d_x = d_x.view(ctx.shape)
        return d_x, *d_weights, None, None


class FastGatedMLP(nn.Module):
    """Stands before a model's own gated MLP class: down(act(gate(x)) * up(x)), with less kept for the backward pass."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module
    activation: str

    def forward(self, x: Tensor) -> Tensor:
        layers = self.gate_proj, self.up_proj, self.down_proj
        # An adapter may have taken the place of some.
        if not all(type(layer) is FastLinear and layer.bias is None and _ours(x, layer.weight) for layer in layers):
            gate, up = self.gate_proj(x), self.up_proj(x)
            if layers_cuda.available(gate) and gate.dtype == up.dtype:
                return self.down_proj(_GatedFunction.apply(gate, up, self.activation))
            return self.down_proj(self.act_fn(gate) * up)
        return _GatedMLPFunction.apply(
            x, *(layer.weight for layer in layers), self.activation, getattr(x, _MADE_OF, None)
        )


def _ours(x: Tensor, weight: Tensor) -> bool:
    """Do the functions above take this input of a linear layer?"""
    if weight.dtype != torch.float32 or x.numel() < _FEW_ROWS * x.shape[-1]:
        return False
    return x.device.type == "cpu" or (x.is_cuda and in_place() and torch.is_grad_enabled())


def use_fast_layers(lm: PreTrainedModel) -> None:
    """Give a model's embedding and, on a CPU, its linear layers, norms and gated MLPs the classes above.

    Weights and names stay. A norm or an MLP is changed only where ours gives the same numbers.
    """
    embedding = lm.get_input_embeddings()
    if isinstance(embedding, nn.Embedding) and not isinstance(embedding, FastEmbedding):
        kind = type(embedding)
        # A model's own kind of embedding (Gemma scales its output) calls nn.Embedding.forward through super(): the
        # new class stands between the two.
        embedding.__class__ = FastEmbedding if kind is nn.Embedding else _join(kind, kind, FastEmbedding)
    on_cpu = next(lm.parameters()).device.type == "cpu"
    _use_fused_rotary(lm)
    if on_cpu and lm.dtype != torch.float32:
        return
    head = lm.get_output_embeddings()
    for module in list(lm.modules()):
        if type(module) is nn.Linear and module is not head:
            module.__class__ = FastLinear
    for module in list(lm.modules()):
        if isinstance(module, FastRMSNorm | FastGatedMLP) or len(signature(module.forward).parameters) != 1:
            continue
        parts = list(dict(module.named_children())), list(dict(module.named_parameters(recurse=False)))
        if type(module).__name__.endswith("RMSNorm") and parts == ([], ["weight"]):
            _try_fast(module, FastRMSNorm, module.get_parameter("weight").shape[-1], weight_offset=(0.0, 1.0))
        elif all(hasattr(getattr(module, f"{name}_proj", None), "in_features") for name in ("gate", "up", "down")):
            _try_fast(module, FastGatedMLP, module.up_proj.in_features, activation=tuple(_ACTIVATIONS))


_joined: dict[tuple[type, ...], type] = {}


def _join(kind: type, *bases: type) -> type:
    """A class with these bases under the name of the model's own, which libraries go by."""
    return _joined.setdefault(bases, type(kind.__name__, bases, {}))


@torch.no_grad()
def _try_fast(module: nn.Module, fast: type, width: int, **choices: tuple[object, ...]) -> None:
    """Put `fast` before the module's class with the first of the settings that gives the module's own numbers."""
    kind = type(module)
    ((name, values),) = choices.items()
    own = {parameter: parameter.data for parameter in module.parameters(recurse=False)}
    for parameter in own:  # a norm's weights are often all equal, which would hide what is done with them
        parameter.data = torch.linspace(0.5, 2, parameter.numel(), device=parameter.device).view_as(parameter)
    try:
        _join_if_equal(module, fast, kind, name, values, width)
    finally:
        for parameter, data in own.items():
            parameter.data = data


def _join_if_equal(
    module: nn.Module, fast: type, kind: type, name: str, values: tuple[object, ...], width: int
) -> None:
    like = next(module.parameters())
    dtype = like.dtype if like.is_floating_point() else torch.float32
    x = torch.linspace(-3, 3, _FEW_ROWS * width).reshape(1, _FEW_ROWS, width).sin().to(like.device, dtype)
    expected = module(x)
    relative, absolute = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 1e-2)
    module.__class__ = _join(kind, fast, kind)
    for value in values:
        setattr(module, name, value)
        if torch.allclose(module(x), expected, rtol=relative, atol=absolute * float(expected.abs().max())):
            return
    delattr(module, name)
    module.__class__ = kind


# --- rotary embeddings ----------------------------------------------------------------------------------------------


class _RotaryFunction(torch.autograd.Function):
    """Rotary embedding of queries or keys `[batch, heads, T, dim]`, in their own type, computed in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _RotaryFunction._rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _RotaryFunction._rotate(grad, cos, sin, -1), None, None

    @staticmethod
    def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
        batch, heads, length, width = x.shape
        rows = x.transpose(1, 2).contiguous().view(batch * length, heads, width)
        cos, sin = (part.expand(batch, length, width).reshape(batch * length, width) for part in (cos, sin))
        return layers_cuda.rotate(rows, cos, sin, sign).view(batch, length, heads, width).transpose(1, 2)


def _rotary(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A model's function for rotary embeddings with a fused path on a GPU, and itself everywhere else."""

    @wraps(original)
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args, **kwargs):
        plain = args or kwargs or q.dim() != 4 or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]
        if plain or cos.requires_grad or not layers_cuda.available(q):
            return original(q, k, cos, sin, *args, **kwargs)
        return _RotaryFunction.apply(q, cos, sin), _RotaryFunction.apply(k, cos, sin)

    apply_rotary_pos_emb.sepo_fused = True  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def _use_fused_rotary(lm: PreTrainedModel) -> None:
    """Put the fused path into the modules of a model's attention layers, where it gives the same on random inputs."""
    device = next(lm.parameters()).device
    if not layers_cuda.available(torch.empty(1, 1, device=device)):
        return
    for name in {type(module).__module__ for module in lm.modules() if type(module).__name__.endswith("Attention")}:
        original = getattr(sys.modules[name], "apply_rotary_pos_emb", None)
        if original is None or getattr(original, "sepo_fused", False):
            continue
        fused = _rotary(original)
        # Not by the global random state: a training draws from it.
        q, k, cos, sin = (
            (torch.arange(7 * heads * 16, device=device) * step).sin().view(1, 7, heads, 16).transpose(1, 2)
            for heads, step in ((4, 1.3), (2, 1.7), (1, 0.9), (1, 0.7))
        )
        try:
            results = []
            for function in (original, fused):
                inputs = [x.detach().clone().requires_grad_() for x in (q, k)]
                with torch.enable_grad():
                    outputs = function(*inputs, cos[:, 0], sin[:, 0])
                    gradients = torch.autograd.grad([(x * x.sin()).sum() for x in outputs], inputs)
                results.append([*outputs, *gradients])
            same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))
        except (RuntimeError, TypeError, ValueError):
            same = False
        if same:
            sys.modules[name].apply_rotary_pos_emb = fused  # type: ignore[attr-defined]


# --- the last block -------------------------------------------------------------------------------------------------


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


# --- memory ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks for the next tensor instead of returning them; True where it could be set.

    A training step allocates and frees the same sizes row after row. By default each such tensor is mapped and its
    pages are zeroed by the kernel anew, which took up to 10 % of a step.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(mmap_threshold, 2**31 - 1) and libc.mallopt(trim_threshold, 2**31 - 1))
