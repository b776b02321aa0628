"""What a stage is, and what it leaves.

Each module of this folder defines one stage of the method:

    check(recipe)            find bad input before anything expensive starts
    stage(...) -> Stage      what the stage reads, writes and runs
    a function that does it  and that can be called without a run

`runs.method` says which stage reads which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# Tables of token rewards in the folder of the stages "score" and "transfer": training pairs and held-out pairs.
SCORES, SCORES_HELD_OUT = "scores", "scores_held_out"
# Parts of the pairs. Each is a table.
PARTS = ("train", "held_out")


@dataclass(frozen=True)
class Stage:
    """A stage that has not run yet.

    Attributes:
        kind: its name ("oracle").
        what: one line for tables.
        depends: everything that its output depends on: settings, and digests of what it reads. A value that is a
            function is called when the stage runs, not when it is planned: digests of large files.
        outputs: files and folders that it writes, as patterns in its folder ("." is the folder itself).
        run: writes the outputs into a folder and returns results for the manifest. Every rank of a launch calls it.
        facts: what a plan needs to know to compute its cost (`planning.stages`); None: it takes no time to speak of.
        verifies: `run` checks by itself which outputs of an earlier attempt it can keep. Otherwise a changed or stale
            output is deleted first.
        missing: one line about results that a second attempt may get, such as replies of a server; None for none.
    """

    kind: str
    what: str
    depends: Mapping[str, Any]
    outputs: tuple[str, ...]
    run: Callable[[Path], dict[str, Any] | None]
    facts: Mapping[str, Any] | None = None
    verifies: bool = False
    missing: Callable[[Mapping[str, Any]], str | None] = lambda results: None

    def key(self) -> dict[str, Any]:
        """What the stage depends on, without the values that only a run can compute: equal keys, equal outputs."""
        return {"stage": self.kind, **{name: value for name, value in self.depends.items() if not callable(value)}}


@dataclass(frozen=True)
class StageResult:
    """What a stage left: its folder, the digest of its content, results, seconds, and peak memory in GB."""

    folder: Path
    content: str
    results: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    memory_gb: float | None = None


class Model(NamedTuple):
    """A model that a stage reads.

    Attributes:
        folder: where it is, or its name where it is only planned.
        content: digest of its weights and config (of all its files, if a stage wrote it).
        usage: digest of its tokenizer, chat template and generation config, where `content` leaves them out.
    """

    folder: str
    content: str
    usage: str = ""

    def inherited(self) -> dict[str, str]:
        """What a stage that trains or samples from this model depends on, under names for messages."""
        return {"weights": self.content, "tokenizer and generation config": self.usage}

    @classmethod
    def of(cls, result: StageResult) -> Model:
        """The model that a stage wrote."""
        return cls(str(result.folder), result.content)
