"""Numbers, durations and sizes as text: the examples of the docstrings."""

from __future__ import annotations

import doctest

from sepo import numbers


def test_numbers_are_written_as_in_the_docstrings():
    result = doctest.testmod(numbers)
    assert result.attempted
    assert not result.failed
