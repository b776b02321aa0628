"""What a stage is: what it depends on, what it writes, how it is done, and what it costs.

Each file of this folder is one stage of the method and says four things about it:

    check(recipe)            what can be known to be wrong before anything expensive starts
    stage(...) -> Stage      its content-based dependencies, its outputs and its work
    cost(recipe, sizes)      its FLOPs and memory, for the plan of a dry run
    and the function that does it, which may be called alone

A run (`runs.pipeline`), a comparison (`runs.compare`) and the single commands do the same stages: they differ only in
where the outputs lie and in what they keep a record of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# Where the token rewards of the training pairs and of the held-out ones lie, for the stages that read them.
SCORES, SCORES_HELD_OUT = "scores", "scores_held_out"


@dataclass(frozen=True)
class Stage:
    """A stage that is to be done.

    Attributes:
        kind: which one ("oracle").
        what: it in words, for tables.
        depends: all that its output depends on: settings, and the *content* of what it reads.
        outputs: the files and folders that it writes, as patterns in its folder ("." is the folder itself).
        work: writes them into the folder that it is given and returns results for the record. All processes of a
            launch call it.
        verifies: the work checks by checksums of its own what it finds of an earlier attempt; otherwise an output that
            was altered since, or was made from something else, is removed before the stage is done again.
    """

    kind: str
    what: str
    depends: Mapping[str, Any]
    outputs: tuple[str, ...]
    work: Callable[[Path], dict[str, Any] | None]
    verifies: bool = False


@dataclass(frozen=True)
class Made:
    """The output of a stage: where it lies, the digest of its content, the results and seconds of its work."""

    folder: Path
    content: str
    results: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Model(NamedTuple):
    """A model as a stage reads it.

    Attributes:
        folder: where it lies.
        content: digest of what it computes (of all of its files, if a stage wrote it).
        usage: digest of its tokenizer, chat template and generation config, where `content` leaves them out.
    """

    folder: str
    content: str
    usage: str = ""

    def inherited(self) -> dict[str, str]:
        """What a stage depends on that trains from this model or lets it speak, by names that a message can show."""
        return {"weights": self.content, "tokenizer and generation config": self.usage}

    @classmethod
    def of(cls, made: Made) -> Model:
        """The model that a stage wrote."""
        return cls(str(made.folder), made.content)


@dataclass(frozen=True)
class Sizes:
    """What costs are computed from.

    Attributes:
        train, held_out: pairs.
        train_tokens, held_out_tokens: of prompt and responses, each prompt once a pair.
        prompts: distinct held-out prompts.
        small, large: figures of the reference and of the policy, from `models.config.describe_model`.
        device: that everything runs on.
    """

    train: int
    held_out: int
    train_tokens: int
    held_out_tokens: int
    prompts: int
    small: Mapping[str, Any]
    large: Mapping[str, Any]
    device: torch.device


@dataclass(frozen=True)
class Cost:
    """What a stage is expected to do: pairs, tokens, FLOPs and bytes of memory; None where it does not matter."""

    what: str
    pairs: int | None = None
    tokens: int | None = None
    flops: float | None = None
    memory: float | None = None
