"""Rank candidate selection rules on stored oracles, beside the rules of the package.

    python scripts/rank_rules.py --out DIR [--ensemble] RUN [RUN ...]

Each candidate transforms the stored rewards (v = s in chosen and -s in rejected responses) and keeps the 30 % highest
of each response, so that a difference to `top` comes from the transformed values alone. No candidate reads the gold
reward, which only judges (by the figures of `sepo analyse --rules`). The two that proved useful became
`select.skip_shared` and `select.label_log_odds`.

With --ensemble the runs are oracles of the same pairs, and candidates that join three oracles take part: each oracle
with the two that follow it. Writes ranking.md, ranking.json and ranking.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from sepo.analyse.analysis import check_same_pairs, rank_inputs
from sepo.analyse.measures import token_classes
from sepo.analyse.page import ranking_markdown, save_ranking_figure
from sepo.analyse.ranking import Rule, ScoredOracle, default_rules, rank_rules, rules_of
from sepo.credit.selection import select_key_tokens
from sepo.data.ragged import SIDES, SIGNED_SIDES, flat, ragged
from sepo.data.tables import make_table, provenance_of, read_table
from sepo.evaluate.gold import gold_reward
from sepo.files import write_json, write_text

Values = dict[str, np.ndarray]  # by side, flat `[tokens]`: how much a token speaks for its label
Candidate = Callable[[ScoredOracle], Values]
K = 0.3


def raw(oracle: ScoredOracle) -> Values:
    """v = s or -s, untransformed."""
    return {
        side: sign * flat(oracle.scores.column(f"{side}_rewards"))[0].astype(np.float64) for side, sign in SIGNED_SIDES
    }


def keep(values: Candidate, k: float = K, **settings) -> Rule:
    """A rule that keeps the share `k` of highest values in each response."""

    def rule(oracle: ScoredOracle) -> pa.Table:
        found = values(oracle)
        columns: dict[str, object] = {name: oracle.scores.column(name) for name in oracle.scores.column_names}
        for side, sign in SIGNED_SIDES:
            lengths = flat(oracle.scores.column(f"{side}_ids"))[1]
            columns[f"{side}_rewards"] = ragged((sign * found[side]).astype(np.float32), lengths)
        provenance = {key: value for key, value in provenance_of(oracle.scores).items() if key == "end_ids"}
        return select_key_tokens(make_table("scores", columns, provenance), k, k, **settings)

    return rule


def group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean of each value's group: `[tokens]`."""
    return (np.bincount(groups, values) / np.maximum(np.bincount(groups), 1))[groups]


# --- (a) pooled over the occurrences of a token -----------------------------------------------------------------------


