"""Several datasets in one sequence: shares by weight, epochs of each, any stretch at once, the same for any ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.settings import UserError, check_settings
from data_pipeline.shards import ShardedDataset
from pretrain.config import DataConfig
from pretrain.data import mixture, order, tokenize
from pretrain.data.batch import Batch
from pretrain.data.loader import TrainLoader
from pretrain.data.mixture import WINDOW, Mixture, MixtureOrder, positions_a_window, unique_names
from pretrain.data.order import SampleOrder
from tests.test_loader import assert_equal, tensors
from tests.tiny_dataset import (
    NUM_SAMPLES,
    TOWERS,
    data_config,
    make_sample,
    noisy_members,
    write_dataset,
    write_mixed_dataset,
    write_tokenizer,
)

SIZES = [[70, 30, 0, 11], [5, 4], [400, 300, 300]]
TOTALS = [sum(sizes) for sizes in SIZES]


def make_order(weights: list[float | None], seed: int = 3) -> MixtureOrder:
    counts = positions_a_window(weights, TOTALS, ["a", "b", "c"])
    return MixtureOrder(counts, SIZES, seed, block_shards=2)


@pytest.mark.parametrize(
    ("weights", "sizes", "counts"),
    [
        ([1.0, 1.0], [10, 10**9], [2048, 2048]),
        ([1.0, 3.0], [10, 10], [1024, 3072]),
        ([None, None], [3000, 1000], [3072, 1024]),
        ([1.0, 1.0, 1.0], [1, 1, 1], [1366, 1365, 1365]),  # the remainder goes to the first of equals
        ([0.2, 0.3, 0.5], [1, 1, 1], [819, 1229, 2048]),
    ],
)
def test_shares_by_largest_remainder(weights: list[float | None], sizes: list[int], counts: list[int]) -> None:
    assert positions_a_window(weights, sizes, [str(n) for n in sizes]) == counts


def test_a_dataset_that_would_never_be_seen_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data.train: small would be 1e-06 of the samples; expected .* 0.00024"):
        positions_a_window([1e6, 1.0], [5, 5], ["large", "small"])


def test_each_dataset_has_its_own_epochs_with_each_sample_once() -> None:
    weights = [2.0, 1.0, 5.0]
    found = make_order(weights)
    epochs, ids = found.samples(0, 3 * WINDOW)
    firsts = np.cumsum(TOTALS) - TOTALS
    for number, total in enumerate(TOTALS):
        own = (ids >= firsts[number]) & (ids < firsts[number] + total)
        assert own.sum() == 3 * found._counts[number]
        assert own.sum() / len(ids) == pytest.approx(weights[number] / 8, abs=1 / WINDOW)
        seen = Counter(zip(epochs[own].tolist(), (ids[own] - firsts[number]).tolist(), strict=True))
        whole = int(own.sum()) // total
        assert set(seen.values()) == {1}
        assert all((epoch, sample) in seen for epoch in range(whole) for sample in range(total))
        assert (np.diff(epochs[own]) >= 0).all()
        # Datasets that are alike are not walked through alike.
        expected = SampleOrder(SIZES[number], 3, 2, dataset=number).samples(0, int(own.sum()))
        assert (ids[own] - firsts[number]).tolist() == expected[1].tolist()
    assert (
        SampleOrder([50], 3, 2, 0).samples(0, 50)[1].tolist() != SampleOrder([50], 3, 2, 1).samples(0, 50)[1].tolist()
    )


def test_one_dataset_is_its_own_order() -> None:
    whole = MixtureOrder([WINDOW], [SIZES[0]], 7, 2).samples(900, 9000)
    alone = SampleOrder(SIZES[0], 7, 2).samples(900, 9000)
    assert all(np.array_equal(left, right) for left, right in zip(whole, alone, strict=True))


def test_any_stretch_is_the_same_whatever_was_asked_before() -> None:
    epochs, ids = make_order([2.0, 1.0, 5.0]).samples(0, 3 * WINDOW)
    reused, random = make_order([2.0, 1.0, 5.0]), np.random.default_rng(0)
    for _ in range(20):
        start, stop = sorted(random.integers(0, 3 * WINDOW + 1, 2).tolist())
        for one in (reused, make_order([2.0, 1.0, 5.0])):
            some_epochs, some_ids = one.samples(start, stop)
            assert some_epochs.tolist() == epochs[start:stop].tolist()
            assert some_ids.tolist() == ids[start:stop].tolist()
    assert make_order([2.0, 1.0, 5.0], seed=4).samples(0, 99)[1].tolist() != ids[:99].tolist()


def test_epochs_before_a_position() -> None:
    found = make_order([2.0, 1.0, 5.0])
    ids = found.samples(0, 5000)[1]
    ends = np.cumsum(TOTALS)
    counts = np.bincount(np.searchsorted(ends, ids, side="right"), minlength=3)
    assert found.epochs_at(5000) == [count / total for count, total in zip(counts, TOTALS, strict=True)]
    assert found.epochs_at(0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("sizes", [SIZES, [SIZES[2]]], ids=["three", "one"])
def test_starting_far_costs_what_starting_near_costs(monkeypatch: pytest.MonkeyPatch, sizes: list[list[int]]) -> None:
    """Counted in numbers that are drawn, over 64 global batches from each start."""
    drawn: list[int] = []
    real = order.permutation

    def counting(length: int, *key: int | str) -> Any:
        drawn.append(length)
        return real(length, *key)

    monkeypatch.setattr(order, "permutation", counting)
    monkeypatch.setattr(mixture, "permutation", counting)
    totals = [sum(own) for own in sizes]
    counts = positions_a_window([None] * len(sizes), totals, [str(n) for n in totals])
    costs = {}
    for step in (10, 1_000, 100_000, 10**9):
        drawn.clear()
        start = step * 8
        MixtureOrder(counts, sizes, 0, 2).samples(start, start + 8)
        costs[step] = (len(drawn), sum(drawn))
    # One epoch's shards and one block a dataset, one window; the rows of a batch may touch a second of each.
    most = sum(2 * (len(own) + sum(sorted(own)[-2:])) for own in sizes) + 2 * WINDOW
    assert all(calls <= 4 * len(sizes) + 2 and numbers <= most for calls, numbers in costs.values()), costs


# Real datasets


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The mixed dataset, whose keys another uses too."""
    base = tmp_path_factory.mktemp("mixture")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "DEFAULT_PATH", write_tokenizer(base / "tokenizer.json"))
        samples = [make_sample(n, noisy_members(100 + n, 1.2), 1.2, (f"other {n}",)) for n in range(5)]
        samples[1].members["video"] = ("mp4", b"garbage")
        yield [write_mixed_dataset(base / "mixed"), write_dataset(base / "other", samples, samples_per_shard=2)]


