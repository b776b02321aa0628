"""Several processes of one launch: the main process writes and shares its results with the others.

    torchrun --nproc-per-node 2 -m sepo run recipe.yaml          accelerate launch -m sepo.cli run recipe.yaml

All processes run the same stages. The main process (rank 0) decides, reads the manifest and writes; `on_main` sends its
result, or its failure, to the others. Messages are JSON, never pickles. They use a separate process group over TCP
(gloo) with a long timeout, because tokenising a dataset may take longer than the ten minutes that NCCL waits.

With one process every function here is a plain call and PyTorch is not imported, so commands that only sort tables
start at once.
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

from sepo.errors import DoneElsewhere, UserError, cannot_write, one_line

_WAIT = timedelta(days=7)
# Seconds to wait until a file from another machine is visible: network file systems cache look-ups.
_VISIBLE_WITHIN = 10.0
_group: Any = None
_logged: set[str] = set()
# The engine of this process (`work.using`), which may help another process that holds a folder; None: wait for nobody.
waiter: Any = None
# What the other processes do with a message of `ask` (`sepo.engines.groups`).
helper: Any = None
# Do the processes do a unit together for which no device holds the model?
share_unit = False


class MainProcessError(RuntimeError):
    """The main process failed, so this process stops, too; the message repeats the reason."""


def launched() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharding() -> str:
    """How the launcher shards a model: "fsdp", "deepspeed" or "" (not at all)."""
    kinds = ("fsdp", "deepspeed")
    return next((k for k in kinds if os.environ.get(f"ACCELERATE_USE_{k.upper()}", "false").lower() == "true"), "")


def zero_stage() -> int:
    """ZeRO stage of DeepSpeed in this launch (3 shards the weights, too); 0 without DeepSpeed.

    Raises:
        UserError: DeepSpeed's file of settings cannot be read.
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
    """Does each process of this launch keep one shard of the weights of frozen models?

    Yes where the launcher shards the trained weights (FSDP, ZeRO-3): a frozen model of that size must not be whole.
    """
    return size() > 1 and (share_unit or sharding() == "fsdp" or zero_stage() == 3)


