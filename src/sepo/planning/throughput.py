"""How many seconds compute takes on this device: measured on a piece of it, or estimated from its FLOPs.

A piece is one scored row of real pairs, one training row with an optimizer step, or a few decoding steps at the width
of the evaluation; the time of a stage is proportional. A model that is not on this machine, or too large to try in
seconds, is estimated: FLOPs over half of the matmul rate. That estimate can be off by a factor of two and more.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sepo import processes
from sepo.forward.packing import Pair, fill_rows, pack
from sepo.forward.scoring import dataset_logps, table_pairs
from sepo.kernels.gradients import matmul_nt
from sepo.models.adapters import causal_lm
from sepo.models.folders import is_outline
from sepo.models.hub import cached_snapshot
from sepo.models.names import gguf_path
from sepo.models.weights import load_model
from sepo.planning.cost import Estimate, ModelSize
from sepo.processes import log
from sepo.training.fit import training_arguments
from sepo.training.trainer import PreferenceConfig, PreferenceTrainer

# Share of the matmul rate that a whole stage reaches (docs/performance.md).
_SHARE = 0.5
# A decoding step reads all weights for a few tokens: it takes about this many times longer than its FLOPs.
_STEP = 3.0
# Tokens of a piece on a CPU, and the largest estimated seconds of one model's pieces.
_PIECE, _SECONDS = 640, 45.0
# Decoding steps of a piece.
_STEPS = 4


class Throughput(NamedTuple):
    """Seconds a FLOP, seconds a unit (load, update, decoding step), and whether both were measured."""

    flop: float
    each: float
    measured: bool

    def seconds(self, estimate: Estimate) -> float:
        """Seconds of one part of a stage, in one process."""
        number = {"load": 1.0, "train": estimate.updates, "generate": estimate.steps}.get(estimate.kind, 0.0)
        return estimate.flops * self.flop + number * self.each


def estimated(estimate: Estimate, rate: float) -> Throughput:
    """Throughput by FLOPs alone; `rate` is the FLOP/s of a whole stage (`stage_rate`)."""
    if estimate.kind == "load":
        return Throughput(0.0, 4e-9 * estimate.model.shape.parameters, False)
    return Throughput(1 / rate * (_STEP if estimate.kind == "generate" else 1), 0.0, False)


def matmul_rate(device: torch.device, seconds: float = 0.3) -> float:
    """Measure a device's matmul FLOP/s in its training type, by its fastest library; estimates of time use it."""
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


@cache
def stage_rate(kind: str) -> float:
    """FLOP/s of a whole stage on a kind of device, from a timed matmul."""
    return _SHARE * matmul_rate(torch.device(kind))


