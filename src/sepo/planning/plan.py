"""Dry runs: what a run would do, how long it would take here, and whether it fits. Nothing is trained.

The data are read and tokenised for the counts. Every other stage is planned (`Planner`): its cost is added up, and it
answers with an empty result. Seconds are those of a piece of the work, done here and now (`throughput.py`). Memory is
computed from the models' configs (`memory.py`), so a plan needs neither the devices nor the weights.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sepo.data.tables import read_table
from sepo.files import digest
from sepo.models.devices import choose_device
from sepo.models.tokenizer import load_tokenizer
from sepo.numbers import duration, size
from sepo.planning.cost import Cost, FrozenMemory, TrainingMemory
from sepo.planning.sizes import method_sizes, prompts_of
from sepo.planning.stages import cost_of
from sepo.recipe.settings import Recipe
from sepo.runs.method import NOTHING, Extension, Method, check_until
from sepo.runs.pipeline import check_inputs, check_method_pairs
from sepo.stages.data import PAIRS_PER_SHARD
from sepo.stages.stage import Model, Stage, StageResult

if TYPE_CHECKING:
    from sepo.planning.throughput import Throughputs
    from sepo.planning.units import Simulated

# Kinds of compute that the processes of a launch share.
SHARED = ("score", "train")
_FEW_UPDATES = 100  # of more, a first update without effect is less than one per cent


class Planner:
    """Walks the stages of a method without doing them; only the pairs are made, for their counts.

    Args:
        folder: for the pairs.
        done: results that exist already, by role.

    Attributes:
        stages: every planned stage, by role.
        by_key: every distinct stage, by the digest of what it depends on.
    """

    def __init__(self, folder: Path | None = None, done: Mapping[str, StageResult] | None = None):
        self.folder, self.done = folder, dict(done or {})
        self.stages: dict[str, Stage] = {}
        self.by_key: dict[str, Stage] = {}
        self._made: dict[str, StageResult] = {}

    def model(self, name: str, revision: str | None = None) -> Model:
        """A model by its name: its files, which may not be here, are not read."""
        place = os.path.realpath(name) if os.path.exists(name) else name
        return Model(name, f"{place}@{revision}")

    def do(self, stage: Stage, role: str) -> StageResult:
        key = digest(stage.key())
        self.stages[role] = self.by_key[key] = stage
        if role in self.done:
            return self.done[role]
        if key not in self._made:
            result = StageResult(Path(role), key)
            if role in ("data", "policy_pairs", "prompts") and self.folder is not None:
                place = self.folder / key
                result = StageResult(place, key, stage.run(place) or {})
            self._made[key] = result
        return self._made[key]


@dataclass(frozen=True)
class Target:
    """Devices that a run is planned for.

    Attributes:
        processes: their number.
        memory: bytes of each; None: as on this machine.
        nodes: machines that they are in; with several, passes are units of work for groups of devices.
        rate: FLOP/s that one reaches in a whole stage; None: as on this machine.
    """

    processes: int = 1
    memory: float | None = None
    nodes: int = 1
    rate: float | None = None


@dataclass(frozen=True)
class RunPlan:
    """A dry run's tables: `stages` with counts and times; `memory` and `units`, empty unless a target asks for them.

    `notes` are lines below them: short warm-ups, and one pair as each tokenizer reads it.
    """

    stages: list[dict[str, str]]
    memory: list[dict[str, str]]
    notes: list[str]
    units: list[dict[str, str]] = field(default_factory=list)


def plan_run(
    recipe: Recipe, extension: Extension = NOTHING, target: Target | None = None, until: str | None = None
) -> RunPlan:
    """Plan a run: its stages, how long they take here, and for a `target` the memory that each needs of a device."""
    check_until(until)
    target = target or Target()
    elsewhere = target.memory is not None
    check_inputs(recipe, extension, elsewhere)
    with tempfile.TemporaryDirectory() as folder:
        planner = Planner(Path(folder))
        kind = device_kind(recipe, target)
        if extension.before_data is not None:
            recipe = extension.before_data(recipe, planner, extension)
        method = Method(recipe, planner, extension=extension, device=kind)
        check_method_pairs(method)
        plan_stages(method, extension, until)
        sizes = method_sizes(method, kind, target.processes)
        throughputs = throughputs_of(method, target)
        example = [line for lines in examples_of(method).values() for line in lines]
    costs = {role: cost_of(stage, sizes) for role, stage in planner.stages.items()}
    seconds = {role: _seconds(cost, throughputs, target) for role, cost in costs.items()}
    rows = [_row(role, cost, seconds[role], throughputs) for role, cost in costs.items()]
    total = sum(value for value in seconds.values() if value is not None)
    rows.append(dict.fromkeys(rows[0], "") | {"stage": "total", "time": approximate(total)})
    memory = []
    if elsewhere or target.processes > 1:
        memory = [row for role, cost in costs.items() for row in _memory_rows(role, cost, target)]
    units = [row for role, cost in costs.items() for row in _unit_rows(role, cost, throughputs, target)]
    notes = [*warm_up_lines(costs), *checkpoint_lines(costs, target), *example]
    return RunPlan(rows, memory, notes, units)


def warm_up_lines(costs: Mapping[str, Cost]) -> list[str]:
    """A line for each training of few updates whose warm-up begins at learning rate 0, as Transformers' does."""
    lines = []
    for role, cost in costs.items():
        for part in cost.estimates or ():
            if part.training is None or part.updates >= _FEW_UPDATES:
                continue
            if 0 < math.ceil(part.training.warmup_ratio * part.updates) < part.updates:
                lines.append(
                    f"{role}: the first of {part.updates:.0f} updates has learning rate 0, as warm-up begins there; "
                    "a warmup_ratio of 0 trains with it"
                )
    return lines


