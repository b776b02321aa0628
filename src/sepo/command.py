"""What the modules of the commands share: options, the folder that a command writes to, tables in the terminal.

Every command is a module with `HELP`, `add_options(parser)` and `run(arguments)`; `cli.arguments` lists them. Libraries
are imported inside functions, so that `--help` and a misspelt option answer at once.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import gc
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sepo.errors import UserError, one_line
from sepo.files import expand_home

if TYPE_CHECKING:
    from sepo.recipe.settings import Recipe

# --- options --------------------------------------------------------------------------------------------------------


def path(text: str) -> str:
    """A path, or a name that may be one. The shell leaves `~` in `--out=~/x` as it is."""
    return expand_home(text)


def named_path(text: str) -> str:
    """`[NAME=]PATH`."""
    name, equals, place = text.partition("=")
    return f"{name}={path(place)}" if equals else path(text)


def data_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that read preference pairs."""
    parser.add_argument(
        "--data", type=path, required=True, metavar="SOURCE", help="hub id, folder or file of preference pairs"
    )
    parser.add_argument("--split", default="train", help="split to read (default train)")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ours=theirs",
        help="name of a column that differs, e.g. chosen=preferred; also for system, input, history, tools; repeatable",
    )
    parser.add_argument(
        "--pairs-from",
        metavar="NAME",
        help="make pairs from the labels or scores of a public dataset (docs/data.md)",
    )
    parser.add_argument("--as-chat", action="store_true", help="wrap plain-text prompts as one user turn")
    chat_template_option(parser)
    parser.add_argument("--max-length", type=int, help="tokens of prompt and response (default 2048)")


def chat_template_option(parser: argparse.ArgumentParser) -> None:
    """Keywords for the chat template."""
    parser.add_argument(
        "--chat-template",
        action="append",
        default=[],
        metavar="key=value",
        help="keyword for the chat template, e.g. enable_thinking=false; repeatable",
    )


def template_keywords(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of `chat_template_option`."""
    return named_values("--chat-template", arguments.chat_template, "key=value", typed=True)


def model_option(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    """A model that a command needs: a hub id or a folder."""
    parser.add_argument(name, type=path, required=True, metavar="MODEL", help=text)


def out_option(parser: argparse.ArgumentParser, text: str) -> None:
    """The folder that a command writes."""
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help=text)


def engine_option(parser: argparse.ArgumentParser, default: str | None = "local") -> None:
    """Who does the units of work (`sepo.engines`)."""
    parser.add_argument(
        "--engine",
        default=default,
        metavar="ENGINE",
        help="who does the work of the models: local (default), files[:FOLDER] or ray[:ADDRESS] "
        "(docs/how-to/many-workers.md)",
    )


def device_options(parser: argparse.ArgumentParser) -> None:
    """Device and seed."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0, mps (default auto)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random draw (default 0)")


def training_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that train."""
    device_options(parser)
    parser.add_argument("--lora", type=int, metavar="RANK", help="train LoRA adapters of this rank")
    parser.add_argument(
        "training",
        nargs="*",
        metavar="key=value",
        help="training settings as in a recipe: learning_rate=5e-6 batch_size=64 num_train_epochs=1 ...",
    )


def named_values(option: str, items: Sequence[str], form: str = "NAME=VALUE", *, typed: bool = False) -> dict[str, Any]:
    """The values of an option that is repeated, by name.

    Args:
        form: what an item looks like, for messages.
        typed: values are YAML (numbers, null), not texts.

    Raises:
        UserError: an item has another form, or a name is given twice.
    """
    from sepo.recipe.reading import parse_override

    values: dict[str, Any] = {}
    for item in items:
        name, equals, value = (part.strip() for part in item.partition("="))
        if not name or not equals or not (value or typed):
            known = re.match(r"[\w.-]*", item)[0]  # type: ignore[index]  # the rest may hold a key
            raise UserError(f"{option} {one_line(known, 40)}: expected {form}")
        if name in values:
            raise UserError(f"{option} {one_line(name, 40)} is given twice: leave one of the two out")
        values[name] = parse_override(item)[1] if typed else value
    return values


def recipe_of(arguments: argparse.Namespace, **sections: Any) -> Recipe:
    """The recipe that the options of a single command amount to, with a recipe's checks. Unset options are left out."""
    from sepo.recipe.reading import parse_recipe

    values = {key: value for key, value in sections.items() if value is not None}
    for name in ("seed", "device"):
        if hasattr(arguments, name):
            values[name] = getattr(arguments, name)
    if hasattr(arguments, "data"):
        data = {
            "source": arguments.data,
            "split": arguments.split,
            "columns": named_values("--column", arguments.column, "ours=theirs, such as chosen=preferred"),
            "pairs_from": arguments.pairs_from,
            "as_chat": arguments.as_chat,
            "chat_template_kwargs": template_keywords(arguments),
            "max_length": arguments.max_length,
            "held_out": 0,
        }
        values["data"] = {key: value for key, value in data.items() if value is not None}
    return parse_recipe(values, "command line")


