"""Token rewards under another tokenizer.

A reward belongs to the bytes of its token. Let a_i be where the tokens of A end in the response, in bytes, and b_j
where those of B end. With F the line through the points (a_i, r_1 + ... + r_i),

    R_j = F(b_j) - F(b_(j-1)) = sum over i of r_i |A_i and B_j| / |A_i|          (allocation "bytes")

so the rewards of a response sum to what they summed to, and so do those of every *group*: the tokens between two
cuts that A and B have in common. How a group's sum is divided among its tokens of B is a convention:

    allocation    a token of B gets                                     of "intell|igent" (1.2 | 0) in "int|elligent"
    bytes     of each token of A, by the bytes they share           0.6 | 0.6
    group     an equal part, so that a group is selected as one     0.6 | 0.6
    first     all, if it is the group's first; else 0               1.2 | 0

Where a group is one token of A and one of B, as most are, all three are the same. Tokens of A without room on the
axis (`alignment`) add their reward to the next token of the response, or to the last one.

What the sum means: the log-ratio of the *canonical* tokenisation under A. Both models of the ratio share it, so
what other tokenisations of the same text hold of the probability nearly cancels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from sepo.credit.alignment import FORMS, UNREADABLE, Alignment, align, begins_of, last_of, response_texts
from sepo.data.ragged import SIDES, flat, ragged
from sepo.data.tables import make_table, provenance_of, require_table
from sepo.data.vocabulary import TokenBytes
from sepo.errors import UserError, nearest
from sepo.recipe.settings import Allocation

ALLOCATIONS: tuple[str, ...] = get_args(Allocation)
DROP_REASONS: dict[str, str] = {
    "no such pair": "the source, as the other tokenizer and its chat template write it, has no pair of this number",
    "other text": "the responses under both tokenizers are different texts",
    "no bytes": "a token of a response stands for no known bytes, such as the unknown token",
    "nothing scored": "no token of a response lies within what was scored: it was cut off too early",
    "identical responses": "chosen and rejected are the same under the other tokenizer, as far as they were scored",
}


@dataclass
class TransferReport:
    """What became of the pairs of a table, and how the two tokenizers cut their responses.

    Attributes:
        pairs: read.
        dropped: number of dropped pairs by reason (a key of `DROP_REASONS`).
        forms: responses by the form in which the texts agree (`alignment.FORMS`).
        cut: responses that go on, under the other tokenizer, beyond what was scored, and are cut there.
        tokens: response tokens of the other tokenizer, the end of a response included.
        one_to_one: those of them that are one token of both.
        groups, bytes: groups, and the bytes in them.
        mass: sum of |s|; `larger` is in groups of more than one token, `lost` beyond the last token of the other.
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
        def both(mine: Any, theirs: Any) -> Any:
            if isinstance(mine, dict):
                return {key: mine.get(key, 0) + theirs.get(key, 0) for key in dict.fromkeys([*mine, *theirs])}
            return mine + theirs

        return TransferReport(
            **{item.name: both(getattr(self, item.name), getattr(other, item.name)) for item in fields(self)}
        )

    @property
    def kept(self) -> int:
        return self.pairs - sum(self.dropped.values())

    def reasons(self) -> str:
        """The drops in one phrase, most frequent first."""
        return ", ".join(f"{reason} {n:,}" for reason, n in sorted(self.dropped.items(), key=lambda item: -item[1]))

    def summary(self) -> str:
        """All of it in one line."""
        parts = [f"{self.kept:,} of {self.pairs:,} pairs"]
        if self.dropped:
            parts.append(f"dropped: {self.reasons()}")
        if self.tokens:
            parts.append(f"{self.one_to_one / self.tokens:.1%} of the tokens are one of both tokenizers")
            parts.append(f"{self.bytes / self.groups:.1f} bytes a group")
        others = ", ".join(f"{name} {n:,}" for name, n in self.forms.items() if n and name != "same")
        if others:
            parts.append(f"responses whose texts agree otherwise than byte by byte: {others}")
        if self.cut:
            parts.append(f"{self.cut:,} responses cut where the scored ones end")
        if self.mass:
            parts.append(f"{self.larger / self.mass:.1%} of the reward in larger groups")
            parts.append(f"{self.lost / self.mass:.1%} lost" if self.lost > 5e-4 * self.mass else "none lost")
        return "; ".join(parts)

    def figures(self) -> dict[str, float]:
        """The same as metrics; a figure that nothing contributes to is NaN."""

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
    """Raise a UserError for an allocation that is not known."""
    if allocation not in ALLOCATIONS:
        raise UserError(
            f"allocation is '{allocation}'{nearest(str(allocation), ALLOCATIONS)}: expected one of "
            f"{', '.join(ALLOCATIONS)}"
        )


