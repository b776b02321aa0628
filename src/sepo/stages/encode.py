"""Tokenising as units of work: a unit is 1,000 rows of a dataset, and leaves their token ids before truncation.

Every worker reads the source itself. The process that asked joins the parts in order (`data.encoding`), because
truncation, the split and the digest of the dataset need all rows; it then removes the parts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from sepo import work
from sepo.data.encoding import ROWS_AT_ONCE, Encoded, Encoder, encode_rows, make_encoder
from sepo.data.fingerprints import short_digest, tokenizer_fingerprint
from sepo.data.loading import read_rows, source_fingerprint
from sepo.data.tables import arrow_file, table_digest, write_parquet
from sepo.errors import UserError, one_line
from sepo.files import digest, write_bytes
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.settings import DataSettings
from sepo.work import Counts, Job, Progress, Unit

_KEY = b"sepo_part"
_COUNTS = ("rows", "drops", "notes", "markup", "chats")


def encoded_by_units(
    settings: DataSettings, split: str, source: str, dataset: datasets.Dataset, encoder: Encoder, as_chat: bool
) -> Generator[Encoded]:
    """The rows of a dataset as token ids, part by part, tokenised by the present engine.

    Args:
        source: file or name that the settings' source stands for.
    """
    tokenizer = encoder.tokenizer
    values: dict[str, Any] = {
        "data": settings.model_dump(mode="json", exclude={"workers"}) | {"source": work.absolute(settings.source)},
        "split": split,
        "source": work.absolute(source),
        "source_fingerprint": source_fingerprint(source),
        "columns": dataset.column_names,
        "as_chat": as_chat,
        "tokenizer": work.absolute(tokenizer.name_or_path),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "template": short_digest(str(tokenizer.chat_template or "")),
    }
    folder = work.shared_folder() / "parts" / digest(values)
    values["out"] = str(folder)
    starts = range(0, len(dataset), ROWS_AT_ONCE)
    units = tuple(
        Unit(f"rows-{start:09d}", min(ROWS_AT_ONCE, len(dataset) - start), {"start": start}) for start in starts
    )
    work.do(Job("sepo.stages.encode:Encodings", f"tokenise {split}", values, units))
    for unit in units:
        yield _read(folder, unit)
    shutil.rmtree(folder)


class Encodings:
    """A kind of work: rows of a dataset as token ids."""

    def __init__(self, settings: Mapping[str, Any]):
        from sepo.stages.data import read_split

        self.settings = settings
        data = DataSettings(**settings["data"])
        tokenizer = load_tokenizer(settings["tokenizer"])
        found = tokenizer_fingerprint(tokenizer), short_digest(str(tokenizer.chat_template or ""))
        if found != (settings["tokenizer_fingerprint"], settings["template"]):
            raise UserError(
                f"the tokenizer '{settings['tokenizer']}' is not the same here as where the job was started"
            )
        if source_fingerprint(settings["source"]) != settings["source_fingerprint"]:
            raise UserError(f"the data '{settings['source']}' are not the same here as where the job was started")
        self.encoder = make_encoder(tokenizer, data.chat_template_kwargs)
        self.rows = read_split(data, settings["split"]).select_columns(settings["columns"])

    def __call__(self, units: Iterable[Unit], progress: Progress) -> Iterator[tuple[Unit, Callable[[], Counts]]]:
        for unit in units:
            start = unit.details["start"]
            rows = read_rows(self.rows, start, min(start + ROWS_AT_ONCE, len(self.rows)))
            part = encode_rows(self.encoder, self.settings["as_chat"], start, rows)
            progress(unit.size)
            yield unit, partial(self._write, unit, part)

    def _write(self, unit: Unit, part: Encoded) -> Counts:
        folder = Path(self.settings["out"])
        write_bytes(folder / f"{unit.name}.rows", part.digested)
        about = {name: getattr(part, name) for name in _COUNTS}
        about["digest"] = table_digest(part.table)
        table = part.table.replace_schema_metadata({_KEY: json.dumps(about).encode()})
        write_parquet(folder / f"{unit.name}.parquet", table)
        return {"rows": part.rows, "pairs": len(part.table)}

    @staticmethod
    def result(settings: Mapping[str, Any], unit: Unit) -> str | None:
        path = Path(settings["out"]) / f"{unit.name}.parquet"
        try:
            with arrow_file(path) as file:
                return json.loads(pq.read_schema(file).metadata[_KEY])["digest"]
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return None


def _read(folder: Path, unit: Unit) -> Encoded:
    path = folder / f"{unit.name}.parquet"
    try:
        with arrow_file(path) as file:
            table = pq.read_table(file)
        about = json.loads(table.schema.metadata[_KEY])
        digested = (folder / f"{unit.name}.rows").read_bytes()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"'{path}', which a worker wrote, cannot be read ({one_line(error, 120)})") from None
    if table_digest(table) != about["digest"]:
        raise UserError(f"'{path}' was altered since it was written: remove it, and give the same command again")
    counts = {name: about[name] for name in _COUNTS} | {"drops": [tuple(drop) for drop in about["drops"]]}
    return Encoded(**counts, table=table.replace_schema_metadata(None), digested=digested)
