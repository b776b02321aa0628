"""How many bytes of a device each kind of work needs, computed from a model's shape.

The formulas follow what the code keeps (`kernels/`: layers, attention, LM head), in the dtypes that it uses.
docs/how-to/does-it-fit.md compares each with a measurement. Figures are bytes of one device at the worst moment.
"""

from __future__ import annotations

import math
from dataclasses import replace

from sepo.kernels.lm_head import CPU_LIMITS, GPU_LIMITS
from sepo.planning.cost import FineTuningMemory, FrozenMemory, Memory, Shape, TrainingMemory
from sepo.recipe.settings import LoraSettings

PARTS = ("weights", "gradients", "AdamW", "activations", "LM head", "cache", "other")
# NF4 with double quantization: half a byte a weight, 8 bits of scale for 64 weights, 32 bits for 256 of those scales.
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# Libraries and data of a CPU process; context, kernels and workspaces of a GPU.
_OTHER = {"cpu": 0.6e9, "cuda": 1.2e9}


def trainable(need: TrainingMemory) -> int:
    """Number of weights that are trained."""
    if need.lora is None:
        return need.shape.parameters
    return need.lora.r * sum(i + o for _, i, o in need.shape.adapted_by(need.lora))


def parts_of(need: Memory) -> dict[str, float]:
    """Bytes of one device by part (`PARTS`)."""
    if isinstance(need, TrainingMemory):
        return _training_parts(need)
    return _frozen_parts(need) if isinstance(need, FrozenMemory) else _fine_tuning_parts(need)


def _half(need: TrainingMemory) -> bool:
    """Are matmuls computed in bfloat16?"""
    return need.device == "cuda" if need.settings.bf16 is None else need.settings.bf16


def _training_parts(need: TrainingMemory) -> dict[str, float]:
    shape, devices = need.shape, need.processes // need.replicas if need.sharded else 1
    compute = 2 if _half(need) else 4
    weights = _trained_weights(need) / devices
    gradients = 4.0 * trainable(need) / devices
    head = head_bytes(shape, need.targets, need.device, compute, trained=True)
    if need.sharded:
        # The current block, the next block, the embedding and the LM head are whole.
        weights += float((2 * shape.block + shape.embedding) * compute)
        gradients += (shape.block + shape.embedding) * compute if need.lora is None else 0
    elif need.processes > 1:
        gradients *= 2  # DDP's buckets
    if need.processes > 1 and need.lora is None:
        head += 4.0 * (shape.head + shape.embedding)  # gradients of LM head and embedding before they are summed
    return {
        "weights": weights + (_trained_weights(need) if need.frozen_copy else 0),
        "gradients": gradients,
        "AdamW": 8.0 * trainable(need) / devices,
        # The backward pass of a block makes gradients of its wide tensors and of the residual stream.
        "activations": kept_bytes(need) + need.tokens * (3 * compute * shape.intermediate + 16 * shape.hidden),
        "LM head": head,
        "cache": 0.0,
        "other": _OTHER.get(need.device, 0.6e9),
    }


def _trained_weights(need: TrainingMemory) -> float:
    """Bytes of whole weights, in the dtypes of the training."""
    shape = need.shape
    if need.lora is None:
        # A single process keeps bfloat16 copies for the matmuls through a step.
        copies = 2.0 * (shape.linear + shape.head) if _half(need) and not need.sharded else 0.0
        return 4.0 * shape.parameters + copies
    frozen = 2 if need.device == "cuda" else 4
    if need.quantization == "4bit":
        return _NF4 * shape.linear + frozen * (shape.parameters - shape.linear) + 4.0 * trainable(need)
    return frozen * float(shape.parameters) + 4.0 * trainable(need)


