"""The report: one self-contained HTML file from a score table, or from a whole run folder.

The page holds its style, its script and its data. Its content security policy allows nothing else: no network, and no
script but its own. 2,000 AlpacaEval pairs (974,000 response tokens, with both log-probabilities) make a file of 8.7 MB.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa

from sepo.credit.selection import check_rate, turn_ends
from sepo.data.conversation import CONVERSATION, conversations_of, in_words
from sepo.data.previews import common_starts
from sepo.data.ragged import SIDES, SIGNED_SIDES, flat, segment_sums
from sepo.data.vocabulary import load_vocabulary
from sepo.errors import UserError, check_number
from sepo.evaluate import GENERATIONS
from sepo.files import expand_home, write_bytes
from sepo.report import reading
from sepo.report.payload import jsonable, pack, smallest_unsigned
from sepo.report.reading import Scores
from sepo.report.token_texts import TokenTexts

# Log-probabilities are stored in 16 bits, to 1/1000 nat; the last value means "none".
_LOGP_SCALE, _NO_LOGP = 1000, 65535


@dataclass(frozen=True)
class _Sources:
    """Where the report's parts come from; None where it does without one."""

    table: Path
    selection: Path | None
    logps: Path | None
    tokenizer: object | None
    oracle_tokenizer: Path | None


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
        run: a run folder. The report reads its recipe, manifest, metrics, training states, log-probabilities,
            selection and tokenizer. None for a score table alone.
        table: a score table (folder or parquet file); by default the run's `scores/`.
        selection: a selection table made from that score table; by default the run's `selection/`.
        tokenizer: a folder with a `tokenizer.json`, or a loaded fast tokenizer; by default the run's.
            Without a tokenizer, tokens are shown by id.
        out: the HTML file to write.
        max_pairs: most pairs to show, evenly spaced over the table; the figures use all pairs.
        k_chosen, k_rejected: selection rates at which the sliders start, in (0, 1]; by default the rates of the
            selection, or 0.3.
        title: the heading; by default the name in the run's manifest, or that of the folder or table.

    Returns:
        The path of the file.

    Raises:
        UserError: a file is missing or cannot be read, or the parts do not belong together.
    """
    check_number("max_pairs", max_pairs, whole=True, least=1)
    for name, rate in (("k_chosen", k_chosen), ("k_rejected", k_rejected)):
        if rate is not None:
            check_rate(name, rate)
    run = None if run is None else _run_folder(run)
    sources = _sources(run, table, selection, tokenizer)
    scores = reading.read_scores(sources.table, max_pairs)
    if tokenizer is not None:
        reading.check_tokenizer(tokenizer, scores.rows, str(sources.table))
    token_texts = TokenTexts(None if sources.tokenizer is None else load_vocabulary(sources.tokenizer))
    documents = reading.read_documents(run, scores.provenance)
    title = title or _title(documents, run or sources.table)
    rates = _starting_rates(sources.selection, {"chosen": k_chosen, "rejected": k_rejected})
    header = {"title": title, "k": rates, "summary": scores.summary(), "documents": jsonable(documents)}
    of_oracle = _oracle_pairs(run, sources, scores)
    data = payload_of(scores, token_texts, header | _answers(run), sources.selection, sources.logps, of_oracle)
    out = Path(expand_home(out, "out"))
    write_bytes(out, page(title, data).encode("utf-8"))
    return out


def _run_folder(run: str | os.PathLike) -> Path:
    folder = Path(expand_home(run, "the run folder"))
    if not folder.is_dir():
        raise UserError(f"no run folder at '{folder}': expected the folder that `sepo run` wrote")
    return folder


def _answers(run: Path | None) -> dict[str, object]:
    """The answers of the evaluation, for the header."""
    if run is None or (answers := reading.read_answers(run / "eval" / GENERATIONS)) is None:
        return {}
    return {"answers": answers | reading.answer_settings(run)}


def _title(documents: Mapping[str, object], place: Path) -> str:
    """The name in the run's manifest, or that of the folder or table."""
    manifest = documents.get("manifest")
    recorded = manifest.get("name") if isinstance(manifest, dict) else None
    return str(recorded or place.resolve().name)


