"""Gradient cache: the gradient of a loss over the global batch, with activations of one chunk at a time.

    pass 1   outputs of each chunk without graph
    loss     gather, objective on the global batch, gradients with respect to the local outputs
    pass 2   outputs of each chunk again, same random draws, with graph; backward of sum(output * cached gradient)

After Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (arXiv 2101.06983), with
gathering, learned scalars, masks and dropout taken in. A batch of one chunk takes one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pretrain.collectives import World
from pretrain.data.batch import Batch
from pretrain.engine import Engine
from pretrain.model import PretrainModel
from pretrain.objectives import Embeddings
from pretrain.pairwise import evaluate_terms
from pretrain.randomness import keyed_random

Outputs = tuple[dict[str, Tensor], dict[str, Tensor]]


def no_stage(name: str) -> AbstractContextManager[None]:
    """A stage that is not timed."""
    return nullcontext()


@dataclass(kw_only=True)
class GradCache:
    """Computes one step's gradient into `engine`.

    chunk: samples a rank holds activations for at once. seed: of the run; draws are keyed by
    (seed, step, tower, global micro-chunk). loss_dtype: in which the objective is computed. stage(name): context
    around pass_1, objective, pass_2, for timing; around gather, inside objective: what its ranks tell each other.
    observe(what, tensors): is shown the local "embeddings" and their "cached gradients", {modality[@view]: [n, D]}.
    """

    engine: Engine
    world: World
    chunk: int
    seed: int
    loss_dtype: torch.dtype = torch.float64
    stage: Callable[[str], AbstractContextManager[None]] = field(default=no_stage)
    observe: Callable[[str, dict[str, Tensor]], None] | None = None

    def backward(self, batch: Batch, step: int) -> dict[str, float]:
        """Leave the gradient of the loss of the global batch in the engine; returns global scalar metrics.

        batch: this rank's rows. Every rank makes the same calls in the same order, whatever its batch lacks. A loss
        that is not finite leaves a gradient that is not, on all ranks, so that `engine.step` leaves the update out.
        """
        chunks = [
            (start, min(start + self.chunk, batch.num_samples)) for start in range(0, batch.num_samples, self.chunk)
        ]
        once = len(chunks) == 1
        with self.stage("pass_1"), torch.set_grad_enabled(once):
            outputs = [self._forward(batch, bounds, step) for bounds in chunks]
        with self.stage("objective"):
            vectors = {name: torch.cat([out[0][name] for out in outputs]).detach() for name in outputs[0][0]}
            scalars = {name: value.detach() for name, value in outputs[0][1].items()}
            metrics, vector_grads, scalar_grads = self._loss_gradients(vectors, scalars, batch)
            if not math.isfinite(metrics["loss"]):
                vector_grads = {name: torch.full_like(grad, torch.nan) for name, grad in vector_grads.items()}
        if self.observe is not None:
            self.observe("embeddings", vectors)
            self.observe("cached gradients", vector_grads)
        with self.stage("pass_2"), self.engine.coalesced():
            for index, (start, stop) in enumerate(chunks):
                embeddings, learned = outputs[0] if once else self._forward(batch, (start, stop), step)
                products = [(embeddings[name] * grad[start:stop]).sum() for name, grad in vector_grads.items()]
                if index == len(chunks) - 1:
                    products += [(learned[name] * grad).sum() for name, grad in scalar_grads.items()]
                self.engine.backward(torch.stack(products).sum())
        return metrics

    def _forward(self, batch: Batch, bounds: tuple[int, int], step: int) -> Outputs:
        start, stop = bounds
        place = self.world.rank * batch.num_samples + start
        number = f"{place // self.chunk}.{place % self.chunk}"  # ".0" wherever chunks divide a rank's rows
        inputs, present = batch.chunk(start, stop, self.world.device)
        outputs: Outputs = self.engine(
            inputs,
            present,
            around=lambda tower: keyed_random(self.seed, step, tower, number),
            augmented=batch.augmented_chunk(start, stop, self.world.device),
        )
        return outputs

    def _loss_gradients(
        self, vectors: dict[str, Tensor], scalars: dict[str, Tensor], batch: Batch
    ) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]:
        """Metrics, and the gradients of the loss with respect to local vectors and this rank's use of the scalars."""
        model = self.engine.model
        assert isinstance(model, PretrainModel)
        vectors = {name: value.to(self.loss_dtype).requires_grad_() for name, value in vectors.items()}
        scalars = {name: value.requires_grad_() for name, value in scalars.items()}
        with torch.enable_grad():
            present = {name: mask.to(self.world.device) for name, mask in batch.present.items()}
            embeddings = Embeddings.of_outputs(vectors, present, batch.ids.to(self.world.device))
            world = replace(self.world, around=lambda: self.stage("gather"))
            value = evaluate_terms(model.objective.terms(embeddings, scalars), world)
        leaves = [*vectors.values(), *scalars.values()]
        grads = torch.autograd.grad(value.local_loss, leaves, materialize_grads=True)
        vector_grads = dict(zip(vectors, (grad.float() for grad in grads), strict=False))
        scalar_grads = dict(zip(scalars, grads[len(vectors) :], strict=True))
        metrics = {name: metric.item() for name, metric in value.metrics.items()}
        return metrics | model.objective.learned_values(scalars), vector_grads, scalar_grads
