"""What a stage is: what it depends on, what it writes, how it is done, and what it costs.

Each file of this folder is one stage of the method and says four things about it:

    check(recipe)            what can be known to be wrong before anything expensive starts
    stage(...) -> Stage      its content-based dependencies, its outputs and its work
    cost(recipe, sizes)      its work and the memory it needs, for the plan of a dry run
    and the function that does it, which may be called alone

A run (`runs.pipeline`), a comparison (`runs.compare`) and the single commands do the same stages: they differ only in
where the outputs lie and in what they keep a record of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sepo.models.config import Shape
    from sepo.planning.memory import Reading, Training
    from sepo.recipe.settings import LoraSettings, TrainingSettings

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
        missing: what its results lack that doing it again may get (replies of a server), in words; None for nothing.
    """

    kind: str
    what: str
    depends: Mapping[str, Any]
    outputs: tuple[str, ...]
    work: Callable[[Path], dict[str, Any] | None]
    verifies: bool = False
    missing: Callable[[Mapping[str, Any]], str | None] = lambda results: None


@dataclass(frozen=True)
class StageResult:
    """The output of a stage: where it lies, the digest of its content, the results, seconds and GB of its work."""

    folder: Path
    content: str
    results: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    memory_gb: float | None = None


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
    def of(cls, made: StageResult) -> Model:
        """The model that a stage wrote."""
        return cls(str(made.folder), made.content)


class ModelSize(NamedTuple):
    """A model of a recipe, by name, its shape, and how many of its layers are taken (None: all)."""

    name: str
    revision: str | None
    shape: Shape
    layers: int | None = None


@dataclass(frozen=True)
class PairSizes:
    """Counts of one part of the pairs.

    Attributes:
        pairs: their number.
        tokens: of prompts and responses, each prompt once a pair.
        scored: that a scoring pass reads: prompts and responses that occur several times once.
        chosen, rejected: of the responses.
        longest: that a row needs for the longest pair.
    """

    pairs: int = 0
    tokens: int = 0
    scored: int = 0
    chosen: int = 0
    rejected: int = 0
    longest: int = 0

    @property
    def responses(self) -> int:
        """Tokens of all responses."""
        return self.chosen + self.rejected


@dataclass(frozen=True)
class Sizes:
    """What costs are computed from.

    Attributes:
        train, held_out: the pairs.
        prompts: distinct held-out prompts.
        prompt_tokens, longest_prompt: tokens of all of those, and of the longest.
        small, large: the reference and the policy.
        device: kind of device that everything runs on ("cpu", "cuda", "mps").
        processes: devices that share the work.
        policy: the same under the policy's tokenizer, where that is another.
        transfer: how both tokenizers cut the responses then, in words.
    """

    train: PairSizes
    held_out: PairSizes
    prompts: int
    prompt_tokens: int
    longest_prompt: int
    small: ModelSize
    large: ModelSize
    device: str
    processes: int = 1
    policy: Sizes | None = None
    transfer: str = ""

    @property
    def of_policy(self) -> Sizes:
        """What the policy reads."""
        return self.policy or self


@dataclass(frozen=True)
class Work:
    """A part of a stage that takes time, as it is counted; `runs.pace` says how long it takes here.

    Attributes:
        kind: "load" a model, "score" rows, "train" on rows, or "generate".
        model: that does it.
        tokens, targets: read, and sent through the LM head.
        updates: optimizer steps.
        steps, width: decoding steps, each of `width` responses.
        training, lora, quantization: how it is trained.
        dtype: of the weights, where they are not trained.
    """

    kind: str
    model: ModelSize
    tokens: float = 0
    targets: float = 0
    updates: float = 0
    steps: float = 0
    width: int = 0
    training: TrainingSettings | None = None
    lora: LoraSettings | None = None
    quantization: str | None = None
    dtype: str = "auto"

    @property
    def flops(self) -> float:
        """2 for each weight of the backbone and token, and of the LM head and target; 6 where it trains, or with LoRA
        2 and 2 more for those that its gradients go through.
        """
        shape = self.model.shape
        if self.kind == "generate":
            return 2.0 * self.steps * self.width * (shape.linear + shape.head)
        forward = 2.0 * (self.tokens * shape.linear + self.targets * shape.head)
        if self.kind != "train":
            return forward
        if self.lora is None:
            return 3 * forward
        return forward + 2.0 * (self.tokens * shape.reached(self.lora) + self.targets * shape.head)

    def times(self, number: float) -> Work:
        """The same work a number of times."""
        return replace(
            self, tokens=self.tokens * number, targets=self.targets * number, updates=self.updates * number,
            steps=self.steps * number,
        )  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What a stage is expected to do: pairs and tokens, the work that takes time, and the memory that it needs; None
    where it is not known or does not matter.
    """

    what: str
    pairs: int | None = None
    tokens: int | None = None
    work: tuple[Work, ...] | None = None
    memory: Training | Reading | Mapping[str, float] | None = None
