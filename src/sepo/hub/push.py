"""Upload a finished run to the hub: the policy or the oracle as a model, the token rewards as a dataset, with a card.

`plan` lists the files and writes nothing; `upload` creates the repository and one commit; `write` writes the same files
to a folder. huggingface_hub finds the
token: `$HF_TOKEN`, or the token that `hf auth login` stored.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from sepo.data.conversation import CONVERSATION, conversations_of
from sepo.data.ragged import SIDES, as_read, flat, ragged
from sepo.data.tables import PAIR_WEIGHT, iter_tables, number_of_rows, table_paths, write_parquet
from sepo.errors import UserError, named_error
from sepo.files import replace_folder
from sepo.hub import card
from sepo.hub.merge import merge_adapter
from sepo.models.folders import is_adapter, read_json_object, weight_files
from sepo.models.tokenizer import load_tokenizer
from sepo.numbers import size
from sepo.recipe.reading import load_recipe
from sepo.recipe.settings import Recipe
from sepo.report.reading import find_tokenizer, has_transfer, read_selection

What = Literal["policy", "oracle", "scores", "pairs"]
# The files of a model folder to upload: no checkpoints, no event files, and not the training history, which names
# folders of this machine.
_MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")
_EXCLUDED = {"trainer_state.json"}
_CACHED = re.compile(r".*/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]+)/?")
# Files of an earlier upload that would be loaded together with the new ones.
_STALE = re.compile(r"[^/]*\.safetensors(\.index\.json)?|(adapter_)?config\.json|data/[^/]*\.parquet")


class File(NamedTuple):
    """A file to upload: its path in the repository, and its content or its local path."""

    name: str
    content: bytes | Path

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class PushPlan:
    """The content of an upload.

    Attributes:
        repo_type: "model" or "dataset".
        files: files that exist already.
        tables: score tables to write as parquet files: split, folder, and folder of the selection.
        tokenizer: tokenizer of the tables.
        merge: an adapter to upload as a whole model, merged into its base when it is uploaded.
    """

    repo_type: Literal["model", "dataset"]
    files: list[File]
    tables: list[tuple[str, Path, Path | None]]
    tokenizer: str | None = None
    merge: Path | None = None

    def lines(self) -> list[dict[str, str]]:
        """Name and size of every file."""
        rows = [{"name": file.name, "size": size(file.size)} for file in self.files]
        for split, folder, _ in self.tables:
            rows.append({"name": f"data/{split}-*.parquet", "size": f"{_pairs(folder):,} pairs"})
        if self.merge is not None:
            rows.append({"name": "the adapter and its base as one model", "size": "merged for the upload"})
        return rows


def plan(
    run: Path, what: What, *, base: str | None = None, license: str | None = None, merge: bool = False
) -> PushPlan:
    """List what of a run to upload.

    An adapter whose base is a GGUF file is merged: no adapter on the hub can name such a base.

    Args:
        base: hub id of the base model; needed if the base is a local folder and only an adapter was saved.
        merge: upload the whole model instead of an adapter.
        license: the hub's identifier of the licence, for the card.

    Raises:
        UserError: the folder is no finished run or lacks `what`, or the adapter's base is not on the hub.
    """
    if what == "pairs":
        return _plan_pairs(run)
    if not (run / "recipe.yaml").is_file() or not (run / "metrics.json").is_file():
        raise UserError(f"'{run}' is no finished run (recipe.yaml, metrics.json): expected a folder of `sepo run`")
    recipe = load_recipe(run / "recipe.yaml")
    metrics = read_json_object(run / "metrics.json")
    names = card.hub_names(run)
    if what == "scores":
        return _plan_scores(run, recipe, license)
    folder = run / what
    if not folder.is_dir() or not weight_files(folder):
        given = recipe.oracle.model if what == "oracle" else None
        why = f": the run used '{given}' without training it" if given else ""
        raise UserError(f"'{run}' trained no {what}{why}; expected {what}/*.safetensors")
    start = (recipe.policy.model if what == "policy" else None) or recipe.reference.model
    trained_first = what == "oracle" or recipe.policy.model is None
    if trained_first and (recipe.reference.sft is not None or recipe.reference.layers is not None):
        start_id = base  # the base exists only in the run folder
    else:
        start_id = base or card.hub_id(start, names)
    merge = _is_merged(folder, base, merge)
    files = {} if merge else {path.name: File(path.name, path) for path in _model_files(folder)}
    if is_adapter(folder) and not merge:
        config, start_id = _adapter_config(folder, base, start_id, names)
        files["adapter_config.json"] = File("adapter_config.json", config)
    license = license or card.license_beside(start, names)
    if what == "policy" and not card.may_write(folder / card.CARD):
        text = (folder / card.CARD).read_text(encoding="utf-8")
    elif what == "policy":
        text = card.policy_card_of_run(run, recipe, metrics, base=start_id, license=license, merged=merge)
    else:
        adapter = is_adapter(folder) and not merge
        text = card.oracle_card(recipe, metrics, names=names, base=start_id, adapter=adapter, license=license)
    card_and_files = [File(card.CARD, text.encode()), *files.values()]
    return PushPlan("model", card_and_files, [], merge=folder if merge else None)


def _is_merged(folder: Path, base: str | None, asked: bool) -> bool:
    """Whether a model goes up as a whole although an adapter was saved."""
    if not is_adapter(folder):
        if asked:
            raise UserError(f"'{folder}' is a whole model: leave --merge out")
        return False
    named = str(read_json_object(folder / "adapter_config.json").get("base_model_name_or_path"))
    return asked or (base is None and named.lower().endswith(".gguf"))


def _plan_pairs(folder: Path) -> PushPlan:
    """The folder of `sepo pairs`, or that of a run's sampled pairs, with its card."""
    folder = folder / "sampled_pairs" if (folder / "sampled_pairs").is_dir() else folder
    files = sorted((folder / "data").glob("train*")) if (folder / card.CARD).is_file() else []
    if not files:
        raise UserError(f"'{folder}' holds no sampled pairs: expected data/ and README.md, as `sepo pairs` writes them")
    listed = [File(path.relative_to(folder).as_posix(), path) for path in (folder / card.CARD, *files)]
    return PushPlan("dataset", listed, [])


