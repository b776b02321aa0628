"""The stages of a single command, without a run: each in a given folder, without a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sepo import processes
from sepo.files import digest
from sepo.stages.reference import hash_model
from sepo.stages.stage import Model, Stage, StageResult


class CommandWalker:
    """Does every stage that it is asked for; scoring and training find out themselves what an earlier attempt left.

    Args:
        folders: of each stage, by role.

    Attributes:
        results: what the stages left, by role.
    """

    def __init__(self, folders: Mapping[str, Path]):
        self.folders = folders
        self.results: dict[str, StageResult] = {}

    def model(self, name: str, revision: str | None = None) -> Model:
        return hash_model(name, revision)

    def do(self, stage: Stage, role: str) -> StageResult:
        folder = self.folders[role]
        results = stage.run(folder) or {}
        processes.wait()
        self.results[role] = StageResult(folder, digest(stage.key()), results)
        return self.results[role]
