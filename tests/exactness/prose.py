"""The words of the page around its tables."""

from __future__ import annotations

from tests.exactness.cells import (
    ADAMW,
    BF16,
    DROPOUT,
    EVERY,
    FAULTS,
    GLOBAL_BATCH,
    MICRO_CHUNK,
    OFFLOAD,
    OPTIONS,
    PLAIN,
    SMALL_CHUNK,
    SMALL_CHUNK_TOLERANCE,
    TOLERANCE,
    TOPOLOGY,
)
from tests.exactness.problem import LEARNING_RATE, NUM_STEPS
from tests.exactness.table import FAULT_SEEN

INTRODUCTION = f"""\
# Exactness

Every row trains {NUM_STEPS} steps of three small towers on real shards (global batch {GLOBAL_BATCH}, augmentation on,
learned temperature) with the loader, the gradient cache, the gather and DeepSpeed that any run uses. It is compared
with one process that has none of them: autograd over the whole batch in one graph, the loss in float64 from its
formula, torch's own optimizer.

    make exactness        # writes this page; exits with 1 if a row that must hold does not
"""
COLUMNS = f"""\
- **loss**: the largest over the {NUM_STEPS} steps of the difference over the step's loss (over a hundredth of the
  largest where a loss passes through 0); at most {TOLERANCE:g}.
- **gradient**: of step 1, the norm of the difference over the norm, all parameters together; at most {TOLERANCE:g}.
- **worst tensor**: the same for the worst parameter alone, over its own norm, or over 1e-3 of the whole gradient's if
  that is more; at most {TOLERANCE:g}, and {SMALL_CHUNK_TOLERANCE:g} where a chunk has fewer than {SMALL_CHUNK} samples:
  torch's kernels for so few rows round otherwise, with or without this project (see *{PLAIN}*).
- **weights**: after step {NUM_STEPS}, the norm of the difference over the norm; at most {TOLERANCE:g} with SGD.
- **of their way**: the same difference over the distance that the weights went in those steps.
- **reductions** a step: the gradient elements that a rank hands to adding collectives over the number of parameters
  (ZeRO pads its slices a little); with one rank, the reductions that the engine counts. Must be 1.

chunks: gradient-cache chunks of each rank. ragged: samples lack modalities at random, whole ranks lack one, and in the
second batch the last four samples lack everything. A figure over its limit is bold.
"""
READINGS = {
    TOPOLOGY: f"""\
SGD with learning rate {LEARNING_RATE["sgd"]:g}, fp32. What is left is the order of sums in fp32.""",
    DROPOUT: f"""\
Ragged masks. Draws belong to the step, the tower and the micro-chunk ({MICRO_CHUNK} samples) of the global batch, not
to a rank.""",
    OFFLOAD: """\
GRAM, ragged masks. Master weights and moments live, and are updated, on the host. On a machine without a GPU the code
path is the same and the memory is the same memory.""",
    OPTIONS: """\
Clipping to a norm of 0.1 (the gradient is larger), a modality that is nowhere, two objectives at once.""",
    EVERY: """\
ZeRO-2, chunks of 4 samples, ragged masks, SGD with a tenth of that learning rate; pmrl with temperatures of 0.5, symile
with all tuples. The last rows have two objectives, second views and second projections, under ZeRO-3.""",
    ADAMW: f"""\
Learning rate {LEARNING_RATE["adamw"]:g}. Loss and gradient are held to the same limits; weights are not. AdamW divides
each gradient by its own size, so where a gradient is zero in exact arithmetic (the key biases of attention, which hold
nearly all of the difference) rounding errors move the weight; it has no effect on the loss. Compare runs by their
losses, or with SGD.""",
    BF16: """\
Encoders under bf16 autocast; master weights, projections, temperatures, the objective and sums of gradients stay fp32.
GRAM, ragged masks. Only the number of reductions is held to a limit. One rank and one chunk under ZeRO 0 to 2 are the
single process itself. A gradient of a weight leaves a chunk's backward pass as bf16, with 8 significant bits (2^-9 =
2e-3), and chunks are added in fp32: cutting a batch changes these roundings, with or without this project (see *Torch
alone*). ZeRO-3 runs DeepSpeed's own linear map, which keeps no gathered weights and rounds otherwise. So topologies are
about as far from each other as bf16 is coarse, and against fp32 the difference is that of bf16 itself, whatever the
topology.""",
    PLAIN: """\
How exact the arithmetic is: one process, no gradient cache, no DeepSpeed, plain autograd in one graph; its towers see
the batch in chunks, or it is compared with float64 (spectrograms included). No limit belongs to these rows. The same
chunks over ranks, in the first table, are off by as much: what is left there is torch's rounding. And in fp32 any
topology is far closer to any other than fp32 is to float64.""",
    FAULTS: f"""\
What the table shows where something is wrong: a gradient off by more than {FAULT_SEEN:g} counts as seen. *gather
without gradient*: as published trainers do. *factor of world size*: the mean over ranks is not undone. *no coalescing*:
backward is called for each chunk without telling DeepSpeed that they are one step (the engine refuses this; it was
forced). *other draws*: dropout under other keys.""",
}
