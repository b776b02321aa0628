"""Device, dtype and quantization of a model.

dtype "auto": bfloat16 on CUDA for frozen weights (generation, the base under LoRA), float32 everywhere else. Weights
that are trained in full are float32 on CUDA, too: bfloat16 has 8 bits of precision, so the update of an optimizer step
at lr 5e-7 would round to nothing. The trainer's bf16 autocast gives the speed of mixed precision.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from sepo.errors import UserError, wrong_type

_DTYPES = ("float64", "float32", "bfloat16", "float16")


def choose_device(device: str = "auto") -> torch.device:
    """Return the device to load a model on: "auto" is CUDA, else MPS, else the CPU.

    In a launch with several GPUs each process uses the GPU of its `LOCAL_RANK`.

    Raises:
        UserError: the device is unknown or not on this machine.
    """
    if not isinstance(device, str | torch.device):
        raise wrong_type("device", device, "auto, cpu, cuda, cuda:N or mps")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device '{device}' is unknown: expected auto, cpu, cuda, cuda:N or mps") from None
    if chosen.type == "cuda":
        of_rank = int(os.environ.get("LOCAL_RANK", "0"))
        index = of_rank if chosen.index is None else chosen.index
        if index != of_rank and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"device '{device}': each process of a launch has its own GPU; use device=cuda")
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            found = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
            raise UserError(f"device '{device}' is not there: this machine has {found}; use device=auto or device=cpu")
        return torch.device("cuda", index)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' is not there: this machine has no Metal GPU; use device=auto or device=cpu")
    if chosen.type not in ("cpu", "mps"):
        raise UserError(f"device '{device}' is not supported: expected auto, cpu, cuda, cuda:N or mps")
    return chosen


def choose_training_device(device: str = "auto") -> torch.device:
    """`choose_device` for a training, which runs on the first visible GPU of its process.

    Raises:
        UserError: as `choose_device`, or another GPU than the first is meant.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda" and chosen.index != int(os.environ.get("LOCAL_RANK", "0")):
        raise UserError(
            f"device '{device}': a training runs on the first visible GPU; start the command with "
            f"CUDA_VISIBLE_DEVICES={chosen.index} and device=cuda"
        )
    return chosen


def choose_dtype(dtype: str = "auto", device: torch.device | None = None, *, trained: bool = False) -> torch.dtype:
    """Return the dtype of a model's weights; the module's text explains "auto".

    Args:
        dtype: "auto", "float32", "bfloat16", "float16" or "float64".
        device: from `choose_device`; None: the device of "auto".
        trained: the weights themselves are trained, not only an adapter.

    Raises:
        UserError: the dtype is unknown.
    """
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise UserError(f"dtype '{dtype}' is unknown: expected auto, {', '.join(_DTYPES)}")
        return getattr(torch, dtype)
    device = device or choose_device()
    return torch.bfloat16 if fast_bfloat16(device) and not trained else torch.float32


def dtype_name(dtype: str, kind: str, *, trained: bool = False) -> str:
    """`choose_dtype` on a kind of device, by name ("bfloat16")."""
    return str(choose_dtype(dtype, torch.device(kind), trained=trained)).removeprefix("torch.")


def fast_bfloat16(device: torch.device) -> bool:
    """Does a device support bfloat16 natively? GPUs before Ampere and most CPUs emulate it, slower than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def check_quantization(
    quantization: str | None, *, train: bool = False, lora: bool = False, installed: bool = True
) -> None:
    """Check a quantization before the model is loaded; `installed` checks that bitsandbytes is installed, too.

    Raises:
        UserError: an unknown kind, full training of quantized weights, or no bitsandbytes.
    """
    if quantization is None:
        return
    if quantization != "4bit":
        raise UserError(f"quantization '{quantization}' is unknown: expected 4bit or none")
    if train and not lora:
        raise UserError("quantization=4bit trains an adapter only: set lora, or leave quantization out")
    if installed and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError('quantization=4bit needs the package bitsandbytes; run: pip install -e ".[qlora]"')
