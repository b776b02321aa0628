"""Models of the Hugging Face Hub: commit, cached snapshot and download of a hub id."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from sepo.errors import UserError, named_error
from sepo.models.folders import check_folder

# Other files (pickles, ONNX, weights in the vendor's layout) are not downloaded.
_HUB_ALLOW = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_HUB_IGNORE = ["*/*", "consolidated*"]


@lru_cache(maxsize=64)
def hub_snapshot(name: str, revision: str | None) -> tuple[str, Path | None]:
    """The commit of a hub id, and its cached folder if the hub is not reachable.

    Cached within the process, so that all stages of a run use one commit.
    """
    kinds = "neither a folder, a .gguf file, package:PACKAGE/FILE.gguf nor a reachable hub id"
    missing = f"no such model: '{name}' is {kinds}"
    if os.path.isfile(name):
        raise UserError(f"'{name}' is a file: name the folder of a model, or a .gguf file")
    try:
        # One request without retries fails at once if there is no network; a download would retry for 20 s.
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10)
    except hub_errors.HFValidationError:
        raise UserError(missing) from None
    except hub_errors.GatedRepoError:
        raise UserError(f"the model '{name}' is gated: accept its terms on the hub and run: hf auth login") from None
    except hub_errors.RevisionNotFoundError:
        raise UserError(f"the model '{name}' has no revision '{revision}' on the hub") from None
    except hub_errors.RepositoryNotFoundError:
        raise UserError(missing) from None
    except Exception as error:  # no network; the class depends on the hub client
        folder = cached_snapshot(name, revision)
        if folder is None:
            reason = "offline mode is on" if isinstance(error, hub_errors.OfflineModeIsEnabled) else named_error(error)
            raise UserError(f"{missing} ({reason})") from None
        check_folder(folder)
        return folder.name, folder
    files = [sibling.rfilename for sibling in info.siblings or []]
    if "config.json" not in files and "adapter_config.json" not in files:
        raise UserError(f"the hub repository '{name}' is no Transformers model: it holds no config.json")
    if not any(file.endswith(".safetensors") for file in files):
        raise UserError(f"the hub repository '{name}' holds no *.safetensors file; pickled weights are never loaded")
    if info.sha is None:
        raise UserError(f"the hub names no commit for '{name}'; give a revision")
    return info.sha, None


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """The cached folder of a hub id, which may be incomplete; None without a cached file."""
    for file in ("config.json", "adapter_config.json"):
        path = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def download(name: str, revision: str | None) -> str:
    commit, cached = hub_snapshot(name, revision)
    if cached is not None:
        return str(cached)
    try:
        return huggingface_hub.snapshot_download(
            name, revision=commit, allow_patterns=_HUB_ALLOW, ignore_patterns=_HUB_IGNORE
        )
    except Exception as error:
        raise UserError(f"the download of '{name}' failed ({named_error(error)}); run the command again") from None
