"""The fused kernel against the PyTorch tiles, under Triton's interpreter; that it compiles; and when it is taken.

A GPU runs the same comparison on itself where there is one.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.kernels.choice import fused_tiles
from pretrain.objectives import Embeddings, build_objective
from pretrain.objectives.terms import CrossEntropy, Pairs
from tests.fused_pairs import CASES, COUNT, MODALITIES
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent
ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is for Linux only")


def difference(one: list[float], other: list[float]) -> float:
    """|one - other| / |other|"""
    first, second = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    assert len(first) == len(second)
    return ((first - second).norm() / second.norm()).item() if len(first) else 0.0  # no learned scalar


@ON_LINUX
@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_the_kernel_equals_the_tiles_it_replaces(tmp_path: Path, size: int) -> None:
    for rank in run_ranks("tests.fused_pairs:both_ways", size, tmp_path):
        assert rank.keys() == CASES.keys()
        for label, found in rank.items():
            num_pairs = math.comb(CASES[label]["modalities"], 2) if CASES[label]["name"] == "infonce" else 1
            num_tiles = math.ceil(COUNT / size / 25) * math.ceil(COUNT / 25)
            assert found["num_fused"] == 2 * num_tiles * num_pairs, label  # forward and backward
            for part, bound in (("loss", 5e-6), ("vectors", 5e-6), ("scalars", 2e-5)):  # the last sums up what cancels
                assert all(map(math.isfinite, found["fused"][part])), (label, part)
                assert difference(found["fused"][part], found["tiles"][part]) < bound, (label, part)
                if "bfloat16" not in label:
                    assert difference(found["fused"][part], found["double"][part]) < bound, (label, part)
            assert any(found["fused"]["vectors"]), label


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pretrain.kernels import triton_blocks
from pretrain.kernels.fused_tiles import FusedTiles
INTEGERS = "dim left_row left_inner right_inner right_column"
tiles = FusedTiles()
for name, blocks, constants in (
    ("statistics_kernel", tiles.score_blocks, {"NUM_AXES": 2, "BFLOAT16": False}),
    ("statistics_kernel", tiles.score_blocks, {"NUM_AXES": 2, "BFLOAT16": True}),
    ("gradient_kernel", tiles.score_blocks, {"NUM_AXES": 2, "BFLOAT16": False}),
    ("gradient_kernel", tiles.score_blocks, {"NUM_AXES": 0, "BFLOAT16": True}),
    ("add_product_kernel", tiles.product_blocks, {"BFLOAT16": False}),
):
    kernel = getattr(triton_blocks, name)
    constants = {**constants, **vars(blocks)}
    types = {argument: "*fp32" for argument in kernel.arg_names} | {"floor": "fp32"}
    types |= {argument: "*i32" for argument in types if argument.endswith("_items")}
    types |= {argument: "i32" for argument in types if argument in INTEGERS.split() or argument.startswith("num_")}
    types = {argument: "constexpr" if argument in constants else types[argument] for argument in kernel.arg_names}
    constants = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=types, constexprs=constants),
        target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "enable_fp_fusion": True},
    )
    assert "wgmma" in compiled.asm["ptx"] and compiled.asm["cubin"], name
    assert compiled.metadata.shared <= 227 * 1024, (name, compiled.metadata.shared)
    print(name)
"""


@ON_LINUX
@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """To machine code of compute capability 9.0 with tensor-core products, within its shared memory; none is needed."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 5


def volume_pairs(**options: object) -> Pairs:
    rows = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    vectors = {"text": rows, "video": rows.roll(1, 0), "audio": rows.roll(2, 0)}
    objective = build_objective("gram", **options)
    contrast = objective.terms(Embeddings(vectors=vectors), objective.scalars())[0]
    assert isinstance(contrast, CrossEntropy)
    return contrast.pairs


def test_the_kernel_is_taken_only_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax = frozenset(["log_sum_exp", "sum"])
    like = torch.zeros(1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert fused_tiles(volume_pairs(), softmax, like) is None  # a CPU
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused_tiles(volume_pairs(kernel="pytorch"), softmax, like) is None
    assert fused_tiles(volume_pairs(), softmax, like.double()) is None
    assert fused_tiles(volume_pairs(), softmax | {"softplus_sum"}, like) is None
    assert fused_tiles(replace(volume_pairs(), matched=None), softmax, like) is None
    assert fused_tiles(replace(volume_pairs(), score=lambda rows, columns, scalars: like), softmax, like) is None


TAKEN = """
import torch
from pretrain.kernels.choice import fused_tiles
from pretrain.objectives.infonce import cosine_score
from pretrain.objective_config import CentrobindOptions, PmrlOptions
from tests.test_kernels import volume_pairs
from dataclasses import replace
softmax, like = frozenset(["log_sum_exp", "sum"]), torch.zeros(1)
assert fused_tiles(volume_pairs(), softmax, like) is not None
for options in (CentrobindOptions, PmrlOptions):
    for kernel, taken in (("auto", True), ("pytorch", False)):
        pairs = replace(volume_pairs(), score=cosine_score(options(kernel=kernel)))
        assert (fused_tiles(pairs, softmax, like) is not None) is taken
"""


@ON_LINUX
def test_the_kernel_is_taken_where_it_can_run() -> None:
    """In a process of its own: Triton looks at the variable when the kernel is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", TAKEN], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("label", CASES)
def test_on_a_gpu_the_kernel_equals_the_tiles(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.kernels.fused_tiles import FusedTiles

    case = {key: value for key, value in CASES[label].items() if key not in ("name", "modalities")}
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(700, 200, generator=generator)
    names = MODALITIES[: CASES[label]["modalities"]]
    drawn = {
        name: torch.nn.functional.normalize(common + torch.randn(700, 200, generator=generator), dim=1)
        for name in names
    }
    launched = []
    launch = FusedTiles._launch
    monkeypatch.setattr(FusedTiles, "_launch", lambda *given: (launched.append(len(launched)), launch(*given)))

    def evaluated(dtype: torch.dtype, kernel: str) -> list[list[float]]:
        vectors = {name: rows.to("cuda", dtype).requires_grad_() for name, rows in drawn.items()}
        objective = build_objective(CASES[label]["name"], **case, kernel=kernel).to("cuda", dtype)
        loss = objective(Embeddings(vectors=vectors)).loss
        learned = list(objective.parameters())
        grads = torch.autograd.grad(loss, [*vectors.values(), *learned])
        by_vector = torch.cat([grad.flatten() for grad in grads[: len(names)]]).tolist()
        return [[loss.item()], by_vector, [grad.item() for grad in grads[len(names) :]]]

    fused = evaluated(torch.float32, "auto")
    assert launched
    num_launched = len(launched)
    tiles = evaluated(torch.float32, "pytorch")
    double = tiles if "bfloat16" in label else evaluated(torch.float64, "pytorch")
    assert len(launched) == num_launched
    for part, other, exact in zip(fused, tiles, double, strict=True):
        assert difference(part, other) < 2e-5
        assert difference(part, exact) < 2e-5