def _plan_scores(run: Path, recipe: Recipe, license: str | None) -> PushPlan:
    folder = run / "transfer" if has_transfer(run) else run
    if not (folder / "scores").is_dir():
        raise UserError(f"'{run}' holds no token rewards (scores/): expected a run that scored its pairs")
    tokenizer = find_tokenizer(run, ("policy",) if has_transfer(run) else ("reference", "oracle", "policy"))
    if tokenizer is None:
        raise UserError(f"'{run}' holds no tokenizer: expected policy/tokenizer.json")
    selection = run / "selection"
    splits = [("train", folder / "scores", selection if selection.is_dir() else None)]
    if (folder / "scores_held_out").is_dir() and _pairs(folder / "scores_held_out"):
        splits.append(("held_out", folder / "scores_held_out", None))
    model = recipe.policy.model if has_transfer(run) else recipe.reference.model
    counts = {name: _pairs(table) for name, table, _ in splits}
    text = card.table_card(recipe, counts, str(model), license, card.hub_names(run))
    return PushPlan("dataset", [File(card.CARD, text.encode())], splits, str(tokenizer))


def upload(plan: PushPlan, to: str, private: bool | None, api: HfApi | None = None) -> str:
    """Create the repository and upload everything in one commit; returns the repository's address.

    Raises:
        UserError: `to` is no repository name, there is no token or it has no write access, the hub cannot be reached,
            or `private` is set and a public repository of this name exists.
    """
    check_name(to)
    api = api or HfApi()
    with tempfile.TemporaryDirectory(prefix="sepo-push-") as temporary:
        files = [_named_in_card(file, to) for file in _all_files(plan, Path(temporary))]
        with _one_line_errors(to):
            return _commit(api, plan, files, to, private)


