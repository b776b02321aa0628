"""The report: which tokens carry the preference, seen in a page, in a notebook and in figures."""

from sepo.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "build_report": "sepo.report.build",
        "display": "sepo.report.notebook",
        "save_figures": "sepo.report.figures",
    },
)