def checkpoint_lines(costs: Mapping[str, Cost], target: Target) -> list[str]:
    """A line for each training with sharded checkpoints: bytes of one, and of the copy that each process makes."""
    from sepo.planning.memory import trainable

    lines = []
    for role, cost in costs.items():
        need = cost.memory
        if isinstance(need, TrainingMemory) and need.settings.checkpoints == "sharded":
            whole = 12.0 * trainable(need)  # float32 weights and AdamW's moments
            lines.append(
                f"{role}: a checkpoint has {size(whole)}; each process copies {size(whole / target.processes)} to the "
                "host's memory and writes it while training goes on"
            )
    return lines


def examples_of(method: Method) -> dict[str, list[str]]:
    """One pair as the reference reads it, and as a policy with another tokenizer does, by the name of the model."""
    from sepo.planning.example import example_lines

    reference, policy = method.recipe.reference, method.recipe.policy
    tokenizer = load_tokenizer(reference.model, revision=reference.revision)
    examples = {reference.model: example_lines(method.pairs.folder, tokenizer, reference.model)}
    if method.transfers:
        tokenizer = load_tokenizer(str(policy.model), revision=policy.revision)
        examples[str(policy.model)] = example_lines(method.policy_pairs.folder, tokenizer, str(policy.model))
    return examples


def plan_stages(method: Method, extension: Extension = NOTHING, until: str | None = None) -> None:
    """Ask a method for everything that a run would."""
    if until is not None:
        method.until(until)
        return
    _ = method.evaluation
    extension.do_stages(method)


