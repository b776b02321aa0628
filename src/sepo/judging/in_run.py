"""A judge in a run: the policy's answers to the held-out prompts against the base's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sepo.errors import UserError
from sepo.evaluate.statistics import mean_and_se, paired_difference
from sepo.files import digest, file_digest
from sepo.judging import judge as compare
from sepo.judging import oracle_judge as oracle
from sepo.judging import scorers as scores
from sepo.judging import server_judge as server
from sepo.judging.endpoint import Spent
from sepo.judging.server_judge import Contest, spent_text
from sepo.judging.winrate import FEW, judgement_of, length_controlled
from sepo.models.checkpoint import load_classifier
from sepo.models.fingerprint import model_fingerprint, usage_fingerprint
from sepo.models.folders import check_folder, is_adapter
from sepo.models.hub import hub_snapshot
from sepo.processes import log
from sepo.recipe.settings import JudgeSettings


def check_judge(settings: JudgeSettings) -> None:
    """Raise a UserError for a judge that cannot be had, before a model is trained for it; nobody is asked."""
    if settings.function is not None:
        scores.user_function(settings.function)
    elif settings.oracle is not None:
        oracle.find_oracle(settings)
    elif settings.server is not None:
        contest = Contest(("question",), ("one",), ("other",))
        server.pair_requests(settings, server.endpoint_of(settings), server.read_prompts(settings), [contest])
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
    """Digest of what verdicts depend on beside the settings: weights, the function's file, the prompt's file."""
    if settings.function is not None:
        source = scores.source_file(settings.function)
        return "" if source is None else file_digest(source)
    if settings.server is not None:
        return file_digest(Path(str(settings.prompt)))
    if settings.oracle is not None:
        found = oracle.find_oracle(settings)
        models = (found.folder, found.reference)
        return digest([found.beta, *map(model_fingerprint, models), usage_fingerprint(found.folder)])
    return model_fingerprint(str(settings.reward_model), revision=settings.revision)


def judge_in_words(settings: JudgeSettings) -> str:
    """What a judge is called, and for an oracle how well it judges, if that is known."""
    found = {} if settings.oracle is None else oracle.held_out_accuracy(Path(settings.oracle))
    if not found:
        return settings.name
    return f"{settings.name} (held-out accuracy {found['oracle_accuracy']:.2f} ± {found['oracle_accuracy_se']:.2f})"


def judge_responses(
    settings: JudgeSettings,
    questions: Sequence[str],
    base: Sequence[str],
    policy: Sequence[str],
    groups: Sequence[int],
    device: str = "auto",
    scorer: scores.Scorer | None = None,
) -> tuple[dict[str, float], dict[str, list[Any]], list[dict[str, Any]]]:
    """Compare responses to the same prompts.

    Args:
        questions, base, policy: texts of each prompt and sample.
        groups: the prompt of each, for the errors.
        scorer: of the judge, where it is in memory already (`compare.scorer_of`).

    Returns:
        metrics (`win_rate` of the policy in [0, 1], ties a half; with `_se`; `length_controlled`; `judged`, `failed`;
        of a server `unanswered`, calls without a reply; of another judge `score/base`, `score/policy`,
        `score/difference`; of an oracle that a run made its `oracle_accuracy` on held-out pairs, with `_se`), columns
        for the table of generations, and annotations that `sepo winrate` reads.
    """
    contests = [
        Contest((question,), (one,), (other,)) for question, one, other in zip(questions, base, policy, strict=True)
    ]
    prepared = compare.prepare(settings, contests)
    verdicts, extra, spent = compare.judge_pairs(prepared, contests, device, scorer)
    lacking = log_spent(prepared, spent)
    rows = [
        {
            "instruction": question,
            "output_1": one,
            "generator_1": "base",
            "output_2": other,
            "generator_2": "policy",
            "index": group,
            "annotator": settings.name,
            "preference": verdict.preference,
            "failure": verdict.failure,
            **columns,
        }
        for question, one, other, group, verdict, columns in zip(
            questions, base, policy, groups, verdicts, extra, strict=True
        )
    ]
    metrics = rate_of(rows, groups) | lacking
    if settings.oracle is not None:
        metrics |= oracle.held_out_accuracy(Path(settings.oracle))
    preferences = np.array([np.nan if one.preference is None else one.preference for one in verdicts], np.float64)
    table: dict[str, list[Any]] = {"preference": preferences.tolist()}
    if settings.server is None:
        numbers = {side: np.array([one[f"score_{i}"] for one in extra]) for i, side in ((1, "base"), (2, "policy"))}
        both = np.isfinite(numbers["base"]) & np.isfinite(numbers["policy"])
        kept = [group for group, good in zip(groups, both, strict=True) if good]
        for side, values in numbers.items():
            metrics[f"score/{side}"], metrics[f"score/{side}_se"] = mean_and_se(values[both], kept)
            table[f"{side}_score"] = values.tolist()
        metrics["score/difference"], metrics["score/difference_se"] = paired_difference(
            numbers["policy"][both], numbers["base"][both], kept
        )
    return {f"judge/{name}": value for name, value in metrics.items()}, table, rows


def log_spent(prepared: compare.Prepared, spent: Mapping[str, Any]) -> dict[str, float]:
    """Say what was asked of a server; returns how many calls it left `unanswered`, nothing for other judges."""
    if prepared.endpoint is None:
        return {}
    log(f"judge: {spent_text(Spent(**spent), None)}")
    return {"unanswered": float(spent["unanswered"])}


def rate_of(rows: Sequence[Mapping[str, Any]], groups: Sequence[int]) -> dict[str, float]:
    """The win rate of annotations, and how many there are; says what has no verdict.

    Args:
        rows: of annotations.json, with `preference` and `failure`.
        groups: the prompt of each, for the error.

    Returns:
        `win_rate` of the second answers in [0, 1] with its `_se`, `length_controlled` (with enough of them), `judged`,
        `failed`.
    """
    preferences = np.array([np.nan if row["preference"] is None else row["preference"] for row in rows], np.float64)
    judged = np.isfinite(preferences)
    kept = [group for group, good in zip(groups, judged, strict=True) if good]
    metrics: dict[str, float] = {}
    metrics["win_rate"], metrics["win_rate_se"] = mean_and_se(preferences[judged] - 1, kept)
    if judged.sum() >= FEW:  # of fewer the penalty draws it towards a half
        controlled = length_controlled([judgement_of(row, i) for i, row in enumerate(rows)])
        metrics["length_controlled"] = controlled["length_controlled_winrate"] / 100
    metrics |= {"judged": float(judged.sum()), "failed": float((~judged).sum())}
    if metrics["failed"]:
        reasons = Counter(row["failure"] for row in rows if row["failure"])
        log(f"judge: {int(metrics['failed'])} of {len(rows)} without a verdict: {json.dumps(dict(reasons))}")
    return metrics
