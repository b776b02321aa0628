"""The method: which stages there are, and what each one reads.

    pairs        tokenised preference pairs
    reference    the small model, fine-tuned or taken as given
    oracles      the reference trained with DPO on the pairs
    scores       token rewards: log-probabilities under the oracle minus those under the reference
    selection    the key tokens of each response
    policy       the model to align, trained on the key tokens
    evaluation   the policy against the model it started from

Asking a `Method` for a result does the stage, after the stages that it reads. A walker says what "doing" is: a run does
a stage in its folder unless the result is up to date, a comparison shares results between variants, a dry run only adds
up costs. Nothing else in the package says in which order the stages come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from sepo import processes
from sepo.errors import UserError, nearest
from sepo.forward.scoring import Types
from sepo.models.devices import choose_device, dtype_name
from sepo.models.tokenizer import load_tokenizer
from sepo.recipe.settings import OracleSettings, PolicySettings, Recipe, ReferenceSettings
from sepo.stages import data, evaluate, logps, oracle, reference, score, select, train
from sepo.stages.evaluate import RunJudge
from sepo.stages.stage import Model, Stage, StageResult
from sepo.training.fit import training_types

# What `sepo run --until` takes: a stage of the method, and the result of a `Method` that ends with it.
UNTIL = {
    "data": "pairs",
    "reference": "reference_logps",
    "oracle": "oracles",
    "score": "policy_scores",
    "select": "selection",
    "train": "policy",
    "eval": "evaluation",
}


def check_until(until: str | None) -> None:
    """Raise a UserError for a stage that does not exist."""
    if until is not None and until not in UNTIL:
        raise UserError(f"there is no stage '{until}'{nearest(until, UNTIL)}: expected one of {', '.join(UNTIL)}")


class Walker(Protocol):
    """Who walks the stages."""

    def model(self, name: str, revision: str | None = None) -> Model:
        """A model that no stage writes."""

    def do(self, stage: Stage, role: str) -> StageResult:
        """Do a stage; its record in the manifest has the name `role`."""


class Transfer(Protocol):
    """The stages for a policy with another tokenizer (`sepo.transfer.stages`)."""

    def pairs_stage(self, recipe: Recipe, pairs: StageResult) -> Stage:
        """Pairs under the policy's tokenizer."""

    def stage(
        self,
        recipe: Recipe,
        scores: StageResult,
        pairs: StageResult,
        policy_pairs: StageResult,
        words: score.Words | None = None,
    ) -> Stage:
        """Token rewards under the policy's tokenizer."""


class Extension(NamedTuple):
    """What a recipe asks for beyond the method: the wings, put together by `sepo.api` or a comparison.

    Attributes:
        check: finds bad input before anything expensive starts.
        judge: compares answers in the evaluation; None without a judge.
        do_stages: does further stages after the evaluation and returns their metrics.
        before_data: does stages before the data, with the whole extension (a model may have to be fine-tuned for them),
            and returns the recipe that reads what they wrote; None without any.
        transfer: the stages for a policy with another tokenizer; None where the policy is no model of its own.
        targets: ends trainings at a measured value; None where they last a number of steps.
        fine_tune: fine-tunes the reference; None where the recipe does not ask for it.
    """

    check: Callable[[Recipe], None] = lambda recipe: None
    judge: RunJudge | None = None
    do_stages: Callable[[Method], dict[str, Any]] = lambda method: {}
    before_data: Callable[[Recipe, Walker, Extension], Recipe] | None = None
    transfer: Transfer | None = None
    targets: train.Targets | None = None
    fine_tune: reference.FineTune | None = None

    def and_also(self, other: Extension) -> Extension:
        """Both extensions."""

        def check(recipe: Recipe) -> None:
            self.check(recipe)
            other.check(recipe)

        return Extension(
            check,
            other.judge or self.judge,
            lambda method: {**self.do_stages(method), **other.do_stages(method)},
            other.before_data or self.before_data,
            other.transfer or self.transfer,
            other.targets or self.targets,
            other.fine_tune or self.fine_tune,
        )


NOTHING = Extension()


