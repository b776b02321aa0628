"""`sepo bench marked`: do token rewards find the mistakes that people marked?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sepo.command import join, model_option, out_option, path, quiet_libraries, work_folder, writing_to
from sepo.files import write_json, write_text
from sepo.numbers import number, share
from sepo.report.documents import print_document

HELP = "test whether token rewards find marked mistakes, in public texts of people and models"


def add_options(parser: argparse.ArgumentParser) -> None:
    model_option(parser, "--oracle", "model trained with DPO")
    model_option(parser, "--reference", "model that the oracle was trained from")
    parser.add_argument(
        "--texts", type=path, action="append", required=True, metavar="FILE",
        help="file of BIG-Bench-Mistake or Fine-Grained RLHF; repeat for several",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, help="first answers of each file (default all)")
    parser.add_argument("--as-chat", action="store_true", help="wrap each prompt as one user turn")
    parser.add_argument("--max-length", type=int, default=2048, help="most tokens of an answer with its prompt (2048)")
    out_option(parser, "folder of marked.md and marked.json")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0, mps (default auto)")


def run(arguments: argparse.Namespace) -> None:
    from sepo.bench.marked.texts import read_marked
    from sepo.errors import UserError

    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit}: expected 1 or more")
    files: dict[str, Any] = {}
    for text in map(Path, arguments.texts):
        if text.stem in files:
            raise UserError(f"two files of --texts are named '{text.stem}', as their results would be: rename one")
        files[text.stem] = read_marked(text)[: arguments.limit]
    quiet_libraries()
    from sepo.bench.marked.measures import measure
    from sepo.bench.marked.reading import read_answers
    from sepo.processes import log
    from sepo.rewards.passes import find_models

    results: dict[str, Any] = {}
    with writing_to(arguments) as out, work_folder(out) as work:
        if join(arguments.device).size() > 1:
            raise UserError("sepo bench marked runs in one process: leave the launcher out")
        models = find_models(arguments.oracle, arguments.reference)
        for name, answers in files.items():
            log(f"{name}: {len(answers):,} answers")
            readings, report = read_answers(
                models, answers, work / name, as_chat=arguments.as_chat, max_length=arguments.max_length,
                device=arguments.device,
            )  # fmt: skip
            results[name] = {**measure(answers, readings), "given": len(answers), **report}
        write_json(out / "marked.json", results)
        page = page_of(results)
        write_text(out / "marked.md", page)
    print_document(page)
    print(f"\n{out / 'marked.md'}")


def page_of(results: dict[str, Any]) -> str:
    """The measures as a Markdown table."""
    lines = [
        "# Marked mistakes",
        "",
        "Means over answers with a mistake. AUC: a token of a wrong part has a lower value than one of another part "
        "of the same answer (chance 0.5). Found: the part, or without parts the token, with the lowest value is wrong. "
        "*Beyond* is the oracle minus the best value that needs no oracle, with its 95 % interval.",
        "",
    ]
    for measure, title, form in (("auc", "AUC", number), ("found", "found", share)):
        lines += [
            f"| {title} | answers | oracle | surprisal | early | late | chance | beyond | best of the others |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---|",
        ]
        for name, result in results.items():
            if not result["answers"]:
                lines.append(f"| {name} | 0 |" + " |" * 7)
                continue
            values = [form(result[value][measure]["mean"]) for value in ("oracle", "surprisal", "early", "late")]
            beyond = result["beyond"][measure]
            low, high = beyond["interval"]
            chance = form(0.5 if measure == "auc" else result["chance"])
            gap = f"{beyond['mean']:+.3f} ({low:+.3f} to {high:+.3f})"
            lines.append(f"| {' | '.join((name, str(result['answers']), *values, chance, gap, beyond['best']))} |")
        lines.append("")
    return "\n".join(lines)
