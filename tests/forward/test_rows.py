"""How pairs are divided into rows, over many sizes."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from properties import examples
from sepo.forward.packing import Pair, _balanced_rows, fill_rows
from sepo.forward.scoring import LAYOUTS


def _sized_pairs(sizes):
    """Pairs of equal or different prompts; a size is (prompt number, prompt tokens, chosen, rejected)."""
    return [
        Pair(i, [prompt + 1] * length, [7] * chosen, [9] * rejected)
        for i, (prompt, length, chosen, rejected) in enumerate(sizes)
    ]


_SIZES = st.tuples(st.integers(0, 60), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@examples(200)
@given(sizes=st.lists(_SIZES, min_size=1, max_size=40), times=st.integers(1, 12), budget=st.integers(1, 400))
@example(sizes=[(i, 2, 29, 31) for i in range(119)], times=1, budget=100)
@example(sizes=[(i, 2, 29, 31) for i in range(1000)], times=1, budget=100)
def test_rows_of_any_sizes_hold_every_pair_once_and_none_is_empty(layout, sizes, times, budget):
    pairs = _sized_pairs(sizes * times)
    fill, lay_out = LAYOUTS[layout]
    rows = fill(pairs, budget)
    assert all(rows)
    assert sorted(pair.pair_id for row in rows for pair in row) == list(range(len(pairs)))
    if layout != "unbatched":
        for row in rows:
            assert len(row) == 1 or lay_out(row).num_tokens <= budget


@examples(200)
@given(lengths=st.lists(st.integers(2, 120), min_size=1, max_size=300), budget=st.integers(120, 400))
def test_the_number_of_packed_rows_is_the_least_tried_that_fits_and_at_most_the_number_of_texts(lengths, budget):
    pairs = [Pair(i, [i + 1], [7] * length, [9]) for i, length in enumerate(lengths)]
    documents = sorted(((length, [pair]) for pair, length in zip(pairs, lengths, strict=True)), key=lambda x: -x[0])
    number = -(-sum(lengths) // budget)
    while _balanced_rows(documents, number, budget) is None:
        number += 1 + number // 50
    assert len(fill_rows(pairs, budget)) == min(number, len(pairs))
