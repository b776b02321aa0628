"""Several processes of one launch: who writes, and how the others learn what came of it.

    torchrun --nproc-per-node 2 -m sepo run recipe.yaml          accelerate launch -m sepo.cli run recipe.yaml

All processes run the same stages. The main one (rank 0) decides, reads the manifest and writes; `on_main` hands its
answer, or its failure, to the others. Messages are JSON, never pickles. Waiting happens in a group of its own over TCP
(gloo) without a short timeout, because tokenising a dataset may take longer than the ten minutes that NCCL waits.

With one process every function here is a plain call, and PyTorch is not even imported: commands that only sort tables
answer at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from sepo.errors import UserError, cannot_write

_WAIT = timedelta(days=7)
_group: Any = None
_said: set[str] = set()
_bars: WeakSet[tqdm] = WeakSet()


class MainProcessError(RuntimeError):
    """The main process failed, so this one stops too; the message repeats why."""


def launched() -> int:
    """Number of processes that the launcher started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str = "auto") -> None:
    """Meet the other processes of the launch, if there are any; later calls do nothing."""
    global _group
    if launched() == 1 or _group is not None:
        return
    import torch
    import torch.distributed as dist

    # Every process checks the model's layout on whole weights before FSDP cuts them up.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if not dist.is_initialized():
        from accelerate import PartialState

        # Accelerate knows the backends of all devices and launchers; the trainer then finds the group made.
        PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    _group = dist.new_group(backend="gloo", timeout=_WAIT)


def leave() -> None:
    """Part from the other processes at the end of a command."""
    global _group
    if _group is not None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
    _group = None


def size() -> int:
    """Number of processes that have joined."""
    return _group.size() if _group is not None else 1


def rank() -> int:
    """Number of this process, from 0."""
    return _group.rank() if _group is not None else 0


def is_main() -> bool:
    """Whether this is the process that decides and writes."""
    return rank() == 0


def say(text: str) -> None:
    """Print a line of progress to standard error, where it does not disturb results on standard output."""
    if is_main():
        tqdm.write(text, file=sys.stderr)  # above a bar that is being drawn, not behind it
        sys.stderr.flush()


def say_once(text: str) -> None:
    """`say` a line that the same command would otherwise repeat."""
    if text not in _said:
        _said.add(text)
        say(text)


def on_main(work: Callable[[], Any]) -> Any:
    """Call `work` in the main process alone; every process gets its JSON-like result.

    Raises:
        whatever `work` raised, in the main process; `MainProcessError` in the others.
    """
    if size() == 1:
        return work()
    if not is_main():
        message = json.loads(_broadcast(None))
        if "error" in message:
            raise MainProcessError(f"process {rank()} stops: the main process failed ({message['error']})")
        return message["result"]
    try:
        result = work()
        message = json.dumps({"result": result})
    except BaseException as error:
        _broadcast(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    _broadcast(message)
    return result


def _broadcast(text: str | None) -> str:
    """Send a text from the main process to all."""
    import torch
    import torch.distributed as dist

    content = np.frombuffer((text or "").encode(), np.uint8)
    length = torch.tensor([len(content)])
    dist.broadcast(length, 0, group=_group)
    buffer = torch.from_numpy(content.copy()) if text is not None else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(buffer, 0, group=_group)
    return buffer.numpy().tobytes().decode()


@contextlib.contextmanager
def alone_in(folder: Path, instead: str = "choose another --out") -> Iterator[None]:
    """Make a folder and hold its lock, so that no second launch writes there at the same time.

    A folder that was made and not written to is removed again.

    Raises:
        UserError: another process works in it, or it cannot be written to; `instead` says what to do.
    """
    lock = FileLock(folder / ".lock")
    made = not folder.exists()
    try:
        on_main(lambda: _take(lock, folder, instead))
        yield
    finally:
        lock.release()
        if made and is_main() and folder.is_dir() and [path.name for path in folder.iterdir()] == [".lock"]:
            shutil.rmtree(folder)


def _take(lock: FileLock, folder: Path, instead: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"'{folder}' is in use by another process: wait for it, or {instead}") from None
    except OSError as error:
        raise cannot_write(folder, error, instead) from None


def add_up(values: np.ndarray) -> np.ndarray:
    """Sum of an array over the processes. Where all but one hold zeros it is exact."""
    if size() == 1:
        return values
    import torch
    import torch.distributed as dist

    tensor = torch.from_numpy(values.copy())
    dist.all_reduce(tensor, group=_group)
    return tensor.numpy()


def wait() -> None:
    """Return when every process has come here."""
    if size() > 1:
        import torch.distributed as dist

        dist.barrier(group=_group)


def progress_bar(shown: bool, **settings: Any) -> tqdm:
    """A bar of tqdm; where it is shown, tqdm's own variables (TQDM_DISABLE) are heeded."""
    bar = tqdm(**settings) if shown else tqdm(**settings, disable=True)
    _bars.add(bar)
    return bar


def end_bars() -> None:
    """Close the bars that an error left open, so that the next line does not stand behind one."""
    for bar in list(_bars):
        bar.close()
