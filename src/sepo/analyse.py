"""`sepo analyse`: what the token rewards of a score table look like, and how far they can be trusted.

From score tables alone: how few tokens carry the reward, where they stand, what kind they are, and what length does.
From several tables of the same pairs: whether oracles agree, and how much of the selection changes with the oracle's
data. Where word values are known (a gold reward with a lexicon): whether the rewards find the words that matter, beside
baselines that need no oracle. All are pure functions of flat rewards and lengths; nothing runs a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from transformers import PreTrainedTokenizerBase

from sepo.errors import UserError
from sepo.evaluate.accuracy import preference_accuracy
from sepo.evaluate.fidelity import auc, fidelity, word_valences
from sepo.evaluate.gold import gold_reward, lexicon_valence
from sepo.models import load_tokenizer
from sepo.recipe import load_recipe
from sepo.report.figures import make_figure, write_png
from sepo.report.summary import cumulative_share
from sepo.rewards import response_sums
from sepo.selection import SIDES, ends_response, select_key_tokens
from sepo.stages import check_table_tokenizer
from sepo.tables import flat, make_table, provenance_of, ragged, read_table, write_text

POSITION_BINS = 10
CLASSES = ("word", "continuation", "number", "punctuation", "space", "special")


@dataclass(frozen=True)
class Inputs:
    """What there is to analyse.

    Attributes:
        tables: score tables of the same pairs by name, the oracle that knows most last.
        tokenizer: of the tables' ids; None leaves out token classes and fidelity.
        reference_logps: kind "logps" of the pairs under the reference; None leaves out the surprisal baseline.
        gold: the gold reward whose word values are the truth; None leaves out fidelity.
    """

    tables: dict[str, pa.Table]
    tokenizer: PreTrainedTokenizerBase | None = None
    reference_logps: pa.Table | None = None
    gold: str | None = None


def run_inputs(
    run: Path | None,
    tables: Sequence[str] = (),
    *,
    tokenizer: str | None = None,
    reference_logps: str | None = None,
    gold: str | None = None,
) -> Inputs:
    """Read what `sepo analyse` was given: a run folder, score tables `[NAME=]DIR`, or both.

    Raises:
        UserError: a table is missing or not one of the same pairs, a name is used twice, or the tokenizer is another.
    """
    named: dict[str, Path] = {}
    for item in tables:
        name, equals, folder = item.partition("=")
        name, folder = (name, folder) if equals else (Path(item).name, item)
        if name in named:
            raise UserError(f"--table {item}: the name '{name}' is used twice; write NAME=DIR")
        named[name] = Path(folder)
    if run is not None:
        if not (run / "scores").is_dir():
            raise UserError(f"'{run}' holds no scores/: expected a run folder in which the score stage is done")
        recipe = load_recipe(run / "recipe.yaml")
        named.setdefault(run.name or "run", run / "scores")
        tokenizer = tokenizer or recipe.reference.model
        gold = gold or recipe.eval.gold
        store = run / "logps" / "reference"
        reference_logps = reference_logps or (str(store) if store.is_dir() else None)
    read = {name: read_table(path, "scores") for name, path in named.items()}
    first = next(iter(read.values()))
    for name, table in read.items():
        check_same_pairs(table, first, name)
    if gold is not None:
        gold_reward(gold)
        if tokenizer is None:
            raise UserError("--gold needs --tokenizer MODEL: the words of a response are read off its tokens")
    loaded = None
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        check_table_tokenizer(first, loaded, str(next(iter(named.values()))), tokenizer)
    logps = None if reference_logps is None else read_table(reference_logps, "logps")
    if logps is not None and logps.column("pair_id").to_pylist() != first.column("pair_id").to_pylist():
        raise UserError(f"'{reference_logps}' holds log-probabilities of other pairs than the score tables")
    return Inputs(read, loaded, logps, gold)


def check_same_pairs(table: pa.Table, other: pa.Table, name: str) -> None:
    """Raise a UserError unless both tables hold the same pairs in the same order."""
    if not len(table):
        raise UserError(f"score table '{name}' holds no pair: expected at least one row")
    for column in ("pair_id", "chosen_ids", "rejected_ids"):
        if table.column(column).combine_chunks() != other.column(column).combine_chunks():
            raise UserError(f"score table '{name}' is not one of the same pairs: score the same data with each oracle")


# --- the figures, one function each ---------------------------------------------------------------------------------


def concentration(scores: pa.Table, points: int = 101) -> dict[str, Any]:
    """How few tokens carry the reward: shares of it against shares of tokens, largest first, mean over responses.

    `magnitude` is the share of the sum of |s|; `mass` that of max(v, 0), the reward that speaks for the label (v = s
    in chosen, -s in rejected responses). `share_for_80` is the share of tokens that holds 80 % of it, both sides
    together; the paper reports 35 to 40 % for the reward difference.
    """
    shares = np.linspace(0, 1, points)
    result: dict[str, Any] = {"share": shares.tolist()}
    for kind in ("magnitude", "mass"):
        curves = {}
        for side, sign in SIDES:
            rewards, lengths = flat(scores.column(f"{side}_rewards"))
            values = np.abs(rewards) if kind == "magnitude" else np.maximum(sign * rewards, 0)
            curve = cumulative_share(values, lengths, shares)
            if curve is not None:
                curves[side] = curve
        both = np.mean(list(curves.values()), axis=0) if curves else None
        result[kind] = {
            **{side: curve.tolist() for side, curve in curves.items()},
            "share_for_80": None if both is None else float(np.interp(0.8, both, shares)),
        }
    return result


def by_position(scores: pa.Table, selection: pa.Table) -> dict[str, Any]:
    """Rewards and key tokens by tenth of the response: mean s and share of tokens that are key tokens, each side."""
    result = {}
    for side, _ in SIDES:
        rewards, lengths = flat(scores.column(f"{side}_rewards"))
        within = np.arange(len(rewards)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        bins = (within * POSITION_BINS) // np.maximum(np.repeat(lengths, lengths), 1)
        number = np.bincount(bins, minlength=POSITION_BINS)
        key = key_mask(selection, side, lengths)
        result[side] = {
            "tokens": number.tolist(),
            "mean": _ratio(np.bincount(bins, rewards.astype(np.float64), POSITION_BINS), number),
            "key_share": _ratio(np.bincount(bins, key.astype(np.float64), POSITION_BINS), number),
        }
    return result


def token_classes(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Class of each token, as an index into `CLASSES`: a word's first token, its continuation, number, and so on.

    Args:
        ids: `[tokens]`.
        first: `[tokens]` bool, the first token of a response: it starts a word though no space is before it.
    """
    unique, inverse = np.unique(ids, return_inverse=True)
    special = set(tokenizer.all_special_ids)
    starts_with_space = ("Ġ", "▁", " ", "Ċ")
    kinds = np.empty(len(unique), np.int64)
    for index, token in enumerate(unique.tolist()):
        raw = str(tokenizer.convert_ids_to_tokens(token))
        text = str(tokenizer.decode([token]))
        if token in special:
            kind = "special"
        elif not text.strip():
            kind = "space"
        elif any(character.isalpha() for character in text):
            kind = "word" if raw.startswith(starts_with_space) else "continuation"
        elif any(character.isdigit() for character in text):
            kind = "number"
        else:
            kind = "punctuation"
        kinds[index] = CLASSES.index(kind)
    classes = kinds[inverse]
    return np.where(first & (classes == CLASSES.index("continuation")), CLASSES.index("word"), classes)