def training_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Section "oracle" or "policy" of a recipe, from options and `key=value` training settings."""
    from sepo.recipe.reading import parse_override, set_key

    values: dict[str, Any] = {}
    for item in arguments.training:
        key, value = parse_override(item)
        set_key(values, f"training.{key}", value, f"override '{item}'")
    for name in ("objective", "beta", "gamma", "margin", "alpha", "rate", "label_smoothing"):
        if getattr(arguments, name, None) is not None:
            values[name] = getattr(arguments, name)
    if arguments.lora is not None:
        values["lora"] = {"r": arguments.lora}
    return values


# --- running --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing_to(arguments: argparse.Namespace, check: Callable[[Path], None] = lambda out: None) -> Iterator[Path]:
    """Hold the lock of the folder `--out`; `check` refuses a folder that holds other things."""
    out = Path(arguments.out)
    processes = join(getattr(arguments, "device", "cpu"))
    processes.on_main(lambda: check(out))
    with processes.alone_in(out):
        processes.require_shared(out)
        yield out


@contextlib.contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, kept by a command that was interrupted for the next one, and removed otherwise."""
    from sepo import processes

    folder = out.with_name(f".{out.name}-work")
    try:
        yield folder
    except UserError:
        if processes.is_main():  # the other ranks may have ended for another reason
            shutil.rmtree(folder, ignore_errors=True)
        raise
    processes.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))


def join(device: str) -> Any:
    """Meet the other processes of a launch (torchrun, accelerate launch); returns the module `processes`."""
    from sepo import processes

    processes.join(device)
    return processes


def quiet_libraries(*modules: str) -> None:
    """Import the heavy libraries and further modules, without progress bars and notices of the libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Users cannot act on deprecations inside the libraries.
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for module in modules:
        import_module(module)
    _freeze_libraries()


@functools.cache  # counting the frozen objects would take longer than many a command
def _freeze_libraries() -> None:
    """Exempt every object that exists now from garbage collection, once in a process.

    Importing PyTorch, Transformers and TRL makes a million objects, and every collection would visit them: more than
    half of the CPU time of a small run. They are thawed at exit, because nanobind reports frozen objects as leaks.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


# --- tables in the terminal -----------------------------------------------------------------------------------------


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """Print metrics as a table, grouped by the part of the name before the slash; `X_se` joins `X`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sepo import processes
    from sepo.numbers import error_text, number

    if not processes.is_main():
        return
    table = Table(title=Text(one_line(title)), title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("± s.e.", justify="right")
    previous = None
    for name, value in metrics.items():
        if name.endswith("_se") and name.removesuffix("_se") in metrics:
            continue
        group = name.split("/")[0]
        if previous is not None and group != previous:
            table.add_section()
        previous = group
        error = metrics.get(f"{name}_se")
        table.add_row(Text(name), number(value), "" if error is None else error_text(error))
    Console().print(table)


def print_plan(title: str, rows: list[dict[str, str]], wide: bool = False) -> None:
    """Print rows as a table. Rows are not folded in a pipe, nor in a terminal if the table is wide."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False)
    for name in rows[0]:
        right = name not in ("stage", "what", "name", "how", "fits", "to fit")
        table.add_column(name, justify="right" if right else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row.values()))
    console = Console()
    (Console(width=max(console.width, 200)) if wide or not console.is_terminal else console).print(table)
