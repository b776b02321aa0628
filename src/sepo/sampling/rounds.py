"""Rounds: one run after the other, each on answers of the policy of the round before.

    runs/NAME/round-1/  round-2/  ...    ordinary run folders, each resumed like any other
    runs/NAME/start-2/  start-3/  ...    the policy of the round before as one model, where it was an adapter
    runs/NAME/last_samples/  ...         answers of the last policy, which show what the last oracle makes of them
    runs/NAME/rounds.md  rounds.json  rounds.html

Round r samples from the policy of round r - 1 (round 1: from the policy's start), scores and pairs the answers, trains
the oracle on them (or keeps the first), scores the tokens and trains the policy on from where it is. The evaluation
compares every policy with the first start, on the same held-out prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sepo.data.conversation import Conversation
from sepo.data.formats import read_rows
from sepo.errors import UserError
from sepo.evaluate.accuracy import preference_accuracy
from sepo.files import defined, digest, file_digest
from sepo.judging.oracle_judge import OracleJudge, oracle_scorer
from sepo.judging.scorers import Judged
from sepo.judging.server_judge import opening_of
from sepo.models.folders import is_adapter, read_json_object
from sepo.models.saving import save_model
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.processes import log
from sepo.recipe.objectives import OBJECTIVES
from sepo.recipe.settings import OnPolicySettings, Recipe, RoundsSettings
from sepo.runs.folder import open_run
from sepo.runs.pipeline import RunWalker
from sepo.sampling.folder import NoPairs
from sepo.sampling.rounds_report import held_out_score, write_rounds
from sepo.sampling.stages import PAIRS, pairs_stage, sample_stage, score_stage
from sepo.stages.stage import Stage, StageResult

_LAST_PROMPTS = 50  # prompts that the last policy answers

# Runs one recipe and returns its metrics: `sepo.api.run_recipe`.
RunOne = Callable[[Recipe], Mapping[str, Any]]


def check_rounds(recipe: Recipe) -> None:
    """Check what rounds need of a recipe. Raises UserError."""
    rounds, oracle = _settings(recipe)[0], recipe.oracle
    objective = OBJECTIVES[recipe.policy.objective]
    if rounds.oracle == "kept" and rounds.reference == "moving":
        raise UserError("rounds.oracle=kept needs rounds.reference=fixed: its token rewards compare with the reference")
    if rounds.oracle == "kept" and (oracle.count > 1 or oracle.contrastive):
        raise UserError("rounds.oracle=kept keeps one oracle: leave oracle.count and oracle.contrastive out")
    if rounds.reference == "fixed" and rounds.number > 1 and objective.kl_direction(recipe.policy.alpha):
        raise UserError(
            f"the objective {objective.name} reads all probabilities of the model that its training starts from: set "
            "rounds.reference=moving"
        )
    if recipe.policy.reference is not None or recipe.eval.base is not None:
        raise UserError("rounds set policy.reference and eval.base: leave them out")


def round_recipe(recipe: Recipe, number: int, start: str | None = None) -> Recipe:
    """The ordinary recipe of one round.

    Args:
        number: from 1.
        start: folder of the policy at hand; None in round 1.
    """
    rounds, _ = _settings(recipe)
    changes: dict[str, Any] = {
        "name": f"{recipe.name}-round-{number}",
        "output_dir": str(_folder(recipe, number)),
        "rounds": None,
        "data": recipe.data.model_copy(update={"on_policy": _on_policy(recipe, number, start)}),
    }
    if start is None:
        return recipe.model_copy(update=changes)
    first = _folder(recipe, 1)
    reference, policy = recipe.reference, recipe.policy
    if reference.sft is not None or reference.layers is not None:  # the first round made it
        reference = reference.model_copy(
            update={"model": str(first / "reference"), "revision": None, "sft": None, "layers": None}
        )
    origin = policy.model or reference.model
    policy = policy.model_copy(update={"model": start, "revision": None})
    if rounds.reference == "fixed" and OBJECTIVES[policy.objective].reads_reference:
        policy = policy.model_copy(update={"reference": origin})
    if rounds.reference == "moving" and recipe.policy.model is None:
        reference = reference.model_copy(update={"model": start, "revision": None})
        policy = policy.model_copy(update={"model": None})
    changes |= {
        "reference": reference,
        "policy": policy,
        "eval": recipe.eval.model_copy(update={"base": origin}),
    }
    if rounds.oracle == "kept" and recipe.reads_oracle and recipe.oracle.model is None:
        changes["oracle"] = recipe.oracle.model_copy(update={"model": str(first / "oracle")})
    return recipe.model_copy(update=changes)


def _settings(recipe: Recipe) -> tuple[RoundsSettings, OnPolicySettings]:
    rounds, on_policy = recipe.rounds, recipe.data.on_policy
    assert rounds is not None
    assert on_policy is not None
    return rounds, on_policy


def _folder(recipe: Recipe, number: int) -> Path:
    return recipe.run_folder / f"round-{number}"


def _on_policy(recipe: Recipe, number: int, start: str | None) -> OnPolicySettings:
    """The sampling of a round: the policy at hand, with numbers and (split) prompts of its own."""
    rounds, settings = _settings(recipe)
    seed = recipe.seed if settings.seed is None else settings.seed
    changes: dict[str, Any] = {"model": start or settings.model, "seed": (seed + number - 1) % 2**32}
    if rounds.prompts == "split":
        changes["part"] = (min(number, rounds.number), rounds.number)
    return settings.model_copy(update=changes)


def run_rounds(recipe: Recipe, run_one: RunOne) -> dict[str, Any]:
    """Run all rounds, reusing results that are up to date. A round of whose answers no pair can be made ends them.

    Returns:
        the metrics of each round, under `round-N/`.

    Raises:
        UserError: bad input.
    """
    check_rounds(recipe)
    rounds, _ = _settings(recipe)
    found: list[dict[str, Any]] = []
    with open_run(recipe) as outer:
        walker = RunWalker(outer)
        start, stopped, no_pairs = None, "", False
        for number in range(1, rounds.number + 1):
            log(f"--- round {number} of {rounds.number} ---")
            own = round_recipe(recipe, number, start)
            try:
                metrics = dict(run_one(own))
            except NoPairs as error:
                if not found:
                    raise
                stopped, no_pairs = f"stopped before round {number}: {error}", True
                break
            if found and found[-1].get("oracle/model"):
                found[-1] |= _accuracy(recipe, walker, number - 1, own.run_folder / "sampled_pairs" / PAIRS, found[-1])
            found.append(_facts(recipe, own, metrics))
            stopped = _stopped(rounds, found)
            if stopped or number == rounds.number:
                break
            start = _start(recipe, walker, number + 1)
        if found[-1].get("oracle/model") and not no_pairs:
            try:
                pairs = _last_pairs(recipe, walker, len(found) + 1)
                found[-1] |= _accuracy(recipe, walker, len(found), pairs.folder / PAIRS, found[-1])
            except NoPairs as error:
                log(f"  the oracle's accuracy on the last policy's answers is not known: {error}")
        outer.forget_others()
        write_rounds(recipe, found, stopped)
    return {f"round-{i}/{name}": value for i, row in enumerate(found, 1) for name, value in defined(row).items()}


def _facts(recipe: Recipe, own: Recipe, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the table of rounds needs of a round: its metrics, and the oracle with the reference of its rewards."""
    oracle = None
    if own.reads_oracle and own.oracle.count == 1 and not own.oracle.contrastive:
        made = own.run_folder / "reference"
        trained = own.reference.sft is not None or own.reference.layers is not None
        oracle = {
            "oracle/model": own.oracle.model or str(own.run_folder / "oracle"),
            "oracle/reference": str(made) if trained else own.reference.model,
        }
    return {**metrics, **(oracle or {})}


