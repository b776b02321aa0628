"""How much memory of a device each kind of work needs, from a model's shape alone: what a plan adds up.

The formulas follow what the code keeps (forward/layers.py, attention, lm_head.py) in the types that it keeps it in.
docs/how-to/does-it-fit.md has each beside what was measured. All figures are bytes of one device, at the worst moment;
prompts shorter than a row's budget need less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sepo.forward.lm_head import CPU_LIMITS, GPU_LIMITS
from sepo.models.config import Shape
from sepo.recipe.settings import LoraSettings, TrainingSettings

PARTS = ("weights", "gradients", "AdamW", "activations", "LM head", "cache", "other")
# NF4 with double quantization: half a byte a weight, and 8 bits of scale for 64 of them (and 32 for 256 of those).
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# Libraries and data of a process on a CPU; context, kernels and workspaces of a GPU.
_OTHER = {"cpu": 0.6e9, "cuda": 1.2e9}


@dataclass(frozen=True)
class Training:
    """One training on one of several devices.

    Attributes:
        device: "cuda", "cpu" or "mps".
        tokens, targets: of the longest row.
        longest: tokens of the longest pair, which no budget of a row can go below.
        processes: devices that share an update.
        sharded: FSDP cuts up weights, gradients and moments (full shard), instead of whole ones on each device (DDP).
        beside: a frozen copy of the model stands beside it (the KL of tdpo and tis_dpo).
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
    beside: bool = False

    @property
    def half(self) -> bool:
        """Are matmuls computed in bfloat16?"""
        return self.device == "cuda" if self.settings.bf16 is None else self.settings.bf16

    @property
    def trainable(self) -> int:
        """Weights that are trained."""
        if self.lora is None:
            return self.shape.parameters
        return self.lora.r * sum(i + o for _, i, o in self.shape.adapted_by(self.lora))

    def parts(self) -> dict[str, float]:
        """Bytes by part (`PARTS`)."""
        shape, devices = self.shape, self.processes if self.sharded else 1
        compute = 2 if self.half else 4
        weights = self._weights() / devices
        gradients = 4.0 * self.trainable / devices
        head = head_bytes(shape, self.targets, self.device, compute, trained=True)
        if self.sharded:
            # The block at hand and the next one are whole, and so are embedding and LM head all the time.
            weights += float((2 * shape.block + shape.embedding) * compute)
            gradients += (shape.block + shape.embedding) * compute if self.lora is None else 0
        elif self.processes > 1:
            gradients *= 2  # DDP's buckets
        if self.processes > 1 and self.lora is None:
            head += 4.0 * (shape.head + shape.embedding)  # gradients of LM head and embedding before they are added up
        return {
            "weights": weights + (self._weights() if self.beside else 0),
            "gradients": gradients,
            "AdamW": 8.0 * self.trainable / devices,
            # On the way back a block forms gradients of its wide tensors and of the residual stream.
            "activations": self.kept() + self.tokens * (3 * compute * shape.intermediate + 16 * shape.hidden),
            "LM head": head,
            "cache": 0.0,
            "other": _OTHER.get(self.device, 0.6e9),
        }

    def _weights(self) -> float:
        """Bytes of whole weights, in the types that they are kept in."""
        shape = self.shape
        if self.lora is None:
            # In one process the copies in bfloat16 that matmuls read are kept through a step.
            copies = 2.0 * (shape.linear + shape.head) if self.half and not self.sharded else 0.0
            return 4.0 * shape.parameters + copies
        frozen = 2 if self.device == "cuda" else 4
        if self.quantization == "4bit":
            return _NF4 * shape.linear + frozen * (shape.parameters - shape.linear) + 4.0 * self.trainable
        return frozen * float(shape.parameters) + 4.0 * self.trainable

    def kept(self) -> float:
        """Bytes that the forward pass of the longest row keeps for the backward pass, those of the LM head apart."""
        shape, compute = self.shape, 2 if self.half else 4
        residual = 2 if self.lora is not None and self.device == "cuda" else 4
        norms = 2 * residual * shape.hidden
        if self.device != "cpu":
            norms += 2 * compute * shape.hidden  # on a CPU a norm's output is formed anew
        attention = compute * (2 * shape.queries + 2 * shape.keys)
        if self.device == "cpu":
            attention += compute * shape.queries  # the output in the order that the next layer reads
        mlp = 2 * compute * shape.intermediate
        plain = self.processes > 1 and self.device != "cpu"
        if plain or self.lora is not None:
            mlp += compute * shape.intermediate  # the product of gate and up
        if self.lora is not None:
            inputs = sum(inputs for _, inputs, _ in shape.adapted_by(self.lora)) / shape.layers
            mlp += math.ceil(compute * inputs + 2 * compute * self.lora.r * len(shape.linears) / shape.layers)
        layer = self.tokens * (norms + attention + mlp)
        if self.settings.activation_checkpointing:  # the inputs of the blocks, and one block at a time
            return (shape.layers + 1) * self.tokens * shape.hidden * residual + layer
        return shape.layers * layer

    def changes(self) -> list[list[tuple[str, Training]]]:
        """Ways to need less: those that leave the result as it is, the mildest first, then those that do not."""
        fsdp = replace(self, sharded=True)
        same: list[tuple[str, Training]] = []
        ways = [("", self)]
        if self.processes > 1 and not self.sharded:
            ways.append((f"FSDP over {self.processes}", fsdp))
        for words, one in ways:
            light = one._with(activation_checkpointing=True)
            for more, changed in (
                ("", one),
                ("activation_checkpointing", light),
                *one._shorter(""),
                *light._shorter("activation_checkpointing"),
            ):
                same.append((", ".join(filter(None, (words, more))), changed))
        over = [2**n for n in range(1, 13) if 2**n > self.processes]
        for number in over:
            larger = replace(fsdp, processes=number)._with(activation_checkpointing=True)
            same.append((f"FSDP over {number}, activation_checkpointing", larger))
        if self.sharded:
            return [same[1:]]
        adapter = replace(self, lora=self.lora or LoraSettings())
        light = adapter._with(activation_checkpointing=True)
        small = replace(light, quantization="4bit")
        other = [
            ("lora", adapter), ("lora, activation_checkpointing", light),
            ("lora, quantization=4bit, activation_checkpointing", small),
            *small._shorter("lora, quantization=4bit, activation_checkpointing"),
        ]  # fmt: skip
        return [same[1:], other]

    def _with(self, **settings) -> Training:
        return replace(self, settings=self.settings.model_copy(update=settings))

    def _shorter(self, words: str) -> list[tuple[str, Training]]:
        """With smaller rows, down to the longest pair."""
        found, tokens = [], 2 ** (max(self.tokens - 1, 1).bit_length() - 1)
        while tokens >= max(self.longest, 256):
            one = replace(self, tokens=tokens, targets=max(1, self.targets * tokens // self.tokens))
            found.append((", ".join(filter(None, (words, f"tokens_per_row={tokens}"))), one))
            tokens //= 2
        return found


@dataclass(frozen=True)
class Reading:
    """A frozen model that reads rows, and one that writes: passes over the pairs, and evaluation.

    Attributes:
        processes: devices that read it.
        sharded: a launch with FSDP (or ZeRO-3) cuts up the weights, instead of a whole model on each device.
        width: bytes of a weight.
        tokens, targets: of the longest row that is read.
        responses: that are written side by side, each of at most `length` tokens with its prompt; 0 for none.
        prompt: tokens of the longest prompt.
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

    def parts(self) -> dict[str, float]:
        """Bytes by part (`PARTS`)."""
        shape = self.shape
        tokens = max(self.tokens, self.responses * self.prompt)
        # Residual stream and its norm, and either the three wide tensors of an MLP or queries to values, rotated.
        layer = 3 * shape.hidden + max(3 * shape.intermediate, 3 * shape.queries + 4 * shape.keys)
        head = head_bytes(shape, self.targets, self.device, self.width, trained=False)
        weights = float(self.width * shape.parameters)
        if self.sharded:
            # The block at hand and the next one are whole, and so are embedding and LM head.
            weights = weights / self.processes + self.width * (2 * shape.block + shape.embedding)
        return {
            "weights": weights,
            "gradients": 0.0,
            "AdamW": 0.0,
            "activations": float(self.width * tokens * layer),
            # Scores of a step, their softmax, and what is left when a token is drawn.
            "LM head": max(head, 16.0 * self.responses * shape.vocab),
            "cache": 2.0 * self.width * shape.keys * shape.layers * self.responses * self.length,
            "other": _OTHER.get(self.device, 0.6e9),
        }

    def changes(self) -> list[list[tuple[str, Reading]]]:
        """As `Training.changes`."""
        same = self._smaller("")
        over = [2**n for n in range(1, 13) if 2**n > self.processes]
        for number in over if self.sharded or self.processes == 1 else [self.processes, *over]:
            words, one = f"FSDP over {number}", replace(self, processes=number, sharded=True)
            same += [(words, one), *one._smaller(f"{words}, ")]
        return [same, [("dtype=bfloat16", replace(self, width=2))] if self.width == 4 else []]

    def _smaller(self, words: str) -> list[tuple[str, Reading]]:
        """With shorter rows, then with fewer responses at once."""
        found: list[tuple[str, Reading]] = []
        tokens, responses = self.tokens, self.responses
        while tokens > 512:
            tokens //= 2
            one = replace(self, tokens=tokens, targets=max(1, self.targets * tokens // self.tokens))
            found.append((f"{words}tokens_per_row={tokens}", one))
        while responses > 1:
            responses //= 2
            found.append((f"{words}eval.batch_size={responses}", replace(self, responses=responses)))
        return found


def head_bytes(shape: Shape, targets: int, device: str, compute: int, trained: bool) -> float:
    """Bytes of the LM head's walk over the vocabulary for the targets of a row."""
    limits = CPU_LIMITS if device == "cpu" else GPU_LIMITS
    block = min(limits.block_bytes, 4 * targets * shape.vocab)
    if not trained:
        return float(block + targets * shape.hidden * compute)
    kept = min(limits.keep_bytes, targets * shape.vocab * compute)
    return float(2 * block + kept + targets * shape.hidden * (compute + 8))


def fine_tuning_parts(shape: Shape, settings: TrainingSettings, device: str, max_length: int, processes: int):
    """Bytes by part of supervised fine-tuning through TRL: full rows of up to 8, and every logit."""
    rows = next(size for size in (8, 4, 2, 1) if (settings.batch_size // processes or 1) % size == 0)
    tokens = rows * max_length
    plain = Training(shape, settings, device, tokens, 1, max_length, processes=processes)
    parts, compute = plain.parts(), 2 if plain.half else 4
    if not settings.activation_checkpointing:
        # Transformers' own layers keep a norm's steps and the MLP's product as well.
        parts["activations"] += tokens * shape.layers * (8 * shape.hidden + 2 * compute * shape.intermediate)
    parts["LM head"] = float(tokens * shape.vocab * (compute + 8))
    return parts


def smallest_change(need: Training | Reading, memory: float) -> str:
    """What makes it fit into `memory` bytes a device: the mildest change that leaves results alone, and another."""
    words = []
    for choices in need.changes():
        found = next((words for words, one in choices if sum(one.parts().values()) <= memory), None)
        if found is not None:
            words.append(found)
    return " or ".join(words) or "nothing: the whole weights must fit"
