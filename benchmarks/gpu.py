"""GPU figures in one process and a few minutes: policy step, oracle step and scoring beside their peers.

    python benchmarks/gpu.py --data prefs.parquet --tokenizer MODEL --out DIR [--minutes 4] [--peak-tflops 989]

Random weights in the shape of Llama 3.2 1B (vocabulary 128,256) and of SmolLM2-135M, bfloat16 autocast over float32
weights, real pairs. TRL, if installed, runs at several batch sizes. Every contender trains a new model on the same
pairs; its first steps are not timed; its peak memory is that of PyTorch's allocator (of the process on a CPU). Each
contender appends a line of JSON with device, versions and commit, so an interrupted run keeps its results. `--plan`
picks contenders by a regular expression. `gpu.sh` runs the whole plan.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Rows differ in length: without this the allocator requests new blocks from the driver for many steps.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from sepo.data.tables import SCHEMAS, make_table
from sepo.forward.packing import pack
from sepo.forward.scoring import dataset_logps, table_pairs
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.settings import DataSettings
from sepo.stages.data import read_pairs
from sepo.training.trainer import PreferenceConfig, PreferenceTrainer

DEVICE = "cuda"  # "cpu" only tests this script; its figures mean nothing

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "tiny": {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
}


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def reset_memory() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    """Peak gigabytes of the allocator since `reset_memory`; on a CPU of the process since its start."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Timer(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        synchronise()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronise()
        self.seconds.append(time.perf_counter() - self.started)


def make_model(shape: str, dtype: torch.dtype = torch.float32, **options):
    config = LlamaConfig(
        **SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def step_flops(shape: str, pairs: list, train: bool = True) -> float:
    """Unavoidable FLOPs: linear layers over the tokens (a pair's prompt once), LM head over targets, causal attention.

    Tokens that several pairs share are counted in each pair.
    """
    s = SHAPES[shape]
    width, kv = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
    layer = s["hidden_size"] * (2 * width + 2 * kv + 3 * s["intermediate_size"])
    linear = attention = 0.0
    for pair in pairs:
        batch = pack([pair])
        linear += batch.num_tokens * layer * s["num_hidden_layers"]
        linear += len(batch.target_ids) * s["vocab_size"] * s["hidden_size"]
        for doc in batch.layout.documents:
            for i, branch in enumerate(doc.branches):
                whole = doc.prompt + branch
                seen = whole * (whole + 1) / 2 - (doc.prompt * (doc.prompt + 1) / 2 if i else 0)
                attention += 2 * seen * width * s["num_hidden_layers"]  # scores, and their product with the values
    return (linear + attention) * (6 if train else 2)


def key_tokens(pairs: list, share: float = 0.3) -> list:
    rng = np.random.default_rng(0)

    def choose(ids) -> list[int]:
        return sorted(rng.permutation(len(ids))[: max(1, int(share * len(ids)))].tolist())

    return [replace(p, chosen_positions=choose(p.chosen_ids), rejected_positions=choose(p.rejected_ids)) for p in pairs]


def arguments_of(steps: int, **settings) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "learning_rate": 1e-6,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "bf16": True,
        "use_cpu": DEVICE == "cpu",
        "optim": "adamw_torch_fused",
        "dataloader_num_workers": 1,
        **settings,
    }


