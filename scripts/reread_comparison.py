"""Interpolate the curves of stored comparisons again: rows, differences and figures from compare.json.

    python scripts/reread_comparison.py results/*/compare.json                        # rewrite them
    python scripts/reread_comparison.py results/rate/compare.json --kl 1.5 3          # print values at these KLs

For changes of the interpolation (`sepo.study.policy_evaluator.at_kl`); runs no model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sepo.files import write_json
from sepo.study.results import difference_text, differences, save_comparison_figures, summarise_runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="compare.json")
    parser.add_argument("--kl", type=float, nargs="*", default=[], help="print values at these KLs and write nothing")
    arguments = parser.parse_args()
    for path in arguments.files:
        comparison = json.loads(path.read_text(encoding="utf-8"))
        for kl in arguments.kl:
            print(f"{path}, KL {kl:g}")
            for row in summarise_runs(comparison["runs"], kl):
                name = f"{row['variant']} {row['label']}".strip() + ("" if row["reported"] else " (sweep)")
                reach = f"{row['reached']} of {row['seeds']} reach it, {row['unmeasured']} have no checkpoint below"
                print(f"  {name:60} {row['value']:+.3f} ± {row['value_se']:.3f}  {reach}")
            for row in differences(comparison["runs"], kl):
                print(f"  {row['name']} against {row['against']}: {difference_text(row)}")
        if not arguments.kl:
            comparison["rows"] = summarise_runs(comparison["runs"], comparison["kl"])
            comparison["differences"] = differences(comparison["runs"], comparison["kl"])
            write_json(path, comparison, indent=1)
            save_comparison_figures(comparison, path.parent)


if __name__ == "__main__":
    main()