def join(device: str = "auto") -> None:
    """Join the other processes of the launch, if there are any; later calls do nothing.

    Raises:
        UserError: torchrun would restart processes in a way in which they can never join again.
    """
    global _group
    if launched() == 1 or _group is not None:
        return
    import torch
    import torch.distributed as dist

    # In PyTorch 2.13 the launcher's store survives a restart with the addresses of the dead processes; the restarted
    # processes wait for them for ever.
    shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UserError(
            "restarted processes would wait for those that died: start torchrun --max-restarts with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )
    # Every process checks the model's layout on whole weights before FSDP shards them.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if not dist.is_initialized():
        from accelerate import PartialState

        # Accelerate knows the backends of all devices and launchers; the trainer reuses this group.
        PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    _group = dist.new_group(backend="gloo", timeout=_WAIT)


def leave(failed: bool = False) -> None:
    """Leave the process group at the end of a command, also of a failed one.

    At interpreter exit the threads of a group over TCP sometimes abort the process. After a failure a group over NCCL
    stays, because destroying it might wait for the other processes.
    """
    global _group
    if _group is not None:
        import torch.distributed as dist

        if dist.is_initialized():
            keep = failed and dist.get_backend() != "gloo"
            dist.destroy_process_group(_group if keep else None)
    _group = None


def size() -> int:
    """Number of processes in the group."""
    return _group.size() if _group is not None else 1


def rank() -> int:
    """Rank of this process, from 0."""
    return _group.rank() if _group is not None else 0


def is_main() -> bool:
    """Is this the main process, which decides and writes?"""
    return rank() == 0


def log(text: str) -> None:
    """Print a line of progress to standard error, so that standard output holds results only."""
    if is_main():
        tqdm.write(text, file=sys.stderr)  # above a progress bar, not inside its line
        sys.stderr.flush()


def log_once(text: str) -> None:
    """`log` a line at most once."""
    if text not in _logged:
        _logged.add(text)
        log(text)


def on_main(work: Callable[[], Any]) -> Any:
    """Call `work` in the main process only; every process gets its JSON-like result.

    Raises:
        In the main process the exception of `work`; in the others `MainProcessError`.
    """
    if size() == 1:
        return work()
    if not is_main():
        while "asked" in (message := json.loads(_broadcast(None))):
            helper(message["asked"])
        if message.get("done"):
            raise DoneElsewhere(message["error"])
        if "error" in message:
            raise MainProcessError(f"process {rank()} stops: the main process failed ({message['error']})")
        return message["result"]
    try:
        result = work()
        message = json.dumps({"result": result})
    except BaseException as error:
        done = isinstance(error, DoneElsewhere)
        _broadcast(json.dumps({"error": str(error) if done else f"{type(error).__name__}: {error}", "done": done}))
        raise
    _broadcast(message)
    return result


def ask(message: dict[str, Any]) -> None:
    """In the main process, inside `on_main`: the other processes, which wait there, call `helper` with a message."""
    if size() > 1:
        _broadcast(json.dumps({"asked": message}))


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
    """Create a folder and hold its lock, so that no second launch writes to the folder at the same time.

    A folder that was created here and stays empty is removed again.

    Raises:
        UserError: another process uses the folder, or it is not writable; `instead` tells the user what to do.
    """
    lock = FileLock(folder / ".lock")
    made = not folder.exists()
    try:
        on_main(lambda: _take(lock, folder, instead))
        yield
        if waiter is not None:
            waiter.finish()
    finally:
        lock.release()
        if made and is_main() and folder.is_dir() and [path.name for path in folder.iterdir()] == [".lock"]:
            shutil.rmtree(folder)


def _take(lock: FileLock, folder: Path, instead: str) -> None:
    waited = False
    while not lock.is_locked:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            if waited:
                waiter.check_wanted()
        except Timeout:
            waited = True
            if waiter is None or not waiter.help():
                raise UserError(f"'{folder}' is in use by another process: wait for it, or {instead}") from None
        except OSError as error:
            raise cannot_write(folder, error, instead) from None


def add_up(values: np.ndarray) -> np.ndarray:
    """Sum of an array over the processes. Exact where at most one process holds a number other than 0."""
    if size() == 1:
        return values
    import torch
    import torch.distributed as dist

    tensor = torch.from_numpy(values.copy())
    dist.all_reduce(tensor, group=_group)
    return tensor.numpy()


def gather(value: Any) -> list[Any]:
    """The JSON-like values of all processes, by rank, in every process."""
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
    """Return when every process has called this function."""
    if size() > 1:
        import torch.distributed as dist

        dist.barrier(group=_group)


def require_shared(folder: Path) -> None:
    """Check that every process of the launch sees the files that the main process writes into `folder`.

    Args:
        folder: may not exist yet; then its parent is checked.

    Raises:
        UserError: in the main process, if another process does not see its file; `MainProcessError` in the others.
    """
    if size() == 1:
        return

    def write_token() -> str:
        existing = folder if folder.is_dir() else folder.parent
        existing.mkdir(parents=True, exist_ok=True)
        token = existing / f".shared-{uuid.uuid4().hex}.tmp"
        token.touch()
        return str(token)

    token = Path(on_main(write_token))
    unseen = np.zeros(size(), np.int64)
    unseen[rank()] = not appears(token)
    unseen = add_up(unseen)

    def conclude() -> None:
        token.unlink(missing_ok=True)
        if unseen.any():
            raise UserError(
                f"process {', '.join(map(str, np.flatnonzero(unseen)))} of {size()} does not see what the main process "
                f"writes to '{folder}': start all machines in a folder of one shared file system, or give the "
                "whole path of such a folder (output_dir, --out)"
            )

    on_main(conclude)


def appears(path: Path) -> bool:
    """Whether a file that another process wrote is seen here within some seconds."""
    deadline = time.monotonic() + _VISIBLE_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
