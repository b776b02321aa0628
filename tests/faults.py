"""Fault injection: kill a small real run, take its disk, its processes or its files away, and look for what was lost.

    make faults                                    the whole suite, some minutes; prints a table
    python tests/faults.py --kills 3 --fills 1     a part of it

A run of all seven stages on made-up pairs and a tiny model takes some seconds. It is done once undisturbed; every
fault then gets a run of its own, is injected, and the same command is given again until it succeeds. What comes out
must equal the undisturbed run: bytes of tables and weights, every step of the loss curves, all metrics but the times.

Faults are drawn from a seed. Each comes before the n-th operation of the main process that writes to the run folder (an
audit hook counts openings, renames and removals, so that the moments between two renames are hit too): a SIGKILL, an
interruption (SIGINT, SIGTERM), a full disk, the death of another process. A moment in seconds would miss the run on a
machine that has become faster meanwhile; only some kills of a single process use one, and try again.
Runs are forked from this process, which has imported everything, so that a run costs no start-up. What was imported is
frozen: the collections between the stages of a run would look through all of it, a third of a run's time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib.pyplot  # noqa: F401  imported here once, as are those below that nothing here names
import torch
import vaderSentiment.vaderSentiment  # noqa: F401
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from trl import SFTTrainer  # noqa: F401

import fsdp_on_cpu
from sepo import processes
from sepo.cli import main
from sepo.runs import pipeline  # noqa: F401
from sepo.stages import data
from sepo.training.checkpoints import STATE_FILE, SaveEvery
from tiny_models import tiny_model, tiny_tokenizer

STAGES = (
    "start", "data", "reference", "reference_logps", "oracle", "oracle_logps", "score", "select", "train", "eval",
)  # fmt: skip
# PyTorch writes "[rank1]" at the start of some lines.
STAGE_LINE = rf"\[({'|'.join(STAGES)})\](?! \d+ s$)"
MODELS = ("reference", "oracle", "policy")
WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
RECIPE = """
name: faults
device: cpu
data: {source: PAIRS, held_out: 24, max_length: 160}
reference:
  model: MODEL
  sft: {source: CHATS, training: {batch_size: 8, learning_rate: 1.0e-3, save_minutes: 0.0003}}
