"""Token rewards carried over to another tokenizer: fidelity of each allocation, conservation, and cost.

    python benchmarks/transfer.py fidelity --run runs/quickstart --policy models/gemma-3-270m --out FILE.json
    python benchmarks/transfer.py texts [--number 17000]
    python benchmarks/transfer.py cost [--policy models/gemma-3-270m]

fidelity    on the embedded task, whose true words are known (VADER): AUC of the rewards by token and by word, and lift
            of words that hold a key token, for every allocation: before, after carrying the rewards over, and after
            carrying them back. The way back shows the effect of the cuts alone, on the oracle's own tokens.
            Standard errors resample prompts, the same for all rows, so that differences are paired.
texts       sums of responses and identity over generated Unicode, for every pair of five kinds of tokenizer. Four in
            ten texts hold a letter that the WordPiece vocabulary lacks; of 17,000 texts it reads 10,000.
cost        10,000 pairs of 2 x 300 tokens from SmolLM2's tokens to another tokenizer's, one core: seconds and memory.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from sepo.credit.selection import select_key_tokens
from sepo.data.encoding import tokenize_pairs
from sepo.data.loading import load_preferences
from sepo.data.ragged import SIDES, flat, ragged, segment_sums
from sepo.data.splits import prompt_numbers
from sepo.data.tables import make_table, provenance_of, read_table, write_table
from sepo.data.vocabulary import token_bytes
from sepo.evaluate.fidelity import fidelity, weighted_auc
from sepo.evaluate.gold import lexicon_valence
from sepo.evaluate.words import token_words, word_truth
from sepo.files import write_json
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.settings import DEFAULT_MODEL, DataSettings
from sepo.stages.data import embedded_data, read_split
from sepo.transfer.carry import ALLOCATIONS, carry
from sepo.transfer.stages import carry_table

# --- fidelity -------------------------------------------------------------------------------------------------------


def word_rewards(tokenizer: Any, table: pa.Table) -> dict[str, dict[str, np.ndarray]]:
    """Each word's summed reward, valence and pair, by side."""
    found = {}
    for side in SIDES:
        sums, valences, pairs = [], [], []
        rows = zip(table[f"{side}_ids"].to_pylist(), table[f"{side}_rewards"].to_pylist(), strict=True)
        for pair, (ids, rewards) in enumerate(rows):
            words, index = token_words(tokenizer, ids)
            inside = index >= 0
            sums += np.bincount(index[inside], np.array(rewards)[inside], minlength=len(words)).tolist()
            valences += [lexicon_valence(word) for word in words]
            pairs += [pair] * len(words)
        found[side] = {"reward": np.array(sums), "valence": np.array(valences), "pair": np.array(pairs)}
    return found


def word_auc(words: dict[str, dict[str, np.ndarray]], weights: np.ndarray) -> float:
    """Fidelity's AUC over words instead of tokens; each pair counts `weights` times."""
    values, totals = [], []
    for side in SIDES:
        one = words[side]
        codes = np.unique(one["reward"], return_inverse=True)[1]
        of_word = weights[one["pair"]]
        for sign in (1, -1):
            targets = of_word * (one["valence"] * sign > 0)
            value = weighted_auc(codes, targets, of_word * (one["valence"] == 0))
            values.append(value if sign > 0 else 1 - value)
            totals.append(targets.sum())
    return float(np.average(values, weights=totals))


def lift(tokenizer: Any, table: pa.Table, k: float = 0.3) -> dict[str, Callable[[np.ndarray], float]]:
    """Share of words with the right sign among words that hold a key token, over their share among all words."""
    selection = select_key_tokens(table, k, k)
    keys, hits, pairs = [], [], []
    for side, sign in zip(SIDES, (1, -1), strict=True):
        rows = zip(table[f"{side}_ids"].to_pylist(), selection[f"{side}_positions"].to_pylist(), strict=True)
        for pair, (ids, positions) in enumerate(rows):
            words, index = token_words(tokenizer, ids)
            key = np.zeros(len(words), bool)
            key[index[positions][index[positions] >= 0]] = True
            keys += key.tolist()
            hits += [lexicon_valence(word) * sign > 0 for word in words]
            pairs += [pair] * len(words)
    key, hit, pair = np.array(keys), np.array(hits), np.array(pairs)

    def value(weights: np.ndarray) -> float:
        of_word = weights[pair]
        return float((of_word * hit * key).sum() / (of_word * key).sum() / ((of_word * hit).sum() / of_word.sum()))

    return {"lift": value}


