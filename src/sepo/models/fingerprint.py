"""Hashes of models.

`model_fingerprint` covers the computation: config and every byte of the weights. `usage_fingerprint` covers tokenizer,
chat template and generation config, which a model trained from this one inherits.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sepo.files import expand_home, file_digest
from sepo.models.folders import adapter_base, is_adapter, read_json_object, weight_files
from sepo.models.hub import hub_snapshot
from sepo.models.names import gguf_path, resolve_model

# Keys of config files that depend on machine or library version, not on the model.
_VOLATILE_KEYS = {
    "_name_or_path",
    "transformers_version",
    "base_model_name_or_path",
    "peft_version",
    "inference_mode",
    "name_or_path",
}
# Files of a model folder that determine tokenisation, chat template and end of a response.
_USAGE_FILES = (
    "tokenizer*",
    "*_tokens*.json",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
)


def model_fingerprint(name_or_path: str | os.PathLike, *, revision: str | None = None) -> str:
    """Return a SHA-256 of a model's config and weights.

    The hash is the same on every machine: it ignores paths, file times and library versions. That of an adapter covers
    its base. That of a hub id covers the commit, so no file is downloaded.

    Raises:
        UserError: no such model.
    """
    name = expand_home(name_or_path, "the model")
    if gguf_path(name) is None and not os.path.isdir(name):
        commit, _ = hub_snapshot(name, revision)
        return hashlib.sha256(f"hub:{name}@{commit}".encode()).hexdigest()
    folder = Path(resolve_model(name, revision=revision))
    digest = hashlib.sha256()
    for config in ("config.json", "adapter_config.json"):
        if (folder / config).is_file():
            values = {k: v for k, v in read_json_object(folder / config).items() if k not in _VOLATILE_KEYS}
            digest.update(f"{config}:{json.dumps(_sorted_lists(values), sort_keys=True)}\n".encode())
    for path in weight_files(folder):
        digest.update(f"{path.name}:{file_digest(path)}\n".encode())
    if is_adapter(folder):
        base, base_revision = adapter_base(folder)
        digest.update(f"base:{model_fingerprint(base, revision=base_revision)}\n".encode())
    return digest.hexdigest()


def usage_fingerprint(name_or_path: str | os.PathLike) -> str:
    """Return a SHA-256 of a model's tokenizer files, chat templates and generation config.

    These files are not part of `model_fingerprint`, because they do not change log-probabilities. But a model trained
    from this one inherits them, and they decide where responses end. The hash of an adapter covers its base.

    Raises:
        UserError: no such model, or one of the files is no JSON object.
    """
    folder = Path(resolve_model(name_or_path))
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _USAGE_FILES for path in folder.glob(pattern) if path.is_file()}):
        content = file_digest(path)
        if path.name in ("tokenizer_config.json", "generation_config.json"):
            values = {k: v for k, v in read_json_object(path).items() if k not in _VOLATILE_KEYS}
            content = json.dumps(values, sort_keys=True)
        digest.update(f"{path.relative_to(folder).as_posix()}:{content}\n".encode())
    if is_adapter(folder):
        base, revision = adapter_base(folder)
        digest.update(f"base:{usage_fingerprint(resolve_model(base, revision=revision))}\n".encode())
    return digest.hexdigest()


def _sorted_lists(values: dict[str, Any]) -> dict[str, Any]:
    # PEFT writes target_modules, a set, in an order that differs between processes.
    return {k: sorted(v, key=str) if k == "target_modules" and isinstance(v, list) else v for k, v in values.items()}
