"""Options of every objective, checked without torch. The name of an objective is the name of its file.

Each default cites its source; one without a source in its paper or code says so.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from data_pipeline.settings import Settings

Pairs = Literal["all"] | list[tuple[str, str]]
Reduce = Literal["sum", "mean"]
Smoothing = Annotated[float, Field(ge=0, lt=1)]


class ObjectiveOptions(Settings):
    """What all objectives share."""

    weight: float = 1.0  # factor of this objective in the sum
    tile: PositiveInt = 512  # rows and columns scored at once; never changes the result

    @property
    def views(self) -> frozenset[str]:
        """Further embeddings of each sample that the objective wants: "augmented", "independent"."""
        return frozenset()

    @property
    def named_modalities(self) -> list[tuple[str, str]]:
        """The modalities that the options name, each after its place: ("pairs.0", "video")."""
        anchor, pairs = getattr(self, "anchor", None), getattr(self, "pairs", "all")
        named = [] if anchor is None else [("anchor", anchor)]
        for number, pair in enumerate(() if pairs == "all" else pairs):
            named += [(f"pairs.{number}", name) for side in pair for name in side.split("+")]
        return named


class Weights(Settings):
    """Of the parts of one objective."""

    @model_validator(mode="after")
    def _something_counts(self) -> Weights:
        if not any(self.model_dump().values()):
            raise ValueError("every weight is 0; expected one that is not")
        return self


class KernelOptions(ObjectiveOptions):
    """Where scores of pairs may be computed by a fused kernel on a GPU, and how precisely."""

    kernel: Literal["auto", "pytorch"] = "auto"  # auto: on CUDA with Triton, in single precision; pytorch: never
    # Of the factors in the matrix products of pairs of two samples; matched pairs stay as they are.
    negatives_precision: Literal["float32", "bfloat16"] = "float32"


class TemperatureOptions(ObjectiveOptions):
    """A temperature that divides scores, learned or fixed."""

    temperature: PositiveFloat = 0.07  # GRAM code (model/gram.py at b70c5c2); CLIP (arXiv 2103.00020)
    learn_temperature: bool = True
    # 0.01: CLIP's upper limit of 100 on 1 / temperature; 1: scores as they are, no source.
    temperature_range: tuple[PositiveFloat, PositiveFloat] = (0.01, 1.0)
    # bounded: its logarithm moves inside the range. divided: the parameter itself divides, as in GRAM's code, and can
    # reach zero.
    temperature_form: Literal["bounded", "divided"] = "bounded"

    @model_validator(mode="after")
    def _inside_the_range(self) -> TemperatureOptions:
        low, high = self.temperature_range
        if self.learn_temperature and self.temperature_form == "bounded" and not low < self.temperature < high:
            raise ValueError(f"temperature {self.temperature} is not inside temperature_range ({low}, {high})")
        return self


class PairOptions(ObjectiveOptions):
    """Pairs of modalities: all, named ones, or those of one anchor with each other."""

    pairs: Pairs = "all"  # a side may be a sum: video+audio
    anchor: str | None = None  # only the pairs of this modality with each other one
    reduce: Reduce = "sum"  # over pairs

    @model_validator(mode="after")
    def _pairs_or_anchor(self) -> PairOptions:
        if self.anchor is not None and self.pairs != "all":
            raise ValueError("give either `pairs` or `anchor`, not both")
        return self

    @model_validator(mode="after")
    def _pairs_of_two(self) -> PairOptions:
        if not self.pairs:
            raise ValueError("pairs: none; expected all, or at least one")
        pairs = [] if self.pairs == "all" else list(self.pairs)
        for pair in pairs:
            names = [name for side in pair for name in side.split("+")]
            if len(set(names)) < len(names):
                raise ValueError(f"pairs: {list(pair)} names a modality twice; expected two sides without a common one")
        if len({frozenset(frozenset(side.split("+")) for side in pair) for pair in pairs}) < len(pairs):
            raise ValueError(f"pairs: {[list(pair) for pair in pairs]}: one is there twice")
        return self


class GramOptions(TemperatureOptions, KernelOptions):
    """GRAM (arXiv 2412.11959)."""

    name: Literal["gram"] = "gram"
    anchor: str = "text"
    label_smoothing: Smoothing = 0.1  # official code, not in the paper's formula
    orientation: NonNegativeFloat = 0.0  # weight of a hinge on negative cosines of a sample; 0 is the paper


class TriangleOptions(TemperatureOptions):
    """TRIANGLE (code: model/triangle.py at 6951d49). At most three modalities."""

    name: Literal["triangle"] = "triangle"
    anchor: str = "text"
    label_smoothing: Smoothing = 0.1  # official code


class InfonceOptions(TemperatureOptions, PairOptions, KernelOptions):
    """InfoNCE / CLIP between modalities (arXiv 2103.00020); with `anchor`, fixed-anchor binding (arXiv 2305.05665)."""

    name: Literal["infonce"] = "infonce"
    label_smoothing: Smoothing = 0.0  # CLIP
    # Weight of the contrast of each side of a pair with its own augmented view. Latent modality structures (arXiv
    # 2303.05952), like CyCLIP's code (src/train.py), has 1: (V2T + T2V + V2V + T2T) / 4, up to a factor of 2.
    within: NonNegativeFloat = 0.0

    @property
    def views(self) -> frozenset[str]:
        return frozenset({"augmented"} if self.within else ())


class SigmoidOptions(TemperatureOptions, PairOptions):
    """SigLIP (arXiv 2303.15343): every pair is its own yes or no."""

    name: Literal["sigmoid"] = "sigmoid"
    temperature: PositiveFloat = 0.1  # paper: t' starts at ln 10
    temperature_range: tuple[PositiveFloat, PositiveFloat] = (0.001, 1.0)  # none in the paper
    bias: float = -10.0  # paper, section 3.2
    learn_bias: bool = True


class SymileOptions(ObjectiveOptions):
    """Symile (arXiv 2411.01053; code at d12e2c8): the sum over dimensions of the product of all modalities."""

    name: Literal["symile"] = "symile"
    candidates: Literal["shuffled", "all"] = "shuffled"  # code: "n" and "n_squared"; its default is "n"
    # Of "all": candidates of one row, (global batch) ** (modalities - 1). No source: where a step takes minutes.
    max_tuples: PositiveInt = 1 << 20
    logit_scale: PositiveFloat | None = None  # None: sqrt(dim ** (modalities - 1)), the spread of the product
    learn_logit_scale: bool = True
    reduce: Reduce = "mean"  # over anchors: code


class PmrlWeights(Weights):
    """Of the two terms; code: 1 each."""

    values: float = 1.0
    contrast: float = 1.0


class PmrlOptions(KernelOptions):
    """PMRL (arXiv 2507.17343; code at c3997e9): the leading singular value of a sample, and its leading vector."""

    name: Literal["pmrl"] = "pmrl"
    anchor: str = "text"  # gives the leading vector its sign; a sample that lacks it is not dropped
    value_temperature: PositiveFloat = 0.05  # tau_1: code's default (utils/args.py); its pretraining script says 0.01
    temperature: PositiveFloat = 0.1  # tau_2, of the contrast of leading vectors: code
    sign: Literal["anchor", "free"] = "anchor"  # the code takes whatever sign the decomposition returns
    label_smoothing: Smoothing = 0.0  # code
    weights: PmrlWeights = PmrlWeights()
    orientation: NonNegativeFloat = 0.0  # as in gram; 0 is the paper


class CentrobindOptions(TemperatureOptions, KernelOptions):
    """CentroBind (arXiv 2410.02086): each modality with the centroid of all. No official code was found."""

    name: Literal["centrobind"] = "centrobind"
    normalize: bool = False  # of the centroid; not decided by the sources
    stop_gradient: bool = False  # through the centroid; not decided by the sources
    label_smoothing: Smoothing = 0.0
    reduce: Reduce = "sum"  # over modalities: paper, the loss of an anchor summed over modalities


class UnialignWeights(Weights):
    """Of the four parts. Paper: 1 for the volume in retrieval, 0.1 in generation; the others could not be read."""

    uniformity: float = 1.0
    alignment: float = 1.0
    volume: float = 1.0
    centroid: float = 1.0


class UnialignOptions(ObjectiveOptions):
    """UniAlign (arXiv 2602.09507): alignment and uniformity apart. No official code was found."""

    name: Literal["unialign"] = "unialign"
    anchor: str = "video"  # paper: image or video
    # joint: log of the mean of the kernel over all pairs, itself included. entropy: mean over samples of the log of
    # the mean. The sources do not settle which.
    uniformity: Literal["joint", "entropy"] = "joint"
    kernel_width: PositiveFloat = 0.5  # of exp(-|x - y|^2 / (2 width^2)); no value in what could be read
    centroid_width: PositiveFloat = 0.5  # of the centroids' kernel
    divergence: bool = False  # also show Hoelder's divergence between the modalities; costs as much as the loss
    weights: UnialignWeights = UnialignWeights()


class SeparationWeights(Weights):
    """Of the three terms; paper: 1 each."""

    orthogonal: float = 1.0
    contrast: float = 1.0
    uniformity: float = 1.0


class FeatureSeparationOptions(TemperatureOptions, PairOptions, KernelOptions):
    """Deep feature separation of latent modality structures (arXiv 2303.05952, section 3.2)."""

    name: Literal["feature_separation"] = "feature_separation"  # its temperature: that of CLIP, the paper names none
    uniformity_t: PositiveFloat = 2.0  # paper: G = exp(-t |u - v|^2), t = 2
    weights: SeparationWeights = SeparationWeights()

    @property
    def views(self) -> frozenset[str]:
        return frozenset({"augmented", "independent"})


class BrownianBridgeOptions(PairOptions):
    """Brownian bridge of latent modality structures (arXiv 2303.05952, section 3.3).

    Of each pair the first modality is the one whose augmentation is bridged; with `anchor`, the others are.
    """

    name: Literal["brownian_bridge"] = "brownian_bridge"
    anchor: str | None = "text"  # paper: (image, text); none where pairs are given
    position: float = Field(0.25, gt=0, lt=1)  # t of the paper: the share of the first modality in the mean

    @model_validator(mode="before")
    @classmethod
    def _pairs_instead_of_the_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("pairs", "all") != "all":
            return {"anchor": None, **values}
        return values

    @property
    def views(self) -> frozenset[str]:
        return frozenset({"augmented"})


class GeometricConsistencyOptions(PairOptions):
    """Geometric consistency of latent modality structures (arXiv 2303.05952, section 3.4); CyCLIP is a part of it."""

    name: Literal["geometric_consistency"] = "geometric_consistency"
    augmented: bool = True  # also compare with the geometry of the augmented views
    normalizer: Literal["samples", "pairs"] = "samples"  # paper: 1 / N, grows with N; CyCLIP: 1 / N^2

    @property
    def views(self) -> frozenset[str]:
        return frozenset({"augmented"} if self.augmented else ())


Options = (
    GramOptions
    | TriangleOptions
    | InfonceOptions
    | SigmoidOptions
    | SymileOptions
    | PmrlOptions
    | CentrobindOptions
    | UnialignOptions
    | FeatureSeparationOptions
    | BrownianBridgeOptions
    | GeometricConsistencyOptions
)
ObjectiveConfig = Annotated[Options, Field(discriminator="name")]
OPTIONS: dict[str, type[Options]] = {kind.model_fields["name"].default: kind for kind in get_args(Options)}
