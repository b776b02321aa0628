"""What sampling adds to a run with `data.on_policy`: the stages before the data.

prompts          the pairs of data.source, tokenised and split; sampling reads their training prompts
samples          several answers of a model to each prompt
responses        the same with scores
sampled_pairs    preference pairs of them with a data card, and the held-out pairs of data.source
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from sepo import processes
from sepo.data.fingerprints import tokenizer_fingerprint
from sepo.data.messages import read_cell
from sepo.data.rows import DROP_COLUMN
from sepo.data.tables import read_table, with_provenance, write_parquet
from sepo.errors import UserError
from sepo.files import digest
from sepo.models.folders import read_json_object
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.processes import log
from sepo.recipe.settings import OnPolicySettings, Recipe
from sepo.runs.method import Extension, Method, Walker
from sepo.sampling.answers import How, sample_all, transformers_source
from sepo.sampling.folder import RECORD, lines_of, write_pairs_folder
from sepo.sampling.pairs import pairs_of
from sepo.sampling.prompts import Prompt, prompts_of_pairs, read_prompts, some_prompts
from sepo.sampling.responses import (
    RESPONSES,
    SAMPLED,
    SCORED,
    Answers,
    Grown,
    counts_of,
    made_with,
    messages_of,
    read_responses,
    responses_table,
    write_responses,
)
from sepo.sampling.scores import Scoring, score_all
from sepo.stages import data
from sepo.stages.evaluate import unanswered
from sepo.stages.stage import Model, Stage, StageResult

PAIRS, HELD_OUT = "data/train.parquet", "held_out.parquet"


def check(recipe: Recipe) -> None:
    """Check prompts and judge before anything expensive starts."""
    settings = recipe.data.on_policy
    if settings is None:
        return
    if processes.launched() > 1:
        raise UserError("data.on_policy samples in one process: run it without a launcher up to the stage data first")
    scoring_of(settings).check()
    if settings.prompts is not None:
        read_prompts(settings.prompts)


def before_data(recipe: Recipe, walker: Walker, extension: Extension) -> Recipe:
    """Do the stages before the data; returns the recipe that trains on the sampled pairs.

    A walker that only plans gets the recipe with the pairs of data.source: the sampled ones do not exist yet.
    """
    settings = recipe.data.on_policy
    assert settings is not None
    plain = recipe.model_copy(update={"data": recipe.data.model_copy(update={"on_policy": None}), "rounds": None})
    method = Method(plain, walker, extension=extension)
    tokenizer = load_tokenizer(recipe.reference.model, revision=recipe.reference.revision)
    prompts = walker.do(data.stage(plain, tokenizer), "prompts")
    model = method.policy_start if settings.model is None else walker.model(settings.model)
    samples = walker.do(sample_stage(recipe, settings, model, prompts), "samples")
    responses = walker.do(score_stage(recipe, settings, samples), "responses")
    pairs = walker.do(pairs_stage(recipe, settings, responses, prompts), "sampled_pairs")
    if not (pairs.folder / PAIRS).is_file():
        return plain
    return plain.model_copy(update={"data": _sampled_data(recipe, pairs)})


def metrics_of(method: Method) -> dict[str, float]:
    """Counts of the sampled pairs, and their lengths, for the metrics of a run; empty in a plan."""
    record = Path(method.recipe.data.source).parent.parent / RECORD
    if not record.is_file():
        return {}
    values = read_json_object(record)
    return {f"on_policy/{name}": float(value) for name, value in values.items() if isinstance(value, int | float)}


def _sampled_data(recipe: Recipe, pairs: StageResult) -> Any:
    """Settings that read the sampled pairs, and the held-out pairs beside them."""
    held_out = pairs.folder / HELD_OUT
    changes: dict[str, Any] = {
        "source": str(pairs.folder / PAIRS),
        "split": "train",
        "config_name": None,
        "columns": {},
        "pairs_from": None,
        "sample": 1.0,
        "held_out": 0.0,
        "held_out_split": None,
        "held_out_source": str(held_out) if held_out.is_file() else None,
        "on_policy": None,
    }
    return recipe.data.model_copy(update=changes)


def scoring_of(settings: OnPolicySettings) -> Scoring:
    """What scores the answers."""
    return Scoring(settings.gold, settings.judge)


def how_of(recipe: Recipe, settings: OnPolicySettings) -> How:
    """How the answers are sampled."""
    seed = recipe.seed if settings.seed is None else settings.seed
    return How(tuple(settings.temperature_of()), settings.max_new_tokens, seed)


def sample_stage(recipe: Recipe, settings: OnPolicySettings, model: Model, prompts: StageResult) -> Stage:
    """Answers of a model to the prompts."""
    how = how_of(recipe, settings)
    depends = {
        "model": model.inherited(),
        "prompts": prompts.content,
        "file": settings.prompts and digest([prompt.key() for prompt in read_prompts(settings.prompts)]),
        "limit": settings.limit,
        "part": settings.part,
        "how": how.key(),
        "chat_template_kwargs": recipe.data.chat_template_kwargs,
        "dtype": recipe.dtype,
    }

    def run(folder: Path) -> dict[str, Any]:
        asked = _prompts(recipe, settings, prompts, model)
        made = {"model": _name(recipe, settings), **how.key(), "prompts": settings.prompts or recipe.data.source}
        tokenizer = load_tokenizer(model.folder)

        def source() -> Any:
            loaded = load_model(model.folder, device=recipe.device, dtype=recipe.dtype)
            options = recipe.data.chat_template_kwargs
            return transformers_source(loaded, tokenizer, asked, how, batch_size=settings.batch_size, options=options)

        answers = sample_all(asked, source, Grown(folder / SAMPLED, digest(depends)))
        whole = [one for one in answers if one is not None]
        table = responses_table(
            asked, whole, None, temperatures=how.temperatures, seed=how.seed, made_with={"made_with": made}
        )
        write_responses(folder / RESPONSES, table)
        (folder / SAMPLED).unlink(missing_ok=True)
        counts = counts_of(table)
        log(f"  {counts['prompts']:,} prompts, {counts['answers']:,} answers, {counts['cut']:,} of them cut off")
        return {name: counts[name] for name in ("prompts", "answers", "cut", "no_answer", "tokens")}

    what, facts = f"{settings.samples} answers a prompt", {"settings": settings, "dtype": recipe.dtype}
    return Stage("samples", what, depends, (RESPONSES,), run, facts, verifies=True)


def _name(recipe: Recipe, settings: OnPolicySettings) -> str:
    """The name of the model that answers."""
    return settings.model or recipe.policy.model or recipe.reference.model


def _prompts(recipe: Recipe, settings: OnPolicySettings, prompts: StageResult, model: Model) -> list[Prompt]:
    """The prompts to answer; with the ids of the data where the model has the data's tokenizer."""
    if settings.prompts is not None:
        asked = read_prompts(settings.prompts)
    else:
        table = read_table(prompts.folder / "train", "pairs")
        asked = prompts_of_pairs(table, _plain_prompts(recipe, table))
        known = load_tokenizer(recipe.reference.model, revision=recipe.reference.revision)
        if tokenizer_fingerprint(load_tokenizer(model.folder)) != tokenizer_fingerprint(known):
            asked = [prompt._replace(ids=None) for prompt in asked]
    return some_prompts(asked, limit=settings.limit, part=settings.part, seed=recipe.seed)


