"""The run: all stages of a recipe in one folder, with a manifest that knows what stands.

    data -> reference -> oracle -> score -> select -> train -> eval

A stage is not run again if all that it depends on (its settings, the content of its inputs, the format version) is
unchanged and the checksums of its output are those it was written with. So an interrupted run continues, a changed
recipe redoes what the change touches and says what changed, and a damaged file is noticed and made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from sepo import processes
from sepo.data import tokenizer_fingerprint
from sepo.errors import UserError, nearest, one_line
from sepo.evaluate.gold import gold_reward
from sepo.evaluate.run import evaluate_run
from sepo.layers import matmul_nt
from sepo.loading import load_rows, source_fingerprint
from sepo.logps import tokens_per_row_for
from sepo.models import (
    check_model,
    check_quantization,
    choose_device,
    describe_model,
    load_config,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
)
from sepo.objectives import SELECTIVE, WITH_REFERENCE, check_objective
from sepo.recipe import EMBEDDED_DATA, Recipe, TrainingSettings, dump_recipe
from sepo.report import build_report
from sepo.selection import check_rule
from sepo.stages import (
    STATE_FILE,
    check_same_tokenizer,
    embedded_data,
    held_out_data,
    logps_pass,
    objective_settings,
    oracle_seeds,
    prepare_data,
    read_split,
    recover_folder,
    say,
    score_pairs,
    select,
    train_model,
    train_oracle,
    train_reference,
)
from sepo.tables import (
    FORMAT_VERSION,
    file_digest,
    flat,
    read_table,
    remove_leftovers,
    write_metrics,
    write_text,
)
from sepo.trainer import PreferenceConfig

STAGES = ("data", "reference", "oracle", "score", "select", "train", "eval")
MANIFEST_FORMAT = 2


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run folder: its recipe, its manifest and the lock that keeps a second process out."""

    folder: Path
    recipe: Recipe
    manifest: dict[str, Any] = field(default_factory=dict)

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def stage(
        self,
        name: str,
        depends: dict[str, Any],
        outputs: list[Path],
        work: Callable[[], dict | None],
        title: str | None = None,
    ) -> dict:
        """Run a stage unless it stands already; returns its record.

        Args:
            name: what its record is kept under.
            depends: everything that its output depends on: settings, and the `content` of the stages it reads.
            outputs: the files and folders that it writes.
            work: writes them; returns results for the manifest. All processes of a launch call it.
            title: what messages call it; default: its name.

        Returns:
            a record with `fingerprint`, `depends`, `files` (checksums of the output), `content` (their fingerprint),
            `seconds` and `results`.
        """
        depends = json.loads(json.dumps({"format": FORMAT_VERSION, **depends}, default=str))
        title = title or name
        record = processes.on_main(lambda: self._standing(name, title, depends, outputs))
        if record is not None:
            return record
        started = time.monotonic()
        results = work() or {}
        processes.wait()
        seconds = time.monotonic() - started
        return processes.on_main(lambda: self._record(name, title, depends, outputs, results, seconds))

    def _standing(self, name: str, title: str, depends: dict[str, Any], outputs: list[Path]) -> dict | None:
        """Return the record of a stage that stands; else say why it does not, and drop the record."""
        record = self.manifest.setdefault("stages", {}).get(name)
        reason = None
        if record is None:
            say(f"[{title}]")
            return None
        if "files" not in record or "depends" not in record:
            reason = "was made by an older version"
        elif record.get("fingerprint") != digest(depends):
            reason = f"{', '.join(_changes(record['depends'], depends)) or 'something'} changed"
        else:
            damage = _damage(record["files"], self._digests(outputs))
            if damage is None:
                say(f"[{title}] unchanged, reused")
                return record
            reason = damage
        say(f"[{title}] {reason}: done again")
        self.forget(name)
        return None

    def _record(self, name: str, title: str, depends: dict, outputs: list[Path], results: dict, seconds: float) -> dict:
        files = self._digests(outputs)
        record = {
            "fingerprint": digest(depends),
            "depends": depends,
            "files": files,
            # The history of a training holds times, which differ from run to run.
            "content": digest({path: value for path, value in files.items() if not path.endswith(STATE_FILE)}),
            "seconds": round(seconds, 2),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "results": results,
        }
        self.manifest["stages"][name] = record
        self.save()
        say(f"[{title}] {seconds:.0f} s")
        return record

    def _digests(self, outputs: list[Path]) -> dict[str, str]:
        """Checksums of all output files, by their path in the run folder; missing outputs have none."""
        found: dict[str, str] = {}
        for output in outputs:
            files = sorted(output.rglob("*")) if output.is_dir() else [output]
            found |= {p.relative_to(self.folder).as_posix(): file_digest(p) for p in files if p.is_file()}
        return found

    def forget(self, name: str) -> None:
        """Drop the record of a stage that the recipe no longer has, with its time."""
        if self.manifest.setdefault("stages", {}).pop(name, None):
            self.save()  # in the main process: the others have no manifest

    def save(self) -> None:
        write_text(self.path("manifest.json"), json.dumps(self.manifest, indent=2, default=str) + "\n")


