"""Models that are sharded over the processes of a launch, because no device can hold them.

Frozen models are sharded here by PyTorch's FSDP2, trained models by Accelerate (FSDP2) or DeepSpeed (ZeRO-3).

Each process keeps an even shard of every weight. A decoder block is gathered on every device while it computes, and the
next one is prefetched; embedding, last norm and LM head are gathered together. So every process must run the same
number of forward passes: a rank without data runs a dummy batch and discards the result.

Weights are gathered when their module is *called*. Code that computes with the weights of a module (packed rows, the
LM head in blocks, the check of the layers) runs inside this call (`inside_call`) or in the context `gathered`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from sepo import processes
from sepo.errors import UserError
from sepo.models.adapters import causal_lm
from sepo.models.checkpoint import check_weights

Result = TypeVar("Result")


def is_sharded(model: nn.Module) -> bool:
    """Are the weights of a model sharded over processes, which must all call it equally often?"""
    return isinstance(causal_lm(model), FSDPModule)


def sharded_loading(folder: Path, name: str, device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` with which each process reads only its shard of every weight.

    Args:
        folder: a checkpoint in the Transformers layout.
        name: the user's name for the model.
        device: device of this process's shard.

    Raises:
        UserError: the device cannot hold shards, or the model's decoder blocks are unknown.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = accelerator.type if accelerator is not None else "cpu"
    if device.type != kind:
        raise UserError(f"device '{device.type}': a launch with FSDP keeps its shards on {kind}; leave device out")
    model = check_weights(folder, name)
    if model is None:
        raise UserError(f"model '{name}' is stored quantized and cannot be sharded by FSDP: launch without FSDP")
    blocks = decoder_blocks(model, name)
    patterns = {".".join("*" if part.isdigit() else part for part in path.split(".")) for path in blocks}
    plan = dict.fromkeys(patterns, "free_full_weight")
    return {"distributed_config": DistributedConfig(fsdp_size=processes.size(), fsdp_plan=plan)}


def decoder_blocks(lm: PreTrainedModel, name: str) -> list[str]:
    """Paths of the modules in Transformers' `_no_split_modules`, which Accelerate wraps in training, too.

    Raises:
        UserError: the architecture has none.
    """
    kinds = set(lm._no_split_modules or ())
    paths = [path for path, module in lm.named_modules() if type(module).__name__ in kinds]
    if not paths:
        raise UserError(
            f"model '{name}': Transformers does not know the decoder blocks of {type(lm).__name__}, so it cannot be "
            "sharded by FSDP: launch without FSDP"
        )
    return paths


@torch.no_grad()
def sharded_twin(model: nn.Module, device: torch.device) -> nn.Module:
    """A frozen, sharded copy of a whole model in memory. A device holds at most one whole weight beside its shards.

    Args:
        model: the same in every process, a causal LM or a PEFT model around one; not changed.
    """
    names = {id(tensor): tensor for tensor in model.parameters()}
    memo: dict[int, Any] = {
        key: nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False) for key, tensor in names.items()
    }
    twin = copy.deepcopy(model, memo)
    whole = {id(memo[key]): tensor for key, tensor in names.items()}
    lm = causal_lm(twin)
    # Collected before sharding, which replaces the parameters.
    sources = {name: whole[id(parameter)] for name, parameter in lm.named_parameters(remove_duplicate=False)}
    mesh = torch.distributed.init_device_mesh(device.type, (processes.size(),))
    for path in decoder_blocks(lm, lm.config.name_or_path or type(lm).__name__):
        fully_shard(lm.get_submodule(path), mesh=mesh, reshard_after_forward=True)
    fully_shard(lm, mesh=mesh)
    parts: dict[str, Tensor] = {}
    for name, parameter in lm.named_parameters():
        assert isinstance(parameter, DTensor)
        # Every process has the whole weight and keeps its shard, without communication.
        parts[name] = distribute_tensor(
            sources[name].detach().to(device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    lm.load_state_dict(parts, strict=False, assign=True)
    lm.tie_weights()
    for module in twin.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
    return twin.requires_grad_(False).eval()


def own_part(tensor: Tensor) -> Tensor:
    """This process's shard of a weight; the whole weight of a model that is not sharded."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)  # ZeRO-3: the weight is empty between calls


def waits_for_call(module: nn.Module) -> bool:
    """Are the weights of a module gathered only while it is called?"""
    return isinstance(module, FSDPModule) or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False))


def gather_by_block(lm: PreTrainedModel) -> None:
    """Let ZeRO-3 gather whole decoder blocks, as FSDP does, not single modules.

    The fused MLP reads weights of modules that are never called.
    """
    from deepspeed.utils import set_z3_leaf_modules

    name = lm.config.name_or_path or type(lm).__name__
    set_z3_leaf_modules(lm, list({type(lm.get_submodule(path)) for path in decoder_blocks(lm, name)}))


def inside_call(module: nn.Module, work: Callable[..., Result], *inputs: Tensor) -> Result:
    """Run `work(*inputs)` as the forward of a module, so that the hooks of the call (FSDP, ZeRO-3) run, too.

    Args:
        inputs: tensors that receive gradients; FSDP's backward hooks depend on them.
    """
    forward = module.__dict__.get("forward")
    module.forward = work
    try:
        return module(*inputs)
    finally:
        if forward is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = forward


def units(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """The modules that are gathered together: each FSDP unit with its modules, or one unit with all modules."""
    roots = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if model not in roots:
        roots.insert(0, model)  # type: ignore[arg-type]
    return [(unit, list(_own_modules(unit))) for unit in roots]


def _own_modules(unit: nn.Module) -> Iterator[nn.Module]:
    yield unit
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _own_modules(child)


@contextlib.contextmanager
def gathered(unit: nn.Module) -> Iterator[None]:
    """Gather the weights of a unit in every process; all processes must call this."""
    if not isinstance(unit, FSDPModule):
        yield
        return
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()