def measured(tokenizer: Any, table: pa.Table, draws: np.ndarray) -> dict[str, Any]:
    """Figures of one table, and their bootstrap draws `[resamples]` for paired differences."""
    words = word_rewards(tokenizer, table)
    measures = {"word_auc": lambda weights: word_auc(words, weights), **lift(tokenizer, table)}
    ones = np.ones(len(table))
    result: dict[str, Any] = {
        "token_auc": fidelity(tokenizer, table, truth=word_truth(lexicon_valence), resamples=50)["auc"]
    }
    for name, measure in measures.items():
        result[name] = measure(ones)
        result[f"{name}_draws"] = np.array([measure(draw) for draw in draws])
    tokens = sum(len(flat(table[f"{side}_ids"])[0]) for side in SIDES)
    result |= {"tokens": tokens, "words": sum(len(words[side]["reward"]) for side in SIDES)}
    return result


def fidelity_of(arguments: argparse.Namespace) -> None:
    run = arguments.run
    small = load_tokenizer(run / "oracle")
    large = load_tokenizer(arguments.policy)
    readers = token_bytes(small, "the oracle"), token_bytes(large, arguments.policy)
    scores = pa.concat_tables([read_table(run / name, "scores") for name in ("scores", "scores_held_out")])
    task = load_preferences(arguments.task or embedded_data("embedded:sentiment"))
    rows = {
        part: task.select([row for row, name in enumerate(task["split"]) if name == part])
        for part in ("train", "held_out")
    }
    made: dict[str, pa.Table] = {}
    for name, part in (("scores", "train"), ("scores_held_out", "held_out")):
        source = read_table(run / name, "scores")
        target, _ = tokenize_pairs(rows[part], large, progress=False)
        back, _ = tokenize_pairs(rows[part], small, progress=False)
        for allocation in ALLOCATIONS:
            there, report = carry(source, target, *readers, allocation)
            again, _ = carry(there, back, *reversed(readers), allocation)
            made[f"{allocation} {part}"], made[f"{allocation} back {part}"] = there, again
            print(f"{allocation}, {part}: {report.summary()}")
    tables = {"before": (small, scores)}
    for allocation in ALLOCATIONS:
        for way, tokenizer in (("", large), (" back", small)):
            parts = [made[f"{allocation}{way} {part}"] for part in ("train", "held_out")]
            tables[allocation + way] = tokenizer, pa.concat_tables(parts)
    prompts = prompt_numbers(scores)
    rng = np.random.default_rng(0)
    draws = np.array(
        [np.bincount(rng.integers(prompts.max() + 1, size=prompts.max() + 1), minlength=prompts.max() + 1)[prompts]
         for _ in range(arguments.resamples)]
    )  # fmt: skip
    found = {name: measured(tokenizer, table, draws) for name, (tokenizer, table) in tables.items()}
    lines = []
    for name, figures in found.items():
        line = {
            "rewards": name,
            "tokens": figures["tokens"],
            "words": figures["words"],
            "token_auc": figures["token_auc"],
        }
        for measure in ("word_auc", "lift"):
            line[measure] = figures[measure]
            line[f"{measure}_se"] = float(figures[f"{measure}_draws"].std(ddof=1))
            difference = figures[f"{measure}_draws"] - found["before"][f"{measure}_draws"]
            line[f"{measure}_change"] = figures[measure] - found["before"][measure]
            line[f"{measure}_change_se"] = float(difference.std(ddof=1))
        lines.append(line)
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()})
    if arguments.out:
        write_json(arguments.out, lines, indent=1)


# --- generated texts, cost --------------------------------------------------------------------------------------------


