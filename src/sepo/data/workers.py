"""Work on parts of a dataset in other processes of this machine: results in order, errors as in one process.

A worker is a new interpreter that reads pickled parts from its standard input and writes results to its standard
output. It imports neither the caller's script, which therefore needs no `if __name__ == "__main__"`, nor PyTorch. It
ends with the pipe, so no worker outlives its parent, however that ended. Starting one takes 2.5 s of CPU time and 220
MB for a tokenizer of 49,000 tokens.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any

from sepo.errors import UserError

# One thread a worker: the workers share the cores.
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
_START = "import sys; sys.path[:] = {path!r}; from sepo.data.workers import serve; serve()"


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_workers(function: Callable[..., Any], common: Any, parts: Iterable[Any], workers: int) -> Generator[Any]:
    """Yield `function(common, part)` for each part, in order; at most two parts a worker are in memory.

    Args:
        function: a function of a module.
        common: sent to each worker once.

    Raises:
        UserError: a worker was killed; or that of `function` for a part, after the results of the parts before it.
        RuntimeError: with the traceback of any other exception of `function`.
    """
    start = pickle.dumps((function, common))
    idle: SimpleQueue[_Worker] = SimpleQueue()

    def work(part: Any) -> Any:
        worker = idle.get()
        try:
            return worker.ask(part)
        finally:
            idle.put(worker)

    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        for _ in range(workers):
            worker = _Worker(start)
            stack.callback(worker.end)  # before the threads, which it frees
            idle.put(worker)
        waiting: deque[Future] = deque()
        stack.callback(lambda: [future.cancel() for future in waiting])
        for part in parts:
            waiting.append(threads.submit(work, part))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class _Worker:
    def __init__(self, start: bytes):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ENVIRONMENT},
            start_new_session=True,  # Ctrl-C reaches the parent alone
        )
        self._start = start

    def ask(self, part: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(self._start)
            self._start = b""
            pickle.dump(part, self._process.stdin)
            self._process.stdin.flush()
            value, error = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise UserError(_ending(self._process.wait())) from None
        if error is not None:
            raise error
        return value

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def _ending(status: int) -> str:
    how = f"was killed ({signal.Signals(-status).name})" if status < 0 else f"ended (exit code {status})"
    return f"a worker process of the data {how}, out of memory? Set data.workers to a smaller number, 1 for none"


def serve() -> None:
    """Answer a parent until it closes the pipe: `(result, None)` or `(None, exception)` for each part."""
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        function, common = pickle.load(source)
        while True:
            part = pickle.load(source)
            try:
                answer = pickle.dumps((function(common, part), None))
            except UserError as error:
                answer = pickle.dumps((None, error))
            except Exception:
                answer = pickle.dumps((None, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")))
            answers.write(answer)
            answers.flush()
    except (EOFError, BrokenPipeError):
        return