oracle: {training: {learning_rate: 1.0e-3, batch_size: 8, save_minutes: 0.0003}}
policy: {training: {learning_rate: 1.0e-3, batch_size: 8, save_minutes: 0.0003}}
eval: {gold: vader, prompts: 4, samples: 1, max_new_tokens: 6}
"""


@dataclass
class Outcome:
    """How a run ended: exit codes of its processes, what it printed, and its seconds."""

    codes: list[int]
    log: str
    seconds: float

    @property
    def stage(self) -> str:
        return stage_of(self.log)


@dataclass
class Lab:
    """A folder with a model, a recipe and as many runs as there are faults."""

    folder: Path
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def prepare(self) -> None:
        (self.folder / "runs").mkdir()
        model, chats, pairs = (self.folder / name for name in ("model", "chats.jsonl", "pairs.jsonl"))
        in_child(lambda: (tiny_model("llama").save_pretrained(model), tiny_tokenizer().save_pretrained(model)))
        colors = ["red", "blue", "green", "pink", "teal", "gold", "grey", "lime"] * 5
        turns = (({"role": "user", "content": f"Is it {c}?"}, {"role": "assistant", "content": "Yes!"}) for c in colors)
        chats.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
        rows = ({"prompt": f"Is {i} {c}?", "chosen": f"Yes, {c}!", "rejected": "no " * (i % 7 + 1)}
                for i, c in enumerate(colors * 2))  # fmt: skip
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = RECIPE.replace("MODEL", str(model)).replace("CHATS", str(chats)).replace("PAIRS", str(pairs))
        (self.folder / "recipe.yaml").write_text(text)

    def run(
        self,
        out: Path,
        *overrides: str,
        ranks: int = 1,
        environment: dict[str, str] | None = None,
        kill_operation: int | None = None,
        kill_after: float | None = None,
        fault: tuple[str, int, int | None] | None = None,
        count: bool = False,
    ) -> Outcome:
        """Run the recipe into `out` in forked processes; a fault hits the last of them, or the disk under `out`.

        Args:
            fault: a stage, the main process's writing operation in it before which the fault comes, and the signal
                that the last process gets; None instead of a signal fills the disk.
            count: log the operations of the main process.
        """
        log = self.folder / f"{out.name}.log"
        arguments = ["run", str(self.folder / "recipe.yaml"), f"output_dir={out}", *overrides]
        started = time.monotonic()
        port, children = free_port(), []
        for rank in reversed(range(ranks)):  # the main process last: it must know whom to send a signal
            variables = dict(environment or {})
            if ranks > 1:
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                variables |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            watched = {"kill_operation": kill_operation, "count": count, "fault": fault} if rank == 0 else {}
            last = children[-1] if children else None
            children.insert(0, fork(lambda v=variables, w=watched, pid=last: child(arguments, log, v, out, pid, **w)))
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(children[-1], signal.SIGKILL)
        codes = wait_for(children)
        return Outcome(codes, log.read_text(), time.monotonic() - started)

    def launch(
        self, out: Path, *overrides: str, kill_step: int | None = None, kill_all: bool = False, folders: int = 1
    ) -> Outcome:
        """Run the recipe as two machines of one process each would: two launch agents that meet over loopback.

        Args:
            kill_step: the second machine's process dies before this step of the policy, once.
            kill_all: everything on both machines dies at that moment, not only the process.
            folders: 2 starts the machines in different folders, so that they do not share a relative `out`.
        """
        log = self.folder / f"{out.name}.log"
        arguments = ["run", str(self.folder / "recipe.yaml"), f"output_dir={out}", *overrides]
        started, port = time.monotonic(), free_port()
        doomed = self.folder / "doomed"
        doomed.touch()
        agents = []
        for node in range(2):
            start_in = self.folder / f"machine-{node % folders}"
            start_in.mkdir(exist_ok=True)
            agents.append(fork(lambda n=node, at=start_in: agent(n, port, at, arguments, log, kill_step, doomed)))
        if kill_all:
            while doomed.exists() and time.monotonic() - started < 120:
                time.sleep(0.001)
            for pid in agents:
                os.killpg(pid, signal.SIGKILL)
        return Outcome(wait_for(agents), log.read_text(), time.monotonic() - started)

    def note(self, fault: str, stage: str, course: str, lost: list[str]) -> None:
        self.rows.append((fault, stage, course, "; ".join(lost) or "nothing"))
        print(f"  {fault:38} in {stage:10} {course:44} lost: {self.rows[-1][3]}", flush=True)

    @property
    def failures(self) -> int:
        return sum(row[3] != "nothing" for row in self.rows)


def agent(
    node: int, port: int, start_in: Path, arguments: list[str], log: Path, kill_step: int | None, doomed: Path
) -> int:
    """What `torchrun --nnodes 2 --rdzv-backend c10d --max-restarts 1` does on one machine; workers are forked."""
    os.setpgid(0, 0)
    os.chdir(start_in)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    # The agent's own words too: they are no part of what the command prints.
    sys.stderr = sys.stdout = open(log.with_suffix(f".agent-{node}"), "w")  # noqa: SIM115
    config = LaunchConfig(
        min_nodes=2, max_nodes=2, nproc_per_node=1, run_id="faults", rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}", rdzv_configs={"is_host": node == 0}, max_restarts=int(kill_step is not None),
        monitor_interval=0.05, start_method="fork", local_addr="localhost",
    )  # fmt: skip
    try:
        elastic_launch(config, worker)(arguments, log, kill_step, doomed)
    except ChildFailedError:
        return 1
    return 0


def worker(arguments: list[str], log: Path, kill_step: int | None, doomed: Path) -> None:
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    if kill_step is not None and os.environ["RANK"] == "1":
        kill_at(kill_step, doomed)
    if code := child(arguments, log, {}, log):
        sys.exit(code)


def kill_at(step: int, doomed: Path) -> None:
    """Die before a step of the policy's training, if `doomed` is there still."""
    before = SaveEvery.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step and "policy" in args.output_dir and doomed.exists():
            doomed.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return before(self, args, state, control, **kwargs)

    SaveEvery.on_step_begin = on_step_begin


