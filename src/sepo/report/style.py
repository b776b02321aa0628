"""Colours and lines that all pictures share; report.css names the same colours for the page."""

from __future__ import annotations

CHOSEN, REJECTED = "#00756a", "#96307a"
SIDE_COLOURS = {"chosen": CHOSEN, "rejected": REJECTED}
SIDE_LINES = {"chosen": "-", "rejected": (0, (4, 2))}
PLAIN = "#1d5ca8"
GREY = "#5f6168"
# Of methods beside each other.
SERIES = (CHOSEN, REJECTED, PLAIN, "#b3541e", GREY, "#7a7a00", "#c0392b", "#2c7fb8", "#4d9221", "#8c6bb1")
MARKERS = "osD^vP*Xhp"
# Rewards of tokens, as "red,green,blue": above and below zero.
POSITIVE, NEGATIVE = "47,125,209", "226,128,26"
