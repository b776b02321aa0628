"""What each stage costs, of the method and of the wings: its name, its `facts` and the sizes in, a `Cost` out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from sepo.evaluate.generate import responses_at_once
from sepo.forward.scoring import Types, tokens_per_row_for
from sepo.planning.cost import (
    Cost,
    Estimate,
    FineTuningMemory,
    FrozenMemory,
    ModelSize,
    PairSizes,
    Sizes,
    TrainingMemory,
)
from sepo.recipe.objectives import OBJECTIVES
from sepo.recipe.settings import OnPolicySettings, OracleSettings, PolicySettings, Recipe, SftSettings
from sepo.stages import select
from sepo.stages.logps import scoring_dtype
from sepo.stages.stage import Stage
from sepo.training.fit import epochs, steps_of


def cost_of(stage: Stage, sizes: Sizes) -> Cost:
    """What a stage costs."""
    if stage.facts is None:
        return Cost(stage.what)
    cost = COSTS[stage.kind.partition("-")[0]](sizes, **stage.facts)
    return cost if cost.what else replace(cost, what=stage.what)


# --- data, reference, oracle ----------------------------------------------------------------------------------------


def data(sizes: Sizes, recipe: Recipe) -> Cost:
    """Reading and tokenising: seconds at most."""
    return Cost(recipe.data.what, *_of_all(sizes))


def policy_pairs(sizes: Sizes) -> Cost:
    """Reading the source again: seconds."""
    return Cost(sizes.transfer, *_of_all(sizes.of_policy))


def samples(sizes: Sizes, settings: OnPolicySettings, dtype: str) -> Cost:
    """Every answer has full length; the prompts are read once."""
    number = settings.samples * min(settings.limit or sizes.train.pairs, sizes.train.pairs)
    width, steps = max(1, (settings.batch_size or 32)), settings.max_new_tokens
    batches = math.ceil(number / width)
    estimate = Estimate("generate", sizes.large, steps=batches * steps, width=width, dtype=dtype)
    return Cost(tokens=number * steps, estimates=(estimate,))


def reference(sizes: Sizes, sft: SftSettings | None) -> Cost:
    """Memory of the fine-tuning. Its time is not estimated: the length of its data is unknown until they are read."""
    if sft is None:
        return Cost()
    need = FineTuningMemory(sizes.small.shape, sft.training, sizes.device, sft.max_length, sizes.processes)
    return Cost(memory=need)


def oracle(sizes: Sizes, recipe: Recipe) -> Cost:
    """One training, and the measurements on the way to `oracle.target_accuracy`."""
    settings, pairs = recipe.oracle, sizes.train
    estimates = _training_estimates(settings, sizes.small, pairs, pairs.responses, share=settings.sample)
    if settings.target_accuracy is not None:
        estimates = (*estimates, *_accuracy_estimates(sizes, estimates))
    return Cost(
        "DPO",
        round(pairs.pairs * settings.sample),
        round(pairs.tokens * settings.sample),
        estimates,
        _training_memory(settings, sizes, sizes.small, pairs.responses),
    )


def _accuracy_estimates(sizes: Sizes, training: tuple[Estimate, ...]) -> tuple[Estimate, ...]:
    """Passes over the held-out pairs in a training of the oracle that lasts its whole length."""
    from sepo.targets.until import number_of_looks

    steps = round(next(part for part in training if part.kind == "train").updates)
    held_out = sizes.held_out
    return (Estimate("score", sizes.small, held_out.scored, held_out.responses).times(number_of_looks(steps)),)


# --- log-probabilities, token rewards, key tokens -------------------------------------------------------------------


def logps(sizes: Sizes, recipe: Recipe, role: str, types: Types) -> Cost:
    """A frozen model of some role scores all pairs."""
    model = sizes.small
    if role in ("policy_start", "policy_reference"):  # a reference for the policy is of its size
        sizes, model = sizes.of_policy, sizes.large
    train, held_out = sizes.train, sizes.held_out
    computes_in = types.autocast or types.dtype
    reads = [
        Estimate("score", model, part.scored, part.responses, dtype=computes_in)
        for part in (train, held_out)
        if part.pairs
    ]
    tokens = recipe.tokens_per_row or tokens_per_row_for(sizes.device, scoring=True)
    longest = min(max(tokens, train.longest), train.scored + held_out.scored)
    share = train.responses / max(train.tokens, 1)
    return Cost(
        "log-probabilities",
        train.pairs + held_out.pairs,
        train.scored + held_out.scored,
        (*(Estimate("load", model, dtype=types.dtype) for _ in reads), *reads),
        FrozenMemory(
            model.shape,
            sizes.device,
            _width_of(types.dtype, sizes.device),
            longest,
            math.ceil(share * longest),
            processes=sizes.processes,
        ),
    )


def score(sizes: Sizes) -> Cost:
    """Differences of stored log-probabilities: seconds."""
    return Cost("token rewards", *_of_all(sizes))


def transfer(sizes: Sizes, recipe: Recipe) -> Cost:
    """Arithmetic on tokens: seconds."""
    return Cost(f"to the policy's tokens, by {recipe.transfer.allocation}", sizes.of_policy.train.pairs)


def key_tokens(sizes: Sizes, recipe: Recipe) -> Cost:
    """Sorting: seconds."""
    objective, pairs = OBJECTIVES[recipe.policy.objective], sizes.of_policy.train.pairs
    if objective.reads_token_rewards:
        return Cost(f"the reward of every token, which {recipe.policy.objective} reads", pairs)
    kept = f"{recipe.select.k_chosen:.0%} of chosen, {recipe.select.k_rejected:.0%} of rejected tokens"
    if not objective.reads_selection:
        pairs_alone = ", which reads the weights of pairs alone" if recipe.select.confidence else ""
        kept += f" (not read by {recipe.policy.objective}{pairs_alone})"
    return Cost(kept, pairs)


# --- policy ---------------------------------------------------------------------------------------------------------


def train(sizes: Sizes, recipe: Recipe) -> Cost:
    """The training of the policy, and the measurements on the way to `policy.target_kl`."""
    policy, sizes = recipe.policy, sizes.of_policy
    parts = _policy_estimates(recipe, sizes)
    if policy.target_kl is not None:
        parts = (*parts, *_to_kl_estimates(recipe, sizes, parts))
    frozen_copy = bool(OBJECTIVES[policy.objective].kl_direction(policy.alpha))
    need = _training_memory(policy, sizes, sizes.large, _targets(recipe, sizes), frozen_copy)
    return Cost(f"{policy.objective} objective", sizes.train.pairs, sizes.train.tokens, parts, need)


def _targets(recipe: Recipe, sizes: Sizes) -> float:
    """Number of target tokens of all pairs."""
    pairs, rule = sizes.train, select.settings_of(recipe)
    if not OBJECTIVES[recipe.policy.objective].reads_selection:
        return pairs.responses
    return rule.k_chosen * pairs.chosen + rule.k_rejected * pairs.rejected


def _policy_estimates(recipe: Recipe, sizes: Sizes) -> tuple[Estimate, ...]:
    """The training, and the frozen reference that some objectives read at every step."""
    training = _training_estimates(recipe.policy, sizes.large, sizes.train, _targets(recipe, sizes))
    if not OBJECTIVES[recipe.policy.objective].kl_direction(recipe.policy.alpha):
        return training
    frozen = Estimate("score", sizes.large, training[1].tokens, training[1].targets, dtype="float32")
    return (*training, frozen)


def _to_kl_estimates(recipe: Recipe, sizes: Sizes, training: tuple[Estimate, ...]) -> tuple[Estimate, ...]:
    """The start, the measurements, and the probes of an automatic rate."""
    from sepo.targets.auto_rate import FIRST_RATE, USUAL_PROBES, probe_steps, probe_training
    from sepo.targets.until import MEASUREMENTS

    measured = _sampling_estimates(recipe, sizes, recipe.dtype) + 2 * _kl_estimates(recipe, sizes, recipe.dtype)
    parts = (Estimate("load", sizes.large), *MEASUREMENTS * measured)
    if recipe.policy.training.learning_rate != "auto":
        return parts
    loads, trained = (next(part for part in training if part.kind == kind) for kind in ("load", "train"))
    steps = probe_steps(round(trained.updates))
    short = trained.times(min(steps / max(trained.updates, 1), 1.0))
    probe = replace(short, training=probe_training(recipe.policy.training, steps, FIRST_RATE))
    return (*parts, *USUAL_PROBES * (loads, probe))


# --- evaluation, benchmarks, comparisons ----------------------------------------------------------------------------


def evaluation(sizes: Sizes, recipe: Recipe, start_scored: bool) -> Cost:
    """Both models generate, one after the other, and score the held-out pairs, the start unless it has scored them."""
    sizes = sizes.of_policy
    held_out, dtype, model = sizes.held_out, recipe.dtype, sizes.large
    number, length = _responses(recipe, sizes), recipe.eval.max_new_tokens
    passes = 1 if start_scored else 2
    examples = min(recipe.eval.examples, recipe.eval.prompts, sizes.prompts)
    share = 1.0 if recipe.eval.pairs is None else min(recipe.eval.pairs / max(held_out.pairs, 1), 1.0)
    scoring = Estimate("score", model, held_out.scored, held_out.responses, dtype=dtype).times(share)
    load = Estimate("load", model, dtype=dtype)
    estimates = (
        load,
        load,
        *[scoring] * passes,
        *_sampling_estimates(recipe, sizes, dtype) * 2,
        *_sampling_estimates(recipe, sizes, dtype, examples) * 2,
        *_kl_estimates(recipe, sizes, dtype),
    )
    budget = min(max(tokens_per_row_for(sizes.device, scoring=True), held_out.longest), max(held_out.scored, 1))
    need = FrozenMemory(
        model.shape,
        sizes.device,
        _width_of(dtype, sizes.device),
        budget,
        math.ceil(budget * held_out.responses / max(held_out.tokens, 1)),
        responses=min(number, _at_once(recipe, sizes)),
        length=sizes.longest_prompt + length,
        prompt=sizes.longest_prompt,
    )
    tokens = round(passes * share * held_out.scored) + 2 * number * length
    return Cost("", held_out.pairs, tokens, estimates, need)


def benchmark(sizes: Sizes, recipe: Recipe, turns: int) -> Cost:
    """Each model writes one answer of full length to each turn; reading the questions is not counted."""
    model, length = sizes.of_policy.large, recipe.eval.benchmark_max_new_tokens
    width = min(turns, recipe.eval.batch_size or 32)
    load = Estimate("load", model, dtype=recipe.dtype)
    steps = math.ceil(turns / width) * length
    write = Estimate("generate", model, steps=steps, width=width, dtype=recipe.dtype)
    return Cost(tokens=2 * turns * length, estimates=(load, load, write, write))


def start_samples(sizes: Sizes, recipe: Recipe) -> Cost:
    """The start answers the held-out prompts."""
    estimates = _sampling_estimates(recipe, sizes.of_policy, scoring_dtype(recipe))
    return Cost("samples of the start", estimates=estimates)


def measured_training(sizes: Sizes, recipe: Recipe, measurements: int) -> Cost:
    """The training of a comparison, and every measurement on its way."""
    sizes, dtype = sizes.of_policy, scoring_dtype(recipe)
    measuring = (*_sampling_estimates(recipe, sizes, dtype), *_kl_estimates(recipe, sizes, dtype))
    if recipe.eval.gold is None and recipe.eval.judge is None:
        held_out = sizes.held_out
        measuring += (Estimate("score", sizes.large, held_out.scored, held_out.responses, dtype=dtype),)
    pairs = epochs(recipe.policy.training, sizes.train.pairs) * sizes.train.pairs
    estimates = (*_policy_estimates(recipe, sizes), *measurements * measuring)
    return Cost(f"{recipe.policy.objective}, {pairs:,.0f} pairs a run", estimates=estimates)


def baselines(sizes: Sizes, recipe: Recipe, answers: int) -> Cost:
    """The answers of best of n, and those of steering with three models at a time."""
    return Cost(estimates=_sampling_estimates(recipe, sizes.of_policy, scoring_dtype(recipe)) * answers)


# The cost of a stage by its kind, or by the first part of its kind ("benchmark-NAME").
COSTS: Mapping[str, Callable[..., Cost]] = {
    "data": data,
    "policy_pairs": policy_pairs,
    "samples": samples,
    "reference": reference,
    "oracle": oracle,
    "logps": logps,
    "score": score,
    "transfer": transfer,
    "select": key_tokens,
    "train": train,
    "eval": evaluation,
    "benchmark": benchmark,
    "start": start_samples,
    "run": measured_training,
    "baselines": baselines,
}


# --- parts of costs -------------------------------------------------------------------------------------------------


def _of_all(sizes: Sizes) -> tuple[int, int]:
    """Number of all pairs, and of their tokens."""
    return sizes.train.pairs + sizes.held_out.pairs, sizes.train.tokens + sizes.held_out.tokens


def _responses(recipe: Recipe, sizes: Sizes) -> int:
    """Number of responses from one model."""
    return min(sizes.prompts, recipe.eval.prompts) * recipe.eval.samples


def _at_once(recipe: Recipe, sizes: Sizes) -> int:
    """Number of responses that are generated at once."""
    longest = sizes.longest_prompt + recipe.eval.max_new_tokens
    return recipe.eval.batch_size or responses_at_once(longest, sizes.device)


def _sampling_estimates(recipe: Recipe, sizes: Sizes, dtype: str, number: int | None = None) -> tuple[Estimate, ...]:
    """One model answers the held-out prompts, or `number` prompts once more; every answer has full length."""
    number, model = _responses(recipe, sizes) if number is None else number, sizes.large
    if not number:
        return ()
    width = min(number, _at_once(recipe, sizes))
    batches = math.ceil(number / width)
    prompts = number * sizes.prompt_tokens / sizes.prompts
    return (
        Estimate("score", model, prompts, number, dtype=dtype),
        Estimate("generate", model, steps=batches * recipe.eval.max_new_tokens, width=width, dtype=dtype),
    )


def _kl_estimates(recipe: Recipe, sizes: Sizes, dtype: str) -> tuple[Estimate, ...]:
    """The base scores the policy's responses, for the KL."""
    number = _responses(recipe, sizes)
    written = number * recipe.eval.max_new_tokens
    prompts = number * sizes.prompt_tokens / max(sizes.prompts, 1)
    return (Estimate("score", sizes.large, prompts + written, written, dtype=dtype),) if number else ()


