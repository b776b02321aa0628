"""One self-contained HTML file from a score table, or from a whole run folder.

Everything is read from files. The page holds its styles, its script and its data, and its content security
policy allows nothing else: no network, no script but its own. 2,000 AlpacaEval pairs (974,000 response
tokens, with both log-probabilities) make a file of 8.7 MB.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa

from sepo.credit.selection import check_rate, ends_response
from sepo.data import tables
from sepo.data.previews import common_starts
from sepo.data.ragged import SIDES, SIGNED_SIDES, flat, segment_sums
from sepo.data.splits import prompt_numbers
from sepo.data.vocabulary import load_vocabulary
from sepo.errors import UserError, check_number
from sepo.evaluate import GENERATIONS
from sepo.files import expand_home, write_bytes
from sepo.report.answers import read_answers
from sepo.report.payload import jsonable, pack, smallest_unsigned
from sepo.report.summary import summarise, training_curves
from sepo.report.token_texts import TokenTexts

MODELS = ("reference", "oracle", "policy")
# Log-probabilities are for reading: 1/1000 nat in 16 bits. The last value says that there is none.
_LOGP_SCALE, _NO_LOGP = 1000, 65535
_FACET_VALUES = 40


@dataclass(frozen=True)
class Scores:
    """A score table read for the report.

    Attributes:
        rows: the pairs to show, at most `max_pairs`, spread evenly over the table.
        rewards: for each side, the rewards of *all* pairs and their lengths.
        prompts: the number of the prompt of *all* pairs.
        provenance: the metadata of the table.
    """

    rows: pa.Table
    rewards: dict[str, tuple[np.ndarray, np.ndarray]]
    prompts: np.ndarray
    provenance: dict


def read_scores(path: Path, max_pairs: int) -> Scores:
    """Read a score table: the rewards of every pair, everything else of at most `max_pairs` pairs.

    Raises:
        UserError: the table is missing, empty, or holds rewards that are not finite or not aligned.
    """
    paths = tables.table_paths(path, "scores")
    total = sum(tables.number_of_rows(shard) for shard in paths)
    if total == 0:
        raise UserError(f"'{path}' holds no pair: expected a score table with at least one row")
    picked = np.unique(np.linspace(0, total - 1, min(max_pairs, total)).round().astype(np.int64))
    shown, rewards, lengths = [], {side: [] for side in SIDES}, {side: [] for side in SIDES}  # type: ignore[var-annotated]
    prompt_ids: list[pa.Array] = []
    start = 0
    for shard in paths:
        table = tables.read_shard(shard, "scores")
        prompt_ids += table["prompt_ids"].chunks
        for side in SIDES:
            values, counts = flat(table[f"{side}_rewards"])
            rewards[side].append(values)
            lengths[side].append(counts)
        inside = picked[(picked >= start) & (picked < start + len(table))] - start
        shown.append(table.take(pa.array(inside)))
        start += len(table)
    joined = {side: (np.concatenate(rewards[side]), np.concatenate(lengths[side])) for side in SIDES}
    if not any(len(values) for values, _ in joined.values()):
        raise UserError(f"'{path}' holds no response token: expected responses of at least one token")
    prompts = prompt_numbers(pa.chunked_array(prompt_ids))
    return Scores(pa.concat_tables(shown), joined, prompts, tables.provenance_of(shown[0]))


def _spread(
    path: Path,
    kind: str,
    rows: pa.Table,
    fill: float,
    place: Callable[[np.ndarray, pa.Table, int, str, slice], None],
) -> dict[str, np.ndarray]:
    """Spread a second table over the tokens of the shown pairs, matched by `pair_id`.

    `place(out, table, row, side, segment)` writes row `row` of `table` into `out[segment]`; tokens of
    pairs that the table does not hold keep `fill`.
    """
    where = {pair_id: i for i, pair_id in enumerate(rows["pair_id"].to_pylist())}
    lengths = {side: flat(rows[f"{side}_ids"])[1] for side in SIDES}
    starts = {side: np.cumsum(counts) - counts for side, counts in lengths.items()}
    out = {side: np.full(int(counts.sum()), fill, dtype=np.float32) for side, counts in lengths.items()}
    for table in tables.iter_tables(path, kind):
        for row, pair_id in enumerate(table["pair_id"].to_pylist()):
            if (i := where.get(pair_id)) is not None:
                for side in SIDES:
                    segment = slice(starts[side][i], starts[side][i] + lengths[side][i])
                    place(out[side], table, row, side, segment)
    return out


def read_selection(path: Path, rows: pa.Table) -> dict[str, np.ndarray]:
    """Read the weight of every token of the shown pairs (0 where it is not a key token), by side.

    Raises:
        UserError: the selection does not fit the pairs.
    """

    def place(out: np.ndarray, table: pa.Table, row: int, side: str, segment: slice) -> None:
        positions = np.asarray(table[f"{side}_positions"][row].as_py(), dtype=np.int64)
        if len(positions) and positions.max() >= segment.stop - segment.start:
            raise UserError(
                f"'{path}', pair {table['pair_id'][row]}: key token {positions.max()} lies beyond the {side} "
                "response; expected a selection made from this score table"
            )
        out[segment.start + positions] = table[f"{side}_weights"][row].as_py()

    return _spread(path, "selection", rows, 0.0, place)


def read_logps(path: Path, rows: pa.Table) -> dict[str, np.ndarray]:
    """Read the log-probability of every token of the shown pairs (NaN where there is none), by side."""

    def place(out: np.ndarray, table: pa.Table, row: int, side: str, segment: slice) -> None:
        values = table[f"{side}_logps"][row].as_py()
        if len(values) == segment.stop - segment.start:
            out[segment] = values

    return _spread(path, "logps", rows, np.nan, place)


def _facets(rows: pa.Table) -> dict[str, dict]:
    """Columns beyond the schema with few distinct words, such as `subset`: filters in the page."""
    facets = {}
    for name in rows.column_names:
        column = rows[name]
        if name in tables.SCHEMAS["scores"].names:
            continue
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_boolean(column.type):
            labels = ["" if value is None else str(value) for value in column.to_pylist()]
            values = sorted(set(labels))
            if 2 <= len(values) <= _FACET_VALUES:
                facets[name] = {"values": values, "codes": [values.index(label) for label in labels]}
    return facets


def _read_json(path: Path) -> object | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is not readable JSON ({error}): give the command that wrote it again") from None


def read_training(run: Path) -> list[dict]:
    """Read the training curves of a run: one entry a model that was trained in it."""
    curves = []
    manifest = _read_json(run / "manifest.json")
    stages = manifest.get("stages") if isinstance(manifest, dict) else None
    # Of several oracles; a folder whose stage is gone belongs to an earlier recipe.
    more = sorted(stage for stage in stages if stage.startswith("oracle-")) if isinstance(stages, dict) else []
    for model in ("reference", "oracle", *more, "policy"):
        state = _read_json(run / model / "trainer_state.json")
        history = state.get("log_history") if isinstance(state, dict) else None
        if charts := training_curves(history or []):
            curves.append({"model": model, "charts": charts})
    return curves


def find_tokenizer(run: Path, models: Sequence[str] = MODELS) -> Path | None:
    """The first model folder of a run that holds a tokenizer."""
    return next((run / model for model in models if (run / model / "tokenizer.json").exists()), None)


def has_transfer(run: Path) -> bool:
    """Were the token rewards carried over to a policy with another tokenizer?"""
    manifest = _read_json(run / "manifest.json")
    stages = manifest.get("stages") if isinstance(manifest, dict) else None
    return isinstance(stages, dict) and "transfer" in stages and (run / "transfer" / "scores").is_dir()


def rows_of(path: Path, pair_ids: pa.ChunkedArray) -> pa.Table:
    """The rows of some pairs of a score table, in the order of the pairs.

    Raises:
        UserError: the table lacks a pair.
    """
    wanted = {pair_id: place for place, pair_id in enumerate(pair_ids.to_pylist())}
    parts, places = [], []
    for table in tables.iter_tables(path, "scores"):
        found = [(row, wanted[one]) for row, one in enumerate(table["pair_id"].to_pylist()) if one in wanted]
        parts.append(table.take(pa.array([row for row, _ in found], type=pa.int64())))
        places += [place for _, place in found]
    if len(places) < len(wanted):
        raise UserError(f"'{path}' lacks {len(wanted) - len(places)} of the pairs to show: run its stage again")
    return pa.concat_tables(parts).take(pa.array(np.argsort(places), type=pa.int64()))


def _documents(run: Path | None, provenance: Mapping) -> dict:
    """What documents the run: recipe, manifest and metrics as they are on disk, the table's provenance."""
    documents: dict = {"table": provenance}
    if run is not None:
        recipe = run / "recipe.yaml"
        documents["recipe"] = recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else None
        documents["manifest"] = _read_json(run / "manifest.json")
        documents["metrics"] = _read_json(run / "metrics.json")
        documents["training"] = read_training(run)
    return documents