def _plain_prompts(recipe: Recipe, table: pa.Table) -> list[bool]:
    """For each pair whether its data wrote the prompt as a text, which no chat template renders."""
    rows = data.read_split(recipe.data, recipe.data.split)
    if recipe.data.as_chat or "prompt" not in rows.column_names:
        return [False] * len(table)
    cells = _rows_of(rows, table)["prompt"]
    return [isinstance(cell, str) and isinstance(read_cell(cell), str) for cell in cells]


def _rows_of(rows: datasets.Dataset, pairs: pa.Table) -> datasets.Dataset:
    """The rows of a source that a table of pairs was made of, in the order of the pairs."""
    ids = list(rows["pair_id"]) if "pair_id" in rows.column_names else []
    if len(set(ids)) < len(rows):  # numbered again when they were tokenised
        ids = list(range(len(rows)))
    places = {pair_id: place for place, pair_id in enumerate(ids)}
    return rows.select([places[pair_id] for pair_id in pairs.column("pair_id").to_pylist()])


def score_stage(recipe: Recipe, settings: OnPolicySettings, samples: StageResult) -> Stage:
    """The answers with their scores."""
    scoring = scoring_of(settings)
    depends = {"samples": samples.content, "scoring": lambda: scoring.key()}

    def run(folder: Path) -> dict[str, Any]:
        table = read_responses(samples.folder)
        prompts = [Prompt(tuple(messages)) for messages in _messages(table)]
        columns = ("answers", "finish_reasons", "tokens")
        rows = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
        answers = [Answers(texts, ends, tokens, [], []) for texts, ends, tokens in rows]
        grown = Grown(folder / SCORED, digest([samples.content, scoring.key()]))
        scores, missing = score_all(prompts, answers, scoring, grown, recipe.device)
        place, column = table.schema.get_field_index("scores"), table.schema.field("scores")
        table = table.set_column(place, column, pa.array(scores, column.type))
        made = {"made_with": {**made_with(table), "scored by": scoring.name}}
        write_responses(folder / RESPONSES, with_provenance(table, "responses", made))
        (folder / SCORED).unlink(missing_ok=True)
        counts = counts_of(table)
        if counts["no_score"]:
            log(f"  {counts['no_score']:,} of {counts['answers']:,} answers have no score")
        return {"no_score": counts["no_score"], "unanswered": missing}

    return Stage(
        "responses",
        scoring.name,
        depends,
        (RESPONSES,),
        run,
        verifies=True,
        missing=lambda results: unanswered(results.get("unanswered")),
    )