def variances(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Variances within and between unequal groups, by moments (one-way random effects)."""
    counts = np.bincount(groups).astype(np.float64)
    means = np.bincount(groups, values) / counts
    number, tokens = len(counts), len(values)
    within = float(np.sum((values - means[groups]) ** 2)) / max(tokens - number, 1)
    between = float(np.sum(counts * (means - values.mean()) ** 2)) / max(number - 1, 1)
    size = (tokens - np.sum(counts**2) / tokens) / max(number - 1, 1)
    return within, max((between - within) / size, 0.0)


def shrunk_means(values: np.ndarray, ids: np.ndarray, leave_out: bool = False) -> np.ndarray:
    """mean + n t / (n t + w) (mean of the id - mean), with t, w the variances between and within ids, n the id's
    occurrences. `leave_out` leaves out the token's own occurrence.
    """
    groups = np.unique(ids, return_inverse=True)[1]
    within, between = variances(values, groups)
    number, total = np.bincount(groups)[groups] - float(leave_out), np.bincount(groups, values)[groups]
    total = total - values if leave_out else total
    worth = number * between / np.maximum(number * between + within, 1e-12)
    return values.mean() + worth * (total / np.maximum(number, 1) - values.mean())


def pooled(oracle: ScoredOracle, own: float = 0.0, leave_out: bool = False, base: Candidate = raw) -> Values:
    """own * v + (1 - own) * the shrunk mean of v over the token's id on its side: the id's value, with less noise."""
    values = base(oracle)
    return {
        side: own * v + (1 - own) * shrunk_means(v, flat(oracle.scores.column(f"{side}_ids"))[0], leave_out)
        for side, v in values.items()
    }


def pooled_over_sides(oracle: ScoredOracle, base: Candidate = raw) -> Values:
    """As `pooled`, over both sides together, each around its mean: a word is good or bad on either side."""
    values = base(oracle)
    centred_ = [sign * (values[side] - values[side].mean()) for side, sign in SIGNED_SIDES]
    ids = [flat(oracle.scores.column(f"{side}_ids"))[0] for side in SIDES]
    parts = np.split(shrunk_means(np.concatenate(centred_), np.concatenate(ids)), [len(ids[0])])
    return {side: sign * part for (side, sign), part in zip(SIGNED_SIDES, parts, strict=True)}


# --- (b) centred by position and class --------------------------------------------------------------------------------


def centred(oracle: ScoredOracle, position: bool = True, classes: bool = True, base: Candidate = raw) -> Values:
    """v minus its mean over the side's tokens of the same position (the tenth and later are one) and class."""
    made = {}
    for side, values in base(oracle).items():
        ids, lengths = flat(oracle.scores.column(f"{side}_ids"))
        within = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        cell = np.minimum(within, 9) * position
        if classes:
            cell = cell + 10 * token_classes(oracle.tokenizer, ids, within == 0)
        made[side] = values - group_means(values, cell)
    return made


# --- (f) controlled for surprisal -------------------------------------------------------------------------------------


def surprisal(oracle: ScoredOracle) -> Values:
    """-log pi_ref of each token."""
    assert oracle.reference_logps is not None
    return {side: -flat(oracle.reference_logps.column(f"{side}_logps"))[0].astype(np.float64) for side in SIDES}


def unsurprised(oracle: ScoredOracle, scaled: bool = False) -> Values:
    """v minus its mean over the side's tokens in the same tenth of surprisal; `scaled`: over their std."""
    made = {}
    hard = surprisal(oracle)
    for side, values in raw(oracle).items():
        tenths = np.searchsorted(np.quantile(hard[side], np.linspace(0, 1, 11)[1:-1]), hard[side])
        rest = values - group_means(values, tenths)
        made[side] = rest / np.sqrt(group_means(rest**2, tenths) + 1e-9) if scaled else rest
    return made


def probability_moved(oracle: ScoredOracle) -> Values:
    """± (pi_oracle - pi_ref): change of the probability itself."""
    hard, values = surprisal(oracle), raw(oracle)
    return {
        side: sign * np.exp(-hard[side]) * np.expm1(sign * values[side]) for side, sign in SIGNED_SIDES
    }  # fmt: skip


# --- (d) several oracles ----------------------------------------------------------------------------------------------


def of_several(others: dict[int, list[ScoredOracle]], join: Callable[[np.ndarray], np.ndarray]) -> Candidate:
    """Values of an oracle and its companions, joined: `join` maps `[oracles, tokens]` to `[tokens]`."""

    def values(oracle: ScoredOracle) -> Values:
        every = [raw(one) for one in others[id(oracle.scores)]]
        return {side: join(np.stack([one[side] for one in every])) for side in SIDES}

    return values


def certain(rows: np.ndarray) -> np.ndarray:
    """mean * max(0, 1 - var / mean^2), var the variance of the mean over oracles: James and Stein's positive part."""
    mean, variance = rows.mean(0), rows.var(0, ddof=1) / len(rows)
    return mean * np.maximum(0, 1 - variance / np.maximum(mean**2, 1e-12))


def moderated(rows: np.ndarray) -> np.ndarray:
    """mean / (sd + median sd): a moderated t."""
    deviation = rows.std(0, ddof=1)
    return rows.mean(0) / (deviation + np.median(deviation))


# ----------------------------------------------------------------------------------------------------------------------


def candidates() -> dict[str, Rule]:
    """Candidates that need only a score table, alone and combined with the two settings that proved useful."""
    return {
        "pooled": keep(pooled),
        "pooled, own left out": keep(partial(pooled, leave_out=True)),
        "pooled, half own": keep(partial(pooled, own=0.5, leave_out=True)),
        "pooled over sides": keep(pooled_over_sides),
        "pooled, skip shared": keep(pooled, skip_shared=True),
        "pooled, label log-odds": keep(pooled, label_log_odds=0.5),
        "pooled, label log-odds, skip shared": keep(pooled, label_log_odds=0.5, skip_shared=True),
        "centred": keep(centred),
        "centred by position": keep(partial(centred, classes=False)),
        "centred by class": keep(partial(centred, position=False)),
        "centred, pooled": keep(partial(pooled, base=centred)),
        "centred, skip shared": keep(centred, skip_shared=True),
    }


def soft_settings() -> dict[str, dict]:
    """Soft credit on all tokens, around the settings in docs/selection.md."""
    found = {}
    for label_log_odds in (0.25, 0.5, 0.75, 1.0):
        for temperature in (0.25, 0.5, 1.0):
            for skip in (False, True) if label_log_odds == 0.5 else (False,):
                found[f"soft {temperature:g}, label log-odds {label_log_odds:g}{', skip shared' if skip else ''}"] = {
                    "k_chosen": 1.0, "k_rejected": 1.0, "credit": "soft", "temperature": temperature, "clip_low": -3.0,
                    "clip_high": 3.0, "label_log_odds": label_log_odds, "skip_shared": skip,
                }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--ensemble", action="store_true", help="oracles scored the same pairs: join three of them too")
    arguments = parser.parse_args()
    found, gold = rank_inputs(arguments.runs)
    oracles = {}
    for (name, oracle), run in zip(found.items(), arguments.runs, strict=True):
        store = run / "logps" / "reference"
        oracles[name] = oracle._replace(reference_logps=read_table(store, "logps") if store.is_dir() else None)
    rules = {**rules_of({**default_rules(K), **soft_settings()}), **candidates()}
    if all(oracle.reference_logps is not None for oracle in oracles.values()):
        rules |= {
            "surprisal": keep(surprisal),
            "unsurprised": keep(unsurprised),
            "unsurprised, scaled": keep(partial(unsurprised, scaled=True)),
            "probability moved": keep(probability_moved),
        }
    if arguments.ensemble:
        every = list(oracles.values())
        for name, oracle in oracles.items():
            check_same_pairs(oracle.scores, every[0].scores, name)
        others = {id(one.scores): [*every, *every][at : at + 3] for at, one in enumerate(every)}
        joins = {"mean": lambda rows: rows.mean(0), "min": lambda rows: rows.min(0), "certain": certain, "t": moderated}
        rules |= {f"three oracles, {name}": keep(of_several(others, join)) for name, join in joins.items()}
    result = rank_rules(oracles, rules, gold_reward(gold).truth)
    write_json(arguments.out / "ranking.json", result, indent=1)
    write_text(arguments.out / "ranking.md", ranking_markdown(result))
    save_ranking_figure(result, arguments.out)
    print(ranking_markdown(result))


if __name__ == "__main__":
    main()
