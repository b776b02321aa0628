"""What an oracle of four times the policy's pairs is worth, against training on those pairs.

    python scripts/oracle_pairs.py details --bench runs/bench --out runs/oracle-pairs --seeds 6

For a planted task whose bench is finished (`sepo bench credit --task TASK`), at each seed the gain at the bench's KL of

    hard4      the policy's pairs, key tokens by an oracle of all pairs
    all4       all tokens (SimPO) of all pairs, one epoch instead of four
    hard44     key tokens of all pairs, by the same oracle
    truth44    what the gold reward counts, in all pairs

in `TASK.json`. `oracle_quality.py` trains the oracles.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from oracle_quality import policies, trained

from sepo.bench.credit.grids import ALL, RULES, TRUTH, bench_of
from sepo.command import quiet_libraries
from sepo.files import write_json

_EVERYTHING = {"data": {"sample": 1.0}}
_ONE_EPOCH = {"training.num_train_epochs": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task")
    parser.add_argument("--bench", type=Path, required=True, help="folder of the bench, with the task")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    quiet_libraries()
    kl, found = bench_of(options.task, options.bench).kl, {}
    for seed in range(1, options.seeds + 1):
        run = trained(options, "four times its pairs", seed)
        gains: dict[str, float] = {}
        # Policies of a comparison see the same pairs, so those of all pairs are a comparison of their own.
        for name, variants in variants_of(run).items():
            gains |= policies(options, variants, seed, kl, f"{name}-{seed}")
        found[seed] = gains
        write_json(options.out / f"{options.task}.json", {"kl": kl, "gains": found})


def variants_of(run: Path) -> dict[str, dict[str, Any]]:
    """Variants by the pairs of their policies."""
    rewards = {"oracle": {"rewards": str(run / "scores")}}
    return {
        "some": {"hard4": {**RULES["hard"], **rewards}},
        "every": {
            "all4": {**_EVERYTHING, "policy": {**RULES[ALL]["policy"], **_ONE_EPOCH}},
            "hard44": {**_EVERYTHING, **RULES["hard"], **rewards, "policy": _ONE_EPOCH},
            "truth44": {**_EVERYTHING, **RULES[TRUTH], "policy": _ONE_EPOCH},
        },
    }


if __name__ == "__main__":
    main()