def _payload(
    scores: Scores,
    pieces: TokenTexts,
    selection: Path | None,
    logps: Path | None,
    header: Mapping[str, object],
    other: tuple[pa.Table, TokenTexts] | None = None,
) -> str:
    """The data of the page; `other` are the same pairs under the oracle's tokenizer, where the policy has its own."""
    rows = scores.rows
    include_end = False
    if selection is not None:
        recorded = tables.provenance_of(tables.read_schema(tables.table_paths(selection, "selection")[0]))
        include_end = bool(recorded.get("include_end", False))
    columns = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    ids = {name: flat(rows[column]) for name, column in columns.items()}
    all_ids = np.concatenate([values for values, _ in ids.values()])
    all_lengths = np.concatenate([lengths for _, lengths in ids.values()])
    numbers = pieces.encode(all_ids, all_lengths)

    arrays: dict[str, np.ndarray] = {}
    start = 0
    for name, (values, lengths) in ids.items():
        arrays[f"{name}_lengths"] = smallest_unsigned(lengths)
        arrays[f"{name}_pieces"] = smallest_unsigned(numbers[start : start + len(values)])
        start += len(values)
    margins = np.zeros(len(rows))
    for side, sign in SIGNED_SIDES:
        rewards, lengths = flat(rows[f"{side}_rewards"])
        arrays[f"{side}_rewards"] = rewards.astype(np.float32)
        ended = ends_response(ids[side][0], lengths, [] if include_end else scores.provenance.get("end_ids", []))
        arrays[f"{side}_ended"] = ended[np.cumsum(lengths) - 1].astype(np.uint8)  # a response has a token at least
        margins += sign * segment_sums(rewards, lengths)
    arrays["margins"] = margins
    if selection is not None:
        arrays |= {f"{side}_weights": weights for side, weights in read_selection(selection, rows).items()}
    if logps is not None:
        for side, values in read_logps(logps, rows).items():
            scaled = np.clip(np.nan_to_num(-values * _LOGP_SCALE), 0, _NO_LOGP - 1).round()
            arrays[f"{side}_logps"] = np.where(np.isnan(values), _NO_LOGP, scaled).astype(np.uint16)

    special = pieces.vocabulary.special if pieces.vocabulary else frozenset()
    newlines = {piece.token_id for piece in pieces.pieces if "\n" in piece.text}
    prompts = rows["prompt_ids"].to_pylist()
    for name, order in (("starts", 1), ("ends", -1)):
        common = common_starts([prompt[::order] for prompt in prompts], lambda id_: id_ in special or id_ in newlines)
        arrays[f"prompt_{name}"] = smallest_unsigned(np.array(common))
    more = {}
    if other is not None:
        for side in SIDES:
            values, lengths = flat(other[0][f"{side}_ids"])
            arrays[f"other_{side}_lengths"] = smallest_unsigned(lengths)
            arrays[f"other_{side}_pieces"] = smallest_unsigned(other[1].encode(values, lengths))
            arrays[f"other_{side}_rewards"] = flat(other[0][f"{side}_rewards"])[0].astype(np.float32)
        more = {"other": _listed(other[1])}
    return pack(
        {
            **header,
            **more,
            "pair_ids": rows["pair_id"].to_pylist(),
            "pieces": _listed(pieces),
            "facets": _facets(rows),
            "logp_scale": _LOGP_SCALE,
        },
        arrays,
    )