class Method:
    """The stages of one recipe.

    Args:
        walker: does the stages.
        seed: of selection and policy; default: the recipe's.
        oracle_seed: of the oracles; default: the recipe's.
        extension: what the recipe asks for beyond the method.
        pairs: tokenised pairs that exist already, such as those that the variants of a comparison share.
        device: the kind of device that a plan is for; default: the recipe's, on this machine.
    """

    def __init__(
        self,
        recipe: Recipe,
        walker: Walker,
        *,
        seed: int | None = None,
        oracle_seed: int | None = None,
        extension: Extension = NOTHING,
        pairs: StageResult | None = None,
        device: str | None = None,
    ):
        if pairs is not None:
            self.pairs = pairs
        self.recipe, self.walker, self.extension = recipe, walker, extension
        self.seed = recipe.seed if seed is None else seed
        self.oracle_seed = recipe.seed if oracle_seed is None else oracle_seed
        self._device = device
        self._passes: dict[tuple[str, str, Types], StageResult] = {}

    # --- data -------------------------------------------------------------------------------------------------------

    @cached_property
    def start(self) -> Model:
        """The small model that the recipe names."""
        return self.walker.model(self.recipe.reference.model, self.recipe.reference.revision)

    @cached_property
    def pairs(self) -> StageResult:
        """Pairs under the reference's tokenizer."""
        return self.walker.do(data.stage(self.recipe, self._tokenizer(self.recipe.reference)), "data")

    @cached_property
    def transfers(self) -> bool:
        """Does the policy have another tokenizer than the oracle?"""
        return processes.on_main(lambda: train.own_tokenizer(self.recipe))

    @cached_property
    def policy_pairs(self) -> StageResult:
        """Pairs under the policy's tokenizer."""
        if not self.transfers:
            return self.pairs
        return self.walker.do(self._transfer.pairs_stage(self.recipe, self.pairs), "policy_pairs")

    # --- reference, oracles -----------------------------------------------------------------------------------------

    @cached_property
    def reference(self) -> Model:
        """The model that the oracles start from."""
        stage = reference.stage(self.recipe, self.start, self.extension.fine_tune)
        return self.start if stage is None else Model.of(self.walker.do(stage, "reference"))

    @cached_property
    def reference_logps(self) -> StageResult:
        """Log-probabilities under the reference: half of the token reward."""
        return self._logps(self.reference, self.pairs, "reference")

    @cached_property
    def oracle_start_logps(self) -> StageResult:
        """Log-probabilities under the reference in the types of the oracle's training: DPO's reference term."""
        types = self._training_types(self.recipe.oracle, self.reference)
        if types == self._scoring_types:
            return self.reference_logps
        return self._logps(self.reference, self.pairs, "oracle_start", types)

    @cached_property
    def oracles(self) -> dict[str, Model]:
        """The oracles by name, an existing one or those that are trained, and their opposites (`oracle.members`)."""
        settings = self.recipe.oracle
        if not self.recipe.reads_oracle:
            return {}
        if settings.model is not None:
            existing = self.walker.model(settings.model)
            oracle.check_differs(str(settings.model), existing, self.reference)
            return {"oracle": existing}
        base, ends = self.oracle_start_logps, self.extension.targets
        return {
            name: Model.of(
                self.walker.do(oracle.stage(self.recipe, self.reference, self.pairs, base, seed, swapped, ends), name)
            )
            for name, seed, swapped in oracle.members(settings, self.oracle_seed)
        }

    # --- token rewards, key tokens ----------------------------------------------------------------------------------

    @cached_property
    def scores(self) -> StageResult:
        """Token rewards under the oracle's tokenizer."""
        settings = self.recipe.oracle
        words = self._words(self.recipe.reference)
        if settings.rewards is not None:
            return self.walker.do(score.given_stage(self.recipe, self.pairs, words), "score")
        if words is not None and not self.recipe.reads_oracle:
            return self.walker.do(score.truth_stage(self.pairs, words), "score")
        base = self.reference_logps
        logps_of = {name: self._logps(model, self.pairs, name) for name, model in self.oracles.items()}
        opposites = [logps_of.pop(name) for name, _, swapped in oracle.members(settings) if swapped]
        return self.walker.do(score.stage(self.pairs, list(logps_of.values()), opposites or base, words), "score")

    @cached_property
    def policy_scores(self) -> StageResult:
        """Token rewards under the policy's tokenizer."""
        if not self.transfers:
            return self.scores
        words = self._words(self.recipe.policy)
        stage = self._transfer.stage(self.recipe, self.scores, self.pairs, self.policy_pairs, words)
        return self.walker.do(stage, "transfer")

    @cached_property
    def selection(self) -> StageResult:
        """Key tokens and their weights."""
        return self.walker.do(select.stage(self.recipe, self.policy_scores, self.seed), "select")

    # --- policy -----------------------------------------------------------------------------------------------------

    @cached_property
    def policy_start(self) -> Model:
        """The model that the policy starts from."""
        policy = self.recipe.policy
        return self.reference if policy.model is None else self.walker.model(policy.model, policy.revision)

    @cached_property
    def policy_start_logps(self) -> StageResult:
        """Log-probabilities under the objective's reference, by default the policy's start, in the training's types."""
        types = self._training_types(self.recipe.policy, self.policy_start)
        name = self.recipe.policy.reference
        if name is None:
            return self.start_logps(types)
        return self._logps(self.walker.model(name), self.policy_pairs, "policy_reference", types)

    def start_logps(self, types: Types) -> StageResult:
        """Log-probabilities under the policy's start in any types."""
        return self._logps(self.policy_start, self.policy_pairs, "policy_start", types)

    @cached_property
    def policy(self) -> StageResult:
        """The trained policy."""
        targets = self.selection
        start_logps = self.policy_start_logps if train.needs_reference(self.recipe) else None
        ends = self.extension.targets
        stage = train.stage(self.recipe, self.policy_start, targets, start_logps, self.seed, self.policy_pairs, ends)
        return self.walker.do(stage, "train")

    @cached_property
    def evaluation(self) -> StageResult:
        """Everything that is measured about the policy."""
        policy = Model.of(self.policy)
        types = Types(dtype_name(self.recipe.dtype, self._kind))
        base = self.policy_start if self.recipe.eval.base is None else self.walker.model(self.recipe.eval.base)
        start_logps = self._passes.get((base.content, self.policy_pairs.content, types))
        stage = evaluate.stage(
            self.recipe,
            policy,
            base,
            self.policy_pairs,
            self.policy_scores,
            self.selection,
            start_logps,
            self.extension.judge,
        )
        return self.walker.do(stage, "eval")

    # ----------------------------------------------------------------------------------------------------------------

    def until(self, stage: str) -> StageResult | Model | Mapping[str, Any]:
        """Do everything up to a stage of `UNTIL`."""
        return getattr(self, UNTIL[stage])

    def _logps(self, model: Model, pairs: StageResult, role: str, types: Types | None = None) -> StageResult:
        """A pass over all pairs in some types (default: those of token rewards), done once whoever asks for it."""
        types = types or self._scoring_types
        key = (model.content, pairs.content, types)
        if key not in self._passes:
            stage = logps.stage(self.recipe, model, pairs, role, types)
            self._passes[key] = self.walker.do(stage, f"{role}_logps")
        return self._passes[key]

    @property
    def _transfer(self) -> Transfer:
        if self.extension.transfer is None:
            raise ValueError("a policy with another tokenizer needs sepo.api.run_recipe")
        return self.extension.transfer

    @cached_property
    def _kind(self) -> str:
        return self._device or choose_device(self.recipe.device).type

    @property
    def _scoring_types(self) -> Types:
        return Types(logps.scoring_dtype(self.recipe))

    def _training_types(self, settings: OracleSettings | PolicySettings, model: Model) -> Types:
        return training_types(settings, model.folder, self._kind)

    def _tokenizer(self, settings: ReferenceSettings | PolicySettings) -> PreTrainedTokenizerBase:
        return load_tokenizer(str(settings.model), revision=settings.revision)

    def _words(self, settings: ReferenceSettings | PolicySettings) -> score.Words | None:
        gold = self.recipe.eval.gold
        return None if gold is None else score.Words(self._tokenizer(settings), gold)