def _training_estimates(
    settings: OracleSettings | PolicySettings, model: ModelSize, pairs: PairSizes, targets: float, share: float = 1.0
) -> tuple[Estimate, ...]:
    """Compute of a training on a share of the pairs.

    Args:
        targets: target tokens of all pairs.
    """
    training = settings.training
    passes = epochs(training, pairs.pairs * share)
    return (
        Estimate("load", model),
        Estimate(
            "train",
            model,
            tokens=pairs.tokens * share * passes,
            targets=targets * share * passes,
            updates=steps_of(training, round(pairs.pairs * share)),
            training=training,
            lora=settings.lora,
            quantization=settings.quantization,
        ),
    )


def _training_memory(
    settings: OracleSettings | PolicySettings, sizes: Sizes, model: ModelSize, targets: float, frozen_copy: bool = False
) -> TrainingMemory:
    """Memory of a training; `targets` as in `_training_estimates`."""
    training, pairs = settings.training, sizes.train
    budget = training.tokens_per_row or tokens_per_row_for(sizes.device)
    # A row holds at most the pairs that one process reads for an update.
    mean = pairs.tokens / max(pairs.pairs, 1)
    tokens = max(min(budget, math.ceil(mean * training.batch_size / sizes.processes)), pairs.longest)
    return TrainingMemory(
        model.shape,
        training,
        sizes.device,
        tokens,
        math.ceil(tokens * targets / max(pairs.tokens, 1)),
        pairs.longest,
        settings.lora,
        settings.quantization,
        sizes.processes,
        frozen_copy=frozen_copy,
    )


def _width_of(dtype: str, device: str) -> int:
    """Bytes of a frozen weight."""
    return 4 if dtype == "float32" or (dtype == "auto" and device != "cuda") else 2
