"""A run folder: its manifest, which results are up to date, and the lock that keeps a second process out.

A result is reused if everything that its stage depends on (settings, content of the inputs, format version) and the
checksums of its files are unchanged. So an interrupted run continues, a changed recipe redoes only what the change
touches and logs what changed, and a damaged file is made again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from sepo import processes
from sepo.bars import redraws
from sepo.data.tables import FORMAT_VERSION
from sepo.errors import UserError, log_kept_on_interrupt, one_line
from sepo.files import (
    check_writable,
    defined,
    digest,
    file_digest,
    recover_folder,
    remove_leftovers,
    write_json,
    write_text,
)
from sepo.forward.memory import PeakMemory
from sepo.processes import log
from sepo.recipe.reading import dump_recipe
from sepo.recipe.settings import Recipe
from sepo.stages import oracle
from sepo.stages.stage import Stage, StageResult
from sepo.training.checkpoints import STATE_FILE
from sepo.training.logs import LOGS

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

MANIFEST_FORMAT = 4


# The model card that `sepo.hub` writes beside a policy: a file for people, not part of the stage's output.
CARD = "README.md"


class ProgressLine(Protocol):
    """Shows the progress of a run in one line."""

    def during(self, name: str) -> AbstractContextManager[None]:
        """While a stage runs."""

    def passed(self, name: str) -> None:
        """The result of a stage is up to date."""


@dataclass
class Run:
    """A run folder: its recipe, and its manifest with a record of every finished stage."""

    folder: Path
    recipe: Recipe
    manifest: dict[str, Any] = field(default_factory=dict)
    used: dict[str, Path] = field(default_factory=dict)  # folder of each stage that this run asked for
    line: ProgressLine | None = None

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def do(self, stage: Stage, folder: Path, name: str | None = None, title: str | None = None) -> StageResult:
        """Do a stage unless its result is up to date.

        Args:
            folder: folder of its outputs, in the run folder.
            name: name of its record; default: its kind.
            title: its name in messages; default: `name`.
        """
        name = name or stage.kind
        title = title or name
        self.used[name] = folder
        values = {key: value() if callable(value) else value for key, value in stage.depends.items()}
        depends = json.loads(json.dumps({"format": FORMAT_VERSION, **values}, default=str))
        record = processes.on_main(lambda: self._standing(name, title, depends, stage, folder))
        if record is not None and self.line is not None:
            self.line.passed(name)
        if record is None:
            started, memory = time.monotonic(), PeakMemory()
            kept = f"stage {title} was not finished, earlier stages are kept; the same command continues with it"
            shown = nullcontext() if self.line is None else self.line.during(name)
            with shown, log_kept_on_interrupt(lambda: kept):
                results = stage.run(folder) or {}
            processes.wait()
            seconds = time.monotonic() - started
            took = {"seconds": round(seconds, 2), "memory_gb": memory.gb()}
            record = processes.on_main(lambda: self._record(name, title, depends, stage, folder, results, took))
        return StageResult(
            folder, record["content"], record["results"] or {}, record["seconds"], record.get("memory_gb")
        )

    def _standing(self, name: str, title: str, depends: dict[str, Any], stage: Stage, folder: Path) -> dict | None:
        """The record of an up-to-date stage; otherwise log why it is done again, and drop the record."""
        record = self.manifest.setdefault("stages", {}).get(name)
        if record is None:
            if self.line is None or not redraws():  # a redrawn line shows the stage
                log(f"[{title}]")
            return None
        if "files" not in record or "depends" not in record:
            reason = "was made by an older version"
        elif record.get("fingerprint") != digest(depends):
            reason = f"{', '.join(_changes(record['depends'], depends)) or 'something'} changed"
        else:
            damage = _damage(record["files"], self._digests(stage, folder))
            lacks = stage.missing(record["results"] or {})
            if damage is None and lacks is None:
                log(f"[{title}] unchanged, reused")
                return record
            reason = str(damage or lacks)
        log(f"[{title}] {reason}: done again")
        self.forget(name)
        if not stage.verifies:
            self._remove(stage, folder)
        return None

    def _remove(self, stage: Stage, folder: Path) -> None:
        for path in _outputs(stage, folder):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _record(
        self, name: str, title: str, depends: dict, stage: Stage, folder: Path, results: dict, took: dict
    ) -> dict:
        files = self._digests(stage, folder)
        inside = folder.relative_to(self.folder).as_posix()
        record = {
            "fingerprint": digest(depends),
            "depends": depends,
            "files": files,
            # Paths are relative to the stage's folder, so the digest does not depend on its place. The history of a
            # training holds times, which differ from run to run.
            "content": digest(
                {
                    path.removeprefix(f"{inside}/"): value
                    for path, value in files.items()
                    if not path.endswith(STATE_FILE)
                }
            ),
            **took,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "results": defined(results),  # NaN as None, as JSON gives it back
        }
        self.manifest["stages"][name] = record
        self.save()
        log(f"[{title}] {took['seconds']:.0f} s")
        return record

    def _digests(self, stage: Stage, folder: Path) -> dict[str, str]:
        """Checksums of the existing output files of a stage, by path in the run folder."""
        found: dict[str, str] = {}
        for output in _outputs(stage, folder):
            files = sorted(output.rglob("*")) if output.is_dir() else [output]
            found |= {
                path.relative_to(self.folder).as_posix(): file_digest(path)
                for path in files
                if path.is_file() and not _for_people(path.relative_to(folder))
            }
        return found

    def forget(self, name: str) -> None:
        """Remove the record of a stage."""
        if self.manifest.setdefault("stages", {}).pop(name, None):
            self.save()  # other ranks have no manifest

    def forget_others(self) -> None:
        """Remove the records of stages that the recipe no longer has."""
        for name in list(self.manifest.get("stages", {})):
            if name not in self.used:
                self.forget(name)

    def log_unused(self, *patterns: str) -> None:
        """Log the folders that earlier settings left, with their size.

        They are kept: a setting that is changed back finds its results there, and other grids may share the folder.
        """
        folders = {path for pattern in patterns for path in self.folder.glob(pattern) if path.is_dir()}
        left = sorted(folders - set(self.used.values()))
        if not left:
            return
        size = sum(file.stat().st_size for folder in left for file in folder.rglob("*") if file.is_file())
        names = [path.relative_to(self.folder).as_posix() for path in left]
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        log(f"not used by these settings, and kept: {listed} ({size / 1e9:.2f} GB in '{self.folder}'); may be deleted")

    def save(self) -> None:
        write_json(self.path("manifest.json"), self.manifest)


def _outputs(stage: Stage, folder: Path) -> list[Path]:
    """The existing output files and folders of a stage."""
    found = [folder] if "." in stage.outputs and folder.exists() else []
    return [*found, *(path for pattern in stage.outputs if pattern != "." for path in sorted(folder.glob(pattern)))]


# --- opening a run --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_run(recipe: Recipe) -> Iterator[Run]:
    """Open or make the recipe's run folder and hold its lock.

    Raises:
        UserError: another process holds the lock, the folder belongs to another recipe, or a machine of the launch
            does not see it.
    """
    run = Run(recipe.run_folder, recipe)
    processes.on_main(lambda: check_run_folder(recipe))
    with processes.alone_in(run.folder, "set output_dir"):
        processes.on_main(lambda: _take_folder(run))
        processes.require_shared(run.folder)
        yield run


def _take_folder(run: Run) -> None:
    """Remove what killed processes left, read the manifest, and write the recipe."""
    check_run_folder(run.recipe)  # again, under the lock
    remove_leftovers(run.folder)
    for name in ("reference", *(name for name, _, _ in oracle.members(run.recipe.oracle)), "policy"):
        recover_folder(run.path(name))
    run.manifest = _read_manifest(run.folder)
    if damage := run.manifest.pop("damage", None):
        log(f"manifest.json is damaged ({damage}): every stage is checked again")
    run.manifest |= {"name": run.recipe.name, "format": MANIFEST_FORMAT, "environment": environment()}
    run.manifest["hub"] = hub_names(run.recipe)
    run.save()
    write_text(run.path("recipe.yaml"), dump_recipe(run.recipe))


def hub_names(recipe: Recipe) -> list[str]:
    """The names in a recipe that mean something on the hub here and now, and no file or folder of this machine.

    Only the run can know: from another folder a relative path looks like a hub id. Cards link these names alone.
    """
    data, reference, judge = recipe.data, recipe.reference, recipe.eval.judge
    names = [
        *(part.source for part in data.parts()),
        data.held_out_source,
        reference.model,
        recipe.oracle.model,
        recipe.policy.model,
    ]
    names += [None if reference.sft is None else reference.sft.source]
    names += [None if judge is None else judge.reward_model]
    return sorted({name for name in names if name and _HUB_ID.fullmatch(name) and not os.path.exists(name)})


def check_run_folder(recipe: Recipe) -> None:
    """Refuse a run folder that is a file, holds other files, or belongs to another recipe."""
    folder = recipe.run_folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file: set output_dir to a new folder")
    check_writable(folder, "set output_dir to another folder")
    manifest = _read_manifest(folder)
    if manifest and manifest.get("name") != recipe.name:
        raise UserError(
            f"'{folder}' belongs to the recipe '{manifest.get('name')}', not '{recipe.name}': set output_dir or name"
        )
    if manifest or not folder.is_dir():
        return
    # A run that was killed at its start left only hidden files.
    if any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"'{folder}' is not empty and not a run folder: set output_dir to a new folder")


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest. A damaged one gives `damage`, and the name from recipe.yaml, without stages."""
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


def _for_people(path: Path) -> bool:
    """Is a file of a stage's folder not part of its output: a training's logs, a model's card?"""
    return path.parts[0] == LOGS or path.as_posix() == CARD


def _damage(written: dict[str, str], found: dict[str, str]) -> str | None:
    """What changed in the files of a stage since it wrote them; files that a user added do not count."""
    for path, checksum in written.items():
        if found.get(path) != checksum:
            return f"{path} {'was altered' if path in found else 'is missing'}"
    added = [path for path in found if path not in written and path.endswith((".parquet", ".safetensors"))]
    return f"{added[0]} was added" if added else None


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys that differ between two nested mappings: `["policy.training.learning_rate"]`."""
    names = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            names.append(f"{prefix}{key}")
    return names


def environment() -> dict[str, Any]:
    """Versions and device, for the manifest."""
    packages = ("sepo", "torch", "transformers", "datasets", "accelerate", "peft")
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in packages if (version := _version(name)) is not None},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
    }


@functools.cache
def _version(name: str) -> str | None:
    """Version of an installed package. To read it takes milliseconds, and a comparison asks after each run."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
