"""The rows of the table: what is compared with one process. A new objective, option or stage is one line in `CELLS`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from pretrain.objective_config import OPTIONS as OPTIONS_OF

GLOBAL_BATCH = 16
MICRO_CHUNK = 4  # samples under one set of draws where dropout is on: the same for every number of ranks
RANKS = (1, 2, 4)
STAGES = (0, 1, 2, 3)
TOLERANCE = 1e-6
# Of the worst tensor where chunks have fewer samples than this: torch's kernels for so few rows round otherwise, and
# plain autograd cut into such chunks is off by as much (the rows of PLAIN show it).
SMALL_CHUNK, SMALL_CHUNK_TOLERANCE = 4, 2e-6

Masks = Literal["all present", "ragged", "no audio"]
OTHERS = tuple(name for name in OPTIONS_OF if name not in ("gram", "infonce"))
MASKS: tuple[Masks, ...] = ("all present", "ragged")
Precision = Literal["fp32", "bf16", "fp64"]  # fp64: of plain references only
Fault = Literal["", "gather without gradient", "factor of world size", "other draws", "no coalescing"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A way to compute five training steps.

    chunks: gradient-cache chunks of each rank. objective: names joined by "+". reference: the precision of the single
    process it is compared with, its own if empty. plain: torch alone, whose graph is cut into the chunks: how exact
    arithmetic itself is. fault: something done wrong on purpose, which must be seen.
    """

    group: str
    ranks: int
    stage: int = 2
    chunks: int = 4
    objective: str = "gram"
    masks: Masks = "ragged"
    dropout: bool = False
    grad_clip: float = 0.0
    offload: bool = False
    optimizer: Literal["sgd", "adamw"] = "sgd"
    precision: Precision = "fp32"
    reference: Literal["", Precision] = ""
    plain: bool = False
    fault: Fault = ""

    @property
    def chunk(self) -> int:
        """Samples of a chunk."""
        return GLOBAL_BATCH // self.ranks // self.chunks

    @property
    def single(self) -> Cell:
        """The same mathematics in one process without chunks or ZeRO."""
        precision = self.reference or self.precision
        return replace(
            self, group="", ranks=1, stage=0, chunks=1, offload=False, precision=precision, reference="", plain=False,
            fault="",
        )  # fmt: skip

    @property
    def limits(self) -> dict[str, float]:
        """What must hold, by column: AdamW amplifies rounding, and bf16 is rounding."""
        if self.precision == "bf16" or self.plain:
            return {}
        limits = dict.fromkeys(("loss", "gradient", "worst_tensor"), TOLERANCE)
        if self.chunk < SMALL_CHUNK:
            limits["worst_tensor"] = SMALL_CHUNK_TOLERANCE
        return limits if self.optimizer == "adamw" else limits | {"weights": TOLERANCE}


def micro_chunks(ranks: int) -> int:
    """Chunks of each rank where a chunk is a micro-chunk."""
    return GLOBAL_BATCH // ranks // MICRO_CHUNK


TOPOLOGY = "Ranks, ZeRO stages, chunks, objectives, masks"
DROPOUT = f"Dropout and patch dropout, micro-chunks of {MICRO_CHUNK} samples"
OFFLOAD = "Optimizer on the host"
OPTIONS = "Other options"
ADAMW = "AdamW"
BF16 = "bf16"
EVERY = "Every objective"
PLAIN = "Torch alone"
FAULTS = "Faults made on purpose"

CELLS: list[Cell] = [
    *(
        Cell(group=TOPOLOGY, ranks=ranks, stage=stage, chunks=chunks, objective=objective, masks=masks)
        for ranks, stage, chunks, objective, masks in product(RANKS, STAGES, (1, 4), ("gram", "infonce"), MASKS)
    ),
    *(
        Cell(group=DROPOUT, ranks=ranks, stage=stage, chunks=micro_chunks(ranks), objective=objective, dropout=True)
        for ranks, stage, objective in product(RANKS, STAGES, ("gram", "infonce"))
    ),
    *(Cell(group=OFFLOAD, ranks=ranks, stage=stage, offload=True) for ranks, stage in product(RANKS, (1, 2, 3))),
    *(Cell(group=OPTIONS, ranks=ranks, grad_clip=0.1) for ranks in RANKS),
    *(Cell(group=OPTIONS, ranks=ranks, stage=3, grad_clip=0.1, offload=True) for ranks in RANKS),
    *(Cell(group=OPTIONS, ranks=ranks, stage=3, masks="no audio") for ranks in RANKS),
    *(Cell(group=OPTIONS, ranks=ranks, objective="gram+infonce") for ranks in RANKS),
    *(
        Cell(group=EVERY, ranks=ranks, chunks=micro_chunks(ranks), objective=name)
        for name, ranks in product(OTHERS, RANKS)
    ),
    *(
        Cell(group=EVERY, ranks=ranks, stage=3, chunks=micro_chunks(ranks), objective="infonce+feature_separation")
        for ranks in RANKS
    ),
    *(Cell(group=ADAMW, ranks=ranks, stage=stage, optimizer="adamw") for ranks, stage in product(RANKS, STAGES)),
    *(Cell(group=ADAMW, ranks=ranks, optimizer="adamw", offload=True) for ranks in RANKS),
    *(
        Cell(group=BF16, ranks=ranks, stage=stage, chunks=chunks, precision="bf16")
        for ranks, stage, chunks in product(RANKS, STAGES, (1, 4))
    ),
    *(
        Cell(group=BF16, ranks=ranks, stage=stage, precision="bf16", reference="fp32")
        for ranks, stage in product(RANKS, STAGES)
    ),
    *(Cell(group=BF16, ranks=ranks, optimizer="adamw", precision="bf16", reference="fp32") for ranks in RANKS),
    *(
        Cell(group=PLAIN, ranks=1, stage=0, chunks=GLOBAL_BATCH // size, objective=objective, masks=masks, plain=True)
        for objective, masks, size in product(("gram", "infonce"), MASKS, (4, 2, 1))
    ),
    *(
        Cell(group=PLAIN, ranks=1, stage=0, chunks=GLOBAL_BATCH // size, precision="bf16", plain=True)
        for size in (8, 4, 1)
    ),
    *(
        Cell(group=PLAIN, ranks=1, stage=0, chunks=1, objective=objective, masks=masks, plain=True, reference="fp64")
        for objective, masks in product(("gram", "infonce"), MASKS)
    ),
    *(Cell(group=FAULTS, ranks=ranks, fault="gather without gradient") for ranks in (2, 4)),
    *(Cell(group=FAULTS, ranks=ranks, fault="factor of world size") for ranks in (2, 4)),
    *(Cell(group=FAULTS, ranks=ranks, stage=stage, fault="no coalescing") for ranks, stage in product((2, 4), (1, 2))),
    *(
        Cell(group=FAULTS, ranks=ranks, chunks=micro_chunks(ranks), dropout=True, fault="other draws")
        for ranks in RANKS
    ),
]
