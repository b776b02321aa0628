"""What token rewards look like, and how far to trust them.

command.py    `sepo analyse`
analysis.py   reads the inputs, and writes the whole analysis or the ranking of rules
measures.py   the measures of a score table: concentration, position, token classes, length, agreement, fidelity
ranking.py    ranks selection rules by the weight that they give to words of a gold reward
page.py       the results as Markdown and figures
"""

from sepo.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "Inputs": "sepo.analyse.analysis",
        "analyse": "sepo.analyse.analysis",
        "rank": "sepo.analyse.analysis",
        "run_inputs": "sepo.analyse.analysis",
    },
)
