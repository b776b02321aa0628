"""The report: which tokens carry the preference, seen in a page, in a notebook and in figures."""

from sepo.report.build import build_report
from sepo.report.figures import save_figures
from sepo.report.notebook import display

__all__ = ["build_report", "display", "save_figures"]
