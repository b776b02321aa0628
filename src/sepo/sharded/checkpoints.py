"""Checkpoints of shards, written while training goes on, which any number of processes continues from.

    checkpoint-N/shards/part-00001-of-00004.safetensors    this process's shards of weights and optimizer state
    checkpoint-N/shards/values.json                        numbers of the optimizer

A checkpoint waits for a copy of weights and optimizer state to host memory. A thread writes the copy. When the threads
of all processes are done, the main process seals the checkpoint, again in a thread. The checkpoint before it stays
until then, so a process that dies while it writes loses only the steps since that one.

Launches with FSDP2, DDP and a single process write the same files, and each continues those of the others.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from sepo import processes
from sepo.errors import UserError
from sepo.files import write_json
from sepo.sharded.shards import Reader, copy_own, write
from sepo.training.checkpoints import SaveEvery, require_finite_weights, seal_checkpoint

FOLDER, VALUES = "shards", "values.json"
# Parts of parameter names that wrappers add (activation checkpointing, torch.compile).
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
_WEIGHTS, _STATE = "model.", "optimizer."


class SaveInBackground(SaveEvery):
    """`SaveEvery`, with checkpoints of shards that are written while training goes on. One is written at a time.

    Attributes:
        write: writes shards to a file.
    """

    write = staticmethod(write)

    def __init__(self, minutes: float):
        super().__init__(minutes)
        self._folder: Path | None = None  # of the checkpoint that is being written
        self._task: _Task | None = None
        self._sealing = False

    @contextlib.contextmanager
    def writing(self, trainer: Any) -> Iterator[None]:
        if processes.sharding() == "deepspeed" or trainer.is_deepspeed_enabled:
            raise UserError(
                "checkpoints is sharded, but DeepSpeed writes checkpoints of its own: leave one of them out"
            )
        plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version != 2:
            raise UserError("checkpoints: sharded needs FSDP2, so set fsdp_version to 2")
        if trainer.args.save_total_limit == 1:
            trainer.args.save_total_limit = 2  # the checkpoint before stays until this one is sealed
        before = type(trainer)
        trainer.__class__ = type(before.__name__, (_ShardedCheckpoints, before), {"saving": self})
        try:
            yield
            self.finish()
        except Exception:
            self._abandon()
            raise
        finally:
            trainer.__class__ = before

    def begin(self, trainer: Any, checkpoint: Path) -> None:
        """Copy the shards of this process and start to write them; a collective call."""
        self.finish()
        require_finite_weights(trainer.model, trainer.state.global_step)
        tensors, values = _state(trainer)
        folder = checkpoint / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        if processes.is_main():
            write_json(folder / VALUES, values, indent=None)
        part = folder / f"part-{processes.rank() + 1:05d}-of-{processes.size():05d}.safetensors"
        self._folder, self._sealing = checkpoint, False
        shards = copy_own(tensors)
        self._task = _Task(lambda: self.write(part, shards))

    def on_step_end(self, args, state, control, **kwargs):
        if self._folder is not None:
            self._advance()
        return super().on_step_end(args, state, control, **kwargs)

    def on_save(self, args, state, control, **kwargs):
        pass  # `_advance` seals the checkpoint

    def on_train_end(self, args, state, control, **kwargs):
        self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is sealed; a collective call."""
        while self._folder is not None:
            if self._task is not None:
                self._task.wait()
            self._advance()

    def _advance(self) -> None:
        """Seal the checkpoint when every process has written its file, and note when that is done. A collective call.

        Raises:
            OSError: writing failed in this process; RuntimeError: in another one.
        """
        task = self._task
        states = processes.gather("" if task is None else task.state())
        if failed := [state for state in states if state not in ("", _Task.RUNNING)]:
            self._folder = self._task = None
            if task is not None and task.error is not None:
                raise task.error
            raise RuntimeError(f"a checkpoint was not written: {failed[0]}")
        if _Task.RUNNING in states:
            return
        self._task = None
        if self._sealing:
            self._folder = None
        elif self._folder is not None:
            folder, self._sealing = self._folder, True
            if processes.is_main():
                self._task = _Task(lambda: seal_checkpoint(folder))

    def _abandon(self) -> None:
        """After an error: let this process's thread end. Without other processes the checkpoint is sealed."""
        if self._task is not None:
            self._task.wait()
        if processes.size() == 1:
            with contextlib.suppress(Exception):
                self.finish()
        self._folder = self._task = None


class _Task:
    """Work in a thread that does not keep the process alive."""

    RUNNING = "running"

    def __init__(self, work: Callable[[], object]):
        self.error: BaseException | None = None

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=run, daemon=True, name="checkpoint")
        self._thread.start()

    def state(self) -> str:
        """ "" after success, RUNNING, or the error."""
        if self._thread.is_alive():
            return self.RUNNING
        return "" if self.error is None else f"{type(self.error).__name__}: {self.error}"

    def wait(self) -> None:
        self._thread.join()


