"""Triton kernels of a tile of scores: statistics of its blocks, gradients of its scores, and products that add.

A program owns one block of BLOCK_R rows and BLOCK_C columns. Nothing is added atomically: each writes what it found of
its rows and of its columns to a place of its own, so that results do not depend on the order in which programs run.
Products of float32 factors keep their precision by three TF32 products each ("tf32x3").
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def block_of(num_row_blocks, num_column_blocks, GROUP: tl.constexpr):
    """The block of this program: GROUP row blocks go through the columns together, so that both stay in cache."""
    program = tl.program_id(0)
    in_group = GROUP * num_column_blocks
    first = program // in_group * GROUP
    size = tl.minimum(num_row_blocks - first, GROUP)
    return first + program % in_group % size, program % in_group // size


@triton.jit
@no_type_check
def block_product(
    left, right, row, column, num_rows, num_columns, dim,
    BFLOAT16: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """left[row] @ right[column].T of row-major matrices with `dim` columns: [BLOCK_R, BLOCK_C]"""
    product = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, dim, BLOCK_D):
        along = start + tl.arange(0, BLOCK_D)
        a = tl.load(left + row[:, None] * dim + along, mask=(row[:, None] < num_rows) & (along < dim), other=0.0)
        b = tl.load(
            right + column[None, :] * dim + along[:, None],
            mask=(column[None, :] < num_columns) & (along[:, None] < dim),
            other=0.0,
        )
        if BFLOAT16:
            product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), product)
        else:
            product = tl.dot(a, b, product, input_precision="tf32x3")
    return product


@triton.jit
@no_type_check
def block_scores(
    left, square, right, weight, bias, products, row, column, num_rows, num_columns, dim, floor,
    NUM_AXES: tl.constexpr, KEEP: tl.constexpr, BFLOAT16: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores, and the product (NUM_AXES 0) or the distance they are made of.

    NUM_AXES 0: weight_j <left_i, right_j> + bias_j. Otherwise -weight_j sqrt(square_i - sum_m <left_i, right^m_j>^2).
    KEEP: write the products of the axes to `products`.
    """
    row_in, column_in = row < num_rows, column < num_columns
    scale = tl.load(weight + column, mask=column_in, other=0.0)[None, :]
    if NUM_AXES == 0:
        base = block_product(left, right, row, column, num_rows, num_columns, dim, BFLOAT16, BLOCK_R, BLOCK_C, BLOCK_D)
        scores = base * scale + tl.load(bias + column, mask=column_in, other=0.0)[None, :]
    else:
        squared = tl.load(square + row, mask=row_in, other=0.0)[:, None] + tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for axis in tl.static_range(NUM_AXES):
            product = block_product(
                left, right + axis * num_columns * dim, row, column, num_rows, num_columns, dim,
                BFLOAT16, BLOCK_R, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            squared -= product * product
            if KEEP:
                place = products + (axis * num_rows + row[:, None]) * num_columns + column[None, :]
                tl.store(place, product, mask=row_in[:, None] & column_in[None, :])
        base = tl.sqrt(tl.where(squared > floor, squared, 0.0))
        scores = -base * scale
    return scores, base


@triton.jit
@no_type_check
def counted_pairs(row_items, column_items, row, column, num_rows, num_columns):
    """Pairs of two valid samples (items >= 0) of different items."""
    row_item = tl.load(row_items + row, mask=row < num_rows, other=-1)[:, None]
    column_item = tl.load(column_items + column, mask=column < num_columns, other=-1)[None, :]
    return (row_item != column_item) & (row_item >= 0) & (column_item >= 0)


@triton.jit
@no_type_check
def statistics_kernel(
    left, square, right, weight, bias, row_items, column_items,
    row_shift, row_sum_exp, row_sum, column_shift, column_sum_exp, column_sum,
    num_rows, num_columns, dim, floor, num_row_blocks, num_column_blocks,
    NUM_AXES: tl.constexpr, BFLOAT16: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of each block: largest score, sum of exp(score - largest), and sum, of its rows and of its columns.

    row_*: [column blocks, rows]; column_*: [row blocks, columns]. A row without a counted pair: -inf, 0, 0.
    """
    row_block, column_block = block_of(num_row_blocks, num_column_blocks, GROUP)
    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    column = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    scores, _ = block_scores(
        left, square, right, weight, bias, left, row, column, num_rows, num_columns, dim, floor,
        NUM_AXES, False, BFLOAT16, BLOCK_R, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    counted = counted_pairs(row_items, column_items, row, column, num_rows, num_columns)
    kept = tl.where(counted, scores, float("-inf"))
    summed = tl.where(counted, scores, 0.0)

    largest = tl.max(kept, axis=1)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    place, inside = column_block * num_rows + row, row < num_rows
    tl.store(row_shift + place, largest, mask=inside)
    tl.store(row_sum_exp + place, tl.sum(tl.exp(kept - shift[:, None]), axis=1), mask=inside)
    tl.store(row_sum + place, tl.sum(summed, axis=1), mask=inside)

    largest = tl.max(kept, axis=0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    place, inside = row_block * num_columns + column, column < num_columns
    tl.store(column_shift + place, largest, mask=inside)
    tl.store(column_sum_exp + place, tl.sum(tl.exp(kept - shift[None, :]), axis=0), mask=inside)
    tl.store(column_sum + place, tl.sum(summed, axis=0), mask=inside)


@triton.jit
@no_type_check
def gradient_kernel(
    left, square, right, weight, bias, row_items, column_items,
    row_shift, row_share, row_by_sum, column_shift, column_share, column_by_sum,
    products, slopes, row_slope, column_along,
    num_rows, num_columns, dim, floor, num_row_blocks, num_column_blocks,
    NUM_AXES: tl.constexpr, BFLOAT16: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gradient g of the scores, as what the products that follow want.

    slopes [rows, columns]: gradient of the product (NUM_AXES 0), or of an axis' product over that product, which is
    written to products [axes, rows, columns]. row_slope [column blocks, rows]: sums of g (NUM_AXES 0) or of slopes.
    column_along [row blocks, columns]: sums of g * product (NUM_AXES 0) or of g * distance.
    """
    row_block, column_block = block_of(num_row_blocks, num_column_blocks, GROUP)
    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    column = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    row_in, column_in = row < num_rows, column < num_columns
    scores, base = block_scores(
        left, square, right, weight, bias, products, row, column, num_rows, num_columns, dim, floor,
        NUM_AXES, NUM_AXES > 0, BFLOAT16, BLOCK_R, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    counted = counted_pairs(row_items, column_items, row, column, num_rows, num_columns)
    by_row = tl.exp(tl.minimum(scores - tl.load(row_shift + row, mask=row_in, other=0.0)[:, None], 0.0))
    grad = by_row * tl.load(row_share + row, mask=row_in, other=0.0)[:, None]
    by_column = tl.exp(tl.minimum(scores - tl.load(column_shift + column, mask=column_in, other=0.0)[None, :], 0.0))
    grad += by_column * tl.load(column_share + column, mask=column_in, other=0.0)[None, :]
    grad += tl.load(row_by_sum + row, mask=row_in, other=0.0)[:, None]
    grad += tl.load(column_by_sum + column, mask=column_in, other=0.0)[None, :]
    grad = tl.where(counted, grad, 0.0)
    scale = tl.load(weight + column, mask=column_in, other=0.0)[None, :]
    along = grad * base
    if NUM_AXES == 0:
        slope = grad * scale
        of_row = grad
    else:
        slope = along / tl.maximum(base * base, floor) * scale
        of_row = slope
    tl.store(slopes + row[:, None] * num_columns + column[None, :], slope, mask=row_in[:, None] & column_in[None, :])
    tl.store(row_slope + column_block * num_rows + row, tl.sum(of_row, axis=1), mask=row_in)
    tl.store(column_along + row_block * num_columns + column, tl.sum(along, axis=0), mask=column_in)


@triton.jit
@no_type_check
def add_product_kernel(
    total, left, right, num_rows, num_columns, num_inner, left_row, left_inner, right_inner, right_column,
    num_row_blocks, num_column_blocks,
    BFLOAT16: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """total += left @ right, total row-major; the others by their strides."""
    row_block, column_block = block_of(num_row_blocks, num_column_blocks, GROUP)
    row = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    column = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    product = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, num_inner, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D)
        a = tl.load(
            left + row[:, None] * left_row + inner[None, :] * left_inner,
            mask=(row[:, None] < num_rows) & (inner[None, :] < num_inner),
            other=0.0,
        )
        b = tl.load(
            right + inner[:, None] * right_inner + column[None, :] * right_column,
            mask=(inner[:, None] < num_inner) & (column[None, :] < num_columns),
            other=0.0,
        )
        if BFLOAT16:
            product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), product)
        else:
            product = tl.dot(a, b, product, input_precision="tf32x3")
    place = total + row[:, None] * num_columns + column[None, :]
    inside = (row[:, None] < num_rows) & (column[None, :] < num_columns)
    tl.store(place, tl.load(place, mask=inside, other=0.0) + product, mask=inside)