def child(
    arguments: list[str],
    log: Path,
    variables: dict[str, str],
    out: Path,
    last: int | None = None,
    kill_operation: int | None = None,
    count: bool = False,
    fault: tuple[str, int, int | None] | None = None,
) -> int:
    """One process of a run; `last` is the process that a signal is sent to, None for this one."""
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if "ACCELERATE_USE_FSDP" in variables:
        fsdp_on_cpu.enable()
    data.PAIRS_PER_SHARD = 16
    processes._VISIBLE_WITHIN = 1.0  # the disk is local
    if kill_operation is not None or count:
        watch(str(out), kill_operation, count)
    if fault is not None:
        inject_in_stage(str(out), log, last or os.getpid(), *fault)
    return main(arguments)


def watch(folder: str, kill_operation: int | None, count: bool) -> None:
    """Count the operations that write under `folder`; print each, or die before a given one."""
    done = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal done
        if not writes(folder, event, arguments):
            return
        if done == kill_operation:
            os.kill(os.getpid(), signal.SIGKILL)
        if count:
            os.write(2, f"#operation {done}\n".encode())
        done += 1

    sys.addaudithook(hook)


def writes(folder: str, event: str, arguments: tuple) -> bool:
    opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    return bool(opens or event in WRITES) and str(arguments[0]).startswith(folder)


def inject_in_stage(folder: str, log: Path, process: int, stage: str, operation: int, number: int | None) -> None:
    """Send a process a signal, or fill the disk, before this process writes for the n-th time in a stage."""
    left = operation + 1

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if left and writes(folder, event, arguments) and stage_of(log.read_text()) == stage:
            left -= 1
            if left:
                return
            if number is None:
                fill(Path(folder).parent)
            else:
                os.kill(process, number)

    sys.addaudithook(hook)


def stage_of(log: str) -> str:
    """The stage that a run was in last."""
    found = re.findall(rf"^{STAGE_LINE}", log, flags=re.MULTILINE)
    return found[-1] if found else "start"


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


def fork(work) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = work() or 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_child(work) -> None:
    """Compute in a process of its own: threads started here would not survive a fork."""
    (code,) = wait_for([fork(lambda: bool(work()) and 0)])
    assert code == 0


def wait_for(children: list[int], grace: float = 30) -> list[int]:
    """Wait for processes as a launcher does: once one has failed the others get a moment, then SIGTERM."""
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(children):
        for pid in children:
            if pid not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(status[1])
                if codes[pid] != 0 and deadline is None:
                    deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            for pid in children:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in children]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- what was lost --------------------------------------------------------------------------------------------------


def differences(clean: Path, other: Path, exact: bool = True) -> list[str]:
    """Say how a run differs from the undisturbed one; with `exact=False` numbers may differ by rounding."""
    found = []
    names = {path.relative_to(run).as_posix() for run in (clean, other) for path in run.rglob("*") if path.is_file()}
    for name in sorted(names):
        if not ((clean / name).is_file() and (other / name).is_file()):
            found.append(f"{name} only in one run")
        elif exact and name.endswith((".parquet", ".safetensors")) and not same_bytes(clean / name, other / name):
            found.append(f"{name} differs")
    for model in (name for name in MODELS if (clean / name).is_dir()):
        curves = [loss_curve(run / model) for run in (clean, other)]
        if not close(*curves, 1e-6 if exact else 2e-4):
            found.append(f"loss curve of {model} differs")
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (clean, other)]
    metrics = [{k: v for k, v in one.items() if not k.startswith(("seconds/", "memory_gb/"))} for one in metrics]
    if metrics[0] != metrics[1] if exact else metrics[0].keys() != metrics[1].keys():
        found.append("metrics differ")
    return found


def loss_curve(model: Path) -> list[tuple[float, ...]]:
    history = json.loads((model / STATE_FILE).read_text())["log_history"]
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in history if "loss" in row]


def close(first: list[tuple], second: list[tuple], tolerance: float) -> bool:
    return len(first) == len(second) and all(
        abs(a - b) <= tolerance * max(1.0, abs(a)) for one, two in zip(first, second, strict=True)
        for a, b in zip(one, two, strict=True)
    )  # fmt: skip


