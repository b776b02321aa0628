"""Models that no device holds whole: cut up over the processes of a launch.

Frozen ones are cut up here, by PyTorch's FSDP2; those that are trained by Accelerate (FSDP2) or DeepSpeed (ZeRO-3).

Each process keeps an even part of every weight. A decoder block is whole on every device while it computes, and the
next one is on its way; embedding, last norm and LM head are wholes of their own. So every process must run as many
forwards as the others: who has nothing to read reads something all the same, and drops the result.

Weights are gathered when the module that owns them is *called*. What computes from the weights of a module (packed
rows, the walk over the vocabulary, the trial of the layers) does so inside of that call (`inside_call`), or between
`gathered` and its end.
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
    """Are the weights of a model cut up over processes, which must all call it equally often?"""
    return isinstance(causal_lm(model), FSDPModule)


def sharded_loading(folder: Path, name: str, device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` with which each process reads its own part of every weight, and nothing else.

    Args:
        folder: a checkpoint in the Transformers layout.
        name: what the user calls the model.
        device: where this process keeps its part.

    Raises:
        UserError: the parts cannot lie on this device, or the model's decoder blocks are not known.
    """
    where = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = where.type if where is not None else "cpu"
    if device.type != kind:
        raise UserError(f"device '{device.type}': a launch with FSDP keeps its parts on {kind}; leave device out")
    laid_out = check_weights(folder, name)
    if laid_out is None:
        raise UserError(f"model '{name}' is stored quantized and cannot be cut up by FSDP: launch without it")
    blocks = decoder_blocks(laid_out, name)
    patterns = {".".join("*" if part.isdigit() else part for part in path.split(".")) for path in blocks}
    plan = dict.fromkeys(patterns, "free_full_weight")
    return {"distributed_config": DistributedConfig(fsdp_size=processes.size(), fsdp_plan=plan)}


def decoder_blocks(lm: PreTrainedModel, name: str) -> list[str]:
    """Paths of the modules that Transformers says are not to be split, as Accelerate wraps them in training.

    Raises:
        UserError: it says nothing of this architecture.
    """
    kinds = set(lm._no_split_modules or ())
    found = [path for path, module in lm.named_modules() if type(module).__name__ in kinds]
    if not found:
        raise UserError(
            f"model '{name}': the decoder blocks of {type(lm).__name__} are not known to Transformers, so it cannot be "
            "cut up by FSDP: launch without it"
        )
    return found


@torch.no_grad()
def sharded_twin(model: nn.Module, device: torch.device) -> nn.Module:
    """A frozen copy of a whole model in memory, cut up over the processes; no device holds more than one weight of it
    beside its parts.

    Args:
        model: the same in every process, a causal LM or a PEFT model around one; left as it is.
    """
    names = {id(tensor): tensor for tensor in model.parameters()}
    memo: dict[int, Any] = {
        key: nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False) for key, tensor in names.items()
    }
    twin = copy.deepcopy(model, memo)
    whole = {id(memo[key]): tensor for key, tensor in names.items()}
    lm = causal_lm(twin)
    # Before they are cut up: the new parameters are others.
    sources = {name: whole[id(parameter)] for name, parameter in lm.named_parameters(remove_duplicate=False)}
    mesh = torch.distributed.init_device_mesh(device.type, (processes.size(),))
    for path in decoder_blocks(lm, lm.config.name_or_path or type(lm).__name__):
        fully_shard(lm.get_submodule(path), mesh=mesh, reshard_after_forward=True)
    fully_shard(lm, mesh=mesh)
    parts: dict[str, Tensor] = {}
    for name, parameter in lm.named_parameters():
        assert isinstance(parameter, DTensor)
        # Every process has the whole weight and takes its part; nothing is sent.
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
    """The part of a weight that this process keeps: all of it where nothing is cut up."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)  # ZeRO-3: the weight itself is empty between the calls


def waits_for_call(module: nn.Module) -> bool:
    """Are the weights of a module whole only while it is called?"""
    return isinstance(module, FSDPModule) or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False))


def gather_by_block(lm: PreTrainedModel) -> None:
    """Let ZeRO-3 gather whole decoder blocks, as FSDP does, not each module for itself.

    An MLP is computed from the weights of modules that are never called.
    """
    from deepspeed.utils import set_z3_leaf_modules

    name = lm.config.name_or_path or type(lm).__name__
    set_z3_leaf_modules(lm, list({type(lm.get_submodule(path)) for path in decoder_blocks(lm, name)}))


def inside_call(module: nn.Module, work: Callable[..., Result], *inputs: Tensor) -> Result:
    """`work(*inputs)` in place of a module's forward, inside of its call: what waits for that call takes part.

    Args:
        inputs: what gradients flow back to; FSDP waits for them on the way back.
    """
    own = module.__dict__.get("forward")
    module.forward = work
    try:
        return module(*inputs)
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def units(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """The modules of a model by what is gathered together: one unit with all of them where nothing is cut up."""
    found = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if model not in found:
        found.insert(0, model)  # type: ignore[arg-type]
    return [(unit, list(_own_modules(unit))) for unit in found]


def _own_modules(unit: nn.Module) -> Iterator[nn.Module]:
    yield unit
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _own_modules(child)


@contextlib.contextmanager
def gathered(unit: nn.Module) -> Iterator[None]:
    """While it lasts, the weights of a unit are whole in every process, all of which must come here."""
    if not isinstance(unit, FSDPModule):
        yield
        return
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()
