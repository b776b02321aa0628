"""`sepo reward`: an oracle as a reward model on RewardBench."""

from __future__ import annotations

import argparse

from sepo import command
from sepo.errors import UserError

HELP = "measure an oracle as a reward model on a local copy of RewardBench, and write the benchmark's files"


def add_options(parser: argparse.ArgumentParser) -> None:
    command.model_option(parser, "--oracle", "model trained with DPO")
    parser.add_argument(
        "--reference", type=command.path, metavar="MODEL", help="model it started from (default: an adapter's base)"
    )
    parser.add_argument(
        "--data", type=command.path, required=True, metavar="SOURCE", help="RewardBench's pairs: a file or a folder"
    )
    parser.add_argument("--split", default="train", help="split to read (default train; of a clone: filtered)")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of prompt and response (default 2048)")
    command.out_option(parser, "folder for eval-set/oracle.json and eval-set-scores/oracle.json")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0, mps (default auto)")


def run(arguments: argparse.Namespace) -> None:
    command.quiet_libraries()
    from sepo.models.names import check_model
    from sepo.rewards.passes import find_models
    from sepo.rewards.rewardbench import read_benchmark, run_benchmark

    with command.writing_to(arguments) as out, command.work_folder(out) as work:
        if command.join(arguments.device).size() > 1:
            raise UserError("sepo reward runs in one process: leave the launcher out")
        for name in (arguments.oracle, arguments.reference):
            if name is not None:
                check_model(name)
        data = read_benchmark(arguments.data, arguments.split)
        models = find_models(arguments.oracle, arguments.reference)
        names = arguments.oracle, arguments.reference or "the adapter's base"
        figures = run_benchmark(models, data, out, work, names, arguments.max_length, arguments.device)
    command.print_metrics(f"RewardBench: {out}", figures)