def write(plan: PushPlan, out: Path) -> None:
    """Write the files of an upload to a new folder; other libraries read it as they read the repository.

    Raises:
        UserError: the folder exists and is not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"'{out}' exists: choose a new folder")
    try:
        with replace_folder(out) as new, tempfile.TemporaryDirectory(prefix="sepo-push-", dir=new.parent) as temporary:
            for file in _all_files(plan, Path(temporary)):
                (new / file.name).parent.mkdir(parents=True, exist_ok=True)
                if isinstance(file.content, bytes):
                    (new / file.name).write_bytes(file.content)
                else:
                    shutil.copyfile(file.content, new / file.name)
    except OSError as error:
        raise UserError(f"cannot write '{out}' ({named_error(error)}): choose another folder") from None


def _all_files(plan: PushPlan, temporary: Path) -> list[File]:
    """The files of an upload; those that do not exist yet are written to `temporary`."""
    files = list(plan.files)
    for split, folder, selection in plan.tables:
        assert plan.tokenizer is not None
        files += write_shared(folder, selection, plan.tokenizer, split, temporary)
    if plan.merge is not None:
        merge_adapter(plan.merge, temporary / "merged")
        files += [File(path.name, path) for path in _model_files(temporary / "merged")]
    return files


def check_name(to: str) -> None:
    """Raise a UserError unless `to` is ORG/NAME."""
    try:
        validate_repo_id(to)
    except HFValidationError:
        pass
    else:
        if "/" in to:
            return
    raise UserError(f"--to {to}: expected ORG/NAME, with letters, digits and .-_")


def _commit(api: HfApi, plan: PushPlan, files: list[File], to: str, private: bool | None) -> str:
    url = api.create_repo(to, repo_type=plan.repo_type, private=private, exist_ok=True)
    if private and not api.repo_info(to, repo_type=plan.repo_type).private:
        raise UserError(f"'{to}' exists and is public: nothing was uploaded; choose another name")
    new = {file.name for file in files}
    stale = [
        name
        for name in api.list_repo_files(to, repo_type=plan.repo_type)
        if _STALE.fullmatch(name) and name not in new
    ]  # fmt: skip
    adds = [CommitOperationAdd(file.name, file.content) for file in files]
    removes = [CommitOperationDelete(name) for name in stale]
    api.create_commit(to, [*adds, *removes], commit_message="Upload of a sepo run", repo_type=plan.repo_type)
    return str(url)


@contextlib.contextmanager
def _one_line_errors(to: str) -> Iterator[None]:
    """Turn errors of the hub into a UserError of one line."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise UserError("no token for the hub: run `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise UserError("the hub is switched off (HF_HUB_OFFLINE): unset it to upload") from None
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        if code == 401:
            raise UserError("the hub rejects the token: run `hf auth login`, or set HF_TOKEN") from None
        if code == 403:
            raise UserError(f"the token may not write to '{to}': give it write access, or another name") from None
        raise UserError(f"the hub refused the upload to '{to}' ({named_error(error)}); run the command again") from None
    except (OSError, RuntimeError) as error:  # no network raises either
        raise UserError(f"the upload to '{to}' failed ({named_error(error)}); run the command again") from None


def _named_in_card(file: File, to: str) -> File:
    """A generated card with the repository's name in its code; other files unchanged."""
    if file.name != card.CARD or not isinstance(file.content, bytes) or not card.is_generated(file.content.decode()):
        return file
    return File(file.name, file.content.replace(b'"ORG/NAME"', f'"{to}"'.encode()))


def _model_files(folder: Path) -> list[Path]:
    files = {path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in files if path.name not in _EXCLUDED and not path.name.startswith("."))


def _adapter_config(folder: Path, base: str | None, start_id: str | None, names: Collection[str]) -> tuple[bytes, str]:
    """An adapter's config with the hub id of its base, and that id.

    Args:
        base: the hub id that the user gave.
        start_id: the hub id that the run records.
        names: those of the recipe that are on the hub.
    """
    config = read_json_object(folder / "adapter_config.json")
    named = str(config.get("base_model_name_or_path") or "")
    if base is not None:
        config["revision"] = None
    elif cached := _CACHED.fullmatch(named):
        base = f"{cached['owner']}/{cached['name']}"
        config["revision"] = cached["commit"]
    elif (base := start_id if start_id is not None else card.hub_id(named, names)) is None:
        raise UserError(
            f"the adapter in '{folder}' names its base by a path on this machine ('{named}'): give its hub id with "
            "--base ORG/NAME, or upload the whole model with --merge"
        )
    config["base_model_name_or_path"] = base
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), base


# --- token rewards as a dataset ------------------------------------------------------------------------------------


def write_shared(folder: Path, selection: Path | None, tokenizer: str, split: str, out: Path) -> list[File]:
    """Write a score table as plain parquet files with texts, tokens and weights, one per shard."""
    loaded = load_tokenizer(tokenizer)
    paths = table_paths(folder, "scores")
    files = []
    for number, table in enumerate(iter_tables(folder, "scores")):
        path = out / f"{split}-{number:05d}-of-{len(paths):05d}.parquet"
        write_parquet(path, with_texts(table, selection, loaded))
        files.append(File(f"data/{path.name}", path))
    return files


def with_texts(scores: pa.Table, selection: Path | None, tokenizer: Any) -> pa.Table:
    """Add texts, tokens and weights to a score table.

    Args:
        scores: a table of kind "scores".
        selection: a selection table of these pairs; weights of pairs that it lacks are null.
        tokenizer: the tokenizer of the table.

    Returns:
        The columns in `table_card.md`, rows in the same order.
    """

    def texts(column: Any) -> pa.Array:
        rows = column.to_pylist()
        return pa.array([tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in rows], pa.string())

    several = "chosen_context_ids" in scores.column_names
    read = {side: as_read(scores, side) for side in SIDES}
    ids_of = {side: ragged(*read[side][:2]) if several else scores[f"{side}_ids"] for side in SIDES}
    columns: dict[str, Any] = {
        "pair_id": scores["pair_id"],
        "prompt": _messages(scores),
        **({CONVERSATION: scores[CONVERSATION]} if CONVERSATION in scores.column_names else {}),
        "prompt_text": texts(scores["prompt_ids"]),
        "chosen": texts(ids_of["chosen"]),
        "rejected": texts(ids_of["rejected"]),
        "prompt_ids": scores["prompt_ids"],
    }
    weights = None if selection is None else read_selection(selection, scores)
    trained, pair_weights = _pair_weights(scores, selection)
    columns[PAIR_WEIGHT] = pa.array(pair_weights, mask=~trained)
    for side in SIDES:
        ids, lengths, own = read[side]
        columns[f"{side}_ids"] = ids_of[side]
        words = pa.array(tokenizer.convert_ids_to_tokens(ids.tolist()), pa.string())
        columns[f"{side}_tokens"] = pa.ListArray.from_arrays(ragged(ids, lengths).offsets, words)
        columns[f"{side}_rewards"] = scores[f"{side}_rewards"]
        values = np.zeros(len(ids), np.float32)
        if weights is not None:
            values[own] = weights[side]
        if several:
            rewards = np.zeros(len(ids), np.float32)
            rewards[own] = flat(scores[f"{side}_rewards"])[0]
            columns[f"{side}_rewards"] = ragged(rewards, lengths)
            columns[f"{side}_mask"] = ragged(own.astype(np.int8), lengths)
        offsets = ragged(values, lengths).offsets
        columns[f"{side}_weights"] = pa.ListArray.from_arrays(offsets, pa.array(values), mask=pa.array(~trained))
    return pa.table(columns)


def _messages(scores: pa.Table) -> pa.Array:
    """The messages of each prompt with role and content; null in tables of earlier releases, which do not have them."""
    type_ = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    if CONVERSATION not in scores.column_names:
        return pa.nulls(len(scores), type_)
    rows = [conversation.messages for conversation in conversations_of(scores)]
    return pa.array([[{name: turn[name] for name in ("role", "content")} for turn in row] for row in rows], type_)


def _pair_weights(scores: pa.Table, selection: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs the selection has, and the weight of each pair (0 for the others)."""
    known: dict[int, float] = {}
    for table in iter_tables(selection, "selection") if selection is not None else ():
        weights = table[PAIR_WEIGHT].to_pylist() if PAIR_WEIGHT in table.column_names else [1.0] * len(table)
        known.update(zip(table["pair_id"].to_pylist(), weights, strict=True))
    pair_ids = scores["pair_id"].to_pylist()
    trained = np.array([pair_id in known for pair_id in pair_ids], bool)
    return trained, np.array([known.get(pair_id, 0.0) for pair_id in pair_ids], np.float32)


def _pairs(folder: Path) -> int:
    return sum(number_of_rows(path) for path in table_paths(folder, "scores"))
