"""Pick the layout in which a model reads batches, by trying each on a few short texts.

The texts go through the model's own forward, one at a time, and through each layout in turn:

    packed     rows of documents, see `packing.py`
    padded     batches of sequences of similar length
    unbatched  one sequence at a time, for models in which the longest text of a batch changes the others' results

The first layout that gives the same log-probabilities is taken. Some models change at a certain length (a window,
another set of rotary frequencies, a scale for late queries). Such lengths are in the config; where the data exceed one,
a text beyond it is tried as well.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sepo.errors import UserError, one_line
from sepo.forward.attention import ATTENTION
from sepo.forward.logps import LayoutTrials, read_logps
from sepo.forward.packing import CHOSEN, REJECTED, PackedBatch, Pair, pack, pad
from sepo.kernels.gradients import gradients_in_place, may_accumulate_in_place
from sepo.kernels.layers import use_fast_layers
from sepo.models.adapters import causal_lm
from sepo.models.sharding import is_sharded, own_part
from sepo.processes import log_once

_ORDER = ("packed", "padded", "unbatched")
_DEFAULT_LENGTH = 2048


def prepare_model(
    model: nn.Module,
    layout: str = "auto",
    *,
    longest: int | None = None,
    tokens_per_row: int = _DEFAULT_LENGTH,
    device: torch.device | str | None = None,
) -> str:
    """Set a model up for packed rows if it takes them. Returns its layout: "packed", "padded" or "unbatched".

    Packed rows require that the model passes keyword arguments on to Transformers' attention interface and transforms
    its logits in a way that `LogitTransform` supports. A trial checks both (see the module's text). If the model does
    not take packed rows, one line on standard error gives the reason.

    Args:
        layout: "auto", or "packed" / "padded" to insist on one.
        longest: tokens of the longest prompt with its response in the data; None for 2,048, or the model's number of
            positions if that is smaller. Longer batches are refused where the model may treat them differently.
        tokens_per_row: length of the packed rows; longer rows are refused likewise.
        device: where FSDP or DeepSpeed will move the model later. The trial runs there; then the model moves back.

    Raises:
        UserError: no layout gives the model's own log-probabilities; or the caller insists on packed rows and they do
            not work; or weights are not finite, or not in this process.
    """
    if layout not in ("auto", "packed", "padded"):
        raise UserError(f"layout is '{layout}': expected auto, packed or padded")
    lm = causal_lm(model)
    trials: LayoutTrials | None = getattr(lm, "sepo_trials", None)
    if trials is None:
        _require_weights(lm)
        trials = LayoutTrials(original_attention=lm.config._attn_implementation)
    required = trials.required if layout == "auto" else layout
    documents, rows = _lengths(lm)
    if longest is None:
        positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
        longest = min(_DEFAULT_LENGTH, positions or _DEFAULT_LENGTH)
    # A pair longer than a row gets its own row.
    for text, in_row in ((0, 0), (longest, max(tokens_per_row, 2 * longest))):
        (document, document_limit), (row, row_limit) = _reach(documents, text), _reach(rows, in_row)
        key = (required, document, row)
        held = (k for k in trials.layouts if k[0] == required and _holds(documents, k[1], document))
        key = next((k for k in held if _holds(rows, k[2], row)), key)
        if key not in trials.layouts:
            with torch.no_grad(), _modes_kept(model), _moved(model, device), _unguarded(lm):
                model.eval()
                kind = next(model.parameters()).device.type
                with torch.autocast(kind, enabled=False):  # autocast's rounding would hide differences
                    trials.layouts[key] = _try_layouts(model, lm, trials, *key)
        chosen = trials.layouts[key]
        before = trials.limits.get(chosen, (0, 0))
        trials.limits[chosen] = (max(before[0], document_limit), max(before[1], row_limit))
    trials.required = required
    lm.sepo_trials = trials  # type: ignore[assignment]
    return chosen


@contextlib.contextmanager
def _unguarded(lm: PreTrainedModel) -> Iterator[None]:
    """Context without the check of batch lengths, since a trial reads longer batches than those before it."""
    trials = getattr(lm, "sepo_trials", None)
    lm.sepo_trials = None  # type: ignore[assignment]
    try:
        yield
    finally:
        lm.sepo_trials = trials  # type: ignore[assignment]


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Context that restores each module's train or eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# --- lengths at which a model may change ----------------------------------------------------------------------------

# Config keys: a window, a chunk of attention, the length up to which the pre-training's rotary frequencies apply.
_OF_DOCUMENTS = re.compile(r"window|chunk|local_att|floor_scale|original_max")
# Those that may refer to the place in a row, in a model that counts tokens instead of reading `position_ids`.
_OF_ROWS = re.compile(r"window|chunk|local_att|floor_scale")


def _lengths(lm: PreTrainedModel) -> tuple[list[int], list[int]]:
    """Lengths in a model's config beyond which documents, and rows, need a trial."""
    config = lm.config.get_text_config().to_dict()
    named = [(name, number) for name, number in _numbers(config) if number > 1]
    documents, rows = ({number for name, number in named if of.search(name)} for of in (_OF_DOCUMENTS, _OF_ROWS))
    if "dynamic" in str(config.get("rope_parameters")):  # frequencies change beyond the model's positions
        documents.add(config["max_position_embeddings"])
    return sorted(documents), sorted(rows)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """All integers of a config, with their keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, str(key) if isinstance(inner, int | list | tuple | dict) else name)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def _reach(lengths: list[int], longest: int) -> tuple[int, float]:
    """(length of the text to try for data up to `longest`, or 0 if short texts suffice; length up to which it holds).

    The text has twice the length that the data exceed, if the data are that long: a window that hides one token in
    thousands would hardly show.
    """
    below = max((length for length in lengths if length < longest), default=0)
    above = min((length for length in lengths if length >= longest), default=math.inf)
    if not below:
        return 0, above
    return (longest, longest) if longest < 2 * below else (2 * below, above)


def _holds(lengths: list[int], tried: int, text: int) -> bool:
    """Whether the trial of one text covers another: no longer, and beyond the same lengths of the config."""
    return text <= tried and not any(text <= length < tried for length in lengths)


# --- the trial ------------------------------------------------------------------------------------------------------

_SHORT = (
    Pair(0, (3, 5, 7), (11, 13, 5, 2), (17, 3)),
    Pair(1, (3, 5, 7), (17, 3), (4, 4, 6)),
    Pair(2, (8,), (9,), (10, 12, 6)),
)


# Largest difference of a token's log-probability between a layout and the model's own forward in float32, in nats.
_TOLERANCE = 2e-3


def _try_layouts(
    model: nn.Module, lm: PreTrainedModel, trials: LayoutTrials, required: str, document: int, row: int
) -> str:
    """Return the first layout that gives the model's own log-probabilities, and set the model up for it.

    Args:
        document: tokens of a long text to try beside the short ones, whose layout is known then; 0 for none.
        row: tokens of a packed row before the texts that are compared.
    """
    trial = _Trial(model, lm, trials, document, row)
    name = trial.name
    reasons: list[str] = []
    first = trials.layouts.get((required, 0, 0), "padded" if required == "padded" else "packed")
    for layout in _ORDER[_ORDER.index(first) :]:
        try:
            problem = trial.problem(layout)
        except Exception as error:  # any error of a model, a compiler or a kernel
            problem = one_line(error, 200)
        if problem is None:
            break
        reasons.append(problem)
        if layout == required == "packed":
            trial.set_attention("padded")
            raise UserError(f"model '{name}' does not take packed rows{_of(document)} ({problem}); use layout=padded")
    else:
        raise UserError(_refusal(lm, name, reasons[-1], document))

    if layout == "packed" and not trials.packs:
        trials.packs = True
        use_fast_layers(lm)
        lm.sepo_prunable = _prunable(model, lm, trial.probe, trial.expected, trial.tolerance)  # type: ignore[assignment]
    if layout == "unbatched" and document:
        _require_no_memory(lm, name, _vocabulary(lm), document, trial.tolerance)
    if reasons:
        how = "in padded batches" if layout == "padded" else "one text at a time"
        log_once(
            f"  model '{name}' does not take {first} rows{_of(document)} ({reasons[0]}): "
            f"it is read {how}, which is slower"
        )
    return layout


class _Trial:
    """Texts that a model reads in a layout, and their log-probabilities by its own forward."""

    def __init__(self, model: nn.Module, lm: PreTrainedModel, trials: LayoutTrials, document: int, row: int) -> None:
        self.model, self.lm, self.trials = model, lm, trials
        self.name = lm.config.name_or_path or type(lm).__name__
        vocabulary = _vocabulary(lm)
        self.probe = [_within(pair, vocabulary) for pair in (*_SHORT, *([_long_pair(document)] if document else []))]
        self.fillers = [_within(pair, vocabulary) for pair in _fillers(document, row)]
        # The model's own logits are rounded to its type; those of `token_logps` are not.
        self.tolerance = _TOLERANCE if lm.dtype in (torch.float32, torch.float64) else 0.25
        _set_attention(lm, trials.original_attention)
        self.expected = _expected_logps(lm, self.name, self.probe, document)

    def set_attention(self, layout: str) -> None:
        packs = layout == "packed" or self.trials.packs
        _set_attention(self.lm, ATTENTION if packs else self.trials.original_attention)

    def difference(self, layout: str, expected: Tensor) -> float:
        self.set_attention(layout)
        batches = _batches(layout, self.probe, self.fillers)
        got = torch.cat([_logps(self.model, batch) for batch in batches])[-len(expected) :]
        return float((got - expected).abs().max())

    def problem(self, layout: str) -> str | None:
        """How a layout's log-probabilities differ from the model's own; None: they do not."""
        nats = self.difference(layout, self.expected)
        if nats <= self.tolerance:
            return None
        problem = f"its log-probabilities differ by {nats:.3g} nats"
        if not _may_flip(self.lm):
            return problem
        with _in_float32(self.lm):
            _set_attention(self.lm, self.trials.original_attention)
            same = self.difference(layout, _own_logps(self.lm, self.probe)) <= _TOLERANCE
        self.set_attention(layout)
        if not same:
            return problem
        log_once(
            f"  model '{self.name}': rounding changes its choice of experts, and a token by {nats:.3g} nats; "
            f"{layout} rows give its own log-probabilities in float32"
        )
        return None


def _may_flip(lm: PreTrainedModel) -> bool:
    """Whether rounding may send a token to other experts, which changes its log-probability by any amount.

    Two layouts round differently, so such a mixture in half precision is compared again in float32.
    """
    experts = any("expert" in name and number > 1 for name, number in _numbers(lm.config.get_text_config().to_dict()))
    whole = not is_sharded(lm) and not getattr(lm, "is_quantized", False)
    return experts and whole and lm.dtype in (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def _in_float32(lm: PreTrainedModel) -> Iterator[None]:
    """Context in which half-precision weights are float32, to the same values."""
    tensors = [(tensor, tensor.dtype) for tensor in (*lm.parameters(), *lm.buffers())]
    halves = [(tensor, dtype) for tensor, dtype in tensors if dtype in (torch.bfloat16, torch.float16)]
    try:
        for tensor, _ in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)


def _expected_logps(lm: PreTrainedModel, name: str, probe: list[Pair], document: int) -> Tensor:
    """The probe's log-probabilities by the model's own forward; a UserError if it fails or they are not finite."""
    try:
        expected = _own_logps(lm, probe)
    except Exception as error:  # any error of a model
        raise UserError(f"model '{name}' cannot read texts{_of(document)} ({one_line(error, 200)})") from error
    if not torch.isfinite(expected).all():
        half = lm.dtype in (torch.float16, torch.bfloat16)
        dtype = f"use another dtype than {str(lm.dtype).removeprefix('torch.')} (bfloat16 or float32)"
        raise UserError(
            f"model '{name}' gives log-probabilities that are not finite, though its weights are: "
            f"{dtype if half else 'its training diverged (lower learning_rate)'}"
        )
    return expected


def _of(document: int) -> str:
    return f" of {document} tokens" if document else ""


def _batches(layout: str, probe: list[Pair], fillers: list[Pair]) -> list[PackedBatch]:
    if layout == "packed":
        return [pack([*fillers, *probe])]
    if layout == "padded":
        # Two batches: only the long pair is padded to the length of its text.
        return [pad(pairs) for pairs in (probe[: len(_SHORT)], probe[len(_SHORT) :]) if pairs]
    return [pad([pair], unbatched=True) for pair in probe]


def _within(pair: Pair, vocabulary: int) -> Pair:
    """The pair with its ids reduced to a vocabulary of this size."""
    prompt, chosen, rejected = (
        np.asarray(ids) % vocabulary for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    )
    return Pair(pair.pair_id, prompt, chosen, rejected, pair.chosen_positions)


def _text(length: int, seed: int) -> np.ndarray:
    """Ids in the range of the short texts': a model may treat other ids as images."""
    return np.random.default_rng(seed).integers(3, 18, length)


def _long_pair(length: int) -> Pair:
    """A pair with a text of `length` tokens, of which the last few are targets, and a short response."""
    size = length - 3
    return Pair(3, (3, 5, 7), _text(size, 0), (17, 3), tuple(range(max(0, size - 4), size)))


def _fillers(longest: int, row: int) -> list[Pair]:
    """Documents of at most `longest` tokens that together fill the first `row` tokens of a row."""
    size = longest or 64
    return [Pair(4 + i, _text(size, 1 + i), (9,), (10,)) for i in range(-(-row // size))]


def _vocabulary(lm: PreTrainedModel) -> int:
    """Number of ids that both the embedding and the LM head have."""
    ends = (getattr(lm.get_input_embeddings(), "num_embeddings", None), lm.config.get_text_config().vocab_size)
    return min(size for size in ends if size)


def _logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    return read_logps(model, batch.to(next(model.parameters()).device))


def _own_logps(lm: PreTrainedModel, pairs: Sequence[Pair]) -> Tensor:
    """Log-probabilities of the pairs' targets by the model's own forward, one sequence at a time."""
    return torch.cat([_own_sequence(lm, pair, side) for pair in pairs for side in (CHOSEN, REJECTED)])


def _own_sequence(lm: PreTrainedModel, pair: Pair, side: int) -> Tensor:
    ids, positions, _ = pair.side(side)
    first = 0 if positions is None else int(positions[0])
    tokens = torch.from_numpy(np.concatenate([pair.prompt_ids, ids]).astype(np.int64))[None]
    tokens = tokens.to(next(lm.parameters()).device)
    kept = len(ids) - first + 1
    # All logits of a long text would take gigabytes.
    few = {"logits_to_keep": kept} if "logits_to_keep" in signature(type(lm).forward).parameters else {}
    logits = lm(input_ids=tokens, use_cache=False, **few).logits[0, -kept:-1]
    logps = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    return logps.gather(1, tokens[0, 1 - kept :, None])[:, 0]


def _prunable(model: nn.Module, lm: PreTrainedModel, probe: list[Pair], expected: Tensor, tolerance: float) -> bool:
    """Whether the model gives the same results when the last block's MLP reads only the rows of targets."""
    lm.sepo_prunable = True  # type: ignore[assignment]
    try:
        return bool((_logps(model, pack(probe)) - expected).abs().max() <= tolerance)
    except Exception:  # an MLP with other inputs or outputs
        return False


def _require_no_memory(lm: PreTrainedModel, name: str, vocabulary: int, document: int, tolerance: float) -> None:
    """Raise a UserError if a long text's result depends on earlier texts (rotary frequencies of the longest so far)."""
    below = max(length for length in _lengths(lm)[0] if length < document)
    longer, shorter = (_within(_long_pair(length), vocabulary) for length in (document, (below + 1 + document) // 2))
    results = []
    for before in (_within(_SHORT[0], vocabulary), longer):
        _own_sequence(lm, before, CHOSEN)
        results.append(_own_sequence(lm, shorter, CHOSEN))
    if not (results[0] - results[1]).abs().max() <= tolerance:
        raise UserError(
            f"model '{name}': its results for texts of more than {below} tokens depend on what it read before "
            f"(rotary frequencies of the longest text so far): lower max_length to {below} or less"
        )


# Config keys whose names suggest a change of the logits, and those that `LogitTransform` or attention support.
_OF_LOGITS = re.compile(r"logit|soft_?cap|lm_head|output_mult")
_SUPPORTED = {
    *("logit_scale", "logits_scaling", "final_logit_softcapping", "logits_soft_cap"),
    *("attn_logit_softcapping", "output_router_logits"),
}


def _refusal(lm: PreTrainedModel, name: str, problem: str, document: int) -> str:
    """One line on why a model cannot be used: no layout gives the results of its own forward."""
    if document:
        below = max(length for length in _lengths(lm)[0] if length < document)
        return (
            f"model '{name}': no layout gives the results of its own forward for texts of more than {below} tokens "
            f"({problem}): lower max_length to {below} or less"
        )
    values = lm.config.get_text_config().to_dict().items()
    keys = [f"{key}={value}" for key, value in values if value and _OF_LOGITS.search(key) and key not in _SUPPORTED]
    hint = f", perhaps by {', '.join(keys)} of its config" if keys else ""
    return (
        f"model '{name}' changes its logits in a way this release does not reproduce{hint} ({problem}): "
        "it cannot be used"
    )


# --- weights --------------------------------------------------------------------------------------------------------


def _require_weights(lm: PreTrainedModel) -> None:
    """Raise a UserError if weights are not in this process or not finite, before they cause an unrelated error."""
    name = lm.config.name_or_path or type(lm).__name__
    head_bias = getattr(lm.get_output_embeddings(), "bias", None)  # may be -inf for tokens of probability 0
    for parameter_name, parameter in lm.named_parameters():
        if parameter.is_meta or not parameter.numel():
            raise UserError(
                f"model '{name}': its weights are not in this process ({parameter_name}), so no layout can be tried; "
                "load it whole, without offloading: a launch with FSDP or DeepSpeed's ZeRO-3 shards it afterwards"
            )
        values = own_part(parameter.detach())
        if parameter is head_bias:
            values = values.masked_fill(values.isneginf(), 0)
        # The sum reads the weights once without a copy; it is finite only if all of them are.
        if values.is_floating_point() and not torch.isfinite(values.sum(dtype=torch.float32)):
            raise UserError(
                f"model '{name}': its weights are not finite ({parameter_name}): download it again, or train it again"
            )


@contextlib.contextmanager
def _moved(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """Context in which a model on the CPU is on `device`, the GPU where it will run, if it fits."""
    here = next(model.parameters()).device
    if device is None or here.type != "cpu" or torch.device(device).type == "cpu":
        yield
        return
    stores: list[dict[str, Any]]
    stores = [store for module in model.modules() for store in (module._parameters, module._buffers)]
    places = [(store, name, tensor) for store in stores for name, tensor in store.items() if tensor is not None]
    moved: dict[int, Tensor] = {}  # by the original's id: a shared weight is moved once
    try:
        for _, _, tensor in places:
            if id(tensor) not in moved:
                there = tensor.detach().to(device)
                is_weight = isinstance(tensor, nn.Parameter)
                moved[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if is_weight else there
    except torch.OutOfMemoryError:
        moved.clear()
        log_once("  the whole model does not fit on one GPU: its layout is tried on the CPU")
    try:
        for store, name, tensor in places:
            store[name] = moved.get(id(tensor), tensor)
        yield
    finally:
        for store, name, tensor in places:
            store[name] = tensor
        moved.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# --- training -------------------------------------------------------------------------------------------------------


def training_noise(model: nn.Module, train: Callable[[], object] | None = None) -> float:
    """Largest difference of a token's log-probability between training and evaluation mode, in nats.

    It is 0, or rounding, for a model without dropout and the like, which preference training needs. It covers all that
    a model does in training only: dropout of any kind, router jitter, skipped layers. The dropout of LoRA adapters is
    excluded, because it is the user's setting. The global random state is restored.

    Args:
        model: as it will be trained; an unprepared one is prepared by `prepare_model`.
        train: puts the model into its training mode; `model.train` if None.

    Returns:
        The largest difference over a few tokens, and over repeated passes until it is clear; infinity if the model
        cannot run in training mode.
    """
    vocabulary = _vocabulary(causal_lm(model))
    layout = prepare_model(model, longest=0, tokens_per_row=0)
    batches = _batches(layout, [_within(pair, vocabulary) for pair in _SHORT], [])
    device = next(model.parameters()).device
    with torch.no_grad(), _modes_kept(model), _seeded(device), _unguarded(causal_lm(model)):
        model.eval()
        expected = torch.cat([_logps(model, batch) for batch in batches])
        (train or model.train)()
        for name, module in model.named_modules():
            if "lora_" in name:
                module.eval()
        worst = 0.0
        for _ in range(_PASSES):
            before = _random_states(device)
            try:
                with torch.enable_grad():  # as in training: some changes in place fail only with gradients
                    got = torch.cat([_logps(model, batch) for batch in batches])
            except Exception:  # attention dropout in packed rows, or any error of a model
                return math.inf
            difference = float((got.detach() - expected).abs().max())
            worst = max(worst, difference if difference == difference else math.inf)
            # Without random numbers every pass gives the same; with them an effect may be rare.
            if worst > _CLEAR or _random_states(device) == before:
                break
        return worst


def training_layout(model: nn.Module, layout: str, required: str, autocast: torch.autocast) -> str:
    """The layout in which a prepared model trains: short texts are read and differentiated as in the training.

    Half-precision kernels and backward passes run here for the first time; the trial of `prepare_model` has neither.

    Args:
        layout: the result of `prepare_model`.
        required: the layout that the user insists on, or "auto".

    Raises:
        UserError: no layout that is left can be trained under this autocast.
    """
    problem = _training_problem(model, layout, autocast)
    while problem is not None:
        name = causal_lm(model).config.name_or_path or type(causal_lm(model)).__name__
        if layout != "packed" or required == "packed":
            raise UserError(f"model '{name}' cannot be trained in {layout} rows here ({problem})")
        log_once(f"  model '{name}' cannot be trained in packed rows here ({problem}): it is read in padded batches")
        layout = prepare_model(model, "padded", longest=0, tokens_per_row=0)
        problem = _training_problem(model, layout, autocast)
    return layout


def _training_problem(model: nn.Module, layout: str, autocast: torch.autocast) -> str | None:
    """What is wrong with one forward and backward pass over short texts; None if nothing is."""
    lm = causal_lm(model)
    probe = [_within(pair, _vocabulary(lm)) for pair in _SHORT]
    try:
        with _modes_kept(model), _unguarded(lm), autocast, torch.enable_grad():
            model.eval()
            with torch.no_grad():
                expected = _own_logps(lm, probe)
            with gradients_in_place(may_accumulate_in_place(model)):
                got = torch.cat([_logps(model, batch) for batch in _batches(layout, probe, [])])
                if got.requires_grad:
                    got.sum().backward()
        finite = all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
        difference = float((got.detach() - expected).abs().mean())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any error of a model, a compiler or a kernel
        return one_line(error, 200)
    finally:
        model.zero_grad(set_to_none=True)
    if not finite:
        return "its gradients are not finite"
    # The mean: the model's own logits are rounded to half precision, up to 0.25 nats for large ones.
    return (
        None if difference <= 0.25 else f"its log-probabilities differ by {difference:.3g} nats from its own forward's"
    )


# With layers that are skipped in one pass of ten, all but two of 10,000 two-layer models show it.
_PASSES = 40
_CLEAR = 0.01  # nats


def _random_states(device: torch.device) -> tuple[object, ...]:
    of_device = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return torch.get_rng_state().numpy().tobytes(), of_device, random.getstate(), str(np.random.get_state())


@contextlib.contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Context with all global random states seeded; it restores them."""
    python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)


def _set_attention(lm: PreTrainedModel, name: str) -> None:
    if lm.config._attn_implementation != name:
        lm.set_attn_implementation(name)
