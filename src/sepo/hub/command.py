"""`sepo push`: upload a run's policy, oracle, token rewards or sampled pairs to the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from sepo.command import path, print_plan, quiet_libraries
from sepo.errors import UserError

HELP = "upload a run's policy, oracle, token rewards or sampled pairs to the hub"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, metavar="RUN", help="run folder")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--to", metavar="ORG/NAME", help="the repository; created if it is missing")
    place.add_argument("--out", type=path, metavar="DIR", help="write the files of the upload to a new folder instead")
    parser.add_argument(
        "--what",
        choices=["policy", "oracle", "scores", "pairs"],
        default="policy",
        help="scores: a dataset of all pairs with texts, token rewards and weights; pairs: those of `sepo pairs`, "
        "or of a run with data.on_policy (default policy)",
    )
    parser.add_argument("--private", action="store_true", help="a private repository (default: ORG's setting)")
    parser.add_argument("--base", metavar="ORG/NAME", help="hub id of the base model, if the run used a local folder")
    parser.add_argument(
        "--merge", action="store_true", help="upload an adapter and its base as one whole model (GGUF bases: always)"
    )
    parser.add_argument(
        "--license", metavar="NAME", help="licence for the card, in the hub's spelling: apache-2.0, mit"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the files to upload; upload nothing")


def run(arguments: argparse.Namespace) -> None:
    quiet_libraries()
    from sepo.hub import push

    for name in filter(None, (arguments.to, arguments.base)):
        push.check_name(name)
    if arguments.merge and arguments.what not in ("policy", "oracle"):
        raise UserError(f"--merge is for a policy or an oracle, not for --what {arguments.what}")
    plan = push.plan(
        Path(arguments.run), arguments.what, base=arguments.base, license=arguments.license, merge=arguments.merge
    )
    print_plan(f"{arguments.what} of {arguments.run} -> {plan.repo_type} {arguments.to or arguments.out}", plan.lines())
    if arguments.dry_run:
        return
    if arguments.out is not None:
        push.write(plan, Path(arguments.out))
        print(arguments.out)
        return
    print(push.upload(plan, arguments.to, private=arguments.private or None))
