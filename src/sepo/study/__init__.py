"""Comparisons: many runs at one budget, compared at equal KL. The door is `compare(grid, settings)`.

command.py            `sepo compare`
grid.py               a grid file: variants, sweeps, seeds
comparison.py         the runs of a grid; shared stages run once
stages.py             two stages of its own: samples of the start, and a training that is measured on its way
policy_evaluator.py   measures a policy while it trains
passing.py            finds when a policy in training passes KLs
baselines.py          best of n and steering, points without training
beside.py             trained methods beside these points
curves.py             reads gain at a KL off a run's measurements
crossed.py            statistics over seeds and prompts
results.py            table, JSON and pictures of a comparison
plan.py               dry run of a grid
"""

from sepo.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "compare": "sepo.study.comparison",
        "load_grid": "sepo.study.grid",
        "plan_grid": "sepo.study.plan",
    },
)
