"""Answering, and judging with a reward model, as units of work: a unit is one batch of token ids.

The process that asks cuts the batches, as one process alone would, so that the values are the same bytes whoever reads
a batch. A unit leaves a JSON file; the process that asked reads these files in order and removes them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sepo import work
from sepo.bars import progress_bar
from sepo.errors import UserError
from sepo.files import digest, file_digest, write_json
from sepo.work import Counts, Job, Progress, Unit

FOLDER = ".batches"


class _Batches:
    """A kind of work: batches of token ids in, a JSON list with a value for each row out."""

    def __init__(self, settings: Mapping[str, Any]):
        from sepo.models.fingerprint import model_fingerprint

        self.settings = settings
        if model_fingerprint(settings["model"], revision=settings["revision"]) != settings["fingerprint"]:
            raise UserError(f"the model '{settings['model']}' is not the same here as where the job was started")

    def read(self, details: Mapping[str, Any]) -> list[Any]:
        """The values of a batch."""
        raise NotImplementedError

    def __call__(self, units: Iterable[Unit], progress: Progress) -> Iterator[tuple[Unit, Callable[[], Counts]]]:
        for unit in units:
            values = self.read(unit.details)
            progress(unit.size)
            yield unit, partial(self._write, unit, values)

    def _write(self, unit: Unit, values: list[Any]) -> Counts:
        write_json(_path(self.settings, unit), {"unit": unit.name, "values": values}, indent=None)
        return {"rows": len(values)}

    @staticmethod
    def result(settings: Mapping[str, Any], unit: Unit) -> str | None:
        path = _path(settings, unit)
        return file_digest(path) if path.is_file() else None


class Answers(_Batches):
    """Sampled responses: `[ids, whether the model ended it]` for each prompt."""

    def __init__(self, settings: Mapping[str, Any]):
        from sepo.models.tokenizer import load_tokenizer
        from sepo.models.weights import load_model

        super().__init__(settings)
        self.tokenizer = load_tokenizer(settings["model"])
        self.model = load_model(settings["model"], device=settings["device"], dtype=settings["dtype"])

    def read(self, details: Mapping[str, Any]) -> list[Any]:
        from sepo.evaluate.generate import generate_responses

        responses = generate_responses(
            self.model,
            self.tokenizer,
            details["prompts"],
            max_new_tokens=self.settings["max_new_tokens"],
            temperature=details["temperature"],
            seed=self.settings["seed"],
            batch_size=len(details["prompts"]),
            progress=False,
        )
        return [[list(map(int, one.response_ids)), bool(one.finished)] for one in responses]


class Rewards(_Batches):
    """Scores of a reward model."""

    def __init__(self, settings: Mapping[str, Any]):
        from sepo.judging.scorers import load_reward_model

        super().__init__(settings)
        self.model = load_reward_model(settings["model"], settings["revision"], settings["device"], settings["dtype"])

    def read(self, details: Mapping[str, Any]) -> list[Any]:
        return self.model.read_batch(details["rows"]).tolist()


def _path(settings: Mapping[str, Any], unit: Unit) -> Path:
    return Path(settings["out"]) / f"{unit.name}.json"


def read_batches(
    kind: type[_Batches],
    title: str,
    settings: Mapping[str, Any],
    batches: Sequence[tuple[int, dict[str, Any]]],
    out: Path,
) -> list[list[Any]]:
    """The values of batches, in order, with the present engine.

    Args:
        kind: `Answers` or `Rewards`.
        settings: `model`, its `revision`, `device`, `dtype`, and those of the kind.
        batches: rows of each, and the details for `kind.read`.
        out: folder of the command.
    """
    from sepo.models.devices import choose_device
    from sepo.models.fingerprint import model_fingerprint

    device = choose_device(settings["device"])
    model = {
        "model": work.absolute(settings["model"]),
        "fingerprint": model_fingerprint(settings["model"], revision=settings["revision"]),
    }
    folder = out / FOLDER / digest([kind.__name__, title, model, settings, batches])
    everything = {**settings, **model, "out": str(folder.resolve())}
    units = tuple(Unit(f"batch-{number:05d}", rows, details) for number, (rows, details) in enumerate(batches))
    job = Job(f"sepo.judging.units:{kind.__name__}", title, everything, units, device.type)
    with progress_bar(True, total=sum(unit.size for unit in units), desc=f"  {title}", unit="row") as bar:
        work.do(job, bar.update)
    values = [json.loads(_path(everything, unit).read_text(encoding="utf-8"))["values"] for unit in units]
    shutil.rmtree(out / FOLDER)
    return values


def reward_units(name: str, *, revision: str | None, device: str, dtype: str, out: Path) -> Any:
    """A scorer that is a reward model read by the present engine; as `scorers.reward_scorer`."""
    from sepo.judging.scorers import ConversationReader, Judged

    reader = ConversationReader.of_model(name, revision)

    def score(conversations: Sequence[Judged]) -> np.ndarray:
        from sepo.models.devices import choose_device

        scores = np.full(len(conversations), np.nan)
        order = list(reader.batches(conversations, choose_device(device).type))
        settings = {"model": name, "revision": revision, "device": device, "dtype": dtype}
        batches = [(len(places), {"rows": rows}) for places, rows in order]
        for (places, _), values in zip(order, read_batches(Rewards, "judge", settings, batches, out), strict=True):
            scores[places] = [math.nan if value is None else value for value in values]
        return scores

    return score
