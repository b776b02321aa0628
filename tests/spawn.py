"""Python commands in processes of their own that need not import PyTorch again, which takes 8 to 12 seconds of a core.

`start_server` forks a server from the test process before any operation of PyTorch, whose threads do not survive a
fork. At the first command the server imports what commands need; then it forks a child for each. A child is a real
process: pid, signals, environment, working folder, descriptors and exit code are those of `python ARGUMENTS`. The
workers of pytest-xdist are such children too (`fork_workers`).

Not for tests of how an interpreter starts and ends: what is read at an import (OMP_NUM_THREADS, HF_HUB_OFFLINE,
TQDM_DISABLE) was read already, and a child waits for its threads and calls what is registered with `atexit`, but takes
no module down, which takes 8 seconds with all that was imported.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import locale
import os
import pickle
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Sequence
from typing import NoReturn

# What a whole run, its report and a launch import, so that no child does.
PRELOADED = (
    "peft", "trl", "datasets", "accelerate", "matplotlib.pyplot", "scipy.stats", "vaderSentiment.vaderSentiment",
    "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.launcher.api",
    "torch.distributed.elastic.rendezvous.dynamic_rendezvous",
    "transformers.models.llama.modeling_llama", "transformers.trainer", "sepo.runs.pipeline", "sepo.report.build",
    "sepo.training.trainer", "sepo.sft", "sepo.models.weights", "sepo.evaluate.generate", "sepo.cli",
    "fsdp_on_cpu",
)  # fmt: skip
OPEN_MAX = os.sysconf("SC_OPEN_MAX")
_requests: socket.socket | None = None
_server = 0


# --- in the test process --------------------------------------------------------------------------------------------


class Child:
    """A started command: a part of what `subprocess.Popen` offers."""

    def __init__(self, status: int) -> None:
        self._status = status
        self.returncode: int | None = None
        self.pid = self._read()

    def _read(self) -> int:
        return struct.unpack("i", os.read(self._status, 4))[0]

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = self._read()
            os.close(self._status)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    arguments: Sequence[object],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    env: dict[str, str] | None = None,
    cwd: object = None,
) -> Child:
    """Start `python ARGUMENTS` (a script, `-c CODE` or `-m MODULE`); the streams are descriptors, or discarded."""
    assert _requests is not None, "start_server() was not called"
    environment = dict(os.environ if env is None else env)
    message = pickle.dumps(([str(argument) for argument in arguments], environment, str(cwd or os.getcwd())))
    read, write = os.pipe()
    with open(os.devnull, "r+b", buffering=0) as nothing:
        streams = [nothing.fileno() if stream is None else stream for stream in (stdin, stdout, stderr)]
        socket.send_fds(_requests, [struct.pack("I", len(message))], [*streams, write])
        _requests.sendall(message)
    os.close(write)
    return Child(read)


def run(
    arguments: Sequence[object],
    *,
    env: dict[str, str] | None = None,
    cwd: object = None,
    timeout: float | None = 300,
) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` and capture what it prints, as text."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = start(arguments, stdout=out.fileno(), stderr=err.fileno(), env=env, cwd=cwd)
        try:
            code = child.wait(timeout)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            raise
        printed = []
        for file in (out, err):
            file.seek(0)
            printed.append(file.read().decode())
    return subprocess.CompletedProcess(list(arguments), code, *printed)


def preload() -> None:
    """Import what commands need."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # Each step of a launch notes its caller for a log that nobody reads, from the source of all functions on the stack.
    if launcher := sys.modules.get("torch.distributed.elastic.rendezvous.dynamic_rendezvous"):
        launcher.get_method_name = lambda depth=2: ""


def start_server(imports: bool = True) -> None:
    """Fork the server, once per test process; it ends with this process.

    Args:
        imports: it imports at the first command what commands need; False leaves it to them.
    """
    global _requests, _server
    _requests, served = socket.socketpair()
    _server = os.fork()
    if _server == 0:
        with contextlib.suppress(BaseException):
            _serve(served, imports)
        os._exit(1)
    served.close()


def fork_workers() -> None:
    """Let pytest-xdist start its workers by `start`: they would import everything anew, 15 seconds of a core each."""
    from execnet import gateway_io

    class Forked(gateway_io.Popen2IOMaster):
        def __init__(self, command: Sequence[str], execmodel: object) -> None:
            (stdin, to_worker), (from_worker, stdout) = os.pipe(), os.pipe()
            arguments = [word for word in command[1:] if word != "-u"]
            self.popen = start(arguments, stdin=stdin, stdout=stdout, stderr=sys.__stderr__.fileno())
            os.close(stdin)
            os.close(stdout)
            gateway_io.Popen2IO.__init__(self, os.fdopen(to_worker, "wb"), os.fdopen(from_worker, "rb"), execmodel)

    gateway_io.Popen2IOMaster = Forked


def stop_server() -> None:
    if _requests is not None:
        _requests.close()
        os.waitpid(_server, 0)


# --- in the server --------------------------------------------------------------------------------------------------


def _serve(requests: socket.socket, imports: bool) -> NoReturn:
    _requests.detach()  # its number will be another file's
    requests = socket.socket(fileno=os.dup2(requests.detach(), 3))
    os.closerange(4, OPEN_MAX)
    faulthandler.disable()
    # Ctrl-C of the tests: the server ends when they do. Blocked, not ignored: a child gets one that came too early.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
    while True:
        length, received, *_ = socket.recv_fds(requests, 4, 4)
        with contextlib.suppress(ChildProcessError):  # the processes that waited for a child
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not length:
            os._exit(0)
        message = requests.recv(struct.unpack("I", length)[0], socket.MSG_WAITALL)
        if imports:
            gc.disable()
            preload()
            gc.freeze()
            gc.enable()
            imports = False
        if os.fork() == 0:
            _start_and_wait(pickle.loads(message), received)
        for descriptor in received:
            os.close(descriptor)


def _start_and_wait(command: tuple[list[str], dict[str, str], str], received: list[int]) -> NoReturn:
    """Fork the child, send its pid, and when it has ended its exit code."""
    *streams, status = received
    pid = os.fork()
    if pid == 0:
        os.close(status)
        _become(*command, streams)
    for stream in streams:
        os.close(stream)
    os.write(status, struct.pack("i", pid))
    os.write(status, struct.pack("i", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    os._exit(0)


# --- in the child ---------------------------------------------------------------------------------------------------


def _become(arguments: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, OPEN_MAX)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        _open_streams(environment)
        if "torch" in sys.modules and "OMP_NUM_THREADS" in environment:
            sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
        _interpret(arguments, environment.get("PYTHONPATH", ""))
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _open_streams(environment: dict[str, str]) -> None:
    encoding = environment.get("PYTHONIOENCODING") or locale.getpreferredencoding(False)
    sys.stdin = sys.__stdin__ = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(  # noqa: SIM115
        2, "w", encoding=encoding, errors="backslashreplace", buffering=1, closefd=False
    )


def _interpret(arguments: list[str], path: str) -> None:
    """Do what `python ARGUMENTS` does."""
    first, *rest = arguments
    sys.path[:0] = [os.path.dirname(os.path.abspath(first)) if first[0] != "-" else "", *filter(None, path.split(":"))]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")
