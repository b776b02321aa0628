"""Speed and memory of training steps and scoring beside their peers, in the same run on the same pairs.

    python benchmarks/run.py policy-step --model DIR --data FILE --pairs 16 --json out.json
    python benchmarks/run.py oracle-step|scoring|pipeline ...
    python benchmarks/run.py policy-step ... --sweep length|vocabulary|k|pairs
    python benchmarks/run.py memory --model DIR --json out.json

Every contender runs in its own process, so that peak memory is its own. TRL runs once at each of `--trl-batch` pairs a
forward; the fastest is the peer. Then the contenders alternate; medians of `--repeats` runs are printed with the ratio
to ours. `limit_share` is the share of the measured matmul rate: unavoidable FLOPs (packed tokens, LM head on targets,
forward and backward) divided by that rate and by the time. `memory` stores the log-probabilities of 1,000 and of 10,000
synthetic pairs, shard by shard like `sepo score`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["policy-step", "oracle-step", "scoring", "pipeline", "memory"])
    parser.add_argument("--model", required=True, help="model folder, hub id, .gguf file or package:PKG/FILE")
    parser.add_argument("--data", help="preference data, as for `sepo run`; `memory` makes its own")
    parser.add_argument("--as-chat", action="store_true", help="wrap plain prompts with the chat template")
    parser.add_argument("--pairs", type=int, default=8, help="pairs in the effective batch (default 8)")
    parser.add_argument(
        "--whole-prompts",
        action="store_true",
        help="scoring: all pairs of a random sample of prompts, as scoring a whole data set reads them",
    )
    parser.add_argument("--k", type=float, default=0.3, help="share of key tokens (default 0.3)")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs of each contender (default 3)")
    parser.add_argument("--steps", type=int, default=1, help="timed optimizer steps a run (default 1)")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before those (default 1)")
    parser.add_argument("--trl-batch", default="1,4", help="TRL's batch sizes to try (default 1,4)")
    parser.add_argument("--tokens-per-row", type=int, help="our token budget (default: the library's)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 mixed precision for everyone")
    parser.add_argument("--no-peer", action="store_true", help="measure ours alone")
    parser.add_argument("--sweep", choices=["length", "vocabulary", "k", "pairs"], help="how our cost grows")
    parser.add_argument("--vocabulary", type=int, help="resize the model's vocabulary to this")
    parser.add_argument("--peak-tflops", type=float, help="the device's nominal rate: prints model FLOPs utilisation")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.data and arguments.benchmark != "memory":
        parser.error(f"{arguments.benchmark} needs --data")
    if arguments.worker:
        print("RESULT " + json.dumps(WORKERS[arguments.worker.split(":")[0]](arguments)))
        return 0
    whole = {"memory": compare_memory, "pipeline": compare_pipeline}.get(arguments.benchmark, compare)
    figures = {**about(arguments), **(sweep(arguments) if arguments.sweep else whole(arguments))}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def about(arguments) -> dict[str, Any]:
    """Settings, device, commit and versions of the measurement."""
    from importlib.metadata import version

    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE.parent, check=False
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "benchmark": arguments.benchmark,
        "model": Path(arguments.model).name,
        "data": Path(arguments.data or "synthetic").name,
        "pairs": arguments.pairs,
        "as_chat": arguments.as_chat,
        "whole_prompts": arguments.whole_prompts,
        "max_length": arguments.max_length,
        "k": arguments.k,
        "dtype": "bfloat16 autocast" if arguments.bf16 else "float32",
        "device": device,
        "commit": commit.stdout.strip(),
        "packages": {name: version(name) for name in ("torch", "transformers", "trl", "accelerate")},
    }


# --- contenders, each in its own process ----------------------------------------------------------------------------


def load_pairs(arguments) -> list:
    """The same seeded sample of pairs for every contender, tokenised by this package."""
    from sepo.data.encoding import tokenize_pairs
    from sepo.data.loading import load_preferences
    from sepo.data.splits import group_by_prompt
    from sepo.forward.scoring import table_pairs
    from sepo.models.tokenizer import load_tokenizer

    dataset = load_preferences(arguments.data).shuffle(seed=0)
    if not arguments.whole_prompts:
        dataset = dataset.select(range(min(len(dataset), 2 * arguments.pairs + 20)))  # spares for dropped pairs
    table, _ = tokenize_pairs(
        dataset,
        load_tokenizer(arguments.model),
        max_length=arguments.max_length,
        as_chat=arguments.as_chat,
        progress=False,
    )
    return list(table_pairs((group_by_prompt(table) if arguments.whole_prompts else table).slice(0, arguments.pairs)))


def key_tokens(pairs: list, share: float) -> list:
    """Mark a seeded random share of each response as key tokens: the cost depends on their number alone."""
    import numpy as np

    rng = np.random.default_rng(0)

    def choose(ids) -> list[int]:
        return sorted(rng.permutation(len(ids))[: max(1, int(share * len(ids)))].tolist())

    return [replace(p, chosen_positions=choose(p.chosen_ids), rejected_positions=choose(p.rejected_ids)) for p in pairs]


class StepTimer:
    """Times optimizer steps."""

    def __new__(cls):
        from transformers import TrainerCallback

        class Timer(TrainerCallback):
            def __init__(self):
                self.seconds: list[float] = []

            def on_step_begin(self, args, state, control, **kwargs):
                _synchronise()
                self.started = time.perf_counter()

            def on_step_end(self, args, state, control, **kwargs):
                _synchronise()
                self.seconds.append(time.perf_counter() - self.started)

        return Timer()


def _synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_memory() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _model(arguments, train: bool = False):
    """The model in float32; for scoring with --bf16 in bfloat16."""
    from sepo.models.adapters import causal_lm
    from sepo.models.weights import load_model

    model = load_model(arguments.model, train=train, dtype="bfloat16" if arguments.bf16 and not train else "float32")
    if arguments.vocabulary:
        causal_lm(model).resize_token_embeddings(arguments.vocabulary, mean_resizing=False)
    return model


def _result(seconds: float, pairs: list, flops: float) -> dict[str, float]:
    import torch

    from sepo.planning.throughput import matmul_rate

    memory = _peak_memory()
    rate = matmul_rate(torch.device("cuda" if torch.cuda.is_available() else "cpu"), seconds=1.0)
    from sepo.forward.packing import read_length

    return {
        "seconds_per_pair": seconds / len(pairs),
        "peak_gb": memory / 1e9,
        "tokens_per_second": sum(read_length(pair) for pair in pairs) / seconds,
        "floor_seconds_per_pair": flops / rate / len(pairs),
        "limit_share": flops / rate / seconds,
        "matmul_gflops": rate / 1e9,
    }


def step_flops(model, pairs: list, train: bool = True) -> float:
    """Unavoidable matmul FLOPs: backbone over the packed tokens, LM head over the targets."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from sepo.forward.packing import pack
    from sepo.models.adapters import causal_lm

    lm = causal_lm(model)
    config = lm.config.get_text_config()
    head = config.vocab_size * config.hidden_size
    backbone = (
        sum(module.weight.numel() for name, module in lm.named_modules() if isinstance(module, nn.Linear | Conv1D))
        - head
    )
    batch = pack(pairs)  # equal prompts of different pairs count once
    return (batch.num_tokens * backbone + len(batch.target_ids) * head) * (6 if train else 2)