def _oracle_pairs(run: Path | None, sources: _Sources, scores: Scores) -> tuple[pa.Table, TokenTexts] | None:
    """The shown pairs under the oracle's tokenizer, if the policy has its own."""
    if run is None or sources.oracle_tokenizer is None:
        return None
    rows = reading.rows_of(run / "scores", scores.rows["pair_id"])
    return rows, TokenTexts(load_vocabulary(sources.oracle_tokenizer))


def _sources(
    run: Path | None,
    table: str | os.PathLike | None,
    selection: str | os.PathLike | None,
    tokenizer: str | os.PathLike | object | None,
) -> _Sources:
    """The given parts, completed by those of the run."""
    if run is None and table is None:
        raise UserError("nothing to report on: give a run folder or a score table")
    logps = oracle_tokenizer = None
    if table is None and run is not None and reading.has_transfer(run):
        # The policy was trained on its own tokens; the page can show the oracle's tokens below them.
        table = run / "transfer" / "scores"
        selection = selection or (run / "selection" if (run / "selection").exists() else None)
        tokenizer = tokenizer or reading.find_tokenizer(run, ("policy",))
        oracle_tokenizer = reading.find_tokenizer(run, ("reference", "oracle"))
    elif table is None:
        assert run is not None
        table = run / "scores"
        # The run's selection and log-probabilities belong to its own score table, not to another table.
        if selection is None and (run / "selection").exists():
            selection = run / "selection"
        logps = run / "logps" / "reference" if (run / "logps" / "reference").exists() else None
    selection = None if selection is None else Path(expand_home(selection, "the selection table"))
    if tokenizer is None and run is not None:
        tokenizer = reading.find_tokenizer(run)
    table = Path(expand_home(table, "the score table"))
    if tokenizer is None and (table / "tokenizer" / "tokenizer.json").exists():
        tokenizer = table / "tokenizer"
    return _Sources(table, selection, logps, tokenizer, oracle_tokenizer)


def _starting_rates(selection: Path | None, given: Mapping[str, float | None]) -> dict[str, float]:
    """The given rates, else those that the selection records, else 0.3."""
    recorded = reading.selection_settings(selection)
    rates = {}
    for side in SIDES:
        rate = given[side] if given[side] is not None else recorded.get(f"k_{side}")
        rates[side] = float(rate) if isinstance(rate, int | float) and 0 < rate <= 1 else 0.3
    return rates


def payload_of(
    scores: Scores,
    token_texts: TokenTexts,
    header: Mapping[str, object],
    selection: Path | None = None,
    logps: Path | None = None,
    oracle_pairs: tuple[pa.Table, TokenTexts] | None = None,
) -> str:
    """The page's data block.

    Args:
        header: what `report.js` reads beside the pairs: `title`, `k`, `summary`, `documents`.
        oracle_pairs: the same pairs under the oracle's tokenizer, where the policy has another.
    """
    rows = scores.rows
    arrays = _token_arrays(rows, token_texts)
    include_end = bool(reading.selection_settings(selection).get("include_end", False))
    margins = np.zeros(len(rows))
    for side, sign in SIGNED_SIDES:
        if side not in scores.rewards:
            continue
        rewards, lengths = flat(rows[f"{side}_rewards"])
        arrays[f"{side}_rewards"] = rewards.astype(np.float32)
        ended = turn_ends(rows, side) if not include_end else np.zeros(len(rewards), bool)
        arrays[f"{side}_ended"] = smallest_unsigned(segment_sums(ended, lengths).astype(np.int64))
        arrays[f"{side}_ends"] = smallest_unsigned(
            np.flatnonzero(ended) - np.repeat(np.cumsum(lengths) - lengths, lengths)[ended]
        )
        margins += sign * segment_sums(rewards, lengths)
    arrays["margins"] = margins
    if selection is not None:
        arrays |= {f"{side}_weights": weights for side, weights in reading.read_selection(selection, rows).items()}
    if logps is not None:
        for side, values in reading.read_logps(logps, rows).items():
            scaled = np.clip(np.nan_to_num(-values * _LOGP_SCALE), 0, _NO_LOGP - 1).round()
            arrays[f"{side}_logps"] = np.where(np.isnan(values), _NO_LOGP, scaled).astype(np.uint16)
    arrays |= _prompt_bounds(rows, token_texts)
    more = {}
    if oracle_pairs is not None:
        oracle_rows, oracle_texts = oracle_pairs
        for side in SIDES:
            values, lengths = flat(oracle_rows[f"{side}_ids"])
            arrays[f"other_{side}_lengths"] = smallest_unsigned(lengths)
            arrays[f"other_{side}_pieces"] = smallest_unsigned(oracle_texts.encode(values, lengths))
            arrays[f"other_{side}_rewards"] = flat(oracle_rows[f"{side}_rewards"])[0].astype(np.float32)
        more = {"other": _listed(oracle_texts)}
    return pack(
        {
            **header,
            **more,
            "sides": list(scores.rewards),
            "questions": _questions(rows),
            "pair_ids": rows["pair_id"].to_pylist(),
            "pieces": _listed(token_texts),
            "facets": reading.facets(rows),
            "logp_scale": _LOGP_SCALE,
        },
        arrays,
    )