@dataclass
class Throughputs:
    """Throughputs of a plan's models, each measured at its first use.

    Attributes:
        device: as in a recipe.
        pairs: real pairs to score and train on.
        prompts: real prompts to answer.
        measure: False: estimate everything.
        others: throughputs of models with another tokenizer, by name.
    """

    device: str
    kind: str
    pairs: pa.Table
    prompts: Sequence[Sequence[int]]
    tokenizer: PreTrainedTokenizerBase
    measure: bool = True
    others: dict[str, Throughputs] = field(default_factory=dict)
    _known: dict[str, Throughput] = field(default_factory=dict)
    _loaded: tuple[str, nn.Module] | None = None
    _rate: float | None = None

    @property
    def rate(self) -> float:
        """FLOP/s of a whole stage, for estimates."""
        if self._rate is None:
            self._rate = stage_rate(self.kind)
        return self._rate

    def seconds(self, estimate: Estimate) -> float:
        """Seconds of one part of a stage here, in one process."""
        return self.of(estimate).seconds(estimate)

    def of(self, estimate: Estimate) -> Throughput:
        """Throughput of one kind of compute with one model."""
        if (own := self.others.get(estimate.model.name)) is not None:
            return own.of(estimate)
        if estimate.dtype == "auto" and self.kind != "cuda":
            estimate = replace(estimate, dtype="float32")  # one model for both
        key = _key(estimate)
        if key not in self._known:
            tried = self.measure and _is_here(estimate.model) and self._seconds_to_try(estimate.model) < _SECONDS
            self._known[key] = self._measured(estimate) if tried else estimated(estimate, self.rate)
        return self._known[key]

    def _seconds_to_try(self, model: ModelSize) -> float:
        weights = model.shape.linear + model.shape.head
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.kind == "cuda":
            memory = torch.cuda.mem_get_info()[1]
        if 20 * model.shape.parameters > memory:
            return float("inf")
        return _PIECE * (2 + 6 + 2) * weights / self.rate

    def _measured(self, estimate: Estimate) -> Throughput:
        log(f"  measuring {_WORDS[estimate.kind]} of {Path(estimate.model.name).name}")
        if estimate.kind == "train":
            self._loaded = None
            return self._training(estimate)
        model, seconds = self._model(estimate.model, estimate.dtype)
        if estimate.kind == "load":
            return Throughput(0.0, seconds, True)
        return self._scoring(estimate, model) if estimate.kind == "score" else self._generating(estimate, model)

    def _model(self, size: ModelSize, dtype: str) -> tuple[nn.Module, float]:
        """A model in memory, and the seconds of loading and preparing it now."""
        key = f"{size.name} {size.revision} {size.layers} {dtype}"
        started = time.perf_counter()
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            model = _load(size, device=self.device, dtype=dtype)
            dataset_logps(model, self.pairs.slice(0, 1))  # tries its layout, and warms up
            self._loaded = key, model
        return self._loaded[1], time.perf_counter() - started

    def _scoring(self, estimate: Estimate, model: nn.Module) -> Throughput:
        row = piece(table_pairs(self.pairs), _PIECE if self.kind == "cpu" else 16 * _PIECE)
        table = self.pairs.filter(pa.array(np.isin(self.pairs.column("pair_id").to_numpy(), [p.pair_id for p in row])))
        self._synchronise()
        started = time.perf_counter()
        dataset_logps(model, table)
        return Throughput((time.perf_counter() - started) / _flops(estimate, row), 0.0, True)

    def _training(self, estimate: Estimate) -> Throughput:
        """Two updates; the first, on the shortest pair, allocates the memory of the second."""
        assert estimate.training is not None
        pairs = table_pairs(self.pairs)
        with tempfile.TemporaryDirectory() as folder:
            settings = estimate.training.model_copy(update={"report_to": "none"})
            arguments = training_arguments(settings, Path(folder), seed=0, device=self.device)
            config = PreferenceConfig(**arguments, objective="simpo", tokens_per_row=settings.tokens_per_row)
            model = _load(
                estimate.model, device=self.device, train=True, lora=estimate.lora, quantization=estimate.quantization
            )
            trainer = PreferenceTrainer(model, config, self.pairs, processing_class=self.tokenizer)
            trainer.create_optimizer()
            wrapped, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
            row = piece(pairs, min(trainer.tokens_per_row, _PIECE) if self.kind == "cpu" else trainer.tokens_per_row)
            for some in ([min(pairs, key=_read)], row):
                items: list[Any] = [(pair, None) for pair in some]
                inputs: dict[str, Any] = trainer.data_collator(items)
                self._synchronise()
                began = time.perf_counter()
                trainer.training_step(wrapped, inputs)
                self._synchronise()
                trained = time.perf_counter()
                trainer.accelerator.clip_grad_norm_(wrapped.parameters(), settings.max_grad_norm or float("inf"))
                optimizer.step()
                self._synchronise()
                stepped = time.perf_counter()
                wrapped.zero_grad()
            trainer.accelerator.free_memory()
            del trainer, model, wrapped, optimizer
            gc.collect()
            if self.kind == "cuda":
                torch.cuda.empty_cache()
        return Throughput((trained - began) / _flops(estimate, row), stepped - trained, True)

    def _generating(self, estimate: Estimate, model: nn.Module) -> Throughput:
        """A few decoding steps after the ends of real prompts; reading the prompts is counted as scoring."""
        from sepo.evaluate.generate import generate_responses

        ends = [list(self.prompts[i % len(self.prompts)][-8:]) for i in range(estimate.width)]
        times = []
        for steps in (1, 1 + _STEPS):
            self._synchronise()
            started = time.perf_counter()
            generate_responses(
                model, self.tokenizer, ends, max_new_tokens=steps, batch_size=estimate.width, progress=False
            )
            times.append(time.perf_counter() - started)
        return Throughput(0.0, max(times[1] - times[0], 0.0) / _STEPS, True)

    def _synchronise(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()


_WORDS = {"load": "loading", "score": "a scored row", "train": "a training row", "generate": "decoding steps"}


def _key(estimate: Estimate) -> str:
    """Estimates with the same key have the same throughput."""
    how: Any = estimate.dtype
    if estimate.training is not None:
        own = ("bf16", "activation_checkpointing", "tokens_per_row", "arguments")
        lora = None if estimate.lora is None else estimate.lora.model_dump(mode="json")
        how = [estimate.training.model_dump(mode="json", include=set(own)), lora, estimate.quantization]
    return json.dumps(
        [estimate.kind, estimate.model.name, estimate.model.revision, estimate.model.layers, how, estimate.width],
        default=str,
    )


def _is_here(model: ModelSize) -> bool:
    """Can one process read the weights without a download?"""
    if processes.launched() > 1:
        return False
    if gguf_path(model.name) is not None:
        return True
    if os.path.isdir(model.name):
        return not is_outline(model.name)
    folder = cached_snapshot(model.name, model.revision)
    return folder is not None and not is_outline(folder)


def _load(size: ModelSize, **options: Any) -> nn.Module:
    model = load_model(size.name, revision=size.revision, **options)
    if size.layers is not None:
        from sepo.models.shrink import drop_layers

        drop_layers(causal_lm(model), size.layers)
    return model


def _read(pair: Pair) -> int:
    context = len(pair.chosen_context_ids) + len(pair.rejected_context_ids)
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) + context


def piece(pairs: Sequence[Pair], tokens: int) -> list[Pair]:
    """Pairs around the median length that fill a row of at most `tokens`; at least the shortest pair."""
    ordered = sorted(pairs, key=_read)
    middle = len(ordered) // 2
    near = sorted(range(len(ordered)), key=lambda index: abs(index - middle))
    chosen: list[Pair] = []
    left = tokens
    for index in near:
        if _read(ordered[index]) <= left:
            chosen.append(ordered[index])
            left -= _read(ordered[index])
        elif chosen:
            break
    return chosen or ordered[:1]


def _flops(estimate: Estimate, row: list[Pair]) -> float:
    """FLOPs of a piece, as `Estimate.flops` counts them."""
    batch = [pack(part) for part in fill_rows(row, 2**30)]
    tokens, targets = sum(b.num_tokens for b in batch), sum(len(b.target_ids) for b in batch)
    return Estimate(estimate.kind, estimate.model, tokens, targets, lora=estimate.lora).flops
