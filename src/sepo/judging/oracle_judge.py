"""An oracle as judge: DPO makes a language model a reward model (Rafailov et al. 2023, arXiv 2305.18290, eq. 5).

    r(x, y) = β · Σ_t (log π_oracle(y_t | x, y_<t) − log π_reference(y_t | x, y_<t)) + a term of the prompt alone
    P(A beats B) = σ(r(x, A) − r(x, B)), in which that term cancels

The sum is over the token rewards that `sepo score` stores, computed by the same pass in the same dtype (float32). The
oracle's reference and β define its reward. The training that made the oracle recorded both in its folder, and no other
values are accepted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peft import PeftModel
from torch import nn

from sepo.bars import progress_bar
from sepo.data.fingerprints import check_same_tokenizer
from sepo.data.rows import TEMPLATE_OPTIONS
from sepo.data.tables import PLAIN_TEXT
from sepo.errors import UserError
from sepo.forward.scoring import summed_logps
from sepo.judging.prompts import encode_answers
from sepo.judging.scorers import Judged, Scorer, as_messages
from sepo.models.adapters import causal_lm
from sepo.models.checkpoint import adapter_is_idle
from sepo.models.fingerprint import model_fingerprint
from sepo.models.folders import adapter_base, is_adapter
from sepo.models.limits import model_limits
from sepo.models.names import check_model, resolve_model
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.reading import read_settings
from sepo.recipe.settings import JudgeSettings
from sepo.training.checkpoints import STATE_FILE

# The dtype of token rewards. With fewer bits, a response's rounding error is as large as the effect of training.
_DTYPE = "float32"


class OracleJudge(NamedTuple):
    """A model trained with DPO, its reference (both local folders), and how its training wrote prompts.

    Attributes:
        options: keywords for the chat template.
        plain: prompts were texts that no chat template rendered.
    """

    folder: str
    reference: str
    beta: float
    options: Mapping[str, Any] = {}
    plain: bool = False

    @classmethod
    def of(cls, folder: str, reference: str, beta: float) -> OracleJudge:
        """The oracle in a folder, with what its training recorded of its prompts."""
        training = _training_record(Path(folder))
        return cls(folder, reference, beta, training.get(TEMPLATE_OPTIONS, {}), training.get(PLAIN_TEXT, False))


def find_oracle(settings: JudgeSettings) -> OracleJudge:
    """The oracle named in the settings, with its reference and β.

    A folder trained by this package records the fingerprint of its reference. The reference's folder is searched where
    the adapter or the run around the oracle names one. Settings must agree with the record.

    Raises:
        UserError: the folder holds no model, or one trained without DPO or on swapped pairs; its reference or β is
            unknown or contradicts the settings; oracle and reference have different tokenizers or equal weights.
    """
    name = str(settings.oracle)
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"no oracle at '{name}': expected the folder of a model that was trained with DPO")
    check_model(name)
    training = _training_record(folder)
    if training and training.get("objective") != "dpo":
        how = f"with the objective {training['objective']}" if "objective" in training else "without preferences"
        raise UserError(f"'{name}' is no oracle: it was trained {how}; expected a model that was trained with DPO")
    if _stages(folder).get(folder.name, {}).get("depends", {}).get("swapped"):
        raise UserError(f"'{name}' is the opposite of an oracle, trained on swapped pairs: name the oracle itself")
    beta = _beta(settings, training.get("beta"))
    reference = _reference(settings, folder, training.get("model"))
    tokenizers = load_tokenizer(name), load_tokenizer(reference)
    check_same_tokenizer(f"the oracle '{name}'", tokenizers[0], f"its reference '{reference}'", tokenizers[1])
    idle = is_adapter(folder) and adapter_is_idle(folder)
    if idle or model_fingerprint(folder) == model_fingerprint(reference):
        raise UserError(f"the oracle '{name}' computes the same as its reference: every reward would be 0")
    return OracleJudge.of(name, reference, beta)


def _training_record(folder: Path) -> Mapping[str, Any]:
    """The record that a training of this package keeps in its folder; empty for other models."""
    try:
        record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["made_with"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return record if isinstance(record, dict) else {}


def _beta(settings: JudgeSettings, recorded: Any) -> float:
    given = settings.beta
    beta = given if recorded is None else float(recorded)
    if beta is None:
        raise UserError(
            f"'{settings.oracle}' has no record of the beta of its training: give it (--judge-beta, or eval.judge.beta)"
        )
    if given not in (None, beta):
        raise UserError(f"'{settings.oracle}' was trained with beta {beta:g}, not {given:g}: leave it out")
    return beta


def _reference(settings: JudgeSettings, folder: Path, recorded: str | None) -> str:
    """The folder of an oracle's reference; `recorded` is the reference's fingerprint."""
    if settings.reference is not None:
        check_model(settings.reference)
        given = resolve_model(settings.reference)
        if recorded not in (None, model_fingerprint(given)):
            raise UserError(
                f"the oracle '{folder}' was not trained from '{settings.reference}': name the model that it started "
                "from, or leave the reference out if its folder records it"
            )
        return given
    for name, revision in _places(folder) if recorded is not None else ():
        try:
            place = resolve_model(name, revision=revision)
            if model_fingerprint(place) == recorded:
                return place
        except UserError:
            continue  # the folder no longer exists
    raise UserError(
        f"the model that '{folder}' was trained from is unknown or has moved: name it (--judge-reference, or "
        "eval.judge.reference)"
    )


def _places(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Where an oracle's reference may be: an adapter's base, in the oracle's run, in the run's recipe."""
    if is_adapter(folder):
        yield adapter_base(folder)
    around = Path(folder.absolute()).parent
    for place in sorted(around.glob("reference*")):  # comparisons add a digest to the name
        if place.is_dir():
            yield str(place), None
    for recipe in (around / "recipe.yaml", around.parent / "recipe.yaml"):
        if recipe.is_file():
            reference = read_settings(recipe, "recipe").get("reference")
            if isinstance(reference, dict) and isinstance(reference.get("model"), str):
                yield reference["model"], reference.get("revision")


