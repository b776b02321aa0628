"""Make the embedded task: preference pairs of SmolLM2's own short answers, labelled by sentiment.

    python scripts/make_sentiment_task.py --out src/sepo/assets/sentiment_pairs.parquet

The model itself writes several answers to each everyday prompt, so that the responses are on its distribution and the
mean sentiment leaves headroom (a prompt that asks for praise would not). Sampling is at temperature 0.7 from the 90 %
nucleus: at temperature 1 a model of this size writes nonsense. Only plain sentences that the model ended itself are
kept. Answers to one prompt are paired, and the label follows a Bradley-Terry model of the VADER compound score v:

    P(a is preferred to b) = sigmoid((v_a - v_b) / tau)

so labels are noisy, like human labels. The scores are stored beside the pairs to check labels; nothing trains on them.
Whole topics are held out, so no held-out prompt rewords a training prompt. The same seed, thread count and library
versions give the same file. The 4,480 answers take about 15 minutes on one idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor

from sepo.data.templates import stop_ids
from sepo.evaluate.gold import vader_scores
from sepo.evaluate.statistics import mean_and_se
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.recipe.settings import DEFAULT_MODEL

# Shorter than the system message that the chat template would add.
SYSTEM = "Answer in one short sentence."
TEMPLATES = (
    "Write one short sentence about {}.",
    "How was {}?",
    "Describe {} in one sentence.",
    "What was {} like?",
)
# Scenes that allow good and bad answers; none of these words is in the sentiment lexicon.
TOPICS = (
    "the bus ride to work", "the soup at the corner cafe", "a walk in the rain", "the exam results",
    "the old house by the river", "the phone call from my sister", "a night in a small hotel",
    "the first day at school", "the meeting with the landlord", "the new haircut", "the train journey north",
    "lunch in the office kitchen", "the neighbour's dog", "the weather in town today", "the last bus home",
    "a weekend at the lake", "the visit to the dentist", "the queue at the post office",
    "the film last night", "the rusty bicycle", "the garden in March", "the first job interview",
    "dinner with the cousins", "the new teacher", "the street market", "the long drive to the coast",
    "the concert in the park", "a morning without coffee", "the school trip", "the move to another city",
    "the letter from the bank", "the swimming lesson", "the borrowed umbrella", "the flat upstairs",
    "the wedding speech", "a Monday morning at the office", "the camping trip", "the football match",
    "the village bakery", "the night shift at the hospital", "the airport at midnight", "the cooking class",
    "the old computer", "the winter in the mountains", "the ferry crossing", "the birthday cake",
    "the museum tour", "the new neighbours", "the piano lesson", "the road works outside",
    "the library on Sunday", "the job at the warehouse", "the reunion of the class", "the hike up the hill",
    "the cat on the roof", "the kitchen after the dinner", "the taxi driver", "the online course",
    "the summer in the city", "the sandwich from the station", "the driving test", "the choir rehearsal",
    "the apartment viewing", "the snow on the street", "the picnic by the canal", "the work trip",
    "the new phone", "the waiting room", "the chess game", "the farm in autumn", "the painting in the hall",
    "the trip to the zoo", "the computer repair", "the morning run", "the restaurant by the harbour",
    "the team meeting", "the house guest", "the language class", "the shoes from the market",
    "the train station at noon", "the talk with the manager", "the road through the forest", "the radio show",
    "the evening at the theatre", "the box in the attic", "the boat trip", "the grocery shopping",
    "the doctor's appointment", "the flight to Madrid", "the barbecue next door", "the history lesson",
    "the dance class", "the bridge at dawn", "the tomato plants", "the coffee machine at work",
    "the school bus", "the tour guide", "the walk to the shop", "the fishing trip", "the rented car",
    "the book club", "the hotel breakfast", "the beach in October", "the new bakery", "the evening shift",
    "the ride on the tram", "the town square", "the day off", "the grandmother's kitchen",
    "the basketball game", "the office plant", "the pizza on the corner",
)  # fmt: skip
BATCH = 128  # answers at a time; another value gives another file
KEYS = [(topic, template) for topic in TOPICS for template in TEMPLATES]

# A small model writes anything: keep faith, sex, violence and addresses out of a shipped file.
BLOCKED = re.compile(
    r"\b(isis|jew|muslim|islam|christ|nazi|hitler|terroris|rape|rapist|sex|porn|nud|naked|fuck|shit|bitch|bastard|ass\b"
    r"|asshole|damn|whore|slut|dick|cock\b|penis|vagina|breast|suicid|murder|kill|corpse|gun\b|guns\b|racis|negro|gay"
    r"|lesbian|homo|retard|drug|cocaine|heroin|trump|biden|obama|putin|masturb|orgas|erotic|genital|holocaust|genocid"
    r"|slave|gipsy|gypsy|queer|tranny|fag|nigg|cunt|crap|piss|torture|hang(ed|ing) himself"
    r"|butts?\b|buttho|undie|xxx|pope\b|mosque|israel|palestin|assault|immigra|affair|lust\b)|@|https?:|\.com\b",
    re.IGNORECASE,
)


# A plain sentence or two: no digits, quotes, lists, dialogue, hashtags or letters of another script.
SENTENCE = re.compile(r"[A-Z][A-Za-z ,;'.!-]*[.!]")


class Response(NamedTuple):
    text: str
    tokens: int
    gold: float


class Nucleus(LogitsProcessor):
    """Draw each row's next token from its nucleus among the 256 likeliest tokens.

    Sorting the whole vocabulary takes longer than the model.
    """

    def __init__(self, temperature: float, top_p: float):
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        best, tokens = torch.softmax(scores / self.temperature, dim=-1).topk(256)
        best[best.cumsum(-1) - best >= self.top_p] = 0.0
        drawn = tokens.gather(-1, torch.multinomial(best, 1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)


def conversation(topic: str, template: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": template.format(topic)}]


def sample_responses(args: argparse.Namespace) -> list[list[Response]]:
    """Sample answers to each prompt, in the order of `KEYS`.

    Keeps plain sentences of at least four words that the model ended itself, each text once a prompt.
    """
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, dtype="float32")
    config = GenerationConfig(
        do_sample=False,  # takes the single token that Nucleus leaves
        max_new_tokens=args.max_new_tokens,
        eos_token_id=stop_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.generation_config = config  # ignore the model's own sampling settings
    tokenizer.padding_side = "left"
    prompts = [
        tokenizer.apply_chat_template(conversation(*key), add_generation_prompt=True, return_dict=False) for key in KEYS
    ]
    order = sorted(range(len(KEYS)), key=lambda index: len(prompts[index]))
    jobs = [index for index in order for _ in range(args.samples)]
    torch.manual_seed(args.seed)
    draw = Nucleus(args.temperature, args.top_p)
    answers: list[tuple[int, list[int]]] = []
    for start in tqdm(range(0, len(jobs), BATCH)):
        batch = jobs[start : start + BATCH]
        inputs = tokenizer.pad({"input_ids": [prompts[index] for index in batch]}, return_tensors="pt")
        with torch.inference_mode():
            written = model.generate(**inputs, logits_processor=[draw])[:, inputs["input_ids"].shape[1] :]
        answers += [(index, ids) for index, ids in zip(batch, written.tolist(), strict=True)]
    stops = set(config.eos_token_id)
    finished = [any(token in stops for token in ids) for _, ids in answers]
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for _, ids in answers]
    golds = vader_scores(texts)
    kept: list[dict[str, Response]] = [{} for _ in KEYS]
    for (index, ids), ended, text, gold in zip(answers, finished, texts, golds, strict=True):
        if ended and SENTENCE.fullmatch(text) and len(text.split()) >= 4 and not BLOCKED.search(text):
            tokens = next(at for at, token in enumerate(ids, 1) if token in stops)
            kept[index].setdefault(text, Response(text, tokens, float(gold)))
    print(
        f"{len(answers)} answers, {np.mean(finished):.0%} ended by the model, "
        f"{sum(map(len, kept))} kept; sentiment of all: mean {golds.mean():.3f}, SD {golds.std():.3f}"
    )
    return [list(responses.values()) for responses in kept]


def pair_up(
    responses: Sequence[Response], rng: np.random.Generator, tau: float, min_gap: float, most: int
) -> list[tuple[Response, Response]]:
    """Pair each answer with the next one in random order, labelled by `label`: (chosen, rejected)."""
    order = [responses[index] for index in rng.permutation(len(responses))]
    pairs = []
    for one, two in pairwise(order):
        labelled = label(one, two, rng, tau)
        if abs(one.gold - two.gold) >= min_gap:
            pairs.append(labelled)
    return pairs[:most]


def label(one: Response, two: Response, rng: np.random.Generator, tau: float) -> tuple[Response, Response]:
    """Draw which of two answers is preferred, by Bradley-Terry: (chosen, rejected)."""
    return (one, two) if rng.random() < 1 / (1 + np.exp(-(one.gold - two.gold) / tau)) else (two, one)


def make_rows(args: argparse.Namespace, responses: Sequence[Sequence[Response]]) -> list[dict]:
    """Pair and label the answers (one list a prompt, in the order of `KEYS`) and hold out topics; rows are shuffled."""
    rng = np.random.default_rng(args.seed)
    held_out = set(rng.choice(TOPICS, size=round(args.held_out * len(TOPICS)), replace=False).tolist())
    rows = []
    for (topic, template), answers in zip(KEYS, responses, strict=True):
        for chosen, rejected in pair_up(answers, rng, args.tau, args.min_gap, args.pairs_per_prompt):
            split = "held_out" if topic in held_out else "train"
            rows.append(row_of(conversation(topic, template), chosen, rejected, split))
    return [rows[index] for index in rng.permutation(len(rows))]


def row_of(prompt: list[dict[str, str]], chosen: Response, rejected: Response, split: str) -> dict:
    """A row of the file, with `tokens` of its responses for the summary only."""
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "chosen_gold": chosen.gold,
        "rejected_gold": rejected.gold,
        "split": split,
        "tokens": (chosen.tokens, rejected.tokens),
    }


def summarise(rows: Sequence[dict]) -> None:
    print(f"\n{'':32}{'train':>10}{'held_out':>10}")
    columns: dict[str, list[str]] = defaultdict(list)
    for split in ("train", "held_out"):
        part = [row for row in rows if row["split"] == split]
        groups = [row["prompt"][-1]["content"] for row in part]
        chosen, rejected = (np.array([row[f"{side}_gold"] for row in part]) for side in ("chosen", "rejected"))
        tokens = np.array([row["tokens"] for row in part])
        mean, se = mean_and_se((chosen + rejected) / 2, groups)
        for name, value in {
            "pairs": f"{len(part)}",
            "prompts": f"{len(set(groups))}",
            "gold, mean of both": f"{mean:.3f}",
            "  standard error": f"{se:.3f}",
            "gold, SD": f"{np.concatenate([chosen, rejected]).std():.3f}",
            "gold, chosen": f"{chosen.mean():.3f}",
            "gold, rejected": f"{rejected.mean():.3f}",
            "gold of the better response": f"{np.maximum(chosen, rejected).mean():.3f}",
            "labels against the gold": f"{(chosen < rejected).mean():.1%}",
            "response tokens, chosen": f"{tokens[:, 0].mean():.1f}",
            "response tokens, rejected": f"{tokens[:, 1].mean():.1f}",
            "chosen longer (ties half)": f"{(np.sign(tokens[:, 0] - tokens[:, 1]) / 2 + 0.5).mean():.1%}",
        }.items():
            columns[name].append(value)
    for name, (train, held_out) in columns.items():
        print(f"{name:32}{train:>10}{held_out:>10}")


def write(rows: Sequence[dict], args: argparse.Namespace) -> None:
    message = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema(
        [
            ("prompt", message),
            ("chosen", message),
            ("rejected", message),
            ("chosen_gold", pa.float32()),
            ("rejected_gold", pa.float32()),
            ("split", pa.string()),
        ]
    )
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    table = pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema=schema)
    table = table.replace_schema_metadata({"made_with": json.dumps(settings, sort_keys=True)})
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"\nwrote {len(rows)} pairs to {path} ({path.stat().st_size / 1024:.0f} KiB)")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", required=True, help="the parquet file to write")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model that writes the answers")
    parser.add_argument("--samples", type=int, default=10, help="answers sampled for each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="length limit; answers cut by it are dropped")
    parser.add_argument("--temperature", type=float, default=0.7, help="sampling temperature")
    parser.add_argument("--top-p", type=float, default=0.9, help="probability mass of the nucleus")
    parser.add_argument("--tau", type=float, default=0.25, help="label noise: P = sigmoid(score difference / tau)")
    parser.add_argument("--min-gap", type=float, default=0.3, help="pairs whose scores differ by less are dropped")
    parser.add_argument("--pairs-per-prompt", type=int, default=5, help="most pairs kept for one prompt")
    parser.add_argument("--held-out", type=float, default=0.27, help="share of the topics that is held out")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples, the pairs and the labels")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (another number gives another file)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    rows = make_rows(args, sample_responses(args))
    summarise(rows)
    write(rows, args)


if __name__ == "__main__":
    main()
