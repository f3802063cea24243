"""The training configuration: every key of a `pretrain` YAML file, its unit, its default and where that comes from."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from data_pipeline.settings import Settings, nearest
from pretrain.objective_config import ObjectiveConfig, SymileOptions


class SplitConfig(Settings):
    """One split of one sharded dataset."""

    path: str  # folder with dataset.json, or its URL (s3://bucket/folder, or any other of fsspec)
    split: str


class TrainSplit(SplitConfig):
    """A split to train on, and its share of the samples."""

    # Relative to the others'; null in all: each in proportion to its number of samples.
    weight: float | None = Field(None, gt=0, allow_inf_nan=False)


class AugmentConfig(Settings):
    """Random changes of training samples, drawn from (seed, epoch, sample). Evaluation never augments."""

    crop_scale: tuple[float, float] = (0.8, 1.0)  # share of the largest square of the picture that is kept
    flip: bool = False  # mirrors the picture; off because captions may say left and right
    brightness: float = Field(0.1, ge=0, le=1)  # factor drawn from [1 - b, 1 + b]
    gain_db: float = Field(6.0, ge=0)  # gain of the sound drawn from [-g, g]
    word_dropout: float = Field(0.0, ge=0, lt=1)  # share of the words of a caption that are left out; one always stays

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError(f"expected 0 < low <= high <= 1, found {value}")
        return value


class DataConfig(Settings):
    """Where samples come from and what is taken of each."""

    train: list[TrainSplit] = Field(min_length=1)  # one mapping is a list of one; several are mixed by weight
    validation: SplitConfig | None = None
    window_s: PositiveFloat = 4.0  # frames and sound of a sample come from the same window of this length
    num_workers: int = Field(2, ge=0)  # decoding processes a rank; 0 decodes in the training process
    prefetch_batches: PositiveInt = 2  # batches a worker keeps ready
    block_shards: PositiveInt = 8  # samples are shuffled inside blocks of this many (shuffled) shards
    augment: AugmentConfig = AugmentConfig()
    # Of the second view of each sample, where an objective wants one; a tenth of the words: EDA (arXiv 1901.11196).
    second_view: AugmentConfig = AugmentConfig(word_dropout=0.1)
    cache_dir: str | None = None  # for shards of URLs, on a local disk; null: a folder in the user's cache folder
    cache_gib: PositiveFloat = 50.0  # bound on the shards in it, which all processes of a node share

    @field_validator("train", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict | SplitConfig) else value

    @field_validator("train")
    @classmethod
    def _all_or_no_weights(cls, value: list[TrainSplit]) -> list[TrainSplit]:
        without = [part.path for part in value if part.weight is None]
        if 0 < len(without) < len(value):
            raise ValueError(f"{without[0]} has no weight and others have one; expected a weight for all or for none")
        places = [(part.path, part.split) for part in value]
        twice = [place for place in places if places.count(place) > 1]
        if twice:
            raise ValueError(f"split {twice[0][1]} of {twice[0][0]} is there twice; expected each once, with a weight")
        return value


class TransformerConfig(Settings):
    """A transformer encoder built from scratch."""

    width: PositiveInt = 128
    depth: PositiveInt = 2
    num_heads: PositiveInt = 4
    mlp_ratio: PositiveFloat = 4.0
    dropout: float = Field(0.0, ge=0, lt=1)
    patch_dropout: float = Field(0.0, ge=0, lt=1)  # share of patches left out in training (video only)
    patch_px: PositiveInt = 16  # side of a square patch (video: pixels; audio: mel bands and spectrogram steps)
    time_stride: PositiveInt = 16  # audio only: spectrogram steps from one patch to the next

    @model_validator(mode="after")
    def _heads_divide(self) -> TransformerConfig:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible by num_heads {self.num_heads}")
        return self


class TowerConfig(Settings):
    """What the three towers share. `encoder`: a published one by name, or a block of TransformerConfig."""

    sources: ClassVar[tuple[str, ...]] = ()
    encoder: str | TransformerConfig = TransformerConfig()
    pretrained: bool = True  # only for encoders given by name: load their published weights
    freeze: bool = False  # keep the encoder as it is: train pooling over time and the projection only

    @field_validator("encoder")
    @classmethod
    def _known_source(cls, value: str | TransformerConfig) -> str | TransformerConfig:
        if isinstance(value, str) and not value.startswith(cls.sources):
            forms = " or ".join(f"'{source}NAME'" for source in cls.sources)
            raise ValueError(f"expected {forms} or a block of keys, found '{value}'")
        return value


class VideoTowerConfig(TowerConfig):
    """An image encoder on each frame (`timm:NAME`, or a ViT from a block), then pooling over time."""

    sources: ClassVar[tuple[str, ...]] = ("timm:",)

    num_frames: PositiveInt = 8  # spread evenly over the window
    size_px: PositiveInt = 224
    pooling: Literal["mean", "transformer"] = "transformer"  # the mean is blind to the order of frames


class AudioTowerConfig(TowerConfig):
    """A spectrogram transformer on log-mel energies (`hf:NAME_OR_FOLDER` of an AST, or one from a block)."""

    sources: ClassVar[tuple[str, ...]] = ("hf:",)

    sample_rate_hz: PositiveInt = 16_000
    num_mels: PositiveInt = 64
    fft_s: PositiveFloat = 0.025
    hop_s: PositiveFloat = 0.010


class TextTowerConfig(TowerConfig):
    """A text encoder (`hf:NAME_OR_FOLDER`, or a BERT from a block) with its tokenizer."""

    sources: ClassVar[tuple[str, ...]] = ("hf:",)

    tokenizer: str = "default"  # the byte-level BPE that this project ships, or hf:NAME_OR_FOLDER
    max_tokens: PositiveInt = 64


class TowersConfig(Settings):
    """The modalities of a run: those that have a tower."""

    video: VideoTowerConfig | None = None
    audio: AudioTowerConfig | None = None
    text: TextTowerConfig | None = None

    @model_validator(mode="after")
    def _at_least_two(self) -> TowersConfig:
        if len(self.names) < 2:
            raise ValueError(f"at least two towers of video, audio, text are needed, found {list(self.names)}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Modalities that have a tower, in a fixed order."""
        return tuple(name for name in ("video", "audio", "text") if getattr(self, name) is not None)


