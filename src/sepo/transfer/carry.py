"""Transfer of token rewards to another tokenizer.

A reward belongs to the bytes of its token. Let the tokens of A end at bytes a_i of the response, and those of B at b_j.
With F the piecewise linear function through the points (a_i, r_1 + ... + r_i),

    R_j = F(b_j) - F(b_(j-1)) = sum over i of r_i |A_i and B_j| / |A_i|          (allocation "bytes")

This preserves the sum of the rewards over a response, and over every *group*: the tokens between two boundaries that A
and B share. The allocation of a group's sum to its tokens of B is a convention:

    allocation  reward of a token of B                                  "intell|igent" (1.2 | 0) as "int|elligent"
    bytes       of each token of A, in proportion to shared bytes       0.6 | 0.6
    group       an equal part, so that a group is selected together     0.6 | 0.6
    first       all for the group's first token, 0 for the others       1.2 | 0

In a group of one token of A and one of B, the most frequent case, all three are the same. Tokens of A of no width on
the axis (`alignment`) add their reward to the next token of the response, or to the last one.

The sum is the log-ratio of the *canonical* tokenisation under A. Both models of the ratio share this tokenisation, so
the probability of other tokenisations of the same text nearly cancels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from sepo.data.conversation import CONVERSATION, PROMPT_KEY
from sepo.data.ragged import SIDES, flat, ragged
from sepo.data.tables import SEVERAL_TURNS, make_table, provenance_of, require_both_sides, require_table
from sepo.data.vocabulary import TokenBytes
from sepo.errors import UserError, nearest
from sepo.recipe.settings import Allocation
from sepo.transfer.alignment import (
    FORMS,
    UNREADABLE,
    Alignment,
    align,
    align_turns,
    begins_of,
    equal_segments,
    first_of,
    last_of,
    response_texts,
)

ALLOCATIONS: tuple[str, ...] = get_args(Allocation)


@dataclass
class TransferReport:
    """Counts of transferred and dropped pairs, and of tokens of both tokenizers.

    Attributes:
        pairs: pairs read.
        dropped: number of dropped pairs by reason: "no such pair" (the other tokenizer and its chat template dropped
            the row of this pair_id), "other text" (the responses under both tokenizers are different texts), "no
            bytes" (a token has no known bytes, such as the unknown token), "nothing scored" (the scored text was
            truncated too early), "identical responses" (the scored parts are the same under the other tokenizer).
        forms: number of responses by the form in which the texts agree (`alignment.FORMS`).
        cut: responses that continue beyond the scored text under the other tokenizer and are truncated there.
        tokens: response tokens of the other tokenizer, including the end of a response.
        one_to_one: tokens of the other tokenizer that are also one token of the first.
        groups, bytes: number of groups, and of bytes in them.
        mass: sum of |s|. `larger`: the part in groups of more than one token. `lost`: the part beyond the last token of
            the other tokenizer.
    """

    pairs: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    tokens: int = 0
    one_to_one: int = 0
    groups: int = 0
    bytes: int = 0
    mass: float = 0.0
    larger: float = 0.0
    lost: float = 0.0

    def __add__(self, other: TransferReport) -> TransferReport:
        def added(a: Any, b: Any) -> Any:
            if isinstance(a, dict):
                return {key: a.get(key, 0) + b.get(key, 0) for key in dict.fromkeys([*a, *b])}
            return a + b

        return TransferReport(
            **{item.name: added(getattr(self, item.name), getattr(other, item.name)) for item in fields(self)}
        )

    @property
    def kept(self) -> int:
        return self.pairs - sum(self.dropped.values())

    def reasons(self) -> str:
        """The drops as text, most frequent first."""
        return ", ".join(f"{reason} {n:,}" for reason, n in sorted(self.dropped.items(), key=lambda item: -item[1]))

    def summary(self) -> str:
        """The report in one line."""
        parts = [f"{self.kept:,} of {self.pairs:,} pairs"]
        if self.dropped:
            parts.append(f"dropped: {self.reasons()}")
        if self.tokens:
            parts.append(f"{self.one_to_one / self.tokens:.1%} of the tokens are one token of both tokenizers")
            parts.append(f"{self.bytes / self.groups:.1f} bytes a group")
        changed = {name: n for name, n in self.forms.items() if n and name != "same"}
        if changed:
            by_form = ", ".join(f"{name} {n:,}" for name, n in changed.items())
            parts.append(f"{sum(changed.values()):,} responses match only after normalising their texts ({by_form})")
        if self.cut:
            parts.append(f"{self.cut:,} responses truncated to the scored text")
        if self.mass:
            parts.append(f"{self.larger / self.mass:.1%} of the reward in groups of several tokens")
            parts.append(f"{self.lost / self.mass:.1%} lost" if self.lost > 5e-4 * self.mass else "none lost")
        return "; ".join(parts)

    def figures(self) -> dict[str, float]:
        """The report as metrics; a ratio of an empty total is NaN."""

        def share(part: float, whole: float) -> float:
            return part / whole if whole else float("nan")

        return {
            "pairs": self.kept,
            "dropped": self.pairs - self.kept,
            "one_to_one_share": share(self.one_to_one, self.tokens),
            "bytes_per_group": share(self.bytes, self.groups),
            "larger_groups_share": share(self.larger, self.mass),
            "lost_share": share(self.lost, self.mass),
        }


def check_allocation(allocation: str) -> None:
    """Raise a UserError for an unknown allocation."""
    if allocation not in ALLOCATIONS:
        raise UserError(
            f"allocation is '{allocation}'{nearest(str(allocation), ALLOCATIONS)}: expected one of "
            f"{', '.join(ALLOCATIONS)}"
        )


@dataclass(frozen=True)
class Cuts:
    """The token boundaries of all responses, concatenated, and the groups between shared boundaries.

    Tokens of no width belong to no group. If B's tokens of a response end before A's, B gets a `filler` for the rest.

    Attributes:
        tokens_a, tokens_b: indices of the tokens with a width.
        ends_a, ends_b: ends of these tokens, ascending; `ends_b` includes the fillers.
        filler: `[ends_b]` bool.
        common: boundaries of both tokenizers; each ends a group.
        group_a, group_b: group of each of `ends_a` and `ends_b`, from 0.
    """

    tokens_a: np.ndarray
    tokens_b: np.ndarray
    ends_a: np.ndarray
    ends_b: np.ndarray
    filler: np.ndarray
    common: np.ndarray
    group_a: np.ndarray
    group_b: np.ndarray

    @property
    def groups(self) -> int:
        return len(self.common)


def join_cuts(ends_a: np.ndarray, lengths_a: np.ndarray, ends_b: np.ndarray, lengths_b: np.ndarray) -> Cuts:
    """Concatenate the token boundaries of many responses, and group them.

    Args:
        ends_a, ends_b: end of each token in its response `[tokens]`, from 0, not descending; B's tokens end within A's.
        lengths_a, lengths_b: tokens of each response `[responses]`.
    """
    sizes = last_of(ends_a, lengths_a)
    base = np.cumsum(sizes) - sizes

    def placed(ends: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.flatnonzero(ends > begins_of(ends, lengths))
        return tokens, (ends + np.repeat(base, lengths))[tokens]

    tokens_a, all_a = placed(ends_a, lengths_a)
    tokens_b, all_b = placed(ends_b, lengths_b)
    rest = (base + sizes)[last_of(ends_b, lengths_b) < sizes]
    where = np.searchsorted(all_b, rest)
    filler = np.insert(np.zeros(len(all_b), bool), where, True)
    all_b = np.insert(all_b, where, rest)
    both = _sorted(all_a, all_b)
    common = both[1:][both[1:] == both[:-1]]
    group_a, group_b = np.searchsorted(common, all_a), np.searchsorted(common, all_b)
    return Cuts(tokens_a, tokens_b, all_a, all_b, filler, common, group_a, group_b)


def _sorted(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Merge two ascending arrays in linear time."""
    return np.sort(np.concatenate([a, b]), kind="stable")