def read_batches(folders: list[Path], count: int, num_workers: int = 0, **changes: int) -> list[Batch]:
    mixed = Mixture([ShardedDataset(folder, "train") for folder in folders], [1.0, 2.0])
    arguments = {"global_batch": 8, "seed": 5, **changes}
    loader = TrainLoader(mixed, data_config(num_workers=num_workers), TOWERS, **arguments)
    try:
        return list(islice(loader, count))
    finally:
        loader.close()
        mixed.close()


def test_batches_do_not_depend_on_ranks_workers_or_where_reading_began(folders: list[Path]) -> None:
    whole = read_batches(folders, 4)
    for left, right in zip(whole[1:], read_batches(folders, 3, 2, start_position=8), strict=True):
        assert_equal(left, right)
    for world in (2, 4):
        of_ranks = [read_batches(folders, 4, rank=rank, world=world) for rank in range(world)]
        assert {len(batches) for batches in of_ranks} == {4}
        for step, batch in enumerate(whole):
            assert all(batches[step].num_samples == 8 // world for batches in of_ranks)  # nothing bad is dropped
            for name, tensor in tensors(batch).items():
                assert torch.equal(torch.cat([tensors(batches[step])[name] for batches in of_ranks]), tensor), name


def test_samples_with_equal_keys_stay_apart(folders: list[Path]) -> None:
    mixed = Mixture([ShardedDataset(folder, "train") for folder in folders], [1.0, 2.0])
    batches = read_batches(folders, 12)
    pairs = {(i, key) for batch in batches for i, key in zip(batch.ids.tolist(), batch.keys, strict=True)}
    assert len(pairs) == NUM_SAMPLES + 5 == len(mixed)
    assert len({key for _, key in pairs}) == NUM_SAMPLES
    assert {(mixed.numbers([i])[0], key) for i, key in pairs if i >= NUM_SAMPLES} == {
        (1, f"clip-{n:04d}") for n in range(5)
    }
    assert mixed.row(NUM_SAMPLES + 2)["captions"][0]["text"] == "other 2"
    assert {(e.dataset, e.key, e.modality) for batch in batches for e in batch.events} == {
        (0, "clip-0006", "video"), (0, "clip-0006", "audio"), (1, "clip-0001", "video"),
    }  # fmt: skip
    mixed.close()


def test_names_in_metrics_are_unique(folders: list[Path]) -> None:
    assert unique_names(["a", "b", "a"]) == ["a-0", "b", "a-2"]
    mixed = Mixture([ShardedDataset(folder, "train") for folder in folders])
    loader = TrainLoader(mixed, data_config(), TOWERS, global_batch=8, seed=0)
    assert loader.epochs_at(19 * 4096).keys() == {"epoch/mixed", "epoch/other"}
    one = TrainLoader(mixed.datasets[0], data_config(), TOWERS, global_batch=8, seed=0)
    assert one.epochs_at(21) == {"epoch": 1.5}
    mixed.close()


# The config


def test_one_mapping_is_a_list_of_one() -> None:
    data = check_settings(DataConfig, {"train": {"path": "a", "split": "train"}}, "x.yaml")
    assert [part.model_dump() for part in data.train] == [{"path": "a", "split": "train", "weight": None}]
    assert DataConfig.model_validate(data.model_dump()) == data


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (
            [{"path": "a", "split": "t", "weight": 1}, {"path": "b", "split": "t"}],
            "b has no weight and others have one",
        ),
        ([{"path": "a", "split": "t"}] * 2, "split t of a is there twice"),
        ([], "at least 1 item"),
        ({"path": "a", "split": "t", "weight": 0}, "greater than 0"),
        ({"path": "a", "split": "t", "weight": float("inf")}, "finite number"),
        ([{"path": "a", "split": "t", "wieght": 1}], "unknown key; did you mean 'weight'?"),
    ],
)
def test_mistakes_in_the_list_of_datasets(train: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_settings(DataConfig, {"train": train}, "x.yaml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