class Bench:
    def __init__(self, arguments):
        self.arguments = arguments
        self.tokenizer = load_tokenizer(arguments.tokenizer)
        self.warm_up, self.steps = 2, arguments.steps
        # Each step trains on new pairs; both trainers draw them in the same order.
        source = DataSettings(source=arguments.data, as_chat=self.tokenizer.chat_template is not None)
        every = table_pairs(read_pairs(source, self.tokenizer, progress=False))
        self.batch = arguments.pairs
        self.pairs = every[: self.batch * (self.warm_up + self.steps)]
        if len(self.pairs) < self.batch * (self.warm_up + self.steps):
            raise SystemExit(f"{arguments.data} has {len(every)} pairs, too few for {self.warm_up + self.steps} steps")

    # --- contenders -------------------------------------------------------------------------------------------------

    def ours(self, shape: str, objective: str, rows: int, profile: bool = False, **settings) -> dict[str, Any]:
        marked = key_tokens(self.pairs) if objective == "sepo" else self.pairs
        kind = "selection" if objective == "sepo" else "pairs"
        columns: dict[str, Any] = {name: [getattr(p, name, None) for p in marked] for name in SCHEMAS[kind].names}
        reference = None
        if objective == "sepo":
            for side in ("chosen", "rejected"):
                columns[f"{side}_weights"] = [[1.0] * len(x) for x in columns[f"{side}_positions"]]
        else:
            logps = {
                f"{side}_logps": [[-1.0] * len(getattr(p, f"{side}_ids")) for p in marked]
                for side in ("chosen", "rejected")
            }
            reference = make_table("logps", {"pair_id": columns["pair_id"], **logps}, {"autocast": "bfloat16"})
        timer = Timer()
        trainer = PreferenceTrainer(
            make_model(shape),
            PreferenceConfig(
                **arguments_of(self.warm_up + self.steps, per_device_train_batch_size=self.batch, **settings),
                objective=objective,
                tokens_per_row=rows,
            ),
            train_dataset=make_table(kind, columns),
            reference_logps=reference,
            processing_class=self.tokenizer,
            callbacks=[timer],
        )
        reset_memory()
        trainer.train()
        result = self.result(shape, timer, step_flops(shape, marked))
        if profile:
            self.profile(trainer, f"{shape}-{objective}")
        return result

    def profile(self, trainer, name: str) -> None:
        """Run one more step under PyTorch's profiler and write the device time of each kernel."""
        inputs = next(iter(trainer.get_train_dataloader()))
        with torch.profiler.profile(
            activities=[
                torch.profiler.ProfilerActivity.CUDA if DEVICE == "cuda" else torch.profiler.ProfilerActivity.CPU
            ]
        ) as profiler:
            trainer.training_step(trainer.model, inputs)
            synchronise()
        rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
        lines = [f"{row.self_device_time_total / 1e3:9.2f} ms {row.count:6d}  {row.key[:140]}" for row in rows[:60]]
        total = sum(row.self_device_time_total for row in rows) / 1e3
        (self.arguments.out / f"profile-{name}.txt").write_text("\n".join([f"{total:.1f} ms in all", *lines]) + "\n")

    def trl(self, shape: str, objective: str, batch: int, attention: str = "sdpa", **settings) -> dict[str, Any]:
        import datasets

        timer = Timer()
        model = make_model(shape, attn_implementation=attention)
        text = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
        common = arguments_of(
            self.warm_up + self.steps, per_device_train_batch_size=batch,
            gradient_accumulation_steps=self.batch // batch, activation_checkpointing=False, max_length=4096,
            **settings,
        )  # fmt: skip
        made = {"args": None, "train_dataset": text, "processing_class": self.tokenizer, "callbacks": [timer]}
        if objective == "sepo":
            from trl.experimental.cpo import CPOConfig, CPOTrainer

            made["args"] = CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.0)
            trainer = CPOTrainer(model, **made)
            rows = []
            for p in self.pairs:
                row: dict[str, Any] = {
                    "prompt": "",
                    "chosen": "",
                    "rejected": "",
                    "prompt_input_ids": list(p.prompt_ids),
                }
                row["prompt_attention_mask"] = [1] * len(p.prompt_ids)
                for side in ("chosen", "rejected"):
                    ids = list(getattr(p, f"{side}_ids"))
                    row[f"{side}_input_ids"] = [*p.prompt_ids, *ids]
                    row[f"{side}_attention_mask"] = [1] * len(row[f"{side}_input_ids"])
                    row[f"{side}_labels"] = [-100] * len(p.prompt_ids) + ids
                rows.append(row)
        else:
            from trl import DPOConfig, DPOTrainer

            made["args"] = DPOConfig(**common, beta=0.1, precompute_ref_log_probs=True)
            trainer = DPOTrainer(model, **made)
            rows = [
                {
                    **{f"{part}_ids": list(getattr(p, f"{part}_ids")) for part in ("prompt", "chosen", "rejected")},
                    "ref_chosen_logps": -float(len(p.chosen_ids)),
                    "ref_rejected_logps": -float(len(p.rejected_ids)),
                }
                for p in self.pairs
            ]
        trainer.train_dataset = datasets.Dataset.from_list(rows)
        reset_memory()
        trainer.train()
        return self.result(
            shape, timer, step_flops(shape, key_tokens(self.pairs) if objective == "sepo" else self.pairs)
        )

    def score(self, shape: str, rows: int, dtype: torch.dtype = torch.float32, autocast: bool = False,
              precision: str = "highest") -> dict[str, Any]:  # fmt: skip
        names = SCHEMAS["pairs"].names
        table = make_table("pairs", {name: [getattr(p, name) for p in self.pairs] for name in names})
        model = make_model(shape, dtype).requires_grad_(False)  # as in a run; gradients would add 2 GB
        torch.set_float32_matmul_precision(precision)
        try:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                dataset_logps(model, table.slice(0, 8), tokens_per_row=rows)
                reset_memory()
                seconds = []
                for _ in range(3):
                    synchronise()
                    started = time.perf_counter()
                    dataset_logps(model, table, tokens_per_row=rows)
                    seconds.append(time.perf_counter() - started)
        finally:
            torch.set_float32_matmul_precision("highest")
        return self.figures(
            statistics.median(seconds), seconds, step_flops(shape, self.pairs, train=False), len(self.pairs)
        )

    def loop(self, shape: str) -> dict[str, Any]:
        """One sequence a forward, through the model's own logits."""
        model = make_model(shape, torch.bfloat16, attn_implementation="sdpa").eval()

        @torch.no_grad()
        def run(some) -> None:
            for pair in some:
                for ids in (pair.chosen_ids, pair.rejected_ids):
                    tokens = torch.tensor([[*pair.prompt_ids, *ids]], device=DEVICE)
                    logits = model(input_ids=tokens, use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1]
                    logits.float().log_softmax(-1).gather(1, tokens[0, len(pair.prompt_ids) :, None]).cpu()

        pairs = self.pairs[: self.batch]
        run(pairs[:4])
        reset_memory()
        started = time.perf_counter()
        run(pairs)
        seconds = time.perf_counter() - started
        return self.figures(seconds, [seconds], step_flops(shape, pairs, train=False), len(pairs))

    # --- figures ----------------------------------------------------------------------------------------------------

    def result(self, shape: str, timer: Timer, flops: float) -> dict[str, Any]:
        timed = timer.seconds[self.warm_up :]
        return self.figures(statistics.mean(timed), timer.seconds, flops / (self.warm_up + self.steps), self.batch)

    def figures(self, seconds: float, all_seconds: list[float], flops: float, pairs: int) -> dict[str, Any]:
        tokens = sum(pack([pair]).num_tokens for pair in self.pairs) / len(self.pairs) * pairs
        return {
            "seconds": seconds,
            "all_seconds": [round(s, 4) for s in all_seconds],
            "pairs": pairs,
            "packed_tokens_per_second": tokens / seconds,
            "peak_gb": peak_memory(),
            "mfu": flops / seconds / (self.arguments.peak_tflops * 1e12),
            "flops": flops,
        }

    def plan(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Contenders by name, most important first. With --liger TRL uses that library's kernels."""
        plan: dict[str, Callable[[], dict[str, Any]]] = {}

        def add(name: str, call: Callable[..., dict[str, Any]], *args, **kwargs) -> None:
            plan[name] = lambda: call(*args, **kwargs)

        # TRL's fastest batch sizes come first; more pairs of the large model do not fit in 139 GiB.
        shapes = (("llama-1b", 16384, (8, 4)), ("smollm2-135m", 32768, (32, 16)))
        if DEVICE == "cpu":
            shapes = (("tiny", 1024, (2,)),)
        # Liger's fused losses replace the model's forward, which TRL's trainers need themselves.
        kernels = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        fused = {"use_liger_kernel": True, "liger_kernel_config": kernels} if self.arguments.liger else {}
        named = " liger" if fused else ""
        for shape, rows, batches in shapes:
            for objective in ("sepo", "dpo"):
                add(f"{shape} {objective} ours rows={rows}", self.ours, shape, objective, rows, profile=True)
                for batch in batches:
                    add(f"{shape} {objective} trl{named} batch={batch}", self.trl, shape, objective, batch, **fused)
            add(f"{shape} score ours bf16", self.score, shape, rows, torch.bfloat16)
            add(f"{shape} score loop bf16", self.loop, shape)
        for shape, rows, _ in shapes:
            add(f"{shape} score ours tf32", self.score, shape, rows, precision="high")
            add(f"{shape} score ours autocast", self.score, shape, rows, autocast=True)
            add(f"{shape} score ours fp32", self.score, shape, rows)
        for shape, sizes in (("llama-1b", (4096, 8192, 32768)), ("smollm2-135m", (8192, 16384, 65536))):
            for size in sizes if DEVICE == "cuda" else ():
                for objective in ("sepo", "dpo"):
                    add(f"{shape} {objective} ours rows={size}", self.ours, shape, objective, size)
        return plan


def about() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    names = ("torch", "transformers", "trl", "accelerate", "triton", "liger-kernel")
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "commit": commit.stdout.strip(),
        **{name: of(name) for name in names},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preference pairs, as in a recipe's data.source")
    parser.add_argument("--tokenizer", required=True, help="model whose tokenizer is used; weights are random")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=64, help="pairs in an update (default 64)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a training contender (default 4)")
    parser.add_argument("--minutes", type=float, default=4.0, help="start no contender after this time")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="nominal bfloat16 rate (989: H100, H200 SXM)")
    parser.add_argument("--plan", default="", help="regular expression that picks contenders")
    parser.add_argument("--liger", action="store_true", help="TRL with Liger-Kernel; its patches persist: run it apart")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu only tests this script")
    arguments = parser.parse_args()
    global DEVICE
    DEVICE = arguments.device
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    bench = Bench(arguments)
    facts = about()
    print(json.dumps(facts), flush=True)
    with open(arguments.out / "gpu.jsonl", "a") as file:
        for name, contender in bench.plan().items():
            if not re.search(arguments.plan, name):
                continue
            if time.monotonic() - started > 60 * arguments.minutes:
                print(f"{name}: not started: time is up", flush=True)
                break
            began = time.monotonic()
            try:
                if " trl" in name and importlib.util.find_spec("trl") is None:
                    raise ImportError("TRL is not installed")
                row = contender()
            except Exception as error:
                row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
                traceback.print_exc(limit=-4)
            row = {"name": name, "wall": round(time.monotonic() - began, 1), **row, **facts}
            file.write(json.dumps(row) + "\n")
            file.flush()
            if "failed" in row:
                print(f"{name:42s} failed: {row['failed'][:160]}", flush=True)
            else:
                print(f"{name:42s} {row['seconds']:8.3f} s  {row['packed_tokens_per_second']:9.0f} tok/s  "
                      f"{row['peak_gb']:6.1f} GB  MFU {row['mfu']:.1%}  ({row['wall']} s)", flush=True)  # fmt: skip
            gc.collect()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