def _stages(folder: Path) -> Mapping[str, Any]:
    """The stage records of the run that contains an oracle; empty outside of a run."""
    try:
        stages = json.loads((Path(folder.absolute()).parent / "manifest.json").read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return stages if isinstance(stages, dict) else {}


def held_out_accuracy(folder: Path) -> dict[str, float]:
    """The share of its own run's held-out pairs that an oracle ranks right, if known.

    Returns:
        `oracle_accuracy` and `oracle_accuracy_se`; empty for an oracle outside of a run, and for one of several oracles
        whose mean was measured.
    """
    stages = _stages(folder)
    trained, read, scored = (stages.get(name, {}) for name in (folder.name, f"{folder.name}_logps", "score"))
    try:
        single = scored["depends"]["oracle"] == [read["content"]] and isinstance(scored["depends"]["reference"], str)
        if not single or read["depends"]["model"] != trained["content"]:
            return {}
        return {f"oracle_{name}": float(scored["results"][f"oracle/{name}"]) for name in ("accuracy", "accuracy_se")}
    except (KeyError, TypeError):
        return {}


def oracle_scorer(oracle: OracleJudge, *, device: str = "auto", progress: bool = True) -> Scorer:
    """A scorer that is an oracle: its DPO reward r(x, y), in nats times β, without the term of the prompt.

    Conversations are formatted like training pairs: by the chat template with the keywords of the training, including
    the end of turn. Without a template, or if the training read plain texts, the answer follows the prompt directly. An
    answer scores NaN if it exceeds the models' context or the template refuses it. An adapter whose base is the
    reference is loaded once.
    """
    model: Any = load_model(oracle.folder, device=device, dtype=_DTYPE)
    shared = is_adapter(Path(oracle.folder)) and _is_base(oracle)
    reference: Any = model if shared else load_model(oracle.reference, device=device, dtype=_DTYPE)
    tokenizer = load_tokenizer(oracle.folder)
    limits = [model_limits(causal_lm(loaded)) for loaded in (model, reference)]

    def fits(ids: list[int]) -> bool:
        return all(max(ids) < limit.vocabulary and len(ids) <= (limit.positions or len(ids)) for limit in limits)

    def score(conversations: Sequence[Judged]) -> np.ndarray:
        scores = np.full(len(conversations), np.nan)
        messages = as_messages(conversations)
        encoded = encode_answers(messages, tokenizer, oracle.options, plain=oracle.plain) if conversations else []
        readable = {i: row for i, row in enumerate(encoded) if not isinstance(row, str) and fits([*row[0], *row[1]])}
        if not readable:
            return scores
        prompts, answers = zip(*readable.values(), strict=True)
        with progress_bar(progress, total=2 * len(readable), desc="judge") as bar:
            after = summed_logps(model, prompts, answers, progress=bar.update)
            with reference_weights(model) if shared else nullcontext():
                before = summed_logps(reference, prompts, answers, progress=bar.update)
        scores[list(readable)] = oracle.beta * (after - before)
        return scores

    return score


def _is_base(oracle: OracleJudge) -> bool:
    """Is the base of an adapter the oracle's reference?"""
    base, revision = adapter_base(Path(oracle.folder))
    return model_fingerprint(resolve_model(base, revision=revision)) == model_fingerprint(oracle.reference)


@contextmanager
def reference_weights(model: nn.Module) -> Iterator[None]:
    """Disable the adapter of a model, so that the model computes the reference.

    Raises:
        TypeError: the model has no adapter, so it does not contain the reference. Using the trained model as reference
            would silently make every token reward zero.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"reference_weights needs a PeftModel, found {type(model).__name__}: load the reference separately"
        )
    with model.disable_adapter():
        yield
