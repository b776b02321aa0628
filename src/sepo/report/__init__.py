"""The report: token rewards as a page in the browser, in a notebook, and as figures for a paper.

command.py       `sepo report`
build.py         the page: its data block and the HTML around it
reading.py       everything the page reads from disk
token_texts.py   readable text for token ids
summary.py       the numbers behind the figures
payload.py       the format of the data block
template.html, report.css, report.js   the page itself
notebook.py      `display`: the page for one pair, in a notebook
figures.py       figures as PNG, SVG or PDF, and the style of all figures
run_summary.py   the summary of a run in the terminal
statistics.py    intervals, means over seeds, correlations
edges.py         words for little data
documents.py     Markdown pages in a terminal and as HTML
"""

from sepo.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "build_report": "sepo.report.build",
        "display": "sepo.report.notebook",
        "save_figures": "sepo.report.figures",
    },
)