def training_config(arguments, **settings) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": arguments.warm_up + arguments.steps,
        "learning_rate": 1e-6,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not cuda,
        "bf16": arguments.bf16,
        "optim": "adamw_torch_fused",
        "dataloader_pin_memory": cuda,
        **settings,
    }


def ours_step(arguments) -> dict[str, float]:
    """One optimizer step of `PreferenceTrainer` over all pairs (policy-step: SePO; oracle-step: DPO)."""
    import pyarrow as pa

    from sepo.data.tables import SCHEMAS, make_table
    from sepo.models.tokenizer import load_tokenizer
    from sepo.training.trainer import PreferenceConfig, PreferenceTrainer

    pairs = load_pairs(arguments)
    policy = arguments.benchmark == "policy-step"
    marked = key_tokens(pairs, arguments.k) if policy else pairs
    kind = "selection" if policy else "pairs"
    columns: dict[str, Any] = {name: [getattr(p, name, None) for p in marked] for name in SCHEMAS[kind].names}
    if policy:
        for side in ("chosen", "rejected"):
            columns[f"{side}_weights"] = [[1.0] * len(x) for x in columns[f"{side}_positions"]]
    reference = None
    if not policy:
        reference = pa.table(
            {
                "pair_id": [p.pair_id for p in pairs],
                "chosen_logps": [[-1.0] * len(p.chosen_ids) for p in pairs],
                "rejected_logps": [[-1.0] * len(p.rejected_ids) for p in pairs],
            }
        )
    timer = StepTimer()
    trainer = PreferenceTrainer(
        _model(arguments, train=True),
        PreferenceConfig(
            **training_config(arguments, per_device_train_batch_size=len(pairs)),
            objective="sepo" if policy else "dpo",
            tokens_per_row=arguments.tokens_per_row,
        ),
        train_dataset=make_table(kind, columns),
        reference_logps=reference,
        processing_class=load_tokenizer(arguments.model),
        callbacks=[timer],
    )
    trainer.train()
    return _result(statistics.median(timer.seconds[arguments.warm_up :]), pairs, step_flops(trainer.model, marked))