def course(outcome: Outcome) -> str:
    """What a continued run did: stages reused, checkpoints continued from."""
    reused = len(re.findall(r"^\[\w+\] unchanged", outcome.log, flags=re.MULTILINE))
    steps = re.findall(r"continuing from \S*checkpoint-(\d+)", outcome.log)
    kept = outcome.log.count("data and settings: reused")
    parts = [f"{reused} stages reused"] + [f"from step {step}" for step in steps] + ["finished model kept"] * kept
    return ", ".join(parts)


def complaint(outcome: Outcome) -> list[str]:
    """What is wrong with the way a failed run spoke: it must end in one line of ours, without a traceback."""
    lines = [line for line in outcome.log.splitlines() if line.startswith("sepo: ")]
    problems = ["a traceback was shown"] if "Traceback" in outcome.log else []
    return problems + ([] if len(lines) == 1 else [f"{len(lines)} lines of error"])


# --- faults ---------------------------------------------------------------------------------------------------------


def operations(log: str) -> dict[str, list[int]]:
    """The numbers of the writing operations of each stage, from the log of a run that counted them."""
    found: dict[str, list[int]] = {stage: [] for stage in STAGES}
    stage = "start"
    for line in log.splitlines():
        if match := re.match(STAGE_LINE, line):
            stage = match[1]
        elif match := re.match(r"#operation (\d+)", line):
            found[stage].append(int(match[1]))
    return found


