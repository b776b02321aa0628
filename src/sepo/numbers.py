"""Numbers, durations and sizes as text for people."""

from __future__ import annotations

from typing import Any

MISSING = "–"
NO_SPREAD = "no spread seen"


def number(value: Any, form: str = "") -> str:
    """A number in four digits, or in a format; "–" for None and NaN.

    >>> [number(value) for value in (None, 0.12345, 1234.5, 12.0)]
    ['–', '0.1235', '1,234', '12']
    >>> number(0.12345, "+.2f")
    '+0.12'
    """
    if value is None or value != value:
        return MISSING
    if form or not isinstance(value, int | float):
        return format(value, form)
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def with_error(value: float | None, error: float | None, form: str = "") -> str:
    """A number and its standard error, if there is one.

    >>> with_error(0.25, 0.05, "+.3f"), with_error(0.25, None), with_error(0.25, float("nan"), ".0%")
    ('+0.250 ± 0.050', '0.25', '25%')
    >>> with_error(1.0, 0.0, ".0%"), with_error(0.5, 0.0004, ".0%")
    ('100% (no spread seen)', '50% ± 0.04%')
    """
    text = number(value, form)
    if value is None or value != value or error is None or error != error:
        return text
    return f"{text} ± {error_text(error, form)}" if error > 0 else f"{text} ({NO_SPREAD})"


def error_text(error: float | None, form: str = "") -> str:
    """A standard error, never rounded to 0. All values equal give an error of 0, which is no certainty."""
    if error == 0:
        return NO_SPREAD
    text = number(error, form.removeprefix("+"))
    if error is None or error != error or any(digit in text for digit in "123456789"):
        return text
    return f"{100 * error:.1g}%" if form.endswith("%") else f"{error:.1g}"


def share(value: float | None) -> str:
    """A share as a percentage with one decimal.

    >>> share(0.1234), share(None)
    ('12.3 %', '–')
    """
    return MISSING if value is None or value != value else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """A duration in the two largest units that matter.

    >>> [duration(s) for s in (8, 75, 700, 9000)]
    ['8 s', '1 min 15 s', '12 min', '2 h 30 min']
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60} s" if seconds % 60 else f"{seconds // 60} min"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def size(number_of_bytes: float) -> str:
    """A number of bytes in units of 1000.

    >>> [size(n) for n in (900, 1_500_000, 2.5e12)]
    ['0.9 kB', '1.5 MB', '2,500.0 GB']
    """
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((pair for pair in units if number_of_bytes >= pair[0]), units[-1])
    return f"{number_of_bytes / unit:,.1f} {name}"
