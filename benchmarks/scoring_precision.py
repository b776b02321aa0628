"""Effect of lower precision on token rewards: train an oracle, then score with both models in every precision.

    python benchmarks/scoring_precision.py --model MODEL --pairs-table TABLE --out FILE.json

Compared with float32: error of s, correlation, share of key tokens (k = 0.3) that stay, preference accuracy of the
summed rewards, and seconds of scoring. On a GPU also TF32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from sepo.credit.rewards import pair_rewards, response_sums
from sepo.credit.selection import select_key_tokens
from sepo.data.ragged import flat
from sepo.data.tables import read_table
from sepo.forward.prepare import prepare_model
from sepo.forward.scoring import dataset_logps
from sepo.models.tokenizer import load_tokenizer
from sepo.models.weights import load_model
from sepo.training.trainer import PreferenceConfig, PreferenceTrainer


def scores(models, table, dtype: torch.dtype, autocast: bool, precision: str):
    torch.set_float32_matmul_precision(precision)
    device = next(models[0].parameters()).device
    before = [next(model.parameters()).dtype for model in models]
    tables = []
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            for model in models:
                model.to(dtype)
                prepare_model(model)
                dataset_logps(model, table.slice(0, 8))
            started = time.perf_counter()
            tables = [dataset_logps(model, table) for model in models]
            seconds = time.perf_counter() - started
    finally:
        torch.set_float32_matmul_precision("highest")
        for model, kind in zip(models, before, strict=True):
            model.to(kind)
    return pair_rewards(table, *tables), seconds


def rewards_of(table) -> np.ndarray:
    return np.concatenate([flat(table.column(f"{side}_rewards"))[0] for side in ("chosen", "rejected")])


def key_tokens(table) -> list[set[tuple[int, int]]]:
    selection = select_key_tokens(table, 0.3, 0.3)
    return [
        {
            (row, at)
            for row, positions in enumerate(selection.column(f"{side}_positions").to_pylist())
            for at in positions
        }
        for side in ("chosen", "rejected")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs-table", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    arguments = parser.parse_args()
    table = read_table(arguments.pairs_table, "pairs").slice(0, arguments.pairs)
    reference, oracle = load_model(arguments.model, dtype="float32"), load_model(arguments.model, train=True)
    device = next(reference.parameters()).device
    config = PreferenceConfig(
        tempfile.mkdtemp(), objective="dpo", learning_rate=arguments.learning_rate, num_train_epochs=1,
        per_device_train_batch_size=16, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        use_cpu=device.type == "cpu", bf16=False,
    )  # fmt: skip
    trainer = PreferenceTrainer(oracle, config, train_dataset=table, processing_class=load_tokenizer(arguments.model))
    trainer.train()
    oracle = oracle.eval().requires_grad_(False)
    ways = {"float32": (torch.float32, False, "highest")}
    if device.type == "cuda":
        ways["TF32"] = (torch.float32, False, "high")
    ways["bfloat16 autocast over float32 weights"] = (torch.float32, True, "highest")
    exact, figures = None, {}
    for name, way in ways.items():
        got, seconds = scores((oracle, reference), table, *way)
        if exact is None:
            exact = got
        s, t = rewards_of(got), rewards_of(exact)
        kept = [len(a & b) / len(b) for a, b in zip(key_tokens(got), key_tokens(exact), strict=True)]
        chosen, rejected = response_sums(got, "rewards")
        exact_margin = np.subtract(*response_sums(exact, "rewards"))
        figures[name] = {
            "seconds": seconds,
            "rms_error_of_s": float(np.sqrt(np.mean((s - t) ** 2))),
            "sd_of_s": float(t.std()),
            "correlation": float(np.corrcoef(s, t)[0, 1]),
            "key_tokens_kept_chosen": kept[0],
            "key_tokens_kept_rejected": kept[1],
            "sd_of_margin_error": float(np.std(chosen - rejected - exact_margin)),
            "sd_of_margin": float(np.std(exact_margin)),
            "accuracy": float(np.mean(chosen > rejected)),
        }
        print(name, json.dumps(figures[name]), flush=True)
    about = {"pairs": len(table), "device": str(device), "torch": torch.__version__, "losses": [
        row["loss"] for row in trainer.state.log_history if "loss" in row]}  # fmt: skip
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name()
    arguments.out.write_text(json.dumps({**about, "ways": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