def _listed(pieces: TokenTexts) -> dict[str, object]:
    """Every way a token is printed, by its number."""
    table = pieces.pieces
    return {
        "id": [piece.token_id for piece in table],
        "shown": [piece.shown for piece in table],
        "label": [piece.label for piece in table],
        "text": {str(i): piece.text for i, piece in enumerate(table) if piece.text != piece.shown},
    }


def _starting_rates(selection: Path | None, given: Mapping[str, float | None]) -> dict[str, float]:
    """The rates that were given, else those that the selection was made with, else 0.3."""
    recorded: dict = {}
    if selection is not None:
        recorded = tables.provenance_of(tables.read_schema(tables.table_paths(selection, "selection")[0]))
    rates = {}
    for side in SIDES:
        rate = given[side] if given[side] is not None else recorded.get(f"k_{side}")
        rates[side] = float(rate) if isinstance(rate, int | float) and 0 < rate <= 1 else 0.3
    return rates


def _asset(name: str) -> str:
    return resources.files("sepo.report").joinpath(name).read_text(encoding="utf-8")


def _source_hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") + "'"


def _page(title: str, data: str) -> str:
    style, script = _asset("report.css"), _asset("report.js")
    policy = (
        f"default-src 'none'; script-src {_source_hash(script)}; style-src {_source_hash(style)}; "
        "img-src blob:; base-uri 'none'; form-action 'none'"
    )
    parts = {"title": html.escape(title), "policy": policy, "style": style, "script": script, "data": data}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("template.html"))