@contextlib.contextmanager
def open_run(recipe: Recipe) -> Iterator[Run]:
    """Open (or make) the recipe's run folder and hold its lock.

    Raises:
        UserError: another process works in the folder, or it belongs to another recipe.
    """
    lock = FileLock(recipe.run_folder / ".lock")
    run = Run(recipe.run_folder, recipe)
    try:
        processes.on_main(lambda: _take_folder(run, lock))
        yield run
    finally:
        lock.release()


def _take_folder(run: Run, lock: FileLock) -> None:
    """Lock the run folder, clear away what killed processes left, read the manifest and write down the recipe."""
    check_run_folder(run.recipe)
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"'{run.folder}' is in use by another process: wait for it, or set output_dir") from None
    remove_leftovers(run.folder)
    for name in ("reference", *oracle_names(run.recipe.oracle.count), "policy"):
        recover_folder(run.path(name))
    run.manifest = _read_manifest(run.folder)
    if damage := run.manifest.pop("damage", None):
        say(f"manifest.json is damaged ({damage}): every stage is looked at again")
    run.manifest |= {"name": run.recipe.name, "format": MANIFEST_FORMAT, "environment": environment()}
    run.save()
    write_text(run.path("recipe.yaml"), dump_recipe(run.recipe))


def check_run_folder(recipe: Recipe) -> None:
    """Refuse a run folder that is a file, holds foreign files, or belongs to a recipe of another name."""
    folder = recipe.run_folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file: set output_dir to a new folder")
    manifest = _read_manifest(folder)
    if manifest and manifest.get("name") != recipe.name:
        raise UserError(
            f"'{folder}' belongs to the recipe '{manifest.get('name')}', not '{recipe.name}': set output_dir or name"
        )
    if manifest or not folder.is_dir():
        return
    # A run killed at its very start has left hidden files only.
    if any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"'{folder}' is not empty and not a run folder: set output_dir to a new folder")


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest; one that is damaged gives its `damage` and the name in recipe.yaml, and no stages."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(record, dict) for record in manifest.get("stages", {}).values()):
            return manifest
        damage = "a stage is no JSON object"
    except (ValueError, AttributeError, RecursionError) as error:
        damage = one_line(error, 200)
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        recipe = None
    return {"damage": damage, "name": recipe.get("name") if isinstance(recipe, dict) else None}


