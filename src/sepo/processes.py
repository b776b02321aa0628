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
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from sepo.errors import UserError, cannot_write, one_line

_WAIT = timedelta(days=7)
# Seconds after which a file that one machine wrote counts as not seen by another: network file systems look it up late.
_UNSEEN = 10.0
_group: Any = None
_said: set[str] = set()


class MainProcessError(RuntimeError):
    """The main process failed, so this one stops too; the message repeats why."""


def launched() -> int:
    """Number of processes that the launcher started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding() -> str:
    """How the launcher cuts up a model: "fsdp", "deepspeed" or nothing."""
    kinds = ("fsdp", "deepspeed")
    return next((k for k in kinds if os.environ.get(f"ACCELERATE_USE_{k.upper()}", "false").lower() == "true"), "")


def zero_stage() -> int:
    """How much DeepSpeed is told to cut up by the launcher (3: the weights too), 0 without it.

    Raises:
        UserError: its file of settings cannot be read.
    """
    if sharding() != "deepspeed":
        return 0
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path is None:
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        return int(settings.get("zero_optimization", {}).get("stage", 0))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"DeepSpeed's settings '{path}' cannot be read ({one_line(error, 200)})") from None


def read_sharded() -> bool:
    """Do the processes of this launch read frozen models together, each keeping a part of the weights?

    Where a launcher has the weights of a training cut up (FSDP, ZeRO-3), the same model would not fit otherwise.
    """
    return size() > 1 and (sharding() == "fsdp" or zero_stage() == 3)


def join(device: str = "auto") -> None:
    """Meet the other processes of the launch, if there are any; later calls do nothing.

    Raises:
        UserError: torchrun was told to restart processes in a way in which they never meet again.
    """
    global _group
    if launched() == 1 or _group is not None:
        return
    import torch
    import torch.distributed as dist

    # The launcher's own store outlives a restart in PyTorch 2.13, with the addresses of the processes that died in it;
    # those that come after wait for them for ever.
    shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UserError(
            "restarted processes would wait for those that died: start torchrun --max-restarts with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )
    # Every process checks the model's layout on whole weights before FSDP cuts them up.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if not dist.is_initialized():
        from accelerate import PartialState

        # Accelerate knows the backends of all devices and launchers; the trainer then finds the group made.
        PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    _group = dist.new_group(backend="gloo", timeout=_WAIT)


def leave(failed: bool = False) -> None:
    """Part from the other processes at the end of a command, also of one that failed.

    Left to the end of the interpreter, the threads of a group over TCP abort the process now and then. After a failure
    a group over NCCL stays, because the others might have to be waited for.
    """
    global _group
    if _group is not None:
        import torch.distributed as dist

        if dist.is_initialized():
            keep = failed and dist.get_backend() != "gloo"
            dist.destroy_process_group(_group if keep else None)
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


def log(text: str) -> None:
    """Print a line of progress to standard error, where it does not disturb results on standard output."""
    if is_main():
        tqdm.write(text, file=sys.stderr)  # above a bar that is being drawn, not behind it
        sys.stderr.flush()


def log_once(text: str) -> None:
    """`say` a line that the same command would otherwise repeat."""
    if text not in _said:
        _said.add(text)
        log(text)


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


def gather(value: Any) -> list[Any]:
    """A JSON-like value of every process, by rank, in all of them."""
    if size() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.zeros(size(), np.int64)
    lengths[rank()] = len(content)
    lengths = add_up(lengths)
    texts = np.zeros((size(), lengths.max()), np.uint8)
    texts[rank(), : len(content)] = content
    return [json.loads(text[:length].tobytes()) for text, length in zip(add_up(texts), lengths, strict=True)]


def wait() -> None:
    """Return when every process has come here."""
    if size() > 1:
        import torch.distributed as dist

        dist.barrier(group=_group)


def require_shared(folder: Path) -> None:
    """See that every process of the launch has `folder` in common with the main one, which alone writes into it.

    Args:
        folder: need not exist yet; then its parent is looked at.

    Raises:
        UserError: in the main process, where others do not see what it wrote there; `MainProcessError` in the others.
    """
    if size() == 1:
        return

    def write_token() -> str:
        place = folder if folder.is_dir() else folder.parent
        place.mkdir(parents=True, exist_ok=True)
        token = place / f".shared-{uuid.uuid4().hex}.tmp"
        token.touch()
        return str(token)

    token = Path(on_main(write_token))
    unseen = np.zeros(size(), np.int64)
    unseen[rank()] = not _appears(token)
    unseen = add_up(unseen)

    def conclude() -> None:
        token.unlink(missing_ok=True)
        if unseen.any():
            raise UserError(
                f"process {', '.join(map(str, np.flatnonzero(unseen)))} of {size()} does not see what the main process "
                f"writes to '{folder}': start all machines in a folder of one shared file system, or name one with its "
                "whole path (output_dir, --out)"
            )

    on_main(conclude)


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _UNSEEN
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
