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
from tests.fused_pairs import CASES, COUNT
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent


def difference(one: list[float], other: list[float]) -> float:
    """|one - other| / |other|"""
    first, second = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return ((first - second).norm() / second.norm()).item() if len(first) else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_the_kernel_equals_the_tiles_it_replaces(tmp_path: Path, size: int) -> None:
    pytest.importorskip("triton")
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
    ("statistics_kernel", tiles.score_blocks, {"NUM_AXES": 2}),
    ("gradient_kernel", tiles.score_blocks, {"NUM_AXES": 2}),
    ("gradient_kernel", tiles.score_blocks, {"NUM_AXES": 0}),
    ("add_product_kernel", tiles.product_blocks, {}),
):
    kernel = getattr(triton_blocks, name)
    constants = {**constants, **vars(blocks), "BFLOAT16": False}
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


@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """To machine code of compute capability 9.0 with tensor-core products, within its shared memory; none is needed."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4


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
    assert fused_tiles(volume_pairs(kernel="off"), softmax, like) is None
    assert fused_tiles(volume_pairs(), softmax, like.double()) is None
    assert fused_tiles(volume_pairs(), softmax | {"softplus_sum"}, like) is None
    assert fused_tiles(replace(volume_pairs(), matched=None), softmax, like) is None
    assert fused_tiles(replace(volume_pairs(), score=lambda rows, columns, scalars: like), softmax, like) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("label", CASES)
def test_on_a_gpu_the_kernel_equals_the_tiles(label: str) -> None:
    case = {key: value for key, value in CASES[label].items() if key not in ("name", "modalities")}
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(700, 200, generator=generator)
    names = ("text", "video", "audio", "depth")[: CASES[label]["modalities"]]
    found = {}
    for kernel in ("auto", "off"):
        generator.manual_seed(2)
        vectors = {
            name: torch.nn.functional.normalize(common + torch.randn(700, 200, generator=generator), dim=1)
            .cuda()
            .requires_grad_()
            for name in names
        }
        options = case if CASES[label]["name"] == "pmrl" else case | {"kernel": kernel}
        objective = build_objective(CASES[label]["name"], **options).cuda()
        loss = objective(Embeddings(vectors=vectors)).loss
        loss.backward()
        found[kernel] = [loss.item()], torch.cat([v.grad.flatten() for v in vectors.values()]).tolist()  # type: ignore
    for fused, tiles in zip(found["auto"], found["off"], strict=True):
        assert difference(fused, tiles) < 2e-5