@dataclass(frozen=True)
class Cuts:
    """The cuts of all responses one after the other, and the groups between those that both tokenizers have.

    Tokens without room are in none. Where B's tokens of a response end before A's do, B has a `filler` for the rest.

    Attributes:
        tokens_a, tokens_b: which tokens have room `[their number]` indices.
        ends_a, ends_b: where they end, ascending; `ends_b` with the fillers.
        filler: `[ends_b]` bool.
        common: the cuts of both, where a group ends each.
        group_a, group_b: the group of each of `ends_a` and `ends_b`, from 0.
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
    """Join the cuts of many responses.

    Args:
        ends_a, ends_b: where each token ends in its own response `[tokens]`, from 0 and not descending; those of B
            end within those of A.
        lengths_a, lengths_b: `[responses]`, tokens of each.
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


def _sorted(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Two ascending arrays as one, in linear time."""
    return np.sort(np.concatenate([one, other]), kind="stable")


def allocate_rewards(
    rewards: np.ndarray, lengths: np.ndarray, cuts: Cuts, tokens: int, allocation: str
) -> tuple[np.ndarray, np.ndarray]:
    """Allocation the rewards of A's tokens over B's (see the module's text).

    Args:
        rewards: `[tokens of A]`.
        lengths: `[responses]`, tokens of A in each; at least one of each has room.
        cuts: of these responses.
        tokens: number of B's tokens.

    Returns:
        rewards `[tokens]` float64, and those that fell to fillers `[fillers]` float64: beyond B's last token.
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
    """Rewards of the tokens `kept`, each with those of the tokens before it in its response that are not kept.

    What has none after it in its response goes to the last one before.
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
    """Carry pairs, or their token rewards, over to another tokenizer.

    Args:
        source: kind "pairs" or "scores", under tokenizer A.
        target: kind "pairs", the same source rows under tokenizer B (and its chat template), in any order; more
            pairs than `source` has do no harm.
        read_a, read_b: of the two tokenizers.
        allocation: one of `ALLOCATIONS`.

    Returns:
        a table of the kind of `source` with the ids of `target`, in `source`'s order, and what became of the pairs.
        Responses are cut where those of `source` end; a pair that cannot be carried over is dropped and counted.

    Raises:
        UserError: a table is of another kind, or holds ids that its tokenizer does not have.
    """
    source, target = require_table("source", source, "scores", "pairs"), require_table("target", target, "pairs")
    check_allocation(allocation)
    with_rewards = "chosen_rewards" in source.column_names
    report = TransferReport(pairs=len(source))

    def keep(good: np.ndarray, reason: str, *tables: pa.Table) -> list[pa.Table]:
        if number := int((~good).sum()):
            report.dropped[reason] = report.dropped.get(reason, 0) + number
        return [table.filter(pa.array(good)) for table in tables]

    wanted, there = source.column("pair_id").to_numpy(), target.column("pair_id").to_numpy()
    order = np.argsort(there, kind="stable")
    at = np.searchsorted(there, wanted, sorter=order)
    found = at < len(there)
    found[found] = there[order[at[found]]] == wanted[found]
    (source,) = keep(found, "no such pair", source)
    target = target.take(pa.array(order[at[found]], type=pa.int64()))
    aligned = {side: _aligned(source, target, side, read_a, read_b) for side in SIDES}
    chosen, rejected = aligned["chosen"], aligned["rejected"]
    good = np.ones(len(source), bool)
    for reason, bad in (
        ("no bytes", (chosen.form == UNREADABLE) | (rejected.form == UNREADABLE)),
        ("other text", (chosen.form < 0) | (rejected.form < 0)),
        ("nothing scored", (chosen.scored == 0) | (rejected.scored == 0)),
    ):
        if number := int((good & bad).sum()):
            report.dropped[reason] = number
        good &= ~bad
    columns: dict[str, Any] = {"pair_id": source.column("pair_id"), "prompt_ids": target.column("prompt_ids")}
    for side in SIDES:
        ids, lengths = flat(target.column(f"{side}_ids"))
        kept = np.where(good, aligned[side].scored, lengths)
        columns[f"{side}_ids"] = ragged(ids[_first(lengths, kept)], kept)
    same = good & _equal(*(flat(columns[f"{side}_ids"]) for side in SIDES))
    if same.any():
        report.dropped["identical responses"] = int(same.sum())
        good &= ~same
    for side in SIDES:
        rewards = flat(source.column(f"{side}_rewards"))[0] if with_rewards else None
        made = _carry_side(aligned[side], source, target, side, good, rewards, allocation, report)
        if with_rewards:
            columns[f"{side}_rewards"] = made
    kind = "scores" if with_rewards else "pairs"
    good_rows = pa.array(good)
    columns = {
        name: column if name.endswith("_rewards") else column.filter(good_rows) for name, column in columns.items()
    }
    provenance = {**provenance_of(source), **provenance_of(target)}
    own = {key: value for key, value in provenance.items() if key not in ("format", "version")}
    return make_table(kind, columns, own), report


def _aligned(source: pa.Table, target: pa.Table, side: str, read_a: TokenBytes, read_b: TokenBytes) -> Alignment:
    texts = [
        response_texts(*flat(table.column(f"{side}_ids")), read, provenance_of(table).get("end_ids", []))
        for table, read in ((source, read_a), (target, read_b))
    ]
    return align(*texts)


def _equal(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Which lists of two columns, each as flat values and lengths, are equal `[rows]` bool."""
    (values, lengths), (others, other_lengths) = one, other
    same = lengths == other_lengths
    rows = np.repeat(np.arange(len(lengths))[same], lengths[same])
    differ = values[np.repeat(same, lengths)] != others[np.repeat(same, other_lengths)]
    return same & (np.bincount(rows[differ], minlength=len(lengths)) == 0)


def _first(lengths: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Mark the first `kept` tokens of each response `[tokens]` bool."""
    position = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return position < np.repeat(kept, lengths)


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
    """Count the cuts of one side's responses, and allocation their rewards."""
    lengths_a, lengths_b = (flat(table.column(f"{side}_ids"))[1] for table in (source, target))
    kept = np.where(good, aligned.scored, 0)
    of_a, of_b = np.repeat(good, lengths_a), _first(lengths_b, kept)
    cuts = join_cuts(aligned.ends_a[of_a], lengths_a[good], aligned.ends_b[of_b], kept[good])
    numbers_a = np.bincount(cuts.group_a, minlength=cuts.groups)
    numbers_b = np.bincount(cuts.group_b, minlength=cuts.groups)
    fillers = np.bincount(cuts.group_b[cuts.filler], minlength=cuts.groups)
    own = numbers_b > fillers  # a group with a token of B
    single = own & (numbers_a == 1) & (numbers_b == 1)
    report.forms = {
        name: report.forms.get(name, 0) + int((aligned.form[good] == number).sum()) for number, name in enumerate(FORMS)
    }
    report.cut += int((aligned.scored < lengths_b)[good].sum())
    report.tokens += len(cuts.tokens_b)
    report.one_to_one += int(single.sum())
    report.groups += int(own.sum())
    report.bytes += round(float(np.diff(cuts.common, prepend=0.0)[own].sum()))
    if rewards is None:
        return None
    made, lost = allocate_rewards(rewards[of_a], lengths_a[good], cuts, int(of_b.sum()), allocation)
    mass = np.bincount(
        cuts.group_a, np.abs(_forwarded(rewards[of_a].astype(np.float64), lengths_a[good], cuts.tokens_a)),
        minlength=cuts.groups,
    )  # fmt: skip
    report.mass += float(mass.sum())
    report.larger += float(mass[own & ~single].sum())
    report.lost += float(np.abs(lost).sum())
    return ragged(made.astype(np.float32), kept[good])
