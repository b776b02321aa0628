"""An oracle as a judge: DPO makes a reward model of a language model (Rafailov et al. 2023, arXiv 2305.18290, eq. 5).

    r(x, y) = β · Σ_t (log π_oracle(y_t | x, y_<t) − log π_reference(y_t | x, y_<t)) + a term of the prompt alone
    P(A beats B) = σ(r(x, A) − r(x, B)), in which that term cancels

The sum is that of the token rewards which `sepo score` stores, read by the same pass in the same type (float32). What
an oracle was trained from, and with which β, is in the folder that its training wrote; both decide what its reward is,
so nothing else is ever put in their place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sepo.bars import progress_bar
from sepo.data.fingerprints import check_same_tokenizer
from sepo.data.prompts import encode_answers
from sepo.errors import UserError
from sepo.forward.scoring import summed_logps
from sepo.judging.scorers import Conversation, Scorer, as_messages
from sepo.models.adapters import causal_lm, reference_weights
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

# As token rewards are scored: in fewer bits the sum over a response is off by as much as a training moves it.
_DTYPE = "float32"


class OracleJudge(NamedTuple):
    """A model trained with DPO, the one that it was trained from (local folders), and the β of its training."""

    folder: str
    reference: str
    beta: float


def find_oracle(settings: JudgeSettings) -> OracleJudge:
    """The oracle that settings name, with its reference and β.

    A folder that this package trained says what it was trained from by the content of that model; its place is looked
    for where an adapter or the run around it names one. What is given must be what is recorded.

    Raises:
        UserError: the folder holds no model, or one that was not trained with DPO, or not on its labels; its reference
            or β is not known, or another one was given; the two have different tokenizers or equal weights.
    """
    name = str(settings.oracle)
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"no oracle at '{name}': expected the folder of a model that was trained with DPO")
    check_model(name)
    made = _made_with(folder)
    if made and made.get("objective") != "dpo":
        how = f"with the objective {made['objective']}" if "objective" in made else "without preferences"
        raise UserError(f"'{name}' is no oracle: it was trained {how}; expected a model that was trained with DPO")
    if _stages(folder).get(folder.name, {}).get("depends", {}).get("swapped"):
        raise UserError(f"'{name}' is the opposite of an oracle, trained on swapped pairs: name the oracle itself")
    beta = _beta(settings, made)
    reference = _reference(settings, folder, made.get("model"))
    oracle_tokenizer, its_tokenizer = load_tokenizer(name), load_tokenizer(reference)
    check_same_tokenizer(f"the oracle '{name}'", oracle_tokenizer, f"its reference '{reference}'", its_tokenizer)
    idle = is_adapter(folder) and adapter_is_idle(folder)
    if idle or model_fingerprint(folder) == model_fingerprint(reference):
        raise UserError(f"the oracle '{name}' computes what its reference does: every reward would be 0")
    return OracleJudge(name, reference, beta)


def _made_with(folder: Path) -> Mapping[str, Any]:
    """What a training of this package wrote down about itself; empty where another made the model."""
    try:
        made = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["made_with"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return made if isinstance(made, dict) else {}


def _beta(settings: JudgeSettings, made: Mapping[str, Any]) -> float:
    recorded, given = made.get("beta"), settings.beta
    beta = given if recorded is None else float(recorded)
    if beta is None:
        raise UserError(
            f"'{settings.oracle}' does not say with which beta it was trained: give beta (--judge-beta, or "
            "eval.judge.beta)"
        )
    if given not in (None, beta):
        raise UserError(f"'{settings.oracle}' was trained with beta {beta:g}, not {given:g}: leave it out")
    return beta


def _reference(settings: JudgeSettings, folder: Path, recorded: str | None) -> str:
    """The folder of the model that an oracle was trained from; `recorded` is that model's fingerprint."""
    if settings.reference is not None:
        check_model(settings.reference)
        given = resolve_model(settings.reference)
        if recorded not in (None, model_fingerprint(given)):
            raise UserError(
                f"the oracle '{folder}' was not trained from '{settings.reference}': expected the model that it "
                "started from, or none where its folder says it"
            )
        return given
    for name, revision in _places(folder) if recorded is not None else ():
        try:
            place = resolve_model(name, revision=revision)
            if model_fingerprint(place) == recorded:
                return place
        except UserError:
            continue  # a place that is gone
    raise UserError(
        f"the model that '{folder}' was trained from is not known, or not where it was: name it (--judge-reference, or "
        "eval.judge.reference)"
    )