def kills(lab: Lab, clean: Path, undisturbed: Outcome, number: int, draw: random.Random) -> None:
    """Kill runs: two of three before a writing operation, each stage in turn, the others after a time."""
    by_stage = {stage: numbers for stage, numbers in operations(undisturbed.log).items() if numbers}
    order = draw.sample(sorted(by_stage), len(by_stage))
    for index in range(number):
        out = lab.folder / "runs" / f"kill-{index}"
        if index % 3 < 2:
            stage = order[(index // 3 * 2 + index % 3) % len(order)]
            operation = draw.choice(by_stage[stage])
            fault = f"SIGKILL before write {operation}"
            outcome = lab.run(out, kill_operation=operation)
        else:
            moment = draw.uniform(0.05, 0.95) * undisturbed.seconds
            outcome = lab.run(out, kill_after=moment)
            while outcome.codes == [0]:  # the machine has become faster since, and the run was through before
                shutil.rmtree(out)
                (lab.folder / f"{out.name}.log").unlink()
                moment /= 2
                outcome = lab.run(out, kill_after=moment)
            fault = f"SIGKILL after {moment:.2f} s"
        lost = [] if outcome.codes == [-signal.SIGKILL] else [f"not killed: exit code {outcome.codes}"]
        again = draw.random() < 0.4 and lab.run(out, kill_operation=draw.choice(by_stage[draw.choice(order)]))
        if again:
            fault += " and once more"
        (lab.folder / f"{out.name}.log").unlink()
        resumed = lab.run(out)
        lost += [f"exit code {resumed.codes}"] if resumed.codes != [0] else differences(clean, out)
        lab.note(fault, outcome.stage, course(resumed), lost)
        shutil.rmtree(out)


def struck(
    lab: Lab, clean: Path, undisturbed: Outcome, out: Path, faults: list[tuple[str, int | None]], draw: random.Random
) -> None:
    """One run meets a fault in each of some stages, in their order; then it ends as if undisturbed.

    An interrupted run says what is kept, a training which step, and goes on from there.

    Args:
        faults: stages, and the signal that comes there; None fills the disk before the stage writes.
    """
    log, by_stage, step = lab.folder / f"{out.name}.log", operations(undisturbed.log), None
    for stage, number in faults:
        interrupted = number in (signal.SIGINT, signal.SIGTERM)
        training = stage in ("reference", "oracle", "train") and interrupted
        # A training writes its checkpoints first and its model last.
        operation = len(by_stage[stage]) // 3 if training else draw.randrange(len(by_stage[stage]))
        operation = 0 if number is None else operation
        outcome = lab.run(out, fault=(stage, operation, number))
        expected = 1 if number is None else 128 + number if interrupted else -number
        lost = [] if outcome.codes == [expected] else [f"exit code {outcome.codes}"]
        lost += [] if number == signal.SIGKILL else complaint(outcome)
        if step is not None and f"checkpoint-{step}\n" not in outcome.log:
            lost.append(f"did not go on from step {step}")
        said = re.search(r"sepo: interrupted: the checkpoint of step (\d+) of \d+ is kept", outcome.log)
        step = said[1] if said else None
        if training and step is None:
            lost.append("the step was not said: " + outcome.log.splitlines()[-1])
        if number is None:
            lost += [] if "the disk is full" in outcome.log else ["a full disk was not named"]
            (out.parent / "filler").unlink()
        fault = "disk full" if number is None else signal.Signals(number).name
        fault += f" before write {operation} of the stage"
        lab.note(fault, outcome.stage, f"kept: step {step}" if step else "", lost)
        log.unlink()
    last = lab.run(out)
    lost = [f"exit code {last.codes}"] if last.codes != [0] else differences(clean, out)
    lab.note("none: after all of these", last.stage, course(last), lost)
    log.unlink()
    shutil.rmtree(out)


def interrupts(lab: Lab, clean: Path, undisturbed: Outcome, stages: list[str], draw: random.Random) -> None:
    """Interrupt one run in some stages, by SIGINT and SIGTERM in turn."""
    faults = [(stage, signal.SIGTERM if index % 2 else signal.SIGINT) for index, stage in enumerate(stages)]
    struck(lab, clean, undisturbed, lab.folder / "runs" / "stopped", faults, draw)


def in_turn(lab: Lab, clean: Path, undisturbed: Outcome, number: int, draw: random.Random) -> None:
    """One run meets another kind of fault in each of some stages, drawn."""
    kinds = [signal.SIGKILL, signal.SIGINT, None, signal.SIGTERM]
    with small_disk(lab, clean) as disk:
        if not os.path.ismount(disk):
            kinds.remove(None)
        stages, first = sorted(draw.sample(STAGES[1:], number), key=STAGES.index), draw.randrange(len(kinds))
        faults = [(stage, kinds[(first + index) % len(kinds)]) for index, stage in enumerate(stages)]
        struck(lab, clean, undisturbed, disk / "in-turn", faults, draw)


def interrupted_rank(lab: Lab) -> None:
    """One of two processes is interrupted in a training: both end, with the checkpoint of one step."""
    one, two = (lab.folder / "runs" / name for name in ("unbatched", "both"))
    # Enough steps that the interruption comes before the last.
    changes = ["reference.sft=null", "oracle.training.num_train_epochs=4", "eval.prompts=0"]
    expected = lab.run(one, *changes, count=True)
    outcome = lab.run(
        two, *changes, ranks=2, fault=("oracle", len(operations(expected.log)["oracle"]) // 3, signal.SIGINT)
    )
    lost = [f"exit codes {expected.codes}"] if any(expected.codes) else []
    lost += complaint(outcome) + ([] if outcome.codes == [130, 130] else [f"exit codes {outcome.codes}"])
    said = re.search(r"the checkpoint of step (\d+) of \d+ is kept", outcome.log)
    (lab.folder / f"{two.name}.log").unlink()
    resumed = lab.run(two, *changes, ranks=2)
    if said is None or f"checkpoint-{said[1]}\n" not in resumed.log:
        lost.append("did not go on from the step that was said")
    lost += [f"exit codes {resumed.codes}"] if any(resumed.codes) else differences(one, two, exact=False)
    lab.note("SIGINT to one of 2 processes", "oracle", course(resumed), lost)


@contextlib.contextmanager
def small_disk(lab: Lab, clean: Path) -> Iterator[Path]:
    """A small tmpfs that runs fill; a plain folder where that cannot be mounted."""
    size = sum(path.stat().st_size for path in clean.rglob("*") if path.is_file())
    disk = lab.folder / "disk"
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={24 * size}", "none", str(disk)]
    mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield disk
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def fills(lab: Lab, clean: Path, undisturbed: Outcome, number: int, draw: random.Random) -> None:
    """Fill the disk of runs, free it, and go on."""
    with small_disk(lab, clean) as disk:
        if not os.path.ismount(disk):
            print("  full disks skipped: mounting a tmpfs needs root")
            return
        order = draw.sample(STAGES[1:], len(STAGES) - 1)
        for index in range(number):
            stage = order[index % len(order)]
            struck(lab, clean, undisturbed, disk / f"full-{index}", [(stage, None)], draw)


def ranks(lab: Lab, clean: Path, draw: random.Random, number: int) -> None:
    """Two processes give what one gives; one of two dies, and the run goes on, first with two and then with one."""
    if number > 1:
        out = lab.folder / "runs" / "two"
        outcome = lab.run(out, ranks=2)
        lost = [f"exit codes {outcome.codes}"] if any(outcome.codes) else differences(clean, out, exact=False)
        lab.note("none: two processes", outcome.stage, course(outcome), lost)
    given = [f"reference.model={clean / 'reference'}", "reference.sft=null", f"oracle.model={clean / 'oracle'}"]
    given += ["policy.training.max_steps=1", "eval.prompts=0"]
    two = lab.folder / "runs" / "given"
    outcome = lab.run(two, *given, ranks=2)
    lost = [f"exit codes {outcome.codes}"] if any(outcome.codes) else tables_differ(clean, two)
    lab.note("none: two processes, given oracle", outcome.stage, "the same bytes in every table", lost)
    for index in range(number):
        out = lab.folder / "runs" / f"rank-{index}"
        stage = draw.choice(STAGES[2:-1])  # a stage that waits for both processes follows
        outcome = lab.run(out, ranks=2, fault=(stage, draw.randrange(3), signal.SIGKILL))
        lost = [] if all(outcome.codes) else [f"not all processes failed: {outcome.codes}"]
        lost += ["a traceback was shown"] if "Traceback" in outcome.log else []
        (lab.folder / f"{out.name}.log").unlink()
        after = 2 - index % 2
        resumed = lab.run(out, ranks=after)
        lost += [f"exit code {resumed.codes}"] if any(resumed.codes) else differences(clean, out, exact=False)
        fault = "one of 2 processes killed"
        lab.note(fault, outcome.stage, f"with {after}: {course(resumed)}", lost)
        shutil.rmtree(out)


def fsdp(lab: Lab, draw: random.Random) -> None:
    """One of two processes that share a model by FSDP2 dies; the run goes on and gives what one process gives."""
    one, two = (lab.folder / "runs" / name for name in ("whole", "sharded"))
    lab.run(one, "reference.sft=null")
    arguments = {"ranks": 2, "environment": fsdp_on_cpu.ENVIRONMENT}
    stage = draw.choice(["oracle", "oracle_logps", "score", "train"])
    outcome = lab.run(two, "reference.sft=null", fault=(stage, draw.randrange(3), signal.SIGKILL), **arguments)
    lost = [] if all(outcome.codes) else [f"not all processes failed: {outcome.codes}"]
    (lab.folder / f"{two.name}.log").unlink()
    resumed = lab.run(two, "reference.sft=null", **arguments)
    lost += [f"exit code {resumed.codes}"] if any(resumed.codes) else differences(one, two, exact=False)
    lab.note("one of 2 processes of FSDP2 killed", outcome.stage, f"with 2: {course(resumed)}", lost)
    changes = ["reference.sft=null", "oracle.training.checkpoints=sharded"]
    one, two = (lab.folder / "runs" / name for name in ("whole-one", "shards"))
    expected = lab.run(one, *changes, count=True)
    middle = len(operations(expected.log)["oracle"]) // 2
    outcome = lab.run(two, *changes, fault=("oracle", middle, signal.SIGKILL), **arguments)
    lost = [] if all(outcome.codes) else [f"not all processes failed: {outcome.codes}"]
    (lab.folder / f"{two.name}.log").unlink()
    resumed = lab.run(two, *changes)
    lost += [f"exit code {resumed.codes}"] if any(resumed.codes) else differences(one, two, exact=False)
    lost += [] if "continuing from" in resumed.log else ["no checkpoint was continued from"]
    lab.note("one of 2 processes of FSDP2 killed", outcome.stage, f"with 1, by shards: {course(resumed)}", lost)


def nodes(lab: Lab) -> None:
    """Two machines that meet over loopback: a process dies and is restarted; both die and one goes on."""
    runs = lab.folder / "runs"
    whole, restarted, lost_both = (runs / name for name in ("machines", "restarted", "killed-both"))
    outcome = lab.run(whole, ranks=2)
    assert outcome.codes == [0, 0], outcome.log
    outcome = lab.launch(restarted, kill_step=5)
    lost = [f"exit codes {outcome.codes}"] if any(outcome.codes) else differences(whole, restarted)
    lost += [] if "continuing from" in outcome.log else ["the launch was not restarted from a checkpoint"]
    lab.note("a process of two machines killed", outcome.stage, f"restarted: {course(outcome)}", lost)
    outcome = lab.launch(lost_both, kill_step=6, kill_all=True)
    lost = [] if all(outcome.codes) else [f"not killed: exit codes {outcome.codes}"]
    (lab.folder / f"{lost_both.name}.log").unlink()
    resumed = lab.run(lost_both)
    lost += [f"exit code {resumed.codes}"] if any(resumed.codes) else differences(whole, lost_both, exact=False)
    lost += [] if "continuing from" in resumed.log else ["no checkpoint was continued from"]
    lab.note("two machines killed", outcome.stage, f"with 1: {course(resumed)}", lost)


def apart(lab: Lab) -> None:
    """Two machines that do not share the folder are refused before a stage starts."""
    outcome = lab.launch(Path("apart"), folders=2)
    lost = [] if all(outcome.codes) else [f"not refused: exit codes {outcome.codes}"]
    line = "process 1 of 2 does not see what the main process writes to 'apart'"
    lost += [] if f"sepo: {line}" in outcome.log else ["the refusal was not said"]
    lost += ["a traceback was shown"] if "Traceback" in outcome.log else []
    lost += ["a stage was started"] if outcome.stage != "start" else []
    lab.note("two machines without a shared folder", outcome.stage, "refused", lost)


def tables_differ(first: Path, second: Path) -> list[str]:
    names = {p.relative_to(run).as_posix() for run in (first, second) for p in run.rglob("part-*.parquet")}
    return [f"{name} differs" for name in sorted(names) if not same_bytes(first / name, second / name)]


def same_bytes(first: Path, second: Path) -> bool:
    return first.is_file() and second.is_file() and first.read_bytes() == second.read_bytes()


def report(lab: Lab) -> None:
    widths = [max(len(row[column]) for row in lab.rows) for column in range(4)]
    print()
    for row in (("injected", "in stage", "continued with", "lost"), *lab.rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\n{len(lab.rows)} faults, {lab.failures} with a loss")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--in-turn", type=int, default=len(STAGES) - 1, help="stages in which one run meets a fault")
    parser.add_argument("--interrupts", nargs="*", choices=STAGES, default=list(STAGES), help="in these stages")
    parser.add_argument("--fills", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=2, help="machines: 0 none, 1 one that is refused, 2 all faults")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts this with & has it ignored
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory(prefix="sepo-faults-") as folder:
        lab = Lab(Path(folder))
        lab.prepare()
        clean = lab.folder / "runs" / "clean"
        if options.kills or options.in_turn or options.interrupts or options.fills or options.ranks:
            undisturbed = lab.run(clean, count=True)
            if undisturbed.codes != [0]:
                sys.exit(undisturbed.log)
            print(f"an undisturbed run takes {undisturbed.seconds:.1f} s", flush=True)
            kills(lab, clean, undisturbed, options.kills, draw)
            if options.in_turn:
                in_turn(lab, clean, undisturbed, options.in_turn, draw)
            if options.interrupts:
                interrupts(lab, clean, undisturbed, options.interrupts, draw)
            if len(options.interrupts) == len(STAGES):
                interrupted_rank(lab)
            if options.fills:
                fills(lab, clean, undisturbed, options.fills, draw)
        if options.ranks:
            ranks(lab, clean, draw, options.ranks)
        if options.ranks > 1:
            fsdp(lab, draw)
        if options.nodes > 1:
            nodes(lab)
        if options.nodes:
            apart(lab)
        report(lab)
    gc.unfreeze()  # else bindings report leaks when the interpreter ends
    sys.exit(1 if lab.failures else 0)
