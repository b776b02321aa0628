"""`sepo eval`: measure a policy against the model it started from, without a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from sepo import command
from sepo.errors import UserError
from sepo.judging.commands.judge import judge_of, judge_options

HELP = "measure a policy against the model it started from"


def add_options(parser: argparse.ArgumentParser) -> None:
    command.model_option(parser, "--policy", "trained model")
    command.model_option(parser, "--base", "model it was trained from")
    command.data_options(parser)
    command.out_option(parser, "folder for metrics.json and generations.parquet")
    parser.add_argument("--gold", metavar="NAME", help="gold reward of the generations (vader, plain, ...)")
    parser.add_argument("--prompts", type=int, help="prompts to generate for (default 100)")
    parser.add_argument("--samples", type=int, help="generations a prompt (default 1)")
    parser.add_argument("--temperature", type=float, help="sampling temperature (default 1)")
    parser.add_argument("--max-new-tokens", type=int, help="length limit of a generation (default 256)")
    parser.add_argument("--batch-size", type=int, help="generations at a time (default: what the device holds)")
    command.device_options(parser)
    judge_options(parser)


def run(arguments: argparse.Namespace) -> int:
    names = ("gold", "prompts", "samples", "temperature", "max_new_tokens", "batch_size")
    settings = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    recipe = command.recipe_of(
        arguments, reference={"model": arguments.base}, policy={"model": arguments.policy}, eval=settings
    )
    if (settings_of_judge := judge_of(arguments)) is not None:
        judged = recipe.eval.model_copy(update={"judge": settings_of_judge})
        recipe = recipe.model_copy(update={"eval": judged})
    command.quiet_libraries()
    from sepo.api import extension_of
    from sepo.evaluate.measure import Evaluation
    from sepo.files import write_json
    from sepo.models.names import resolve_model
    from sepo.models.tokenizer import load_tokenizer
    from sepo.stages import data, evaluate, reference, train

    extension = extension_of(recipe)

    def write_pairs(out: Path) -> None:
        for stage in (reference, train, evaluate, data):
            stage.check(recipe)
        if train.own_tokenizer(recipe):
            raise UserError(
                f"policy '{arguments.policy}' and base '{arguments.base}' have different tokenizers: expected the "
                "model that the policy was trained from"
            )
        extension.check(recipe)
        pairs = data.read_pairs(recipe.data, load_tokenizer(resolve_model(arguments.base)))
        data.check_limits(recipe, [pairs])
        if recipe.eval.prompts:
            data.check_limits(recipe, [pairs], recipe.eval.max_new_tokens)
        data.write_pairs(out / "pairs", pairs)

    with command.writing_to(arguments) as out:
        processes = command.join(recipe.device)
        processes.on_main(lambda: write_pairs(out))
        policy, base = resolve_model(arguments.policy), resolve_model(arguments.base)
        judge = extension.judge and extension.judge.judge
        evaluation = Evaluation(
            policy, base, out / "pairs", out, recipe.eval, seed=recipe.seed, device=recipe.device, judge=judge
        )
        metrics = evaluation.measure()
        processes.on_main(lambda: write_json(out / "metrics.json", metrics))
    command.print_metrics(f"eval: {out}", metrics)
    if missing := evaluate.unanswered(metrics.get("judge/unanswered")):
        processes.log(f"{missing}: the same command asks again")
    return 1 if missing else 0
