"""GGUF files: check of the header, and conversion to safetensors in a cache."""

from __future__ import annotations

import errno
import importlib.util
import math
import mmap
import os
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoTokenizer

from sepo.data.templates import stop_ids
from sepo.errors import UserError, named_error
from sepo.files import expand_home, file_digest, replace_folder
from sepo.models.checkpoint import load_whole

# Part of the cache key: raise it when the conversion below writes other files.
_GGUF_CACHE_VERSION = 1
# Errors caused by the cache folder, not by the file.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def converted_folder(gguf: Path) -> Path:
    root = Path(expand_home(os.environ.get("SEPO_CACHE") or "~/.cache/sepo", "the cache of models"))
    return root / "gguf" / f"{gguf.stem}-{file_digest(gguf)[:16]}-v{_GGUF_CACHE_VERSION}"


def is_converted(folder: Path) -> bool:
    return (folder / "config.json").is_file()  # the folder is complete or missing


def check_gguf(path: Path) -> None:
    """Check the header and size of a GGUF file.

    The reader of the gguf package takes 20 s for a vocabulary of 262,144; this takes a quarter of a second.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading '{path}' needs the package gguf; run: pip install -e \".[quickstart]\"")
    size = path.stat().st_size
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = _gguf_end(data)
    except (ValueError, KeyError, ArithmeticError, OSError, struct.error) as error:
        raise UserError(
            f"'{path}' is not a whole GGUF file ({named_error(error)}); download or install it again"
        ) from None
    if end > size:
        raise UserError(
            f"'{path}' is not a whole GGUF file (it has {size:,} of {end:,} bytes); download or install it again"
        )


def _gguf_end(data: mmap.mmap) -> int:
    """The size of a GGUF file in bytes according to its header (versions 2 and 3)."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    scalar_sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by value type
    string, array = 8, 9
    at = 0

    def read(layout: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from("<" + layout, data, at)
        at += struct.calcsize("<" + layout)
        return values

    def read_string() -> bytes:
        nonlocal at
        (length,) = read("Q")
        at += length
        return data[at - length : at]

    magic, version, tensors, pairs = read("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it starts with {magic!r}, version {version}")
    alignment = 32
    for _ in range(pairs):
        key = read_string()
        (kind,) = read("I")
        count = 1
        if kind == array:
            kind, count = read("IQ")
        if kind == string:
            for _ in range(count):
                (length,) = read("Q")
                at += length
        elif key == b"general.alignment":
            (alignment,) = read("I")
        else:
            at += count * scalar_sizes[kind]
    last = 0
    for _ in range(tensors):
        read_string()
        (dimensions,) = read("I")
        if dimensions > 4:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        *shape, kind, offset = read(f"{dimensions}QIQ")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        last = max(last, offset + math.prod(shape) // block * block_bytes)
    if last == 0:
        raise ValueError("it holds no weights")
    return -(-at // alignment) * alignment + last


def convert_gguf(gguf: Path) -> Path:
    """Return the folder of a converted GGUF file; convert it if it is not cached."""
    target = converted_folder(gguf)
    if is_converted(target):
        return target
    check_gguf(gguf)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The first process of a launch converts, the others wait.
        with FileLock(f"{target}.lock"):
            if is_converted(target):
                return target
            print(f"converting {gguf.name} to safetensors in {target} (once)", file=sys.stderr, flush=True)
            with replace_folder(target) as folder:
                _write_converted(gguf, folder)
    except OSError as error:
        if error.errno in _UNWRITABLE:
            reason = f"cannot write the converted model to '{target}' ({named_error(error)})"
            raise UserError(f"{reason}; set SEPO_CACHE to a folder with space for it") from None
        raise _not_convertible(gguf, error) from None
    except UserError:
        raise
    except Exception as error:  # the converter checks little: a damaged file may raise any exception
        raise _not_convertible(gguf, error) from None
    return target


def _not_convertible(gguf: Path, error: Exception) -> UserError:
    return UserError(f"cannot convert '{gguf}' ({named_error(error)}): expected a whole GGUF file of a known decoder")


def _write_converted(gguf: Path, folder: Path) -> None:
    parent, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=file)
    model = load_whole(gguf.parent, str(gguf), gguf_file=file, dtype=torch.float32)
    # The weights are float32 now, and save_pretrained rejects models that are marked as quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    stops = stop_ids(model, tokenizer)
    if stops:
        model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