def _places(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Where the model may lie that an oracle was trained from: an adapter's base; in its run; what its recipe names."""
    if is_adapter(folder):
        yield adapter_base(folder)
    around = Path(folder.absolute()).parent
    for place in sorted(around.glob("reference*")):  # a comparison's have digests in their names
        if place.is_dir():
            yield str(place), None
    for recipe in (around / "recipe.yaml", around.parent / "recipe.yaml"):
        if recipe.is_file():
            reference = read_settings(recipe, "recipe").get("reference")
            if isinstance(reference, dict) and isinstance(reference.get("model"), str):
                yield reference["model"], reference.get("revision")


def _stages(folder: Path) -> Mapping[str, Any]:
    """The records of the run that an oracle lies in; empty where it lies in none."""
    try:
        stages = json.loads((Path(folder.absolute()).parent / "manifest.json").read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return stages if isinstance(stages, dict) else {}


def held_out_accuracy(folder: Path) -> dict[str, float]:
    """How many of its own run's held-out pairs an oracle ranks right, where that is known.

    Returns:
        `oracle_accuracy` and `oracle_accuracy_se`; nothing for an oracle of no run, or one of several whose mean was
        measured.
    """
    stages = _stages(folder)
    trained, read, scored = (stages.get(name, {}) for name in (folder.name, f"{folder.name}_logps", "score"))
    try:
        alone = scored["depends"]["oracle"] == [read["content"]] and isinstance(scored["depends"]["reference"], str)
        if not alone or read["depends"]["model"] != trained["content"]:
            return {}
        found = scored["results"]
        return {f"oracle_{name}": float(found[f"oracle/{name}"]) for name in ("accuracy", "accuracy_se")}
    except (KeyError, TypeError):
        return {}


def oracle_scorer(oracle: OracleJudge, *, device: str = "auto", progress: bool = True) -> Scorer:
    """Scores by an oracle: its DPO reward r(x, y), in nats times β, without the term of the prompt.

    Conversations are written as training pairs are: by the chat template, the end of turn included; without a template
    prompt and answer stand one after another. An answer that is longer than the models read, or that the template does
    not write, has NaN. An adapter on its reference is in memory once.
    """
    model: Any = load_model(oracle.folder, device=device, dtype=_DTYPE)
    shared = is_adapter(Path(oracle.folder)) and _is_base(oracle)
    reference: Any = model if shared else load_model(oracle.reference, device=device, dtype=_DTYPE)
    tokenizer = load_tokenizer(oracle.folder)
    limits = [model_limits(causal_lm(one)) for one in (model, reference)]

    def fits(length: int, largest: int) -> bool:
        return all(largest < one.vocabulary and length <= (one.positions or length) for one in limits)

    def score(conversations: Sequence[Conversation]) -> np.ndarray:
        scores = np.full(len(conversations), np.nan)
        encoded = encode_answers(as_messages(conversations), tokenizer) if conversations else []
        readable = {
            i: one
            for i, one in enumerate(encoded)
            if not isinstance(one, str) and fits(len(one[0]) + len(one[1]), max(max(one[0]), max(one[1])))
        }
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
    """Is the reference of an adapter the very model that the adapter is put on?"""
    base, revision = adapter_base(Path(oracle.folder))
    return model_fingerprint(resolve_model(base, revision=revision)) == model_fingerprint(oracle.reference)
