"""The configuration of a comparison of objectives, checked without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from data_pipeline.settings import Settings, nearest
from pretrain.objective_config import ObjectiveConfig

NUM_EVENT_MODALITIES = 3


class Entry(Settings):
    """One line of the comparison: an objective, or a sum of several, as in a training config."""

    label: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ,+_-]*$")  # also the name of its files
    objective: list[ObjectiveConfig]  # empty: encoders as they were drawn, without training
    # One line a modality instead, each with that modality as the anchor of every objective that has one.
    each_anchor: bool = False
    freeze_anchor: bool = False  # the anchor's encoder stays as it was drawn
    num_modalities: list[PositiveInt] | None = None  # only where there are so many; null: everywhere
    lr: PositiveFloat | None = None  # null: that of all

    @model_validator(mode="after")
    def _has_an_anchor(self) -> Entry:
        if (self.each_anchor or self.freeze_anchor) and not any(
            "anchor" in type(p).model_fields for p in self.objective
        ):
            raise ValueError(f"{self.label}: each_anchor and freeze_anchor need an objective that has an anchor")
        if self.freeze_anchor and not self.each_anchor and not any(getattr(p, "anchor", None) for p in self.objective):
            raise ValueError(f"{self.label}: freeze_anchor: no objective names its anchor")
        if self.each_anchor and any(getattr(part, "pairs", "all") != "all" for part in self.objective):
            raise ValueError(f"{self.label}: give either each_anchor or pairs, not both")
        return self

    @field_validator("label")
    @classmethod
    def _no_space_at_the_end(cls, value: str) -> str:
        return value.strip()


class MixtureConfig(Settings):
    """Modalities of unequal quality, in the spirit of CentroBind's experiment (arXiv 2410.02086).

    The latent is drawn from a mixture of Gaussians, and the label is its component. Modality x1 is the worst, the last
    the best: fixed random networks of the latent, of unit variance, plus noise. In `anchor` and `pairs` an objective
    may also say `worst` and `best`. No size is the paper's: none could be read.
    """

    name: Literal["mixture"] = "mixture"
    num_modalities: list[Annotated[int, Field(ge=2, le=16)]] = Field([4], min_length=1)  # each a setting
    num_components: Annotated[int, Field(ge=2)] = 32
    latent_dim: PositiveInt = 16
    separation: PositiveFloat = 1.0  # standard deviation of the components' means; inside a component it is 1
    observed_dim: PositiveInt = 32  # of a modality
    noise_worst: PositiveFloat = 2.0  # standard deviation; between worst and best at equal ratios
    noise_best: PositiveFloat = 0.3
    num_train: PositiveInt = 4096
    num_test: PositiveInt = 1024

    @model_validator(mode="after")
    def _worst_is_noisier(self) -> MixtureConfig:
        if self.noise_worst < self.noise_best:
            raise ValueError(f"noise_worst {self.noise_worst}: expected at least noise_best, {self.noise_best}")
        return self


class EventsConfig(Settings):
    """Text that names what is seen and what is heard: two independent latents, one each of video and audio, both of
    text. The label is the component of what is seen."""

    name: Literal["events"] = "events"
    num_components: Annotated[int, Field(ge=2)] = 16  # of each latent
    latent_dim: PositiveInt = 8  # of each
    separation: PositiveFloat = 1.0
    observed_dim: PositiveInt = 32
    noise: NonNegativeFloat = 0.1
    num_train: PositiveInt = 1000
    num_test: PositiveInt = 1000


class EncoderConfig(Settings):
    """A perceptron of two hidden layers for each modality, and a linear projection."""

    hidden_dim: PositiveInt = 64
    embedding_dim: PositiveInt = 32


class BudgetConfig(Settings):
    """What every objective gets, with Adam and half a cosine down to 0 after the warmup."""

    num_steps: PositiveInt = 200
    batch: PositiveInt = 256
    lr: PositiveFloat = 2e-3
    warmup_steps: int = Field(20, ge=0)


class SyntheticConfig(Settings):
    """Encoders of a few layers on vectors: minutes instead of days, and everything known of the data."""

    name: Literal["synthetic"] = "synthetic"
    generator: Annotated[MixtureConfig | EventsConfig, Field(discriminator="name")] = MixtureConfig()
    encoder: EncoderConfig = EncoderConfig()
    budget: BudgetConfig = BudgetConfig()
    # Label from frozen embeddings by logistic regression, or one hidden layer; null: not measured.
    readout: Literal["linear", "mlp"] | None = "linear"

    @model_validator(mode="after")
    def _batch_is_there(self) -> SyntheticConfig:
        if self.budget.batch > self.generator.num_train:
            raise ValueError(f"budget.batch {self.budget.batch} exceeds generator.num_train {self.generator.num_train}")
        return self

    @model_validator(mode="after")
    def _volumes_have_room(self) -> SyntheticConfig:
        most = max(self.generator.num_modalities) if isinstance(self.generator, MixtureConfig) else NUM_EVENT_MODALITIES
        if self.encoder.embedding_dim < most:
            raise ValueError(
                f"encoder.embedding_dim {self.encoder.embedding_dim}; expected at least {most}, the modalities: "
                "retrieval by volume is measured of every objective"
            )
        return self


class CorpusConfig(Settings):
    """Real media and the real trainer, one rank, a run folder a cell; then retrieval on a split."""

    name: Literal["corpus"] = "corpus"
    run: str = "configs/demo/pretrain.yaml"  # the training config; objective, seed and run_dir are the comparison's
    overrides: tuple[str, ...] = ()  # keys of it to change: schedule.num_steps=100
    data: str | None = None  # dataset to evaluate on; null: the first one trained on
    split: str = "test"


class CompareConfig(Settings):
    """A comparison: every entry, in every setting of the experiment, with every seed."""

    out_dir: str
    seeds: list[int] = Field([0, 1, 2, 3, 4], min_length=1)
    baseline: str  # label of the entry that the others are compared with, seed by seed
    experiment: Annotated[SyntheticConfig | CorpusConfig, Field(discriminator="name")] = SyntheticConfig()
    objectives: list[Entry] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_once(self) -> CompareConfig:
        labels = [entry.label for entry in self.objectives]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise ValueError(f"objectives: label '{twice[0]}' is there twice; expected each once")
        plain = [entry.label for entry in self.objectives if not entry.each_anchor]
        if self.baseline not in plain:
            raise ValueError(f"baseline '{self.baseline}'; {nearest(self.baseline, plain)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: one is there twice")
        return self

    @model_validator(mode="after")
    def _what_a_run_can_do(self) -> CompareConfig:
        if self.experiment.name == "corpus":
            for entry in self.objectives:
                unable = [n for n in ("freeze_anchor", "each_anchor", "lr") if getattr(entry, n)]
                if unable or not entry.objective:
                    what = unable[0] if unable else "an empty objective"
                    raise ValueError(f"objectives: {entry.label}: {what} is for the synthetic experiment only")
        return self