def trl_step(arguments) -> dict[str, float]:
    """The same step in TRL: SimPO (CPOTrainer) or DPO with stored reference, `batch` pairs a forward."""
    import datasets

    from sepo.models.tokenizer import load_tokenizer

    batch = int(arguments.worker.split(":")[1])
    pairs = load_pairs(arguments)
    tokenizer = load_tokenizer(arguments.model)
    model = _model(arguments, train=True)
    timer = StepTimer()
    settings = training_config(
        arguments, per_device_train_batch_size=batch, gradient_accumulation_steps=len(pairs) // batch
    )
    text = datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    common = {"gradient_checkpointing": False, "max_length": arguments.max_length}
    if arguments.benchmark == "policy-step":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        config = CPOConfig(**settings, **common, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.0)
        trainer = CPOTrainer(model, args=config, train_dataset=text, processing_class=tokenizer, callbacks=[timer])
        rows = []
        for p in pairs:
            row: dict[str, Any] = {"prompt": "", "chosen": "", "rejected": "", "prompt_input_ids": list(p.prompt_ids)}
            row["prompt_attention_mask"] = [1] * len(p.prompt_ids)
            for side in ("chosen", "rejected"):
                ids = list(getattr(p, f"{side}_ids"))
                row[f"{side}_input_ids"] = [*p.prompt_ids, *ids]
                row[f"{side}_attention_mask"] = [1] * len(row[f"{side}_input_ids"])
                row[f"{side}_labels"] = [-100] * len(p.prompt_ids) + ids
            rows.append(row)
    else:
        from trl import DPOConfig, DPOTrainer

        config = DPOConfig(**settings, **common, beta=0.1, precompute_ref_log_probs=True)
        trainer = DPOTrainer(model, args=config, train_dataset=text, processing_class=tokenizer, callbacks=[timer])
        rows = [
            {
                **{f"{part}_ids": list(getattr(p, f"{part}_ids")) for part in ("prompt", "chosen", "rejected")},
                "ref_chosen_logps": -float(len(p.chosen_ids)),
                "ref_rejected_logps": -float(len(p.rejected_ids)),
            }
            for p in pairs
        ]
    trainer.train_dataset = datasets.Dataset.from_list(rows)
    trainer.train()
    return _result(statistics.median(timer.seconds[arguments.warm_up :]), pairs, step_flops(trainer.model, pairs))


def ours_scoring(arguments) -> dict[str, float]:
    """Log-probabilities of every response token over packed rows."""
    from sepo.data.tables import SCHEMAS, make_table
    from sepo.forward.prepare import prepare_model
    from sepo.forward.scoring import dataset_logps

    pairs = load_pairs(arguments)
    model = _model(arguments)
    prepare_model(model)
    names = SCHEMAS["pairs"].names
    table = make_table("pairs", {name: [getattr(p, name) for p in pairs] for name in names})
    dataset_logps(model, table.slice(0, 2), tokens_per_row=arguments.tokens_per_row)
    started = time.perf_counter()
    dataset_logps(model, table, tokens_per_row=arguments.tokens_per_row)
    _synchronise()
    return _result(time.perf_counter() - started, pairs, step_flops(model, pairs, train=False))


def loop_scoring(arguments) -> dict[str, float]:
    """One unpadded sequence a forward, through the model's own full logits."""
    import torch

    pairs = load_pairs(arguments)
    model = _model(arguments)

    @torch.no_grad()
    def score(some) -> None:
        for pair in some:
            for ids in (pair.chosen_ids, pair.rejected_ids):
                tokens = torch.tensor([[*pair.prompt_ids, *ids]], device=model.device)
                logits = model(input_ids=tokens, use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1]
                logps = logits.float().log_softmax(-1).gather(1, tokens[0, len(pair.prompt_ids) :, None])
                logps.cpu()

    score(pairs[:2])
    started = time.perf_counter()
    score(pairs)
    return _result(time.perf_counter() - started, pairs, step_flops(model, pairs, train=False))