def _messages(table: pa.Table) -> list[list[dict[str, Any]]]:
    return [messages_of({"conversation": text}) for text in table.column("conversation").to_pylist()]


def pairs_stage(recipe: Recipe, settings: OnPolicySettings, responses: StageResult, prompts: StageResult) -> Stage:
    """Preference pairs of the answers, and the held-out pairs as they are in the source."""
    how = how_of(recipe, settings)

    def run(folder: Path) -> dict[str, Any]:
        table = read_responses(responses.folder)
        made = pairs_of(table, settings.pick, settings.min_gap, how.seed)
        origin = {**made_with(table), "min_gap": settings.min_gap}
        results = write_pairs_folder(folder, made, table, origin, rule=settings.pick, name=recipe.name)
        for line in lines_of(made, results):
            log(f"  {line}")
        _write_held_out(recipe, prompts, folder / HELD_OUT)
        return results

    return Stage(
        "sampled_pairs",
        settings.pick,
        {
            "responses": responses.content,
            "prompts": prompts.content,
            "pick": settings.pick,
            "min_gap": settings.min_gap,
            "seed": how.seed,
        },
        ("data/*", "pairs.json", HELD_OUT),
        run,
    )


def _write_held_out(recipe: Recipe, prompts: StageResult, path: Path) -> None:
    """The held-out pairs in the notation of their source."""
    settings = recipe.data
    table = read_table(prompts.folder / "held_out", "pairs")
    if not len(table):
        return
    own = data.has_own_rows(settings)
    if settings.source.startswith("embedded:") and settings.held_out_source is None:
        rows = data.read_split(settings, settings.held_out_split or "held_out")
    elif own:
        rows = data.read_split(*data.held_out_data(settings, settings.held_out_split))
    else:
        rows = data.read_split(settings, settings.split)
    rows = _rows_of(rows, table)
    kept = [name for name in rows.column_names if name not in (DROP_COLUMN, "pair_id")]
    write_parquet(path, rows.select_columns(kept).with_format("arrow")[:])