def _stopped(rounds: RoundsSettings, found: list[dict[str, Any]]) -> str:
    """Why the rounds stop before their number; empty if they go on."""
    if not rounds.stop or len(found) < 2:
        return ""
    before, after = (held_out_score(row) for row in found[-2:])
    if before is None or after is None or after >= before:
        return ""
    return (
        f"stopped after round {len(found)}: the held-out score fell from {before:.3f} to {after:.3f}; the policy of "
        f"round {len(found) - 1} is the better one"
    )


def _start(recipe: Recipe, walker: RunWalker, number: int) -> str:
    """The folder that round `number` starts from: the policy before, with its adapter merged if it is one."""
    policy = _folder(recipe, number - 1) / "policy"
    if not is_adapter(policy):
        return str(policy)
    before = walker.model(str(policy))

    def run(folder: Path) -> None:
        model = load_model(policy, device="cpu", dtype="float32")
        save_model(model, load_tokenizer(policy), folder, merge_adapter=True)

    stage = Stage("start", "the policy as one model", {"policy": before.inherited()}, (".",), run)
    return str(walker.do(stage, f"start-{number}").folder)


def _last_pairs(recipe: Recipe, walker: RunWalker, number: int) -> StageResult:
    """Pairs of the last policy's answers to some of the prompts, which nothing is trained on."""
    last = _folder(recipe, number - 1)
    own = round_recipe(recipe, number, str(last / "policy"))
    settings = _on_policy(recipe, number, str(last / "policy"))
    limit = min(settings.limit or _LAST_PROMPTS, _LAST_PROMPTS)
    settings = settings.model_copy(update={"limit": limit})
    own = own.model_copy(update={"data": own.data.model_copy(update={"on_policy": settings})})
    prompts = StageResult(last / "prompts", _content(last, "prompts"))
    model = walker.model(str(last / "policy"))
    samples = walker.do(sample_stage(own, settings, model, prompts), "last_samples")
    responses = walker.do(score_stage(own, settings, samples), "last_responses")
    return walker.do(pairs_stage(own, settings, responses, prompts), "last_pairs")


