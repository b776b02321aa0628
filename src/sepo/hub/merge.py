"""`sepo merge`: an adapter and its base as one model folder, for tools that read no adapters."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sepo import command
from sepo.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

HELP = "merge an adapter into its base and write the whole model"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", type=command.path, required=True, metavar="DIR", help="adapter: a folder or a hub id"
    )
    command.out_option(parser, "folder for the whole model, with its tokenizer")
    parser.add_argument(
        "--base", type=command.path, metavar="MODEL", help="base model (default: the one that the adapter names)"
    )
    parser.add_argument(
        "--dtype",
        default="base",
        help="type of the weights: float32, bfloat16, float16 (default: as the base is stored)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0, mps (default auto)")


def run(arguments: argparse.Namespace) -> None:
    command.quiet_libraries()
    from sepo.files import check_writable
    from sepo.models.devices import choose_device

    def check(out: Path) -> None:
        for name in filter(None, (arguments.adapter, arguments.base)):
            if os.path.isdir(name) and out.exists() and os.path.samefile(name, out):
                raise UserError(f"--out '{out}' is the model that is read: choose another folder")
        check_writable(Path(os.path.abspath(out)).parent, "choose another folder for the model")
        if out.is_file() or (out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())):
            raise UserError(f"'{out}' holds files, which the merged model would replace: choose a new folder")

    with command.writing_to(arguments, check) as out:
        if command.join(arguments.device).size() > 1:
            raise UserError("sepo merge runs in one process: leave the launcher out")
        choose_device(arguments.device)
        merge_adapter(arguments.adapter, out, base=arguments.base, dtype=arguments.dtype, device=arguments.device)
    print(f"merged model: {arguments.out}")


def merge_adapter(
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    *,
    base: str | None = None,
    dtype: str = "base",
    device: str = "auto",
) -> None:
    """Merge an adapter into its base and write the whole model with tokenizer, chat template and generation config.

    The weights are merged in float32 and compared with the adapter (`models.saving.merge`), then rounded once to
    `dtype` and written. This takes 4 bytes of memory for each weight.

    Args:
        adapter: a folder or a hub id.
        out: the folder; replaced if it exists.
        base: the base; None: the one that the adapter names.
        dtype: type of the weights; "base": the type in which the base is stored.

    Raises:
        UserError: `adapter` is no adapter, its base is missing, or the merged model computes other log-probabilities.
    """
    from sepo.models.devices import choose_dtype
    from sepo.models.folders import adapter_base, is_adapter
    from sepo.models.names import load_config, resolve_model
    from sepo.models.saving import merge, save_model
    from sepo.models.tokenizer import load_tokenizer
    from sepo.models.weights import load_model

    folder = Path(resolve_model(adapter))
    if not is_adapter(folder):
        raise UserError(f"'{adapter}' is no adapter (it has no adapter_config.json): there is nothing to merge")
    base_name, revision = (base, None) if base is not None else adapter_base(folder)
    if dtype == "base":
        stored = load_config(base_name, revision=revision).dtype
        dtype = "float32" if stored is None else str(stored).removeprefix("torch.")
    written = choose_dtype(dtype)
    tokenizer = load_tokenizer(folder)
    model = load_model(base_name, adapter=folder, revision=revision, dtype="float32", device=device)
    merged = merge(cast("PeftModel", model))
    cast(Any, merged).to(written)
    save_model(merged, tokenizer, out)
