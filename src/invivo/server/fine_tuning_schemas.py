"""Requests of /v1/fine_tuning: OpenAI's fields, and invivo's among the hyperparameters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from invivo.server.schemas import ADAPTER_NAME, BlobNames, ModelName, ProgramData, Strict

MAX_STEPS = 10_000_000
_EXT = " (extension)"
_Place = Annotated[str, Field(min_length=1, max_length=64)]
_Steps = Annotated[int, Field(ge=0, le=MAX_STEPS)]


class HyperparametersBody(Strict):
    """OpenAI's three and everything else that a job can be told; "auto" is as leaving out."""

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        None, description="How often every example is seen; steps goes before"
    )
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None, description="Examples of one optimizer step"
    )
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=1e6)] | None = (
        Field(None, description="Times the usual learning rate; instead of learning_rate")
    )
    learning_rate: Annotated[float, Field(gt=0, le=1e3)] | None = Field(
        None, description="The highest of the schedule" + _EXT
    )
    method: (
        Literal["lora", "ia3", "adapter", "prefix", "soft_prompt", "steering", "program"] | None
    ) = Field(None, description="Kind of adapter; program: see there" + _EXT)
    on: Annotated[list[_Place], Field(max_length=64)] | None = Field(
        None,
        description="Linear maps (lora, ia3: q, k, v, o, gate, up, down) or sites (adapter, "
        "steering: attn.out, mlp.out, resid.post); left out, the method's usual places" + _EXT,
    )
    r: Annotated[int, Field(ge=1, le=65_536)] | None = Field(
        None,
        description="Rank (lora), width (adapter), number of virtual tokens (prefix, soft_prompt)"
        + _EXT,
    )
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=4096)] | None = Field(
        None, description="Layers to train, from 0; left out, all" + _EXT
    )
    alpha: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        None, description="Of a LoRA, whose factor is alpha / r; left out, r" + _EXT
    )
    rank_stabilized: bool | None = Field(
        None, description="A LoRA's factor is alpha / sqrt(r)" + _EXT
    )
    activation: Annotated[str, Field(max_length=32)] | None = Field(
        None, description="Of a bottleneck adapter" + _EXT
    )
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = Field(
        None, description="Optimizer steps; left out, as many as the epochs need" + _EXT
    )
    schedule: Literal["constant", "linear", "cosine"] | None = Field(
        None, description="Course of the learning rate after the warm-up" + _EXT
    )
    warmup: _Steps | None = Field(
        None, description="Steps over which the learning rate rises" + _EXT
    )
    optimizer: Literal["adamw", "sgd"] | None = Field(None, description="Optimizer" + _EXT)
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] | None = Field(
        None, description="Of either optimizer" + _EXT
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="Of sgd" + _EXT)
    clip: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Largest norm of all gradients together; null = any" + _EXT
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        None, description="As the job's own seed" + _EXT
    )
    shuffle: bool | None = Field(None, description="A new order of the examples every epoch" + _EXT)
    max_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Longest example in tokens; texts are cut into pieces of it" + _EXT
    )
    truncate: bool | None = Field(
        None, description="Cut longer examples off instead of refusing them" + _EXT
    )
    checkpoint_every: _Steps | None = Field(
        None, description="Steps; left out, a tenth of them, 50 at most; 0 = only at the end" + _EXT
    )
    keep_checkpoints: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="The newest so many stay; left out, 3" + _EXT
    )
    validate_every: _Steps | None = Field(
        None,
        description="Steps after which the validation file is run through; left out, a tenth of "
        "them, 50 at most; 0 = only at the end" + _EXT,
    )
    publish_every: _Steps | None = Field(
        None,
        description="Steps after which the adapter is served as it then is; 0 = only at the end"
        + _EXT,
    )
    share: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None, description="Weight of this job among those that run at the same time" + _EXT
    )
    program: ProgramData | None = Field(
        None,
        description="Parameters of this program are trained (docs/interventions.md), in place of "
        "an adapter; fine_tuned_model is then the hash of a program with their values" + _EXT,
    )
    train: Annotated[list[_Place], Field(max_length=256)] | None = Field(
        None, description="Names of the program's parameters that are trained" + _EXT
    )
    blobs: BlobNames | None = None
    objective: Literal["cross_entropy", "logit_diff", "kl"] | None = Field(
        None,
        description="Of a program: cross_entropy of what is learned, logits of the examples' "
        "other minus those, or kl, how far the program moves the model's predictions" + _EXT,
    )
    sparsity: Annotated[float, Field(ge=0, le=1e9)] | None = Field(
        None,
        description="Times the distance of trained masks and vectors from changing nothing, added "
        "to the loss" + _EXT,
    )

    start: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None,
        description="An adapter, or a checkpoint of one, that is learned further: training begins "
        "with it, and method, places and sizes are its own; as model base:adapter" + _EXT,
    )

    @model_validator(mode="after")
    def _one_learning_rate(self) -> HyperparametersBody:
        if self.learning_rate is not None and isinstance(self.learning_rate_multiplier, float):
            raise ValueError("give either learning_rate or learning_rate_multiplier")
        return self


class SupervisedBody(Strict):
    hyperparameters: HyperparametersBody | None = None


class MethodBody(Strict):
    """Only supervised fine-tuning is offered."""

    type: Literal["supervised"]
    supervised: SupervisedBody | None = None


_MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
_MetadataValue = Annotated[str, Field(max_length=512)]


class FineTuningRequest(Strict):
    """Body of POST /v1/fine_tuning/jobs."""

    model: ModelName = Field(
        description="The base model, or base:adapter for an adapter that is learned further"
    )
    training_file: str = Field(min_length=1, max_length=128)
    validation_file: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None, description="Held-out examples, whose loss is told in events and checkpoints"
    )
    suffix: Annotated[str, Field(pattern=ADAPTER_NAME)] | None = Field(
        None, description="Name of the adapter: the result is served as model:suffix"
    )
    method: MethodBody | None = None
    hyperparameters: HyperparametersBody | None = Field(
        None, description="As method.supervised.hyperparameters; give one of both"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    metadata: Annotated[dict[_MetadataKey, _MetadataValue], Field(max_length=16)] | None = None
    integrations: Annotated[list[None], Field(max_length=0)] | None = Field(
        None, description="Not supported: must be null or empty"
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> FineTuningRequest:
        inner = self.method.supervised if self.method is not None else None
        if self.hyperparameters is not None and inner is not None and inner.hyperparameters:
            raise ValueError(
                "hyperparameters: give them either here or in method.supervised.hyperparameters"
            )
        chosen = self.chosen
        if None not in (self.seed, chosen.seed) and self.seed != chosen.seed:
            raise ValueError("seed: differs from the seed among the hyperparameters")
        return self

    @property
    def chosen(self) -> HyperparametersBody:
        """The hyperparameters, wherever they were given."""
        inner = self.method.supervised if self.method is not None else None
        within = inner.hyperparameters if inner is not None else None
        return self.hyperparameters or within or HyperparametersBody.model_validate({})