def kept_bytes(need: TrainingMemory) -> float:
    """Bytes that the forward pass of the longest row keeps for the backward pass, without the LM head's."""
    shape, compute = need.shape, 2 if _half(need) else 4
    residual = 2 if need.lora is not None and need.device == "cuda" else 4
    norms = 2 * residual * shape.hidden
    if need.device != "cpu":
        norms += 2 * compute * shape.hidden  # a CPU computes a norm's output again
    attention = compute * (2 * shape.queries + 2 * shape.keys)
    if need.device == "cpu":
        attention += compute * shape.queries  # the output in the order that the next layer reads
    mlp = 2 * compute * shape.intermediate
    plain = need.processes > 1 and need.device != "cpu"
    if plain or need.lora is not None:
        mlp += compute * shape.intermediate  # the product of gate and up
    if need.lora is not None:
        inputs = sum(inputs for _, inputs, _ in shape.adapted_by(need.lora)) / shape.layers
        mlp += math.ceil(compute * inputs + 2 * compute * need.lora.r * len(shape.linears) / shape.layers)
    layer = need.tokens * (norms + attention + mlp)
    if need.settings.activation_checkpointing:  # the inputs of the blocks, and one block at a time
        return (shape.layers + 1) * need.tokens * shape.hidden * residual + layer
    return shape.layers * layer


