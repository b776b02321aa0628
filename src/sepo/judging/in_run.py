"""A judge in a run compares the policy's answers to the held-out prompts with the base's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sepo.data.conversation import Conversation
from sepo.errors import UserError
from sepo.evaluate.statistics import mean_and_se, paired_difference
from sepo.files import digest, file_digest
from sepo.judging.classifier import load_classifier
from sepo.judging.judge import Prepared, judge_pairs, prepare_judge
from sepo.judging.oracle_judge import find_oracle, held_out_accuracy
from sepo.judging.replies import NO_END, Spent
from sepo.judging.scorers import Scorer, source_file, user_function
from sepo.judging.server_judge import Contest, ServerJudge, Verdict, contest_of
from sepo.judging.winrate import FEW, judgement_of, length_controlled
from sepo.models.fingerprint import model_fingerprint, usage_fingerprint
from sepo.models.folders import check_folder, is_adapter
from sepo.models.hub import hub_snapshot
from sepo.numbers import with_error
from sepo.processes import log
from sepo.recipe.settings import JudgeSettings


def check_judge(settings: JudgeSettings) -> None:
    """Raise a UserError for an unusable judge, before a model is trained. A server is not asked."""
    if settings.function is not None:
        user_function(settings.function)
    elif settings.oracle is not None:
        find_oracle(settings)
    elif settings.server is not None:
        judge = ServerJudge.of(settings)
        judge.pair_requests([Contest(("question",), ("one",), ("other",))])
        judge.endpoint.log_key()
    else:
        name = str(settings.reward_model)
        folder = Path(name)
        if not folder.is_dir():
            _, cached = hub_snapshot(name, settings.revision)
            if cached is None:
                return
            folder = Path(cached)
        check_folder(folder)
        if is_adapter(folder):
            raise UserError(f"the reward model '{name}' is an adapter: merge it into its base first")
        load_classifier(folder, name, device_map="meta")


def judge_content(settings: JudgeSettings) -> str:
    """Digest of the judge's weights, of its function's source file, or of its prompt file."""
    if settings.function is not None:
        source = source_file(settings.function)
        return "" if source is None else file_digest(source)
    if settings.server is not None:
        return file_digest(Path(str(settings.prompt)))
    if settings.oracle is not None:
        oracle = find_oracle(settings)
        models = (oracle.folder, oracle.reference)
        options = [*([oracle.options] if oracle.options else []), *(["plain"] if oracle.plain else [])]
        return digest([oracle.beta, *map(model_fingerprint, models), usage_fingerprint(oracle.folder), *options])
    return model_fingerprint(str(settings.reward_model), revision=settings.revision)


def judge_in_words(settings: JudgeSettings) -> str:
    """The judge's name, and an oracle's accuracy on held-out pairs if known."""
    known = {} if settings.oracle is None else held_out_accuracy(Path(settings.oracle))
    if not known:
        return settings.name
    accuracy = with_error(known["oracle_accuracy"], known["oracle_accuracy_se"], ".2f")
    return f"{settings.name} (held-out accuracy {accuracy})"


def judge_responses(
    settings: JudgeSettings,
    conversations: Sequence[Conversation],
    base: Sequence[str | None],
    policy: Sequence[str | None],
    groups: Sequence[int],
    device: str = "auto",
    scorer: Scorer | None = None,
) -> tuple[dict[str, float], dict[str, list[Any]], list[dict[str, Any]]]:
    """Compare responses to the same prompts.

    Args:
        conversations: of the prompts, one for each sample.
        base, policy: the texts of the samples; None where the thinking has no end, which has no verdict.
        groups: the prompt of each sample, for the errors.
        scorer: of this judge, if its models are in memory already (`scorer_of`).

    Returns:
        metrics, columns for the table of generations, and annotations that `sepo winrate` reads. The metrics are the
        policy's `win_rate` in [0, 1] with `_se` (a tie counts a half), `length_controlled`, `judged` and `failed`; for
        a server `unanswered`, the calls without a reply; for another judge `score/base`, `score/policy` and
        `score/difference`; for an oracle made by a run its `oracle_accuracy` on held-out pairs with `_se`.
    """
    samples = list(zip(conversations, base, policy, strict=True))
    contests = [contest_of(asked, first or "", second or "") for asked, first, second in samples]
    whole = [i for i, (_, *answers) in enumerate(samples) if None not in answers]
    prepared = prepare_judge(settings, [contests[i] for i in whole])
    judged, judged_columns, spent = judge_pairs(prepared, [contests[i] for i in whole], device, scorer)
    unanswered = log_spent(prepared, spent)
    verdicts = [Verdict(None, f"no answer: {NO_END}")] * len(samples)
    columns: list[dict[str, Any]] = [{} for _ in samples]
    for place, verdict, more in zip(whole, judged, judged_columns, strict=True):
        verdicts[place], columns[place] = verdict, more
    rows = [
        _annotation(contest, verdict, {"index": group, "annotator": settings.name}) | more
        for contest, group, verdict, more in zip(contests, groups, verdicts, columns, strict=True)
    ]
    metrics = rate_of(rows, groups) | unanswered
    if settings.oracle is not None:
        metrics |= held_out_accuracy(Path(settings.oracle))
    table: dict[str, list[Any]] = {"preference": _preferences(rows).tolist()}
    if settings.server is None:
        scores = {
            side: np.array([more.get(f"score_{i}", np.nan) for more in columns])
            for i, side in ((1, "base"), (2, "policy"))
        }
        metrics |= _score_metrics(scores, groups)
        table |= {f"{side}_score": values.tolist() for side, values in scores.items()}
    return {f"judge/{name}": value for name, value in metrics.items()}, table, rows


def _annotation(contest: Contest, verdict: Verdict, identity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "instruction": contest.questions[0],
        "output_1": contest.baseline[0],
        "generator_1": "base",
        "output_2": contest.model[0],
        "generator_2": "policy",
        **identity,
        "preference": verdict.preference,
        "failure": verdict.failure,
    }


def _score_metrics(scores: Mapping[str, np.ndarray], groups: Sequence[int]) -> dict[str, float]:
    """Mean scores of both models and of their difference, over the samples that have both, with standard errors."""
    both = np.isfinite(scores["base"]) & np.isfinite(scores["policy"])
    kept = [group for group, good in zip(groups, both, strict=True) if good]
    policy, base = scores["policy"][both], scores["base"][both]
    metrics: dict[str, float] = {}
    for side, values in scores.items():
        metrics[f"score/{side}"], metrics[f"score/{side}_se"] = mean_and_se(values[both], kept)
    metrics["score/difference"], metrics["score/difference_se"] = paired_difference(policy, base, kept)
    return metrics


def _preferences(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([np.nan if row["preference"] is None else row["preference"] for row in rows], np.float64)


def log_spent(prepared: Prepared, spent: Mapping[str, Any]) -> dict[str, float]:
    """Log the cost of a server; returns its number of `unanswered` calls, and nothing for other judges."""
    if prepared.endpoint is None:
        return {}
    log(f"judge: {Spent(**spent).in_words()}")
    return {"unanswered": float(spent["unanswered"])}


def rate_of(rows: Sequence[Mapping[str, Any]], groups: Sequence[int]) -> dict[str, float]:
    """The win rate and the numbers of annotations. Missing verdicts are logged with their reasons.

    Args:
        rows: of annotations.json, with `preference` and `failure`.
        groups: the prompt of each row, for the error.

    Returns:
        `win_rate` of the second answers in [0, 1] with its `_se`, `length_controlled` (with enough of them), `judged`,
        `failed`.
    """
    preferences = _preferences(rows)
    judged = np.isfinite(preferences)
    kept = [group for group, good in zip(groups, judged, strict=True) if good]
    metrics: dict[str, float] = {}
    metrics["win_rate"], metrics["win_rate_se"] = mean_and_se(preferences[judged] - 1, kept)
    if judged.sum() >= FEW:  # with fewer, the penalty draws it towards a half
        controlled = length_controlled([judgement_of(row, i) for i, row in enumerate(rows)])
        metrics["length_controlled"] = controlled["length_controlled_winrate"] / 100
    metrics |= {"judged": float(judged.sum()), "failed": float((~judged).sum())}
    if metrics["failed"]:
        reasons = Counter(row["failure"] for row in rows if row["failure"])
        log(f"judge: {int(metrics['failed'])} of {len(rows)} without a verdict: {json.dumps(dict(reasons))}")
    return metrics
