"""Throughput of generation: this package beside `transformers.pipeline("text-generation")` at its best batch size.

    python benchmarks/generation.py --model MODEL --prompts reference_outputs.parquet question.jsonl --json OUT.json

The prompts are the first turns of all files, filled up to `--number` with those of the embedded task. The pipeline is
tried on `--trial` prompts at each of `--batch-sizes`, sorted by length and in given order; the fastest setting is
measured on all prompts. Both contenders use the same model, weight type, prompts, temperature, stop tokens and limit of
new tokens, and sample from the whole distribution (no top-k, no nucleus). Each measurement runs in its own process, so
that peak memory is its own. The time excludes loading and a first small batch. Random numbers differ, so the number of
new tokens differs a little: compare tokens a second.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
OURS = "sepo"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub id, .gguf file or package:PKG/FILE")
    parser.add_argument("--prompts", nargs="*", default=[], help="question files, as for `sepo generate`")
    parser.add_argument("--number", type=int, default=1000, help="prompts (default 1000)")
    parser.add_argument("--trial", type=int, default=128, help="prompts on which batch sizes are tried (default 128)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64], help="to try for the pipeline")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=1, help="alternating runs of both (default 1)")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print("RESULT " + json.dumps(measure(arguments, **json.loads(arguments.worker))))
        return 0
    figures = compare(arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Find the pipeline's best setting, measure both contenders on all prompts, print and return the figures."""
    trials = [
        worker(contender="pipeline", number=arguments.trial, batch_size=size, in_order=in_order)
        for size in arguments.batch_sizes
        for in_order in (True, False)
    ]
    best = max(trials, key=lambda trial: trial["tokens_per_second"])
    chosen = {"batch_size": best["batch_size"], "in_order": best["in_order"]}
    runs: list[dict[str, Any]] = []
    for _ in range(arguments.repeats):
        runs.append(worker(contender=OURS, number=arguments.number, batch_size=None, in_order=False))
        runs.append(worker(contender="pipeline", number=arguments.number, **chosen))
    rates = {
        name: sorted(run["tokens_per_second"] for run in runs if run["contender"] == name)
        for name in (OURS, "pipeline")
    }
    ours, theirs = (values[len(values) // 2] for values in rates.values())
    print(f"tokens a second: {ours:.1f} and {theirs:.1f}, {ours / theirs:.2f} times")
    return {**about(arguments), "trials": trials, "runs": runs, "ratio": ours / theirs}


def worker(**what: Any) -> dict[str, Any]:
    """One measurement in its own process, with this process's options."""
    command = [sys.executable, str(HERE), *sys.argv[1:], "--worker", json.dumps(what)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        raise SystemExit(f"{what} failed:\n{done.stderr[-3000:]}")
    result = {**what, **json.loads(found[-1].removeprefix("RESULT "))}
    order = "sorted by length" if what["in_order"] else "in given order"
    how = "" if what["contender"] == OURS else f", batches of {what['batch_size']}, {order}"
    print(
        f"{what['contender']}{how}: {result['prompts']} prompts, {result['seconds']:.1f} s, {result['new_tokens']} new "
        f"tokens, {result['tokens_per_second']:.1f} a second, peak {result['peak_gb']:.2f} GB",
        flush=True,
    )
    return result


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings, device, commit and versions of the measurement."""
    from importlib.metadata import version

    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE.parent, check=False
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    kept = ("number", "trial", "max_new_tokens", "temperature", "dtype", "repeats")
    return {
        "benchmark": "generation",
        "model": Path(arguments.model).name,
        "prompts": [Path(path).name for path in arguments.prompts],
        **{name: getattr(arguments, name) for name in kept},
        "device": device,
        "platform": platform.platform(),
        "commit": commit.stdout.strip(),
        "packages": {name: version(name) for name in ("torch", "transformers")},
    }


# --- one measurement, in its own process ----------------------------------------------------------------------------


def measure(
    arguments: argparse.Namespace, contender: str, number: int, batch_size: int | None, in_order: bool
) -> dict[str, Any]:
    """Answer prompts and count tokens; `in_order` sorts the prompts by length, longest first."""
    from sepo.data.templates import stop_ids
    from sepo.judging.prompts import encode_prompts
    from sepo.models.tokenizer import load_tokenizer
    from sepo.models.weights import load_model

    tokenizer: Any = load_tokenizer(arguments.model)
    model: Any = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    everything = [[{"role": "user", "content": text}] for text in texts_of(arguments)]
    # A trial takes prompts evenly from all.
    chats = [everything[i * len(everything) // number] for i in range(min(number, len(everything)))]
    ids = encode_prompts(chats, tokenizer)
    if in_order:
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        chats, ids = [chats[i] for i in order], [ids[i] for i in order]
    stops = stop_ids(model, tokenizer)
    answer = by_pipeline if contender == "pipeline" else by_sepo
    answer(model, tokenizer, chats[:4], ids[:4], stops, batch_size, arguments)
    began = time.perf_counter()
    new_tokens, finished = answer(model, tokenizer, chats, ids, stops, batch_size, arguments)
    seconds = time.perf_counter() - began
    return {
        "prompts": len(ids),
        "prompt_tokens": sum(map(len, ids)),
        "seconds": seconds,
        "new_tokens": new_tokens,
        "finished": finished,
        "tokens_per_second": new_tokens / seconds,
        "peak_gb": peak_gb(model.device.type),
    }


def peak_gb(device: str) -> float:
    """Peak memory: of PyTorch's allocator on a GPU, of the process on a CPU."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def texts_of(arguments: argparse.Namespace) -> list[str]:
    """`number` distinct prompts: first turns of the files' questions, then the embedded task's prompts."""
    from sepo.data.loading import load_preferences
    from sepo.judging.questions import read_questions
    from sepo.stages.data import embedded_data

    texts = [question.turns[0] for path in arguments.prompts for question in read_questions(Path(path))[0]]
    embedded = [row["prompt"] for row in load_preferences(embedded_data("embedded:sentiment"))]
    texts += [text if isinstance(text, str) else text[-1]["content"] for text in embedded]
    texts = list(dict.fromkeys(texts))
    if len(texts) < arguments.number:
        # A suffix makes repeated prompts distinct, so that no cache can serve them.
        texts += [f"{text} (in other words, {n})" for n in range(arguments.number // len(texts)) for text in texts]
    return texts[: arguments.number]


def by_sepo(
    model: Any, tokenizer: Any, chats: list, ids: list, stops: list, batch_size: int | None, arguments: Any
) -> tuple[int, int]:
    """New tokens and finished answers of this package's generation."""
    from sepo.evaluate.generate import generate_responses

    found = generate_responses(
        model,
        tokenizer,
        ids,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        progress=False,
    )
    return sum(len(one.response_ids) for one in found), sum(one.finished for one in found)


def by_pipeline(
    model: Any, tokenizer: Any, chats: list, ids: list, stops: list, batch_size: int | None, arguments: Any
) -> tuple[int, int]:
    """New tokens and finished answers of the pipeline, counted up to and including the first stop token."""
    from transformers import GenerationConfig, pipeline

    tokenizer.padding_side = "left"
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = GenerationConfig(
        do_sample=True, temperature=arguments.temperature, top_k=0, top_p=1.0,
        max_new_tokens=arguments.max_new_tokens, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.generation_config = settings
    rows = pipe(chats, batch_size=batch_size, generation_config=settings, return_tensors=True)
    tokens = ended = 0
    for (row,), prompt in zip(rows, ids, strict=True):
        sequence = list(row["generated_token_ids"])
        start = next(i for i in range(len(sequence)) if sequence[i : i + len(prompt)] == prompt) + len(prompt)
        new = sequence[start:]
        stop = next((i for i, token in enumerate(new) if token in stops), None)
        tokens += len(new) if stop is None else stop + 1
        ended += stop is not None
    return tokens, ended


if __name__ == "__main__":
    raise SystemExit(main())