def _frozen_parts(need: FrozenMemory) -> dict[str, float]:
    shape = need.shape
    tokens = max(need.tokens, need.responses * need.prompt)
    # Residual stream and its norm, and the larger of an MLP's three wide tensors and rotated queries to values.
    layer = 3 * shape.hidden + max(3 * shape.intermediate, 3 * shape.queries + 4 * shape.keys)
    head = head_bytes(shape, need.targets, need.device, need.width, trained=False)
    weights = float(need.width * shape.parameters)
    if need.sharded:
        # The current block, the next block, the embedding and the LM head are whole.
        weights = weights / (need.processes // need.replicas) + need.width * (2 * shape.block + shape.embedding)
    return {
        "weights": weights,
        "gradients": 0.0,
        "AdamW": 0.0,
        "activations": float(need.width * tokens * layer),
        # Scores of a step, their softmax, and the copy that a token is drawn from.
        "LM head": max(head, 16.0 * need.responses * shape.vocab),
        "cache": 2.0 * need.width * shape.keys * shape.layers * need.responses * need.length,
        "other": _OTHER.get(need.device, 0.6e9),
    }


def _fine_tuning_parts(need: FineTuningMemory) -> dict[str, float]:
    """TRL trains on full rows, up to 8 at once, and keeps every logit."""
    shape, settings = need.shape, need.settings
    rows = next(size for size in (8, 4, 2, 1) if (settings.batch_size // need.processes or 1) % size == 0)
    tokens = rows * need.max_length
    plain = TrainingMemory(shape, settings, need.device, tokens, 1, need.max_length, processes=need.processes)
    parts, compute = _training_parts(plain), 2 if _half(plain) else 4
    if not settings.activation_checkpointing:
        # Transformers' own layers also keep a norm's steps and the MLP's product.
        parts["activations"] += tokens * shape.layers * (8 * shape.hidden + 2 * compute * shape.intermediate)
    parts["LM head"] = float(tokens * shape.vocab * (compute + 8))
    return parts


def head_bytes(shape: Shape, targets: int, device: str, compute: int, trained: bool) -> float:
    """Bytes of the LM head's walk over the vocabulary for the targets of a row."""
    limits = CPU_LIMITS if device == "cpu" else GPU_LIMITS
    block = min(limits.block_bytes, 4 * targets * shape.vocab)
    if not trained:
        return float(block + targets * shape.hidden * compute)
    kept = min(limits.keep_bytes, targets * shape.vocab * compute)
    return float(2 * block + kept + targets * shape.hidden * (compute + 8))


Option = tuple[str, Memory]


def options_to_fit(need: TrainingMemory | FrozenMemory) -> list[list[Option]]:
    """Settings that need less memory, mildest first: a list that keeps the result, then a list that changes it."""
    return _training_options(need) if isinstance(need, TrainingMemory) else _frozen_options(need)


def _training_options(need: TrainingMemory) -> list[list[Option]]:
    fsdp = replace(need, sharded=True, replicas=1)
    same: list[Option] = []
    ways = [("", need)]
    if need.processes > 1 and not need.sharded:
        ways.append((f"FSDP over {need.processes}", fsdp))
    for words, way in ways:
        light = _with(way, activation_checkpointing=True)
        for more, changed in (
            ("", way),
            ("activation_checkpointing", light),
            *_shorter_rows(way, ""),
            *_shorter_rows(light, "activation_checkpointing"),
        ):
            same.append((", ".join(filter(None, (words, more))), changed))
    for number in _more_devices(need):
        larger = _with(replace(fsdp, processes=number), activation_checkpointing=True)
        same.append((f"FSDP over {number}, activation_checkpointing", larger))
    if need.sharded:
        return [same[1:]]
    adapter = replace(need, lora=need.lora or LoraSettings())
    light = _with(adapter, activation_checkpointing=True)
    small = replace(light, quantization="4bit")
    other: list[Option] = [
        ("lora", adapter),
        ("lora, activation_checkpointing", light),
        ("lora, quantization=4bit, activation_checkpointing", small),
        *_shorter_rows(small, "lora, quantization=4bit, activation_checkpointing"),
    ]
    return [same[1:], other]


def _with(need: TrainingMemory, **settings) -> TrainingMemory:
    return replace(need, settings=need.settings.model_copy(update=settings))


def _more_devices(need: TrainingMemory | FrozenMemory) -> list[int]:
    return [2**n for n in range(1, 13) if 2**n > need.processes]


def _shorter_rows(need: TrainingMemory, words: str) -> list[tuple[str, TrainingMemory]]:
    """Shorter rows, down to the longest pair."""
    found, tokens = [], 2 ** (max(need.tokens - 1, 1).bit_length() - 1)
    while tokens >= max(need.longest, 256):
        shorter = replace(need, tokens=tokens, targets=max(1, need.targets * tokens // need.tokens))
        found.append((", ".join(filter(None, (words, f"tokens_per_row={tokens}"))), shorter))
        tokens //= 2
    return found


def _frozen_options(need: FrozenMemory) -> list[list[Option]]:
    same: list[Option] = list(_smaller_batches(need, ""))
    over = _more_devices(need)
    for number in over if need.sharded or need.processes == 1 else [need.processes, *over]:
        words, sharded = f"FSDP over {number}", replace(need, processes=number, sharded=True, replicas=1)
        same += [(words, sharded), *_smaller_batches(sharded, f"{words}, ")]
    return [same, [("dtype=bfloat16", replace(need, width=2))] if need.width == 4 else []]


def _smaller_batches(need: FrozenMemory, words: str) -> list[tuple[str, FrozenMemory]]:
    """Shorter rows, then fewer responses at once."""
    found: list[tuple[str, FrozenMemory]] = []
    tokens, responses = need.tokens, need.responses
    while tokens > 512:
        tokens //= 2
        shorter = replace(need, tokens=tokens, targets=max(1, need.targets * tokens // need.tokens))
        found.append((f"{words}tokens_per_row={tokens}", shorter))
    while responses > 1:
        responses //= 2
        found.append((f"{words}eval.batch_size={responses}", replace(need, responses=responses)))
    return found


def smallest_change(need: TrainingMemory | FrozenMemory, memory: float) -> str:
    """The mildest setting that fits into `memory` bytes a device and keeps the result, and one that changes it."""
    words = []
    for options in options_to_fit(need):
        found = next((words for words, option in options if sum(parts_of(option).values()) <= memory), None)
        if found is not None:
            words.append(found)
    return " or ".join(words) or "nothing: the whole weights must fit"