def _damage(written: dict[str, str], found: dict[str, str]) -> str | None:
    """Say what happened to the files of a stage since it wrote them; notes that a user put beside them do no harm."""
    for path, checksum in written.items():
        if found.get(path) != checksum:
            return f"{path} {'was altered' if path in found else 'is missing'}"
    added = [path for path in found if path not in written and path.endswith((".parquet", ".safetensors"))]
    return f"{added[0]} was added" if added else None


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Name what differs between two nested mappings: `["policy.training.learning_rate"]`."""
    names = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            names.append(f"{prefix}{key}")
    return names


def run_recipe(recipe: Recipe) -> dict[str, float]:
    """Run all stages of a recipe, reusing what stands; returns the metrics that `metrics.json` holds."""
    processes.join(recipe.device)
    processes.on_main(lambda: check_inputs(recipe))
    with open_run(recipe) as run:
        return _run_stages(run)


def _run_stages(run: Run) -> dict[str, float]:
    recipe, seed = run.recipe, run.recipe.seed
    settings = recipe.model_dump(mode="json")
    start = resolve_model(recipe.reference.model, revision=recipe.reference.revision)
    tokenizer = load_tokenizer(start)
    # Token rewards are small differences: bfloat16 weights would round most of what the oracle learned away.
    dtype = "float32" if recipe.dtype == "auto" else recipe.dtype
    scoring: dict[str, Any] = {"device": recipe.device, "dtype": dtype, "tokens_per_row": recipe.tokens_per_row}

    train, held_out = run.path("pairs", "train"), run.path("pairs", "held_out")
    source = str(embedded_data()) if recipe.data.source == EMBEDDED_DATA else recipe.data.source
    data = run.stage(
        "data",
        {
            "data": settings["data"],
            "seed": seed,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "template": digest(tokenizer.chat_template),
            "source": processes.on_main(lambda: source_fingerprint(source)),
            "held_out_source": processes.on_main(
                lambda: recipe.data.held_out_source and source_fingerprint(recipe.data.held_out_source)
            ),
        },
        [train, held_out],
        lambda: processes.on_main(lambda: prepare_data(recipe.data, tokenizer, run.path("pairs"), seed)),
    )

    reference, reference_key = start, processes.on_main(lambda: model_fingerprint(start))
    if recipe.reference.sft is not None:
        folder = run.path("reference")
        sft = recipe.reference.sft
        record = run.stage(
            "reference",
            {
                "model": reference_key,
                "reference": {"sft": settings["reference"]["sft"]},
                "source": processes.on_main(lambda: source_fingerprint(sft.source)),
                "seed": seed,
            },
            [folder],
            lambda: {"model": str(train_reference(start, sft, folder, seed=seed, device=recipe.device))},
        )
        reference, reference_key = str(folder), record["content"]
    else:
        run.forget("reference")

    def make_oracle(folder: Path, seed: int) -> dict[str, Any]:
        store = logps_pass(reference, train, run.path("logps", "reference"), description="reference", **scoring)
        return train_oracle(reference, train, store, folder, recipe.oracle, seed=seed, device=recipe.device)

    names = oracle_names(recipe.oracle.count)
    oracles: dict[str, str] = {}  # folder of its log-probabilities -> model
    oracle_keys = []
    if recipe.oracle.model is not None:
        names = []
        oracles["oracle"] = resolve_model(recipe.oracle.model)
        oracle_keys.append(processes.on_main(lambda: model_fingerprint(oracles["oracle"])))
    for stale in [stage for stage in run.manifest.get("stages", {}) if stage.startswith("oracle")]:
        if stale not in names:
            run.forget(stale)
    for name, oracle_seed in zip(names, oracle_seeds(seed, len(names)), strict=True):
        oracles[name] = str(run.path(name))
        record = run.stage(
            name,
            {
                # One of several is the oracle that its seed alone would make.
                "oracle": {key: value for key, value in settings["oracle"].items() if key != "count"},
                "pairs": data["content"],
                "reference": reference_key,
                "seed": oracle_seed,
                "dtype": recipe.dtype,
            },
            [run.path(name)],
            partial(make_oracle, run.path(name), oracle_seed),
        )
        oracle_keys.append(record["content"])

    def make_scores() -> dict[str, Any]:
        tables = []
        for pairs, suffix, scores in ((train, (), "scores"), (held_out, ("held_out",), "scores_held_out")):
            stores = []
            for role, model in (("reference", reference), *oracles.items()):
                folder = run.path("logps", role, *suffix)
                stores.append(logps_pass(model, pairs, folder, description=f"{role} {pairs.name}", **scoring))
            tables.append((pairs, stores[1:], stores[0], run.path(scores)))
        return processes.on_main(lambda: {"tables": [str(score_pairs(*folders)) for folders in tables]})

    score = run.stage(
        "score",
        {
            "oracle": oracle_keys[0] if len(oracle_keys) == 1 else oracle_keys,
            "reference": reference_key,
            "pairs": data["content"],
            "dtype": recipe.dtype,
        },
        [
            run.path("scores"),
            run.path("scores_held_out"),
            *(run.path("logps", role) for role in ("reference", *oracles)),
        ],
        make_scores,
    )

    def make_selection() -> dict[str, str]:
        rule = recipe.select.model_dump()
        return {"folder": str(select(run.path("scores"), run.path("selection"), **rule, seed=seed))}

    selection = run.stage(
        "select",
        {"scores": score["content"], "select": settings["select"], "seed": seed},
        [run.path("selection")],
        lambda: processes.on_main(make_selection),
    )

    policy_folder = run.path("policy")
    start_policy = reference
    if recipe.policy.model is not None:
        start_policy = resolve_model(recipe.policy.model, revision=recipe.policy.revision)
    start_key = processes.on_main(lambda: model_fingerprint(start_policy))

    def train_policy() -> dict[str, Any]:
        logps = None
        if recipe.policy.objective in WITH_REFERENCE:
            # The policy's reference is the model it starts from; its pass stands already where that is π_ref.
            store = run.path("logps", "reference" if start_policy == reference else "policy_start")
            logps_pass(start_policy, train, store, description="policy's reference", **scoring)
            logps = read_table(store, "logps")
        return train_model(
            start_policy,
            read_table(run.path("selection"), "selection"),
            policy_folder,
            recipe.policy.training,
            reference_logps=logps,
            lora=recipe.policy.lora,
            quantization=recipe.policy.quantization,
            seed=seed,
            device=recipe.device,
            **objective_settings(recipe.policy),
        )

    policy = run.stage(
        "train",
        {
            "policy": settings["policy"],
            "start": start_key,
            "selection": selection["content"],
            "seed": seed,
        },
        [policy_folder],
        train_policy,
    )

    def measure() -> dict[str, float]:
        run.path("eval", "generations.parquet").unlink(missing_ok=True)  # of other settings
        return evaluate_run(
            policy=str(policy_folder),
            base=start_policy,
            held_out=held_out,
            scores=run.path("scores"),
            scores_held_out=run.path("scores_held_out"),
            selection=run.path("selection"),
            base_logps=run.path("logps", "reference", "held_out") if start_policy == reference else None,
            out=run.path("eval"),
            settings=recipe.eval,
            seed=seed,
            device=recipe.device,
            dtype=recipe.dtype,
        )

    evaluation = run.stage(
        "eval",
        {
            "eval": settings["eval"],
            "policy": policy["content"],
            "start": start_key,
            "scores": score["content"],
            "selection": selection["content"],
            "seed": seed,
            "dtype": recipe.dtype,
        },
        [run.path("eval")],
        lambda: processes.on_main(measure),
    )
    return processes.on_main(lambda: _finish_run(run, data, evaluation))


def _finish_run(run: Run, data: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, float]:
    """Write metrics.json and the report; returns the metrics."""
    metrics = {
        **evaluation["results"],
        "pairs/train": data["results"]["train"],
        "pairs/held_out": data["results"]["held_out"],
        **{f"seconds/{name}": record["seconds"] for name, record in run.manifest["stages"].items()},
    }
    write_metrics(run.path("metrics.json"), metrics)
    build_report(run.folder, out=run.path("report.html"))
    say(f"report: {run.path('report.html')}")
    return metrics


# --- checks before anything expensive -------------------------------------------------------------------------------


def check_inputs(recipe: Recipe) -> None:
    """Raise a UserError for anything about a recipe that can be known to be wrong before a model is loaded."""
    check_run_folder(recipe)
    check_model(recipe.reference.model, revision=recipe.reference.revision)
    if recipe.oracle.model is not None:
        check_model(recipe.oracle.model)
    if recipe.policy.model is not None:
        check_model(recipe.policy.model, revision=recipe.policy.revision)
    for part in (recipe.oracle, recipe.policy):
        check_quantization(part.quantization, train=True, lora=part.lora is not None)
    if recipe.eval.gold is not None:
        gold_reward(recipe.eval.gold)
    # Reading the source finds a missing file, split or column; tokenisation then counts bad rows.
    read_split(recipe.data, recipe.data.split)
    if recipe.data.held_out_split or recipe.data.held_out_source:
        read_split(*held_out_data(recipe.data, recipe.data.held_out_split))
    for settings in (recipe.oracle.training, recipe.policy.training):
        _check_arguments(settings)
    check_objective(recipe.policy.objective, recipe.policy.label_smoothing)
    check_rule(**recipe.select.model_dump())
    if recipe.reference.sft is not None:
        sft = recipe.reference.sft
        if importlib.util.find_spec("trl") is None:
            raise UserError('reference.sft needs TRL: run pip install "sepo[sft]"')
        _check_arguments(sft.training)
        load_rows(sft.source, split=sft.split, config_name=sft.config_name)
    if recipe.oracle.model or recipe.policy.model:
        reference = load_tokenizer(recipe.reference.model, revision=recipe.reference.revision)
        revisions = {"oracle": None, "policy": recipe.policy.revision}
        for role, name in (("oracle", recipe.oracle.model), ("policy", recipe.policy.model)):
            if name is not None:
                other = load_tokenizer(name, revision=revisions[role])
                check_same_tokenizer(f"{role} '{name}'", other, f"reference '{recipe.reference.model}'", reference)


def _check_arguments(settings: TrainingSettings) -> None:
    names = {item.name for item in dataclasses.fields(PreferenceConfig)}
    for key in settings.arguments:
        if key not in names:
            raise UserError(f"training.arguments.{key}: not a TrainingArguments field{nearest(key, names)}")


# --- dry run --------------------------------------------------------------------------------------------------------


def plan_run(recipe: Recipe) -> list[dict[str, str]]:
    """Say what a run would do: one row a stage with pairs, tokens, and estimates of time and memory.

    The data are read and tokenised for the counts; no model is loaded. Times follow from the FLOPs of each stage and
    the matmul rate measured here and now, at the shares of it that docs/performance.md reports: a guide, not a promise.
    """
    check_inputs(recipe)
    tokenizer = load_tokenizer(recipe.reference.model, revision=recipe.reference.revision)
    with tempfile.TemporaryDirectory() as folder:
        prepare_data(recipe.data, tokenizer, Path(folder), recipe.seed)
        counts = {}
        for split in ("train", "held_out"):
            table = read_table(Path(folder) / split, "pairs")
            tokens = sum(int(flat(table.column(f"{part}_ids"))[1].sum()) for part in ("prompt", "chosen", "rejected"))
            prompts = len({tuple(ids) for ids in table.column("prompt_ids").to_pylist()})
            counts[split] = (len(table), tokens, prompts)
    device = choose_device(recipe.device)
    rate = 0.5 * matmul_rate(device)
    small = describe_model(load_config(recipe.reference.model, revision=recipe.reference.revision))
    large = small
    if recipe.policy.model:
        large = describe_model(load_config(recipe.policy.model, revision=recipe.policy.revision))
    (train, train_tokens, _), (held, held_tokens, prompts) = counts["train"], counts["held_out"]
    rows = [_plan_row("data", recipe.data.source, train + held, train_tokens + held_tokens)]
    if recipe.reference.sft is not None:
        rows.append(_plan_row("reference", f"SFT on {recipe.reference.sft.source}"))
    if recipe.oracle.model is None:
        share, epochs = recipe.oracle.sample, _epochs(recipe.oracle.training, train * recipe.oracle.sample)
        count = recipe.oracle.count
        seconds = (2 + 6 * share * epochs * count) * small["parameters"] * train_tokens / rate
        memory = _training_memory(small, recipe.oracle.training, recipe.oracle.lora is not None, device)
        rows.append(
            _plan_row(
                "oracle",
                "reference pass, then DPO" + (f", {count} times" if count > 1 else ""),
                round(train * share),
                train_tokens,
                seconds,
                memory,
            )
        )
    oracles = recipe.oracle.count
    # The reference has read the training pairs for the oracle already, where one is trained.
    tokens = (oracles + bool(recipe.oracle.model)) * train_tokens + (oracles + 1) * held_tokens
    seconds = 2 * small["parameters"] * tokens / rate
    rows.append(
        _plan_row(
            "score",
            "reference and oracle passes" if recipe.oracle.model else f"oracle pass{'es' if oracles > 1 else ''}",
            train + held,
            tokens,
            seconds,
            6 * small["parameters"],
        )
    )
    kept = f"{recipe.select.k_chosen:.0%} of chosen, {recipe.select.k_rejected:.0%} of rejected tokens"
    if recipe.policy.objective not in SELECTIVE:
        kept += f" (not read by {recipe.policy.objective})"
    rows.append(_plan_row("select", kept, train))
    epochs = _epochs(recipe.policy.training, train)
    seconds = 6 * large["parameters"] * train_tokens * epochs / rate
    memory = _training_memory(large, recipe.policy.training, recipe.policy.lora is not None, device)
    rows.append(_plan_row("train", f"{recipe.policy.objective} objective", train, train_tokens, seconds, memory))
    generated = 2 * min(prompts, recipe.eval.prompts) * recipe.eval.samples * recipe.eval.max_new_tokens
    # A decoding step reads every weight for a batch of about 64 tokens: some 3 times the FLOPs' time.
    seconds = 2 * large["parameters"] * (2 * held_tokens + 3 * generated) / rate
    rows.append(
        _plan_row(
            "eval", f"gold: {recipe.eval.gold}", held, 2 * held_tokens + generated, seconds, 9 * large["parameters"]
        )
    )
    return rows


def matmul_rate(device: torch.device, seconds: float = 0.3) -> float:
    """Measure the matmul FLOP/s of a device in the type that training uses there, by the fastest library at hand."""
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(shape, device=device).to(kind) for shape in ((1024, 1024), (4096, 1024)))
    rates = []
    for multiply in (matmul_nt, lambda x, w: x @ w.t()):
        done, started = 0, time.perf_counter()
        while done == 0 or time.perf_counter() - started < seconds / 2:
            product = multiply(left, right)
            if device.type != "cpu":
                product[0, 0].item()  # wait for it
            done += 1
        rates.append(done * 2 * 1024 * 1024 * 4096 / (time.perf_counter() - started))
    return max(rates)


def oracle_names(count: int) -> list[str]:
    """Folders and stages of a run's oracles: oracle, oracle-2, ..."""
    return ["oracle", *(f"oracle-{number}" for number in range(2, count + 1))]