def _accuracy(
    recipe: Recipe, walker: RunWalker, number: int, pairs: Path, facts: Mapping[str, Any]
) -> dict[str, float]:
    """Share of the pairs of the *new* policy's answers that the round's oracle ranks right, with its error."""
    folder, reference = (str(facts[f"oracle/{name}"]) for name in ("model", "reference"))
    models = [walker.model(name) for name in (folder, reference)]

    def run(place: Path) -> dict[str, float]:
        rewards = OracleJudge.of(models[0].folder, models[1].folder, 1.0)
        return new_accuracy(rewards, pairs, recipe.device)

    depends = {"oracle": models[0].content, "reference": models[1].content, "pairs": file_digest(pairs)}
    return walker.do(Stage("accuracy", "on the new policy's answers", depends, (), run), f"accuracy-{number}").results


def _content(run: Path, stage: str) -> str:
    """The digest of what a stage of a finished run left."""
    return str(read_json_object(run / "manifest.json")["stages"][stage]["content"])


def new_accuracy(oracle: OracleJudge, pairs: Path, device: str = "auto") -> dict[str, float]:
    """The accuracy of an oracle on a file of sampled pairs.

    Returns:
        `oracle/new_accuracy` with its `_se`, clustered by prompt, and `oracle/new_pairs`.
    """
    rows = read_rows(pairs)
    sides = [[_judged(row["prompt"], row[side]) for row in rows] for side in ("chosen", "rejected")]
    scores = oracle_scorer(oracle, device=device)([*sides[0], *sides[1]])
    lengths = [[row[f"{side}_tokens"] for row in rows] for side in ("chosen", "rejected")]
    groups = [digest(row["prompt"]) for row in rows]
    known = preference_accuracy(scores[: len(rows)], scores[len(rows) :], *lengths, groups=groups)
    return {
        "oracle/new_accuracy": known["accuracy"],
        "oracle/new_accuracy_se": known["accuracy_se"],
        "oracle/new_pairs": known["pairs"],
    }


def _judged(prompt: Any, response: Any) -> Judged:
    """A conversation as judges read it."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    asked, opening = opening_of(Conversation(messages, []))
    return (asked,), response if isinstance(response, str) else response[-1]["content"], opening