def by_class(scores: pa.Table, selection: pa.Table, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """For each side and token class: share of all tokens, of key tokens and of the sum of |s|, and mean s."""
    result: dict[str, Any] = {}
    for side, _ in SIDES:
        ids, lengths = flat(scores.column(f"{side}_ids"))
        rewards, _ = flat(scores.column(f"{side}_rewards"))
        first = np.zeros(len(ids), bool)
        first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        classes = token_classes(tokenizer, ids, first)
        count = len(CLASSES)
        number = np.bincount(classes, minlength=count)
        key = np.bincount(classes, key_mask(selection, side, lengths).astype(np.float64), count)
        magnitude = np.bincount(classes, np.abs(rewards.astype(np.float64)), count)
        sums = np.bincount(classes, rewards.astype(np.float64), count)
        result[side] = {
            name: {
                "tokens": int(number[index]),
                "share": float(number[index] / max(len(ids), 1)),
                "key_share": float(key[index] / max(key.sum(), 1)),
                "magnitude_share": float(magnitude[index] / magnitude.sum()) if magnitude.sum() else None,
                "mean": float(sums[index] / number[index]) if number[index] else None,
            }
            for index, name in enumerate(CLASSES)
        }
    return result


def length_effects(scores: pa.Table) -> dict[str, Any]:
    """What length does to a response's summed and mean reward.

    For each of the two: preference accuracy (all pairs, and where the chosen response is not the longer one, where
    length cannot help), and rank correlation of reward and length over responses, each side. `length_baseline` is the
    accuracy of preferring the longer response.
    """
    lengths = {side: flat(scores.column(f"{side}_ids"))[1] for side, _ in SIDES}
    sums = dict(zip(("chosen", "rejected"), response_sums(scores, "rewards"), strict=True))
    prompts = [tuple(ids) for ids in scores.column("prompt_ids").to_pylist()]
    result: dict[str, Any] = {}
    for name in ("sum", "mean"):
        values = {side: sums[side] / (lengths[side] if name == "mean" else 1) for side, _ in SIDES}
        judged = preference_accuracy(*values.values(), *lengths.values(), groups=prompts)
        result[name] = {
            **{
                key: judged[key] for key in ("accuracy", "accuracy_se", "accuracy_not_longer", "accuracy_not_longer_se")
            },
            **{f"length_correlation_{side}": rank_correlation(values[side], lengths[side]) for side, _ in SIDES},
            "margin_length_correlation": rank_correlation(
                values["chosen"] - values["rejected"], lengths["chosen"] - lengths["rejected"]
            ),
        }
        result |= {"length_baseline": judged["length_baseline"], "pairs_not_longer": judged["pairs_not_longer"]}
    return result


def agreement(tables: Mapping[str, pa.Table], k: float) -> dict[str, Any]:
    """How far oracles of the same pairs agree, every pair of tables, and what each changes against the last.

    `correlation` is Pearson's over all tokens of a side, averaged over sides; `same_sign` the share of tokens with
    rewards of one sign; `overlap` the share of key tokens at rate k in common. `chance` is the overlap of two random
    selections. `changed` is 1 - overlap with the last table: the share of the selection that more oracle data would
    change.
    """
    names = list(tables)
    rewards = {name: [flat(tables[name].column(f"{side}_rewards"))[0] for side, _ in SIDES] for name in names}
    lengths = [flat(tables[names[0]].column(f"{side}_ids"))[1] for side, _ in SIDES]
    chosen = {name: select_key_tokens(tables[name], k, k) for name in names}
    masks = {
        name: [key_mask(chosen[name], side, lengths[index]) for index, (side, _) in enumerate(SIDES)] for name in names
    }
    last = masks[names[-1]]
    counts = [np.bincount(np.repeat(np.arange(len(n)), n), mask, len(n)) for n, mask in zip(lengths, last, strict=True)]
    expected = sum(float(np.sum(c**2 / np.maximum(n, 1))) for c, n in zip(counts, lengths, strict=True))
    total = sum(float(c.sum()) for c in counts)

    def compare(a: str, b: str) -> dict[str, float]:
        pairs = list(zip(rewards[a], rewards[b], strict=True))
        kept = list(zip(masks[a], masks[b], strict=True))
        return {
            "correlation": float(np.mean([correlation(x, y) for x, y in pairs])),
            "same_sign": float(np.mean(np.concatenate([np.sign(x) == np.sign(y) for x, y in pairs]))),
            "overlap": float(sum((x & y).sum() for x, y in kept) / sum(x.sum() for x, _ in kept)),
        }

    between = [{"a": a, "b": b, **compare(a, b)} for i, a in enumerate(names) for b in names[i + 1 :]]
    changed = {name: 1 - compare(name, names[-1])["overlap"] for name in names[:-1]}
    return {"between": between, "changed": changed, "chance": expected / total if total else None}


def truth(
    scores: Mapping[str, pa.Table], tokenizer: PreTrainedTokenizerBase, k: float, reference: pa.Table | None, seed: int
) -> dict[str, Any]:
    """Token rewards against the lexicon, word by word, beside baselines that need no oracle.

    Baselines put the same tokens first on both sides: `random`; `position`, early tokens; `surprisal`, tokens that the
    reference finds improbable.

    Returns:
        for each table and baseline: `auc`, `auc_se` (sign-aware, `evaluate.fidelity`), `auc_unsigned` (|s| of words
        that carry sentiment against other words), `correlation` and `rank_correlation` of s with the word's value over
        word tokens (mean of the sides), and of the key tokens at rate k `precision_chosen` (in positive words),
        `precision_rejected` (in negative words), with `lift_chosen` and `lift_rejected`, the ratio to all tokens.
    """
    first = next(iter(scores.values()))
    values = {
        side: np.concatenate([word_valences(tokenizer, ids) for ids in first.column(f"{side}_ids").to_pylist()])
        for side, _ in SIDES
    }
    candidates = {**scores, **baseline_tables(first, reference, seed)}
    result = {}
    for name, table in candidates.items():
        judged = fidelity(tokenizer, table, select_key_tokens(table, k, k), valence=lexicon_valence, seed=seed)
        found = {key: judged[key] for key in ("auc", "auc_se", "precision_chosen", "precision_rejected")}
        unsigned, weights, linear, ranked = [], [], [], []
        for side, _ in SIDES:
            rewards = flat(table.column(f"{side}_rewards"))[0].astype(np.float64)
            word = ~np.isnan(values[side])
            carries = word & (values[side] != 0)
            unsigned.append(auc(np.abs(rewards[carries]), np.abs(rewards[word & ~carries])))
            weights.append(carries.sum())
            linear.append(correlation(rewards[word], values[side][word]))
            ranked.append(rank_correlation(rewards[word], values[side][word]))
            base = judged[f"base_rate_{side}"]
            found[f"lift_{side}"] = judged[f"precision_{side}"] / base if base else float("nan")
        found["auc_unsigned"] = float(np.average(unsigned, weights=weights)) if sum(weights) else float("nan")
        found["correlation"], found["rank_correlation"] = float(np.mean(linear)), float(np.mean(ranked))
        result[name] = found
    return result


def baseline_tables(scores: pa.Table, reference_logps: pa.Table | None, seed: int) -> dict[str, pa.Table]:
    """Score tables of baselines that need no oracle: random, position and (with log-probabilities) surprisal."""
    rng = np.random.default_rng(seed)
    columns: dict[str, dict[str, object]] = {name: {} for name in ("random", "position", "surprisal")}
    for side, sign in SIDES:
        _, lengths = flat(scores.column(f"{side}_ids"))
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        order = {"random": rng.normal(size=len(within)), "position": -within.astype(np.float64)}
        if reference_logps is not None:
            order["surprisal"] = -flat(reference_logps.column(f"{side}_logps"))[0].astype(np.float64)
        for name, values in order.items():
            columns[name][f"{side}_rewards"] = ragged((sign * values).astype(np.float32), lengths)
    keys = {name: scores.column(name) for name in ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids")}
    provenance = {key: value for key, value in provenance_of(scores).items() if key not in ("format", "version")}
    return {name: make_table("scores", {**keys, **found}, provenance) for name, found in columns.items() if found}


def overview(scores: pa.Table) -> dict[str, Any]:
    """Counts, spread of the rewards (a start for the temperature of soft credit), and the share of rewarded ends."""
    ends = provenance_of(scores).get("end_ids", [])
    result: dict[str, Any] = {"pairs": len(scores)}
    for side, sign in SIDES:
        rewards, lengths = flat(scores.column(f"{side}_rewards"))
        ids, _ = flat(scores.column(f"{side}_ids"))
        mass = np.maximum(sign * rewards.astype(np.float64), 0)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        totals, squares = (np.bincount(rows, mass**power, len(lengths)) for power in (1, 2))
        effective = np.divide(totals**2, squares, out=np.ones(len(lengths)), where=squares > 0)
        ended = ends_response(ids, lengths, ends)
        result[side] = {
            "tokens": len(rewards),
            "mean_length": float(lengths.mean()),
            "mean": float(rewards.mean()),
            "sd": float(rewards.std()),
            "effective_share": float(np.mean(effective / np.maximum(lengths, 1))),
            "mean_end": float(rewards[ended].mean()) if ended.any() else None,
        }
    return result


# --- small statistics -----------------------------------------------------------------------------------------------


def key_mask(selection: pa.Table, side: str, lengths: np.ndarray) -> np.ndarray:
    """Mark the selected tokens of a side: `[tokens]` bool."""
    positions, counts = flat(selection.column(f"{side}_positions"))
    mask = np.zeros(int(lengths.sum()), bool)
    mask[np.repeat(np.cumsum(lengths) - lengths, counts) + positions] = True
    return mask


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation; NaN where one of the two does not vary."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation, ties at their mean rank.

    >>> round(rank_correlation(np.array([1.0, 2.0, 9.0]), np.array([0.0, 0.0, 5.0])), 4)
    0.866
    """
    return correlation(_ranks(np.asarray(a)), _ranks(np.asarray(b)))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def _ratio(sums: np.ndarray, number: np.ndarray) -> list[float | None]:
    return [float(total / count) if count else None for total, count in zip(sums, number, strict=True)]


# --- all of it ------------------------------------------------------------------------------------------------------


def analyse(inputs: Inputs, out: Path, *, k: float = 0.3, seed: int = 0) -> dict[str, Any]:
    """Compute everything the inputs allow, and write `analysis.json`, `analysis.md` and pictures into `out`.

    Single-table figures are those of the last table.

    Args:
        k: share of key tokens to look at, both sides.
        seed: of the random baseline and of bootstrap errors.

    Returns:
        what `analysis.json` holds.
    """
    name, scores = list(inputs.tables.items())[-1]
    selection = select_key_tokens(scores, k, k)
    result: dict[str, Any] = {
        "table": name,
        "k": k,
        "overview": overview(scores),
        "concentration": concentration(scores),
        "position": by_position(scores, selection),
        "length": length_effects(scores),
    }
    if inputs.tokenizer is not None:
        result["classes"] = by_class(scores, selection, inputs.tokenizer)
    if len(inputs.tables) > 1:
        result["agreement"] = agreement(inputs.tables, k)
    if inputs.gold is not None and inputs.tokenizer is not None:
        result["fidelity"] = truth(inputs.tables, inputs.tokenizer, k, inputs.reference_logps, seed)
    save_analysis_figures(result, out)
    write_text(out / "analysis.md", analysis_markdown(result))
    write_text(out / "analysis.json", json.dumps(_defined(result), indent=1) + "\n")
    return result


def _defined(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _defined(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_defined(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None or value != value else f"{value:{form}}"


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.1f} %"


def analysis_markdown(result: Mapping[str, Any]) -> str:
    """The analysis as a Markdown page; docs/compare.md says how to read it."""
    sides = ("chosen", "rejected")
    seen, few, length = result["overview"], result["concentration"], result["length"]
    lines = [f"# Token rewards of {result['table']}", ""]
    lines += _table(
        ("", *sides),
        [
            ("tokens", *(f"{seen[side]['tokens']:,}" for side in sides)),
            ("tokens a response", *(_number(seen[side]["mean_length"], ".1f") for side in sides)),
            ("mean reward s", *(_number(seen[side]["mean"], "+.4f") for side in sides)),
            ("standard deviation of s", *(_number(seen[side]["sd"], ".4f") for side in sides)),
            ("mean s of the end of a response", *(_number(seen[side]["mean_end"], "+.4f") for side in sides)),
            ("effective share of tokens", *(_percent(seen[side]["effective_share"]) for side in sides)),
        ],
    )
    lines += [f"{seen['pairs']:,} pairs.", "", "## How few tokens carry the reward", ""]
    lines += [
        f"80 % of Σ\\|s\\| lie in {_percent(few['magnitude']['share_for_80'])} of the tokens, 80 % of the reward that "
        f"speaks for the label in {_percent(few['mass']['share_for_80'])} (paper: 35–40 % for the reward difference).",
        "",
        "![](share.png)",
        "",
        "## Length",
        "",
    ]
    lines += _table(
        ("reward of a response", "accuracy", "chosen not longer", "rank correlation with length, chosen / rejected"),
        [
            (
                name,
                f"{_number(length[name]['accuracy'])} ± {_number(length[name]['accuracy_se'])}",
                f"{_number(length[name]['accuracy_not_longer'])} ± {_number(length[name]['accuracy_not_longer_se'])}",
                " / ".join(_number(length[name][f"length_correlation_{side}"], "+.2f") for side in sides),
            )
            for name in ("sum", "mean")
        ],
    )
    lines += [
        f"Preferring the longer response: {_number(length['length_baseline'])}; {length['pairs_not_longer']:,} pairs "
        "have a chosen response that is not the longer one.",
        "",
        "## Position",
        "",
        "![](position.png)",
        "",
    ]
    if "classes" in result:
        lines += ["## Token classes", ""]
        for side in sides:
            lines += _table(
                (side, "share of tokens", f"share of key tokens (k = {result['k']:g})", "share of Σ\\|s\\|", "mean s"),
                [
                    (
                        name,
                        _percent(row["share"]),
                        _percent(row["key_share"]),
                        _percent(row["magnitude_share"]),
                        _number(row["mean"], "+.4f"),
                    )
                    for name, row in result["classes"][side].items()
                    if row["tokens"]
                ],
            )
    if "agreement" in result:
        found = result["agreement"]
        lines += ["## Agreement between oracles", ""]
        lines += _table(
            ("oracles", "correlation of s", "same sign", f"key tokens in common (k = {result['k']:g})"),
            [
                (
                    f"{row['a']}, {row['b']}",
                    _number(row["correlation"]),
                    _percent(row["same_sign"]),
                    _percent(row["overlap"]),
                )
                for row in found["between"]
            ],
        )
        lines += [f"Two random selections have {_percent(found['chance'])} in common.", "", "![](agreement.png)", ""]
    if "fidelity" in result:
        lines += ["## Fidelity: do rewards find the words that carry the gold reward?", ""]
        lines += _table(
            (
                "reward",
                "AUC, sign-aware",
                "AUC of \\|s\\|",
                "correlation",
                "precision chosen (lift)",
                "rejected (lift)",
            ),
            [
                (
                    name,
                    f"{_number(row['auc'])} ± {_number(row['auc_se'])}",
                    _number(row["auc_unsigned"]),
                    _number(row["correlation"], "+.3f"),
                    *(
                        f"{_percent(row[f'precision_{side}'])} ({_number(row[f'lift_{side}'], '.2f')})"
                        for side in sides
                    ),
                )
                for name, row in result["fidelity"].items()
            ],
        )
        lines += ["![](fidelity.png)", ""]
    return "\n".join(lines)


_COLOURS = {"chosen": "#00756a", "rejected": "#96307a"}


def save_analysis_figures(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw share.png, position.png and, where they were computed, agreement.png and fidelity.png."""

    def share(axes: Axes) -> None:
        for kind, style in (("magnitude", "-"), ("mass", (0, (4, 2)))):
            for side in _COLOURS:
                if side in result["concentration"][kind]:
                    label = f"{side}, {'Σ|s|' if kind == 'magnitude' else 'for the label'}"
                    axes.plot(
                        result["concentration"]["share"],
                        result["concentration"][kind][side],
                        color=_COLOURS[side],
                        linestyle=style,
                        label=label,
                    )
        axes.axhline(0.8, color="#5f6168", linewidth=0.8, linestyle=":")
        axes.set(xlim=(0, 1), ylim=(0, 1))

    def position(axes: Axes) -> None:
        at = (np.arange(POSITION_BINS) + 0.5) / POSITION_BINS
        for side, colour in _COLOURS.items():
            means = [np.nan if value is None else value for value in result["position"][side]["mean"]]
            axes.plot(at, means, color=colour, marker="o", markersize=3, label=side)
        axes.axhline(0, color="#5f6168", linewidth=0.8)

    def changed(axes: Axes) -> None:
        found = result["agreement"]["changed"]
        axes.barh(range(len(found)), list(found.values()), color="#1d5ca8", height=0.6)
        axes.axvline(1 - result["agreement"]["chance"], color="#5f6168", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(found)), list(found))
        axes.invert_yaxis()

    def fidelities(axes: Axes) -> None:
        found = result["fidelity"]
        errors = [1.96 * row["auc_se"] for row in found.values()]
        values = [row["auc"] for row in found.values()]
        axes.errorbar(values, range(len(found)), xerr=errors, fmt="o", color="#1d5ca8", capsize=3)
        axes.axvline(0.5, color="#5f6168", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(found)), list(found))
        axes.invert_yaxis()

    figures = {
        "share": make_figure(share, "Share of tokens, largest first", "Share of the reward"),
        "position": make_figure(position, "Place in the response", "Mean reward s"),
    }
    if "agreement" in result and result["agreement"]["chance"] is not None:
        figures["agreement"] = make_figure(changed, "Share of key tokens that are not the last oracle's", "")
    if "fidelity" in result:
        figures["fidelity"] = make_figure(fidelities, "AUC for the words of the lexicon, sign-aware", "")
    return [write_png(figure, folder / f"{stem}.png") for stem, figure in figures.items()]