class OptimizerConfig(Settings):
    """AdamW, or plain SGD. Norms, biases, embeddings of position and learned scalars are not decayed."""

    name: Literal["adamw", "sgd"] = "adamw"  # sgd: no momentum; to compare runs, as AdamW amplifies rounding
    lr: PositiveFloat = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.05, ge=0)


class ScheduleConfig(Settings):
    """Linear warmup, then a cosine to `final_lr_ratio` of the peak at the last step."""

    num_steps: PositiveInt
    warmup_steps: int = Field(0, ge=0)
    final_lr_ratio: float = Field(0.0, ge=0, le=1)


class TrainConfig(Settings):
    """The step: what is computed at once, where state lives, in which precision."""

    global_batch: PositiveInt  # samples of one step over all ranks
    chunk: PositiveInt = 32  # samples a rank holds activations for at once; never changes the result
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; master weights, projections, scalars stay fp32
    # Of the objective alone. Distances between near-parallel embeddings cancel digits: in fp32 the gradient depends on
    # the order of sums by a few 1e-6, in fp64 by 3e-7. fp32 pays where the global batch is large and fp64 is slow.
    loss_precision: Literal["fp32", "fp64"] = "fp64"
    grad_clip: float = Field(1.0, ge=0)  # on the norm of the whole gradient; 0 turns it off
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False  # ZeRO 1 to 3: master weights and moments live, and are updated, on the host
    ema_decay: float | None = Field(None, gt=0, lt=1)  # keep an average of the towers; it is what is then evaluated
    # What embeds the second view: the towers, with gradients, or their average, as momentum encoders do (ALBEF, arXiv
    # 2107.07651).
    second_view_by: Literal["towers", "average"] = "towers"
    threads: int = Field(0, ge=0)  # CPU threads a rank computes with; 0: cores / ranks of this machine
    log_every: PositiveInt = (
        10  # steps between lines on the terminal, which has the first and the last too; metrics.jsonl: all
    )
    log_samples: bool = False  # write the keys of every step's samples to RUN/samples/