def throughputs_of(method: Method, target: Target | None = None) -> Throughputs:
    """Throughputs of a method's models on its own pairs."""
    from sepo.planning.throughput import Throughputs

    target, recipe = target or Target(), method.recipe
    kind = device_kind(recipe, target)
    # Seconds are of this machine; they say nothing about another kind of device.
    here = target.rate is None and (target.memory is None or kind == choose_device("auto").type)

    def of_pairs(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Throughputs:
        pairs, held_out = (read_table(folder / part, "pairs") for part in ("train", "held_out"))
        step = max(1, len(pairs) // 256)
        some = pairs.take(pa.array(range(0, len(pairs), step)))
        prompts = prompts_of(held_out) or [(0,)]
        return Throughputs(recipe.device, kind, some, prompts, tokenizer, measure=here, _rate=target.rate)

    reference, policy = recipe.reference, recipe.policy
    found = of_pairs(method.pairs.folder, load_tokenizer(reference.model, revision=reference.revision))
    if method.transfers:
        name = str(policy.model)
        tokenizer = load_tokenizer(name, revision=policy.revision)
        found.others[name] = of_pairs(method.policy_pairs.folder, tokenizer)
    return found


def device_kind(recipe: Recipe, target: Target) -> str:
    """The kind of device of a plan: a GPU, if its memory is given and the recipe leaves the device open."""
    if target.memory is None:
        return choose_device(recipe.device).type
    return "cuda" if recipe.device == "auto" else recipe.device.split(":")[0]


def _seconds(cost: Cost, throughputs: Throughputs, target: Target) -> float | None:
    """Seconds of a stage on the target's devices, if they equal the one here; generation is not shared."""
    if cost.estimates is None or not (throughputs.measure or target.rate):
        return None
    total = 0.0
    for estimate in cost.estimates:
        seconds = throughputs.seconds(estimate)
        if target.nodes > 1 and estimate.kind == "score":
            total += _by_units(cost, seconds, target).simulated.seconds
        else:
            total += seconds / (target.processes if estimate.kind in SHARED else 1)
    return total


class _Units(NamedTuple):
    """A pass as units of work: their number, devices that do one together, such groups, and what a simulation says."""

    number: int
    devices: int
    groups: int
    simulated: Simulated


def _by_units(cost: Cost, seconds: float, target: Target) -> _Units:
    """A pass of `seconds` on one device as units for the smallest groups of devices that hold the model."""
    from sepo.planning.memory import parts_of

    sizes = [1, target.processes // target.nodes, target.processes]
    need, memory = cost.memory, target.memory
    devices = 1
    if isinstance(need, FrozenMemory) and memory is not None:
        sharded = {size: replace(need, processes=size, sharded=size > 1) for size in sizes}
        devices = next((size for size in sizes if sum(parts_of(sharded[size]).values()) <= memory), sizes[-1])
    number = math.ceil((cost.pairs or 1) / PAIRS_PER_SHARD)
    groups = target.processes // devices
    from sepo.planning.units import simulate

    return _Units(number, devices, groups, simulate([seconds / number / devices] * number, groups))


def _unit_rows(stage: str, cost: Cost, throughputs: Throughputs, target: Target) -> list[dict[str, str]]:
    """A pass as units of work, on several machines."""
    scored = [part for part in cost.estimates or () if part.kind == "score"]
    if target.nodes == 1 or not scored:
        return []
    known = bool(throughputs.measure or target.rate)
    seconds = sum(map(throughputs.seconds, scored)) if known else 1.0
    units = _by_units(cost, seconds, target)
    each = units.simulated.seconds / math.ceil(units.number / units.groups)
    groups = f"{units.groups} of {units.devices} {'device' if units.devices == 1 else 'devices'}"
    return [
        {
            "stage": stage,
            "units": f"{units.number:,}",
            "groups": groups,
            "a unit": approximate(each) if known else "",
            "time": approximate(units.simulated.seconds) if known else "",
            "busy": f"{units.simulated.busy:.0%}",
            "engine": "files" if units.devices == 1 else f"files@{units.devices}",
        }
    ]


def _row(stage: str, cost: Cost, seconds: float | None, throughputs: Throughputs) -> dict[str, str]:
    def text(value: float | None, form: Callable[[Any], str]) -> str:
        return "" if value is None else form(value)

    from sepo.planning.memory import parts_of

    parts = None if cost.memory is None else parts_of(cost.memory)
    estimated = seconds is not None and not all(throughputs.of(estimate).measured for estimate in cost.estimates or ())
    return {
        "stage": stage,
        "what": cost.what,
        "pairs": text(cost.pairs, lambda n: f"{n:,}"),
        "tokens": text(cost.tokens, lambda n: f"{n:,}"),
        "time": text(seconds, approximate) + (" (by FLOPs)" if estimated else ""),
        "memory": "" if parts is None else f"~{_size(sum(parts.values()))}",
    }


def _memory_rows(stage: str, cost: Cost, target: Target) -> list[dict[str, str]]:
    """Memory of a stage on each device: with whole weights and, if they can be sharded, with FSDP."""
    if cost.memory is None:
        return []
    from sepo.planning.memory import PARTS, parts_of, smallest_change

    number, memory = target.processes, cost.memory
    if isinstance(memory, FrozenMemory):
        memory = replace(memory, processes=number)
    ways: list[tuple[str, Any]] = [("whole weights" if number > 1 else "one device", memory)]
    if isinstance(memory, TrainingMemory | FrozenMemory) and number > 1:
        if (group := number // target.nodes) not in (1, number):
            hybrid = replace(memory, sharded=True, replicas=target.nodes)
            ways.append((f"HSDP, {target.nodes} x {group}", hybrid))
        ways.append((f"FSDP over {number}", replace(memory, sharded=True)))
    rows = []
    for how, need in ways:
        parts = parts_of(need)
        total = sum(parts.values())
        row = {"stage": stage, "how": how, **{name: _size(parts[name]) for name in PARTS}, "total": _size(total)}
        if target.memory is not None:
            fits = total <= target.memory
            row["fits"] = "yes" if fits else "no"
            row["to fit"] = (
                ""
                if fits or not isinstance(need, TrainingMemory | FrozenMemory)
                else smallest_change(need, target.memory)
            )
        rows.append(row)
    return rows


def _size(number: float) -> str:
    return size(number) if number else ""


def approximate(seconds: float) -> str:
    """Estimated seconds as text."""
    return f"~{duration(seconds)}"
