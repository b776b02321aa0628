"""Ctrl-C in a training: it ends with the step at hand, and with a checkpoint from which the same command goes on."""

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
    """While it is entered, SIGINT (Ctrl-C) and SIGTERM are noted; Ctrl-C after either of them stops at once.

    Attributes:
        number: of the signal that came first; 0 as long as none did.
    """

    def __init__(self) -> None:
        self.number = 0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGINT, signal.SIGTERM):
                # Not where they are ignored (a job in the background), nor where somebody else's C code has them.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:
            return  # a worker of the data loader has this handler too, and is needed until the step is done
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.number:
            self.number = number
            with contextlib.suppress(RuntimeError):  # it came while this very line was being written
                processes.log("  stopping with a checkpoint when this step is done; Ctrl-C again stops at once")


class StopWhenAsked(TrainerCallback):
    """End a training after the step in which some process of the launch was asked to stop, with a checkpoint.

    Attributes:
        stopped_at: the step of that checkpoint; None if the training came to its own end.
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
        # Not before: the checkpoint holds the trainer's control, which must not say that the training is over.
        if self.asked:
            self.stopped_at = state.global_step
            control.should_training_stop = True
        return control


def asked_anywhere(signals: StopSignals) -> bool:
    """Was any process of the launch asked to stop? All of them must ask this together."""
    return bool(processes.add_up(np.array([int(signals.number > 0)]))[0])