class CheckpointConfig(Settings):
    """When state is saved and how many checkpoints stay (the best one is kept besides)."""

    every_steps: PositiveInt = 1000
    every_minutes: PositiveFloat = 30.0
    keep_last: PositiveInt = 2
    keep_every_steps: PositiveInt | None = None  # also keep those of steps that this divides
    asynchronous: bool = True  # write while training goes on; needs memory for one copy of the state on the host


# What a checkpoint must share with the run that goes on from it, unless it is named in `accept`.
IDENTITY = (
    "towers", "embedding_dim", "objective", "optimizer", "tokenizer", "dataset", "mixture", "global_batch", "seed",
    "block_shards",
)  # fmt: skip


class FaultsConfig(Settings):
    """What is borne, and for how long."""

    max_skipped_steps: int = Field(5, ge=0)  # in a row, for a loss or gradient that is not finite; then the run ends
    # In a row, of whose samples no picture and no sound could be read; then the run ends.
    max_unreadable_steps: int = Field(5, ge=0)
    stage_timeout_s: PositiveFloat = 1800.0  # a stage of a step that takes longer hangs: the rank says which and ends


class ValidationConfig(Settings):
    """Retrieval on the validation split while training."""

    every_steps: PositiveInt = 500
    max_samples: PositiveInt = 1000


class RunConfig(Settings):
    """A whole training run."""

    run_dir: str
    seed: int = 0
    data: DataConfig
    towers: TowersConfig
    embedding_dim: PositiveInt = 512
    objective: list[ObjectiveConfig] = Field(min_length=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    faults: FaultsConfig = FaultsConfig()
    accept: tuple[str, ...] = ()  # of IDENTITY: in what a checkpoint of run_dir may differ from this config
    init_from: str | None = None  # a run folder or checkpoint whose weights start this run; its step is not taken

    @field_validator("accept")
    @classmethod
    def _known_differences(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in IDENTITY:
                raise ValueError(f"'{name}'; {nearest(name, IDENTITY)}")
        return value

    @property
    def views(self) -> frozenset[str]:
        """Further embeddings of each sample that the objectives want: "augmented", "independent"."""
        return frozenset().union(*(part.views for part in self.objective))

    @model_validator(mode="after")
    def _an_average_to_embed_by(self) -> RunConfig:
        if self.train.second_view_by == "average" and self.train.ema_decay is None:
            raise ValueError("train.second_view_by average needs train.ema_decay, found null")
        return self

    @model_validator(mode="after")
    def _something_to_offload(self) -> RunConfig:
        if self.train.offload_optimizer and self.train.zero_stage == 0:
            raise ValueError("train.offload_optimizer needs train.zero_stage 1, 2 or 3, found 0")
        return self

    @model_validator(mode="after")
    def _objectives_of_these_modalities(self) -> RunConfig:
        names = self.towers.names
        for index, part in enumerate(self.objective):
            for place, name in part.named_modalities:
                if name not in names:
                    raise ValueError(f"objective.{index}.{place} of {part.name}: '{name}'; {nearest(name, names)}")
        if not any(part.weight for part in self.objective):
            raise ValueError("objective: every weight is 0; expected one that is not")
        return self

    @model_validator(mode="after")
    def _few_enough_tuples(self) -> RunConfig:
        batch, others = self.train.global_batch, len(self.towers.names) - 1
        for index, part in enumerate(self.objective):
            if isinstance(part, SymileOptions) and part.candidates == "all" and batch**others > part.max_tuples:
                raise ValueError(
                    f"objective.{index}.candidates all: train.global_batch ** {others} = {batch**others:,} tuples, "
                    f"expected at most max_tuples {part.max_tuples:,}; candidates shuffled takes {batch:,}"
                )
        return self

    @model_validator(mode="after")
    def _enough_dimensions(self) -> RunConfig:
        if self.embedding_dim < len(self.towers.names):
            raise ValueError(
                f"embedding_dim {self.embedding_dim} is smaller than the number of modalities "
                f"{len(self.towers.names)}: every volume would be 0"
            )
        return self
