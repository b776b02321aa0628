"""Named tensors in one file a process: each process writes its shards, and any number of processes reads them.

The files are safetensors. The metadata of each has the offsets of its shards in the whole tensors (`OFFSETS`, JSON), so
a reader needs no other index. PyTorch's own format (`torch.distributed.checkpoint`) is read as pickles, and its writer
of safetensors keeps each file in memory twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sepo import processes
from sepo.errors import UserError, one_line
from sepo.files import replacing
from sepo.models.sharding import own_part

OFFSETS = "offsets"
Shards = dict[str, tuple[tuple[int, ...], Tensor]]


def offsets_of(tensor: Tensor) -> tuple[int, ...]:
    """Where this process's shard begins in the whole tensor; zeros for a tensor that is not sharded."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offsets)


def copy_own(tensors: Mapping[str, Tensor]) -> Shards:
    """Copies in host memory of the shards that this process has to write, by name, with their offsets.

    A tensor that all processes hold whole is written by one of them, each process in turn; of replicas, the first.

    Args:
        tensors: the same names in the same order in every process.
    """
    copies: Shards = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        if isinstance(tensor, DTensor):
            coordinate = list(tensor.device_mesh.get_coordinate() or ())
            writes = not any(
                index
                for index, placement in zip(coordinate, tensor.placements, strict=True)
                if placement.is_replicate()
            )
        else:
            writes = number % processes.size() == processes.rank()
        part = own_part(tensor.detach())
        if writes and part.numel():
            copies[name] = offsets_of(tensor), part.to("cpu", copy=True).contiguous()
    return copies


def write(path: Path, shards: Shards) -> None:
    """Write shards to a file, complete or not at all."""
    offsets = json.dumps({name: places for name, (places, _) in shards.items()})
    with replacing(path) as temporary:
        save_file({name: tensor for name, (_, tensor) in shards.items()}, temporary, {OFFSETS: offsets})


class _Piece(NamedTuple):
    """A shard in a file: where it begins in the whole tensor, and its shape."""

    file: Any
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class Reader:
    """The tensors in the files of a folder.

    Raises:
        UserError: a file is none that `write` wrote.
    """

    def __init__(self, folder: Path):
        self._pieces: dict[str, list[_Piece]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
                for name, offsets in json.loads(file.metadata()[OFFSETS]).items():
                    shape = tuple(file.get_slice(name).get_shape())
                    self._pieces.setdefault(name, []).append(_Piece(file, tuple(offsets), shape))
            except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"'{path}' cannot be read ({one_line(error, 200)})") from None

    def names(self) -> set[str]:
        return set(self._pieces)

    def shape(self, name: str) -> torch.Size:
        """Shape of a whole tensor."""
        ends = [[a + b for a, b in zip(piece.offsets, piece.shape, strict=True)] for piece in self._pieces[name]]
        return torch.Size(map(max, zip(*ends, strict=True)))

    def dtype(self, name: str) -> torch.dtype:
        piece = self._pieces[name][0]
        return piece.file.get_slice(name)[tuple(slice(0, 0) for _ in piece.shape)].dtype

    @torch.no_grad()
    def fill(self, name: str, tensor: Tensor) -> None:
        """Copy a stored tensor, or this process's shard of it, into `tensor`.

        Raises:
            UserError: it is not there, not whole, or has another shape.
        """
        if name not in self._pieces or self.shape(name) != tensor.shape:
            stored = list(self.shape(name)) if name in self._pieces else "missing"
            raise UserError(f"{name} is {stored}, and the model's is {list(tensor.shape)}")
        own, begin = own_part(tensor.detach()), offsets_of(tensor)
        copied = 0
        for piece in self._pieces[name]:
            low = [max(a, b) for a, b in zip(begin, piece.offsets, strict=True)]
            ends = zip(begin, own.shape, piece.offsets, piece.shape, strict=True)
            high = [min(a + size, b + length) for a, size, b, length in ends]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            here, there = (
                tuple(slice(a - start, b - start) for a, b, start in zip(low, high, starts, strict=True))
                for starts in (begin, piece.offsets)
            )
            own[here].copy_(piece.file.get_slice(name)[there])
            copied += math.prod(b - a for a, b in zip(low, high, strict=True))
        if copied != own.numel():
            raise UserError(f"{name} is not whole: {own.numel() - copied} of {own.numel()} values are missing")
