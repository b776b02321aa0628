"""The report: which tokens carry the preference, seen in a page, in a notebook and in figures."""

from sepo._moved import names_of

__getattr__ = names_of(
    __name__,
    {
        "build_report": "sepo.report.build",
        "display": "sepo.report.notebook",
        "save_figures": "sepo.report.figures",
    },
)
