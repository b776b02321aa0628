"""What a cost is: the sizes of data and models that it follows from, the compute, the memory.

`planning.stages` has the cost of each stage, `throughput.py` turns compute into seconds, `memory.py` memory into bytes.
Nothing here is measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sepo.recipe.settings import LoraSettings, TrainingSettings


@dataclass(frozen=True)
class Shape:
    """The numbers that determine time and memory of a model.

    Attributes:
        parameters: number of weights, tied weights once.
        block: weights of the largest decoder block.
        head: weights of the LM head.
        embedding: weights of the input embedding and, if it is not tied, the LM head.
        linears: name, inputs and outputs of every linear layer except the LM head.
        layers, hidden, intermediate, vocab: sizes of the decoder; `intermediate` counts the experts of one token.
        queries, keys: total width of the query heads, and of the key heads.
    """

    parameters: int
    block: int
    head: int
    embedding: int
    linears: tuple[tuple[str, int, int], ...]
    layers: int
    hidden: int
    intermediate: int
    vocab: int
    queries: int
    keys: int

    @property
    def linear(self) -> int:
        """Weights of the linear layers without the LM head."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)

    def adapted_by(self, lora: LoraSettings) -> list[tuple[str, int, int]]:
        """The linear layers that LoRA adapts, in its decoder layers only."""
        layers = lora.adapted_layers(self.layers)
        numbered = ((linear, re.search(r"\.(\d+)\.", linear[0])) for linear in self.adapted(lora.target_modules))
        return [linear for linear, number in numbered if number is None or int(number[1]) in layers]

    def reached(self, lora: LoraSettings) -> int:
        """Weights of the linear layers from the first adapted one on; a backward pass ends there."""
        adapted = self.adapted_by(lora)
        first = self.linears.index(adapted[0]) if adapted else len(self.linears)
        return sum(inputs * outputs for _, inputs, outputs in self.linears[first:])

    def adapted(self, targets: str | list[str]) -> list[tuple[str, int, int]]:
        """The linear layers that LoRA adapts, by the rules of PEFT's `target_modules`."""
        if targets == "all-linear":
            return list(self.linears)
        if isinstance(targets, str):
            return [layer for layer in self.linears if re.fullmatch(targets, layer[0])]
        return [layer for layer in self.linears if any(layer[0] == t or layer[0].endswith(f".{t}") for t in targets)]


class ModelSize(NamedTuple):
    """A model of a recipe: name, revision, shape, and the number of its layers that are kept (None: all)."""

    name: str
    revision: str | None
    shape: Shape
    layers: int | None = None


@dataclass(frozen=True)
class PairSizes:
    """Counts of the training pairs or of the held-out pairs.

    Attributes:
        pairs: their number.
        tokens: of prompts and responses; a prompt counts once a pair.
        scored: tokens that a scoring pass reads; repeated prompts and responses count once.
        chosen, rejected: tokens of the responses.
        longest: tokens of a row that holds the longest pair.
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
    """Input of every cost.

    Attributes:
        train, held_out: counts of the pairs.
        prompts: number of distinct held-out prompts.
        prompt_tokens, longest_prompt: tokens of all distinct prompts, and of the longest.
        small, large: the reference and the policy.
        device: kind of device for all stages ("cpu", "cuda", "mps").
        processes: devices that share the work.
        policy: the same counts under the policy's tokenizer, if it differs.
        transfer: one line on how the two tokenizers cut the responses, if they differ.
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
        """The counts under the policy's tokenizer."""
        return self.policy or self


@dataclass(frozen=True)
class Estimate:
    """The compute of one part of a stage. `planning.throughput` turns it into seconds.

    Attributes:
        kind: "load" a model, "score" rows, "train" on rows, or "generate" responses.
        model: the model that does it.
        tokens, targets: tokens that are read, and tokens whose hidden state goes through the LM head.
        updates: optimizer steps.
        steps, width: decoding steps, and the responses that each step continues.
        training, lora, quantization: settings of a training.
        dtype: of the weights of a frozen model.
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
        """FLOPs: 2 a weight for a forward pass (backbone weights times tokens, head weights times targets).

        Full training takes three times that. LoRA takes a forward pass, and 2 a weight that gradients go through.
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

    def times(self, number: float) -> Estimate:
        """The same compute, `number` times."""
        return replace(
            self,
            tokens=self.tokens * number,
            targets=self.targets * number,
            updates=self.updates * number,
            steps=self.steps * number,
        )


@dataclass(frozen=True)
class TrainingMemory:
    """What decides the memory of a training on one of several devices.

    Attributes:
        device: "cuda", "cpu" or "mps".
        tokens, targets: of the longest row.
        longest: tokens of the longest pair; no row can be shorter.
        processes: devices that share an update.
        sharded: FSDP shards weights, gradients and moments; otherwise each device holds whole ones (DDP).
        replicas: groups of devices that each hold all shards (HSDP).
        frozen_copy: a frozen copy of the model is in memory too (the KL of tdpo and tis_dpo).
    """

    shape: Shape
    settings: TrainingSettings
    device: str
    tokens: int
    targets: int
    longest: int
    lora: LoraSettings | None = None
    quantization: str | None = None
    processes: int = 1
    sharded: bool = False
    replicas: int = 1
    frozen_copy: bool = False


@dataclass(frozen=True)
class FrozenMemory:
    """What decides the memory of a frozen model that scores rows or generates responses.

    Attributes:
        width: bytes of a weight.
        tokens, targets: of the longest row that is scored.
        responses: number generated at once, each of at most `length` tokens with its prompt; 0 for none.
        prompt: tokens of the longest prompt.
        processes: devices that share the rows.
        sharded: FSDP or ZeRO-3 shards the weights; otherwise each device holds a whole model.
        replicas: groups of devices that each hold all shards.
    """

    shape: Shape
    device: str
    width: int
    tokens: int
    targets: int
    responses: int = 0
    length: int = 0
    prompt: int = 0
    processes: int = 1
    sharded: bool = False
    replicas: int = 1


@dataclass(frozen=True)
class FineTuningMemory:
    """What decides the memory of supervised fine-tuning through TRL."""

    shape: Shape
    settings: TrainingSettings
    device: str
    max_length: int
    processes: int = 1


Memory = TrainingMemory | FrozenMemory | FineTuningMemory


@dataclass(frozen=True)
class Cost:
    """What a stage will do: pairs and tokens, its compute, its memory. None: unknown, or too small to matter.

    An empty `what` is that of the stage.
    """

    what: str = ""
    pairs: int | None = None
    tokens: int | None = None
    estimates: tuple[Estimate, ...] | None = None
    memory: Memory | None = None