def stored_scoring(arguments) -> dict[str, float]:
    """Store the log-probabilities of synthetic pairs, shard by shard, and measure the peak memory."""
    import numpy as np

    from sepo.data.tables import make_table, write_table
    from sepo.forward.scoring import Types
    from sepo.models.tokenizer import load_tokenizer
    from sepo.stages.data import PAIRS_PER_SHARD
    from sepo.stages.logps import logps_pass

    rng = np.random.default_rng(0)
    vocabulary = len(load_tokenizer(arguments.model))
    with tempfile.TemporaryDirectory() as folder:
        pairs, out = Path(folder) / "pairs", Path(folder) / "logps"
        columns: dict[str, Any] = {"pair_id": list(range(arguments.pairs))}
        for name, most in (("prompt_ids", 60), ("chosen_ids", 90), ("rejected_ids", 90)):
            lengths = rng.integers(1, most, arguments.pairs)
            columns[name] = [rng.integers(4, vocabulary, length).tolist() for length in lengths]
        tokens = sum(len(ids) for name in list(columns)[1:] for ids in columns[name])
        write_table(pairs, make_table("pairs", columns), PAIRS_PER_SHARD)
        del columns
        before = _peak_memory()
        started = time.perf_counter()
        logps_pass(arguments.model, pairs, out, types=Types("float32"))
        seconds = time.perf_counter() - started
    return {
        "pairs": arguments.pairs,
        "seconds_per_pair": seconds / arguments.pairs,
        "tokens_per_second": tokens / seconds,
        "peak_gb": _peak_memory() / 1e9,
        "peak_before_gb": before / 1e9,
    }


WORKERS = {
    "ours": ours_step,
    "trl": trl_step,
    "ours-scoring": ours_scoring,
    "loop": loop_scoring,
    "stored": stored_scoring,
}


# --- the parent -----------------------------------------------------------------------------------------------------


