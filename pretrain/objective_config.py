"""Options of every objective, checked without torch. The name of an objective is the name of its file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_pipeline.settings import Settings


class ObjectiveOptions(Settings):
    """What all objectives share."""

    weight: float = 1.0  # factor of this objective in the sum
    temperature: PositiveFloat = 0.07  # GRAM code (model/gram.py at b70c5c2); CLIP (arXiv 2103.00020)
    learn_temperature: bool = True
    temperature_range: tuple[PositiveFloat, PositiveFloat] = (0.01, 1.0)  # CLIP's upper limit of 100 on 1 / temperature
    tile: PositiveInt = 1024  # rows and columns scored at once; never changes the result

    @model_validator(mode="after")
    def _inside_the_range(self) -> ObjectiveOptions:
        low, high = self.temperature_range
        if self.learn_temperature and not low < self.temperature < high:
            raise ValueError(f"temperature {self.temperature} is not inside temperature_range ({low}, {high})")
        return self


class GramOptions(ObjectiveOptions):
    """GRAM (arXiv 2412.11959)."""

    name: Literal["gram"] = "gram"
    anchor: str = "text"
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # official code, not in the paper's formula
    orientation: float = Field(0.0, ge=0)  # weight of a hinge on negative anchor cosines; 0 is the paper


class InfonceOptions(ObjectiveOptions):
    """InfoNCE / CLIP between modalities (arXiv 2103.00020); with `anchor`, fixed-anchor binding (arXiv 2305.05665)."""

    name: Literal["infonce"] = "infonce"
    pairs: Literal["all"] | list[tuple[str, str]] = "all"  # a side may be a sum: video+audio
    anchor: str | None = None  # only the pairs of this modality with each other one
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    reduce: Literal["sum", "mean"] = "sum"  # over pairs

    @model_validator(mode="after")
    def _pairs_or_anchor(self) -> InfonceOptions:
        if self.anchor is not None and self.pairs != "all":
            raise ValueError("give either `pairs` or `anchor`, not both")
        return self


ObjectiveConfig = Annotated[GramOptions | InfonceOptions, Field(discriminator="name")]
OPTIONS: dict[str, type[GramOptions] | type[InfonceOptions]] = {"gram": GramOptions, "infonce": InfonceOptions}