def _questions(rows: pa.Table) -> list[str] | None:
    """The beginning of each conversation in words; None for tables of earlier releases, which show the prompt's ids."""
    if CONVERSATION not in rows.column_names:
        return None
    return [in_words(conversation.messages)[:_PREVIEW] for conversation in conversations_of(rows)]


_PREVIEW = 300  # characters


def _token_arrays(rows: pa.Table, token_texts: TokenTexts) -> dict[str, np.ndarray]:
    """The lengths of prompts, responses and the context within them, and the number of every token's text."""
    names = ("prompt", *SIDES, *(f"{side}_context" for side in SIDES))
    ids = {name: flat(rows[f"{name}_ids"]) for name in names if f"{name}_ids" in rows.column_names}
    all_ids = np.concatenate([values for values, _ in ids.values()])
    all_lengths = np.concatenate([lengths for _, lengths in ids.values()])
    numbers = token_texts.encode(all_ids, all_lengths)
    arrays = {}
    start = 0
    for name, (values, lengths) in ids.items():
        arrays[f"{name}_lengths"] = smallest_unsigned(lengths)
        arrays[f"{name}_pieces"] = smallest_unsigned(numbers[start : start + len(values)])
        start += len(values)
    for side in SIDES if "chosen_context_at" in rows.column_names else ():
        arrays[f"{side}_context_at"] = smallest_unsigned(flat(rows[f"{side}_context_at"])[0])
    return arrays


def _prompt_bounds(rows: pa.Table, token_texts: TokenTexts) -> dict[str, np.ndarray]:
    """The tokens at each prompt's start and end that most prompts share; previews leave them out."""
    special = token_texts.vocabulary.special if token_texts.vocabulary else frozenset()
    newlines = {text.token_id for text in token_texts.texts if "\n" in text.text}
    prompts = rows["prompt_ids"].to_pylist()
    bounds = {}
    for name, order in (("starts", 1), ("ends", -1)):
        common = common_starts([prompt[::order] for prompt in prompts], lambda id_: id_ in special or id_ in newlines)
        bounds[f"prompt_{name}"] = smallest_unsigned(np.array(common))
    return bounds


def _listed(token_texts: TokenTexts) -> dict[str, object]:
    """The token texts by number, as columns."""
    texts = token_texts.texts
    return {
        "id": [text.token_id for text in texts],
        "shown": [text.shown for text in texts],
        "label": [text.label for text in texts],
        "text": {str(i): text.text for i, text in enumerate(texts) if text.text != text.shown},
    }


def page(title: str, data: str) -> str:
    """The HTML page around a data block."""
    style, script = _asset("report.css"), _asset("report.js")
    policy = (
        f"default-src 'none'; script-src {_source_hash(script)}; style-src {_source_hash(style)}; "
        "img-src blob:; base-uri 'none'; form-action 'none'"
    )
    parts = {"title": html.escape(title), "policy": policy, "style": style, "script": script, "data": data}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("template.html"))


def page_style() -> str:
    """The style sheet of every HTML page."""
    return _asset("report.css")


def _asset(name: str) -> str:
    return resources.files("sepo.report").joinpath(name).read_text(encoding="utf-8")


def _source_hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") + "'"