def run_worker(arguments, worker: str, **changes) -> dict[str, float] | None:
    values = {**vars(arguments), **changes, "worker": worker}
    command = [sys.executable, str(HERE), values["benchmark"]]
    for name in (
        "model",
        "data",
        "pairs",
        "k",
        "max_length",
        "steps",
        "warm_up",
        "tokens_per_row",
        "vocabulary",
        "worker",
    ):
        if values[name] is not None:
            command += [f"--{name.replace('_', '-')}", str(values[name])]
    command += [f"--{name.replace('_', '-')}" for name in ("as_chat", "whole_prompts", "bf16") if values[name]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    print(f"{worker} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", file=sys.stderr)
    return None


def compare(arguments) -> dict[str, Any]:
    scoring = arguments.benchmark == "scoring"
    ours = "ours-scoring" if scoring else "ours"
    peer = None if arguments.no_peer else "loop" if scoring else best_trl(arguments)
    names = [ours] if peer is None else [ours, peer]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name in names:
            result = run_worker(arguments, name)
            if result is None:
                raise SystemExit(f"{name} failed")
            runs[name].append(result)
            print(f"  {name}: {result['seconds_per_pair']:.3f} s/pair", file=sys.stderr)
    figures: dict[str, Any] = {name: _medians(results) for name, results in runs.items()}
    figures["runs"] = runs
    if peer is not None:
        # Ratios of consecutive runs: a machine that slows down slows both.
        pairs = zip(runs[peer], runs[ours], strict=True)
        figures["peer"] = peer
        figures["speedup"] = statistics.median(p["seconds_per_pair"] / o["seconds_per_pair"] for p, o in pairs)
        figures["memory_ratio"] = figures[ours]["peak_gb"] / figures[peer]["peak_gb"]
    figures["limit_share"] = figures[ours]["limit_share"]
    if arguments.peak_tflops:
        for name in names:
            row = figures[name]
            row["mfu"] = row["limit_share"] * row["matmul_gflops"] / 1e3 / arguments.peak_tflops
        figures["mfu"] = figures[ours]["mfu"]
    print_table(arguments.benchmark, {name: figures[name] for name in names}, figures)
    return figures


def _medians(results: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def best_trl(arguments) -> str:
    """TRL's fastest batch size, from one run each."""
    names = [f"trl:{batch}" for batch in arguments.trl_batch.split(",")]
    if len(names) == 1:
        return names[0]
    tried = {name: result for name in names if (result := run_worker(arguments, name)) is not None}
    if not tried:
        raise SystemExit("TRL failed at every batch size")
    for name, result in tried.items():
        print(f"  {name}: {result['seconds_per_pair']:.3f} s/pair, {result['peak_gb']:.2f} GB", file=sys.stderr)
    return min(tried, key=lambda name: tried[name]["seconds_per_pair"])


def compare_memory(arguments) -> dict[str, Any]:
    """Peak memory of scoring 1,000 and 10,000 pairs to disk."""
    figures: dict[str, Any] = {}
    for pairs in (1000, 10_000):
        result = run_worker(arguments, "stored", pairs=pairs)
        if result is None:
            raise SystemExit("scoring failed")
        figures[str(pairs)] = result
        print(f"{pairs} pairs: {result['peak_gb']:.3f} GB, {result['tokens_per_second']:.0f} tokens/s")
    figures["memory_ratio"] = figures["10000"]["peak_gb"] / figures["1000"]["peak_gb"]
    print(f"memory ratio {figures['memory_ratio']:.3f}")
    return figures


def compare_pipeline(arguments) -> dict[str, Any]:
    """Reference scoring, DPO on 30 % of the pairs, oracle scoring and policy step, against TRL's DPO on all pairs."""
    part = max(1, round(0.3 * arguments.pairs))
    totals: dict[str, list[float]] = {"ours": [], "trl": []}
    peer = best_trl(argparse.Namespace(**{**vars(arguments), "benchmark": "oracle-step"}))
    for _ in range(arguments.repeats):
        scoring = run_worker(arguments, "ours-scoring", benchmark="scoring")
        oracle = run_worker(arguments, "ours", benchmark="oracle-step", pairs=part)
        policy = run_worker(arguments, "ours", benchmark="policy-step")
        dpo = run_worker(arguments, peer, benchmark="oracle-step")
        if not (scoring and oracle and policy and dpo):
            raise SystemExit("a contender failed")
        scored = 2 * scoring["seconds_per_pair"] * arguments.pairs  # by reference and oracle
        steps = oracle["seconds_per_pair"] * part + policy["seconds_per_pair"] * arguments.pairs
        totals["ours"].append(scored + steps)
        totals["trl"].append(dpo["seconds_per_pair"] * arguments.pairs)
        print(f"  ours {totals['ours'][-1]:.1f} s, TRL DPO {totals['trl'][-1]:.1f} s", file=sys.stderr)
    figures = {name: {"seconds": statistics.median(values), "runs": values} for name, values in totals.items()}
    figures["speedup"] = statistics.median(t / o for t, o in zip(totals["trl"], totals["ours"], strict=True))
    figures["peer"] = peer
    print(f"pipeline, {arguments.pairs} pairs: ours {figures['ours']['seconds']:.1f} s, "
          f"TRL DPO alone {figures['trl']['seconds']:.1f} s, ratio {figures['speedup']:.2f}")  # fmt: skip
    return figures


def sweep(arguments) -> dict[str, Any]:
    """How our cost grows with one quantity, all others fixed."""
    from sepo.models.names import load_config

    own = load_config(arguments.model).get_text_config().vocab_size
    values: dict[str, list] = {
        "length": [128, 256, 512, 1024],
        "vocabulary": [own, 2 * own, 4 * own],
        "k": [0.1, 0.3, 0.6, 1.0],
        "pairs": [arguments.pairs, 2 * arguments.pairs, 4 * arguments.pairs],
    }
    key = "max_length" if arguments.sweep == "length" else arguments.sweep
    worker = "ours-scoring" if arguments.benchmark == "scoring" else "ours"
    figures: dict[str, Any] = {}
    for value in values[arguments.sweep]:
        runs = [run_worker(arguments, worker, **{key: value}) for _ in range(arguments.repeats)]
        results = [run for run in runs if run]
        figures[str(value)] = _medians(results)
    print_table(f"{arguments.benchmark} by {arguments.sweep}", figures, {})
    return figures


def print_table(title: str, rows: dict[str, dict[str, float]], figures: dict[str, Any]) -> None:
    heads = ("s/pair", "floor s/pair", "peak GB", "tokens/s", "limit share")
    keys = ("seconds_per_pair", "floor_seconds_per_pair", "peak_gb", "tokens_per_second", "limit_share")
    print(f"\n{title}\n| | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[key]:.3g}" for key in keys) + " |")
    if "speedup" in figures:
        print(
            f"\nspeedup {figures['speedup']:.2f}, memory ratio {figures['memory_ratio']:.2f} against {figures['peer']}"
            + (f", MFU {figures['mfu']:.0%}" if "mfu" in figures else "")
        )


if __name__ == "__main__":
    sys.exit(main())