class _ShardedCheckpoints(Trainer):
    """What `SaveInBackground` changes of a trainer."""

    saving: SaveInBackground
    model: nn.Module
    lr_scheduler: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.saving.begin(self, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        reader = _reader(resume_from_checkpoint)
        for name, parameter in _trained(self.model).items():
            _fill(reader, _WEIGHTS + name, parameter, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        _load_optimizer(self, Path(checkpoint))
        schedule = torch.load(Path(checkpoint, SCHEDULER_NAME), map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights by name; the same names in every launch."""
    trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for wrapper in _WRAPPERS:
        trained = {name.replace(wrapper, ""): parameter for name, parameter in trained.items()}
    return trained


def _state(trainer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of weights and optimizer by name, and the rest of the optimizer's state as JSON.

    Raises:
        UserError: the optimizer keeps something that cannot be stored, or that depends on the number of processes.
    """
    weights = _trained(trainer.model)
    names = {id(parameter): name for name, parameter in weights.items()}
    tensors = {_WEIGHTS + name: parameter for name, parameter in weights.items()}
    numbers: dict[str, dict[str, Any]] = {}
    what = f"the optimizer {type(_optimizer(trainer)).__name__} keeps"
    for parameter, state in _optimizer(trainer).state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
                    raise UserError(f"{what} '{key}' by process: set checkpoints to whole, or use another optimizer")
                tensors[f"{_STATE}{key}.{name}"] = value
            elif isinstance(value, Tensor):
                numbers.setdefault(name, {})[key] = [value.item(), str(value.dtype).removeprefix("torch.")]
            elif isinstance(value, int | float | str | None):
                numbers.setdefault(name, {})[key] = value
            else:
                raise UserError(f"{what} '{key}', a {type(value).__name__}: set checkpoints to whole")
    groups = []
    for group in _optimizer(trainer).param_groups:
        plain = {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}
        groups.append({**plain, "params": [names[id(parameter)] for parameter in group["params"]]})
    return tensors, {"numbers": numbers, "groups": groups}


def _optimizer(trainer: Any) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def _load_optimizer(trainer: Any, checkpoint: Path) -> None:
    """Give the optimizer the state of a checkpoint."""
    reader, optimizer = _reader(checkpoint), _optimizer(trainer)
    values = json.loads((checkpoint / FOLDER / VALUES).read_text(encoding="utf-8"))
    groups = {name: group for group in values["groups"] for name in group["params"]}
    stored: dict[str, list[str]] = {}
    for full in sorted(reader.names()):
        if full.startswith(_STATE):
            key, _, name = full.removeprefix(_STATE).partition(".")
            stored.setdefault(name, []).append(key)
    names = {id(parameter): name for name, parameter in _trained(trainer.model).items()}
    states: dict[int, dict[str, Any]] = {}
    packed, number = [], 0
    for group in optimizer.param_groups:
        numbers = list(range(number, number + len(group["params"])))
        number += len(numbers)
        for index, parameter in zip(numbers, group["params"], strict=True):
            name = names[id(parameter)]
            state: dict[str, Any] = {}
            for key in stored.get(name, []):
                full = f"{_STATE}{key}.{name}"
                state[key] = _empty(reader, full, parameter)
                _fill(reader, full, state[key], checkpoint)
            for key, value in values["numbers"].get(name, {}).items():
                state[key] = torch.tensor(value[0], dtype=_dtype(value[1])) if isinstance(value, list) else value
            if state:
                states[index] = state
        before = groups[names[id(group["params"][0])]] if group["params"] else {}
        packed.append({**{key: _like(group[key], before.get(key)) for key in group}, "params": numbers})
    optimizer.load_state_dict({"state": states, "param_groups": packed})


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"'{name}' is no dtype")
    return dtype


def _like(current: Any, stored: Any) -> Any:
    """A stored setting of an optimizer in the type of the present one."""
    if stored is None:
        return current
    if isinstance(current, Tensor):
        return torch.full_like(current, stored)
    return tuple(stored) if isinstance(current, tuple) else stored


def _empty(reader: Reader, name: str, parameter: Tensor) -> Tensor:
    """Room for a state of a weight: sharded like the weight where it has the weight's shape."""
    shape, dtype = reader.shape(name), reader.dtype(name)
    if shape == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=parameter.device)


def _reader(checkpoint: str | Path) -> Reader:
    return Reader(Path(checkpoint, FOLDER))


def _fill(reader: Reader, name: str, tensor: Tensor, checkpoint: str | Path) -> None:
    try:
        reader.fill(name, tensor)
    except UserError as error:
        raise UserError(f"'{checkpoint}' cannot be continued from ({error}): delete it") from None