def _epochs(training: TrainingSettings, pairs: float) -> float:
    return (
        training.max_steps * training.batch_size / max(pairs, 1)
        if training.max_steps > 0
        else training.num_train_epochs
    )


def _training_memory(model: dict[str, Any], training: TrainingSettings, lora: bool, device: torch.device) -> float:
    """Bytes: weights, gradients and two AdamW moments, and the activations of one packed row."""
    tokens = training.tokens_per_row or tokens_per_row_for(device)
    width = 4 if device.type == "cpu" else 2
    activations = tokens * model["layers"] * model["hidden"] * 20 * width
    if training.activation_checkpointing:
        activations /= model["layers"] / 2
    return (4 if lora else 16) * model["parameters"] + activations


def _plan_row(
    stage: str,
    what: str,
    pairs: int | None = None,
    tokens: int | None = None,
    seconds: float | None = None,
    memory: float | None = None,
) -> dict[str, str]:
    def text(value: float | None, form: Callable[[float], str]) -> str:
        return "" if value is None else form(value)

    return {
        "stage": stage,
        "what": what,
        "pairs": text(pairs, lambda n: f"{n:,}"),
        "tokens": text(tokens, lambda n: f"{n:,}"),
        "time": text(
            seconds, lambda s: f"~{s:.0f} s" if s < 120 else f"~{s / 60:.0f} min" if s < 7200 else f"~{s / 3600:.1f} h"
        ),
        "memory": text(memory, lambda b: f"~{b / 1e9:.1f} GB"),
    }


# --- small helpers --------------------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    """Fingerprint of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Versions and device, for the manifest."""
    packages = ("sepo", "torch", "transformers", "datasets", "accelerate", "peft")
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages if _installed(name)},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