def with_random_rewards(pairs: pa.Table, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {name: pairs.column(name) for name in pairs.column_names}
    for side in SIDES:
        lengths = flat(pairs.column(f"{side}_ids"))[1]
        columns[f"{side}_rewards"] = ragged(rng.standard_normal(int(lengths.sum())).astype(np.float32), lengths)
    return make_table("scores", columns, provenance_of(pairs))


def rows_of(texts: list[str]) -> datasets.Dataset:
    def said(text: str) -> list[dict]:
        return [{"role": "assistant", "content": text}]

    pairs = zip(texts[::2], texts[1::2], strict=True)
    prompt = [{"role": "user", "content": "hi"}]
    return datasets.Dataset.from_list([{"prompt": prompt, "chosen": said(a), "rejected": said(b)} for a, b in pairs])


def generated_texts(arguments: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tiny_tokenizers import KINDS, odd_texts, tiny_tokenizer_of

    started = time.perf_counter()
    rows = rows_of(odd_texts(arguments.number))
    tokenizers = {kind: tiny_tokenizer_of(kind) for kind in KINDS}
    readers = {kind: token_bytes(tokenizer, kind) for kind, tokenizer in tokenizers.items()}
    tables = {kind: tokenize_pairs(rows, tokenizer, progress=False)[0] for kind, tokenizer in tokenizers.items()}
    for a in KINDS:
        source = with_random_rewards(tables[a])
        for b in KINDS:
            found, report = carry(source, tables[b], readers[a], readers[b])
            kept = source.filter(pa.array(np.isin(source["pair_id"].to_numpy(), found["pair_id"].to_numpy())))
            worst = max(
                float(np.abs(np.subtract(*(segment_sums(*flat(t[f"{side}_rewards"])) for t in (found, kept)))).max())
                for side in SIDES
            )
            assert worst < 1e-5, (a, b, worst)
            assert a != b or found.equals(kept)
            print(f"{a} -> {b}: {2 * len(found):,} texts, sums differ by {worst:.1e} at most; {report.summary()}")
    print(f"{time.perf_counter() - started:.0f} s")


def cost(arguments: argparse.Namespace) -> None:
    small, large = load_tokenizer(DEFAULT_MODEL), load_tokenizer(arguments.policy)
    rng = np.random.default_rng(0)
    words = [one for row in read_split(DataSettings(), "train") for one in row["chosen"][0]["content"].split()]
    texts = [" ".join(rng.choice(words, 230)) + "." for _ in range(2 * arguments.pairs)]
    rows = rows_of(texts)
    tables = [tokenize_pairs(rows, one, progress=False)[0] for one in (small, large)]
    scores = with_random_rewards(tables[0])
    readers = token_bytes(small, "a"), token_bytes(large, "b")
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder) / "scores", scores, 1000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started, used = time.perf_counter(), time.process_time()
        report = carry_table(Path(folder) / "scores", "scores", lambda shard: tables[1], readers, Path(folder) / "out")
        seconds, used = time.perf_counter() - started, time.process_time() - used
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{arguments.pairs:,} pairs, {report.tokens:,} tokens: {seconds:.1f} s ({used:.1f} s of a core)")
    print(f"{more:.0f} MB of additional memory")
    print(report.summary())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("fidelity")
    one.add_argument("--run", type=Path, required=True, help="run of the embedded task, with its oracle")
    one.add_argument("--policy", default="models/gemma-3-270m", help="a model with another tokenizer")
    one.add_argument("--task", type=Path, help="data file of the run, if it is not the embedded task's present one")
    one.add_argument("--resamples", type=int, default=100)
    one.add_argument("--out", type=Path)
    one.set_defaults(work=fidelity_of)
    one = commands.add_parser("texts")
    one.add_argument("--number", type=int, default=17_000)
    one.set_defaults(work=generated_texts)
    one = commands.add_parser("cost")
    one.add_argument("--pairs", type=int, default=10_000)
    one.add_argument("--policy", default="models/gemma-3-270m")
    one.set_defaults(work=cost)
    arguments = parser.parse_args()
    arguments.work(arguments)


if __name__ == "__main__":
    main()