def allocate_rewards(
    rewards: np.ndarray, lengths: np.ndarray, cuts: Cuts, tokens: int, allocation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Allocate the rewards of A's tokens to B's tokens (see the module's text).

    Args:
        rewards: `[tokens of A]`.
        lengths: tokens of A in each response `[responses]`; each response has a token with a width.
        cuts: the boundaries of these responses.
        tokens: number of B's tokens.

    Returns:
        rewards `[tokens]` float64, and the rewards of the fillers `[fillers]` float64, beyond B's last token.
    """
    values = _forwarded(rewards.astype(np.float64), lengths, cuts.tokens_a)
    if allocation == "bytes":
        places = _sorted(cuts.ends_a, cuts.ends_b)
        places = places[np.diff(places, prepend=0.0) > 0]
        of_a, of_b = np.searchsorted(cuts.ends_a, places), np.searchsorted(cuts.ends_b, places)
        share = np.diff(places, prepend=0.0) / np.diff(cuts.ends_a, prepend=0.0)[of_a]
        given = np.bincount(of_b, values[of_a] * share, minlength=len(cuts.ends_b))
    else:
        sums = np.bincount(cuts.group_a, values, minlength=cuts.groups)
        if allocation == "group":
            given = (sums / np.bincount(cuts.group_b, minlength=cuts.groups))[cuts.group_b]
        else:
            given = np.where(np.diff(cuts.group_b, prepend=-1) > 0, sums[cuts.group_b], 0.0)
    result = np.zeros(tokens)
    result[cuts.tokens_b] = given[~cuts.filler]
    return result, given[cuts.filler]


def _forwarded(values: np.ndarray, lengths: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Add the values of tokens that are not `kept` to the next kept token of their response.

    Without a next kept token they are added to the last one before.
    """
    if len(kept) == len(values):
        return values
    rows = np.repeat(np.arange(len(lengths)), lengths)
    target = np.searchsorted(kept, np.arange(len(values)))
    target[(target == len(kept)) | (rows[kept[np.minimum(target, len(kept) - 1)]] != rows)] -= 1
    return np.bincount(target, values, minlength=len(kept))


def carry(
    source: pa.Table, target: pa.Table, read_a: TokenBytes, read_b: TokenBytes, allocation: str = "bytes"
) -> tuple[pa.Table, TransferReport]:
    """Transfer pairs, or their token rewards, to another tokenizer.

    Args:
        source: kind "pairs" or "scores", under tokenizer A.
        target: kind "pairs", the same dataset under tokenizer B (and its chat template), in any order. Additional pairs
            are ignored.
        read_a, read_b: map ids of the two tokenizers to bytes.
        allocation: one of `ALLOCATIONS`.

    Returns:
        a table of the kind of `source` with the ids of `target`, in the order of `source`, and a report. Responses are
        truncated where those of `source` end; pairs that cannot be transferred are dropped and counted.

    Raises:
        UserError: a table is of another kind, or holds ids that its tokenizer does not have.
    """
    source, target = require_table("source", source, "scores", "pairs"), require_table("target", target, "pairs")
    require_both_sides(source, "the score table")
    check_allocation(allocation)
    with_rewards = "chosen_rewards" in source.column_names
    report = TransferReport(pairs=len(source))
    source, target = _matched(source, target, report)
    aligned = {side: _aligned(source, target, side, read_a, read_b) for side in SIDES}
    good = _transferable(aligned, report)
    columns: dict[str, Any] = {"pair_id": source.column("pair_id"), "prompt_ids": target.column("prompt_ids")}
    columns |= {name: target.column(name) for name in (CONVERSATION, PROMPT_KEY) if name in target.column_names}
    for side in SIDES:
        ids, lengths = flat(target.column(f"{side}_ids"))
        kept = np.where(good, aligned[side].scored, lengths)
        columns[f"{side}_ids"] = ragged(ids[first_of(lengths, kept)], kept)
        if f"{side}_context_at" in target.column_names:
            columns |= _context_before(target, side, kept)
    same = good & equal_segments(*flat(columns["chosen_ids"]), *flat(columns["rejected_ids"]))
    if same.any():
        report.dropped["identical responses"] = int(same.sum())
        good &= ~same
    for side in SIDES:
        rewards = flat(source.column(f"{side}_rewards"))[0] if with_rewards else None
        moved = _carry_side(aligned[side], source, target, side, good, rewards, allocation, report)
        if with_rewards:
            columns[f"{side}_rewards"] = moved
    kind = "scores" if with_rewards else "pairs"
    good_rows = pa.array(good)
    columns = {
        name: column if name.endswith("_rewards") else column.filter(good_rows) for name, column in columns.items()
    }
    facts = {**provenance_of(source), **provenance_of(target)}
    if "chosen_context_at" not in columns:
        facts.pop(SEVERAL_TURNS, None)
    return make_table(kind, columns, facts), report


def _context_before(table: pa.Table, side: str, kept: np.ndarray) -> dict[str, pa.ListArray]:
    """The context of a side that one of the first `kept` tokens of each response follows."""
    ids, counts = flat(table.column(f"{side}_context_ids"))
    at, _ = flat(table.column(f"{side}_context_at"))
    before = at < np.repeat(kept, counts)
    numbers = np.bincount(np.repeat(np.arange(len(counts)), counts)[before], minlength=len(counts))
    return {
        f"{side}_context_ids": ragged(ids[before], numbers),
        f"{side}_context_at": ragged(at[before], numbers),
    }


def _matched(source: pa.Table, target: pa.Table, report: TransferReport) -> tuple[pa.Table, pa.Table]:
    """The rows with the same `pair_id` in both tables, in the order of `source`; counts missing pairs."""
    wanted, ids = source.column("pair_id").to_numpy(), target.column("pair_id").to_numpy()
    order = np.argsort(ids, kind="stable")
    at = np.searchsorted(ids, wanted, sorter=order)
    exists = at < len(ids)
    exists[exists] = ids[order[at[exists]]] == wanted[exists]
    if missing := int((~exists).sum()):
        report.dropped["no such pair"] = missing
    return source.filter(pa.array(exists)), target.take(pa.array(order[at[exists]], type=pa.int64()))


def _transferable(aligned: dict[str, Alignment], report: TransferReport) -> np.ndarray:
    """Mark the pairs whose responses are both aligned `[pairs]` bool; counts the others by reason."""
    chosen, rejected = aligned["chosen"], aligned["rejected"]
    good = np.ones(len(chosen.form), bool)
    for reason, bad in (
        ("no bytes", (chosen.form == UNREADABLE) | (rejected.form == UNREADABLE)),
        ("other text", (chosen.form < 0) | (rejected.form < 0)),
        ("nothing scored", (chosen.scored == 0) | (rejected.scored == 0)),
    ):
        if number := int((good & bad).sum()):
            report.dropped[reason] = number
        good &= ~bad
    return good


def _aligned(source: pa.Table, target: pa.Table, side: str, read_a: TokenBytes, read_b: TokenBytes) -> Alignment:
    texts, turns = [], []
    for table, read in ((source, read_a), (target, read_b)):
        lengths, number = _turns(table, side)
        end_ids = provenance_of(table).get("end_ids", [])
        texts.append(response_texts(flat(table.column(f"{side}_ids"))[0], lengths, read, end_ids))
        turns.append(number)
    if max(int(number.max(initial=1)) for number in turns) == 1:
        return align(*texts)
    return align_turns(texts[0], texts[1], turns[0], turns[1])


def _turns(table: pa.Table, side: str) -> tuple[np.ndarray, np.ndarray]:
    """The assistant turns of a side, which its context parts.

    Returns:
        tokens of each turn `[turns]`, and turns of each response `[responses]`.
    """
    lengths = flat(table.column(f"{side}_ids"))[1]
    if f"{side}_context_at" not in table.column_names:
        return lengths, np.ones(len(lengths), np.int64)
    at, counts = flat(table.column(f"{side}_context_at"))
    begins = np.zeros(int(lengths.sum()), bool)
    begins[np.cumsum(lengths) - lengths] = True
    inside = (at > 0) & (at < np.repeat(lengths, counts))
    begins[(np.repeat(np.cumsum(lengths) - lengths, counts) + at)[inside]] = True
    rows = np.repeat(np.arange(len(lengths)), lengths)
    sizes = np.diff(np.flatnonzero(begins), append=len(begins))
    return sizes, np.bincount(rows[begins], minlength=len(lengths))


def _carry_side(
    aligned: Alignment,
    source: pa.Table,
    target: pa.Table,
    side: str,
    good: np.ndarray,
    rewards: np.ndarray | None,
    allocation: str,
    report: TransferReport,
) -> pa.ListArray | None:
    """Transfer the rewards of one side, if there are any, and count its tokens in the report."""
    lengths_a, lengths_b = (flat(table.column(f"{side}_ids"))[1] for table in (source, target))
    kept = np.where(good, aligned.scored, 0)
    of_a, of_b = np.repeat(good, lengths_a), first_of(lengths_b, kept)
    cuts = join_cuts(aligned.ends_a[of_a], lengths_a[good], aligned.ends_b[of_b], kept[good])
    numbers_a = np.bincount(cuts.group_a, minlength=cuts.groups)
    numbers_b = np.bincount(cuts.group_b, minlength=cuts.groups)
    fillers = np.bincount(cuts.group_b[cuts.filler], minlength=cuts.groups)
    has_b = numbers_b > fillers  # groups with a token of B, not only a filler
    single = has_b & (numbers_a == 1) & (numbers_b == 1)
    report.forms = {
        name: report.forms.get(name, 0) + int((aligned.form[good] == number).sum()) for number, name in enumerate(FORMS)
    }
    report.cut += int((aligned.scored < lengths_b)[good].sum())
    report.tokens += len(cuts.tokens_b)
    report.one_to_one += int(single.sum())
    report.groups += int(has_b.sum())
    report.bytes += round(float(np.diff(cuts.common, prepend=0.0)[has_b].sum()))
    if rewards is None:
        return None
    moved, lost = allocate_rewards(rewards[of_a], lengths_a[good], cuts, int(of_b.sum()), allocation)
    mass = np.bincount(
        cuts.group_a, np.abs(_forwarded(rewards[of_a].astype(np.float64), lengths_a[good], cuts.tokens_a)),
        minlength=cuts.groups,
    )  # fmt: skip
    report.mass += float(mass.sum())
    report.larger += float(mass[has_b & ~single].sum())
    report.lost += float(np.abs(lost).sum())
    return ragged(moved.astype(np.float32), kept[good])
