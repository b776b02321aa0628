"""Ctrl-C during a training: it finishes the step and writes a checkpoint, from which the same command resumes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any

import numpy as np
from transformers import TrainerCallback

from sepo import processes


class StopSignals:
    """A context that records SIGINT (Ctrl-C) and SIGTERM. A Ctrl-C after the first signal stops at once.

    Attributes:
        number: number of the first signal; 0 before one arrives.
    """

    def __init__(self) -> None:
        self.number = 0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers only there
            for number in (signal.SIGINT, signal.SIGTERM):
                # Leave ignored signals (a background job) and handlers of C code alone.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:
            return  # a worker of the data loader inherits this handler and must work until the step is done
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.number:
            self.number = number
            with contextlib.suppress(RuntimeError):  # the signal arrived while another line was being written
                processes.log("  stopping with a checkpoint when this step is done; Ctrl-C again stops at once")


class StopWhenAsked(TrainerCallback):
    """End a training with a checkpoint after the step in which any process of the launch received a signal.

    Attributes:
        stopped_at: the step of that checkpoint; None if the training was not stopped.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self.asked = False
        self.stopped_at: int | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps and asked_anywhere(self.signals):
            self.asked = control.should_save = True
        return control

    def on_save(self, args, state, control, **kwargs):
        # Only after saving: the checkpoint contains the trainer's control, which must not say that training is over.
        if self.asked:
            self.stopped_at = state.global_step
            control.should_training_stop = True
        return control


def asked_anywhere(signals: StopSignals) -> bool:
    """Whether any process of the launch received a signal. A collective call."""
    return bool(processes.add_up(np.array([int(signals.number > 0)]))[0])