def build_report(
    run: str | os.PathLike | None,
    *,
    table: str | os.PathLike | None = None,
    selection: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | object | None = None,
    out: str | os.PathLike,
    max_pairs: int = 5000,
    k_chosen: float | None = None,
    k_rejected: float | None = None,
    title: str | None = None,
) -> Path:
    """Write the report of a run folder, or of any score table, as one HTML file.

    Args:
        run: a run folder; what it holds of recipe, manifest, metrics, training states, log-probabilities,
            selection and tokenizer is read. None to show a score table alone.
        table: a score table (folder or parquet file); by default the run's `scores/`.
        selection: a selection table made from that score table; by default the run's `selection/`.
        tokenizer: a folder with a `tokenizer.json`, or a loaded fast tokenizer; by default the run's.
            Without one, tokens are shown by id.
        out: the HTML file to write.
        max_pairs: at most so many pairs are shown, spread evenly over the table; the figures use all.
        k_chosen, k_rejected: selection rates at which the sliders start, in (0, 1]; by default those that the
            selection was made with, or 0.3.
        title: the heading; by default the name of the run in its manifest, or of the folder or table.

    Returns:
        The path of the file.

    Raises:
        UserError: a file is missing or cannot be read, or the parts do not belong together.
    """
    if run is None and table is None:
        raise UserError("nothing to report on: give a run folder or a score table")
    check_number("max_pairs", max_pairs, whole=True, least=1)
    for name, rate in (("k_chosen", k_chosen), ("k_rejected", k_rejected)):
        if rate is not None:
            check_rate(name, rate)
    run = None if run is None else Path(expand_home(run, "the run folder"))
    if run is not None and not run.is_dir():
        raise UserError(f"no run folder at '{run}': expected the folder that `sepo run` wrote")
    logps = oracles = None
    if table is None and run is not None and has_transfer(run):
        # The policy's tokens are what it was trained on; the oracle's are shown beside them.
        table = run / "transfer" / "scores"
        selection = selection or (run / "selection" if (run / "selection").exists() else None)
        tokenizer = tokenizer or find_tokenizer(run, ("policy",))
        oracles = find_tokenizer(run, ("reference", "oracle"))
    elif table is None:
        assert run is not None
        table = run / "scores"
        # Selection and log-probabilities of the run belong to its own score table, not to another.
        if selection is None and (run / "selection").exists():
            selection = run / "selection"
        logps = run / "logps" / "reference" if (run / "logps" / "reference").exists() else None
    selection = None if selection is None else Path(expand_home(selection, "the selection table"))
    if tokenizer is None and run is not None:
        tokenizer = find_tokenizer(run)
    table = Path(expand_home(table, "the score table"))
    if tokenizer is None and (table / "tokenizer" / "tokenizer.json").exists():
        tokenizer = table / "tokenizer"

    scores = read_scores(table, max_pairs)
    pieces = TokenTexts(None if tokenizer is None else load_vocabulary(tokenizer))
    documents = _documents(run, scores.provenance)
    manifest = documents.get("manifest")
    recorded = manifest.get("name") if isinstance(manifest, dict) else None
    title = title or str(recorded or (run or table).resolve().name)
    header = {
        "title": title,
        "k": _starting_rates(selection, {"chosen": k_chosen, "rejected": k_rejected}),
        "summary": summarise(scores.rewards, scores.prompts),
        "documents": jsonable(documents),
    }
    if run is not None and (answers := read_answers(run / "eval" / GENERATIONS)) is not None:
        header["answers"] = answers
    other = None
    if run is not None and oracles is not None:
        other = rows_of(run / "scores", scores.rows["pair_id"]), TokenTexts(load_vocabulary(oracles))
    data = _payload(scores, pieces, selection, logps, header, other)
    out = Path(expand_home(out, "out"))
    write_bytes(out, _page(title, data).encode("utf-8"))
    return out
