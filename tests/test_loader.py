"""The loader on real shards: the same batches for any ranks, workers and starting point; what is missing is masked."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from data_pipeline.settings import UserError
from data_pipeline.shards import ShardedDataset, ShardUnavailable
from pretrain.config import VideoTowerConfig
from pretrain.data import tokenize
from pretrain.data.batch import Batch, LoadEvent
from pretrain.data.loader import EvalLoader, TrainLoader
from tests.tiny_dataset import (
    CLIP_S,
    NUM_SAMPLES,
    SAMPLE_RATE_HZ,
    SWITCH_S,
    TOWERS,
    data_config,
    make_sample,
    switching_members,
    write_dataset,
    write_mixed_dataset,
    write_tokenizer,
)

GLOBAL_BATCH = 8  # does not divide an epoch
MODALITIES = ("video", "audio", "text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The mixed dataset, with a tokenizer made for it."""
    base = tmp_path_factory.mktemp("loader")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "DEFAULT_PATH", write_tokenizer(base / "tokenizer.json"))
        yield write_mixed_dataset(base / "dataset")


@pytest.fixture
def dataset(folder: Path) -> Iterator[ShardedDataset]:
    opened = ShardedDataset(folder, "train")
    yield opened
    opened.close()


def read_batches(dataset: ShardedDataset, count: int, num_workers: int = 0, **changes: int) -> list[Batch]:
    """The first `count` batches of a training loader."""
    arguments = {"global_batch": GLOBAL_BATCH, "seed": 5, **changes}
    loader = TrainLoader(dataset, data_config(num_workers=num_workers), TOWERS, **arguments)
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch under one name each."""
    found = {"ids": batch.ids, "epochs": batch.epochs, **{f"present.{k}": v for k, v in batch.present.items()}}
    return found | {f"{m}.{k}": tensor for m, parts in batch.inputs.items() for k, tensor in parts.items()}


def assert_equal(left: Batch, right: Batch) -> None:
    """All fields, bitwise."""
    assert (left.keys, left.position, left.next_position) == (right.keys, right.position, right.next_position)
    assert left.events == right.events
    assert tensors(left).keys() == tensors(right).keys()
    for name, tensor in tensors(left).items():
        assert tensor.dtype == tensors(right)[name].dtype
        assert torch.equal(tensor, tensors(right)[name]), name


def test_each_epoch_has_each_sample_once_and_batches_cross_epochs(dataset: ShardedDataset) -> None:
    batches = read_batches(dataset, 7)  # 56 samples: four epochs
    seen = Counter((epoch, key) for b in batches for epoch, key in zip(b.epochs.tolist(), b.keys, strict=True))
    assert seen == Counter((epoch, f"clip-{n:04d}") for epoch in range(4) for n in range(NUM_SAMPLES))
    assert any(len(set(b.epochs.tolist())) == 2 for b in batches)
    assert [b.position for b in batches] == list(range(0, 56, GLOBAL_BATCH))
    assert [b.next_position for b in batches] == list(range(GLOBAL_BATCH, 57, GLOBAL_BATCH))
    assert all(b.keys == [f"clip-{n:04d}" for n in b.ids.tolist()] for b in batches)


@pytest.mark.parametrize("world", [2, 4])
def test_rows_of_all_ranks_are_the_global_batch(dataset: ShardedDataset, world: int) -> None:
    whole = read_batches(dataset, 3)
    of_ranks = [read_batches(dataset, 3, rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(whole):
        parts = [batches[step] for batches in of_ranks]
        assert [key for part in parts for key in part.keys] == batch.keys
        assert [event for part in parts for event in part.events] == batch.events
        assert {(part.position, part.next_position) for part in parts} == {(batch.position, batch.next_position)}
        for name, tensor in tensors(batch).items():
            assert torch.equal(torch.cat([tensors(part)[name] for part in parts]), tensor), name


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_loader_that_starts_late_equals_one_that_ran_there(dataset: ShardedDataset, num_workers: int) -> None:
    ran = read_batches(dataset, 5)
    started = read_batches(dataset, 3, num_workers, start_position=ran[2].position)
    for left, right in zip(ran[2:], started, strict=True):
        assert_equal(left, right)


def test_a_far_start_is_the_same_epoch_arithmetic(dataset: ShardedDataset) -> None:
    start = GLOBAL_BATCH * 10**11
    batch = read_batches(dataset, 1, start_position=start)[0]
    assert batch.position == start
    assert set(batch.epochs.tolist()) <= {start // NUM_SAMPLES, start // NUM_SAMPLES + 1}


def test_augmentation_differs_between_epochs_and_seeds(dataset: ShardedDataset) -> None:
    views: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for seed in (0, 1):
        for batch in read_batches(dataset, 4, seed=seed):
            for row, (epoch, number) in enumerate(zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True)):
                if seed == 0 or epoch == 0:
                    views[seed * 100 + epoch, number] = {name: t[row] for name, t in tensors(batch).items()}
    for number in (7, 8, 9):
        for name in ("video.frames", "audio.waveform"):
            assert not torch.equal(views[0, number][name], views[1, number][name])
            assert not torch.equal(views[0, number][name], views[100, number][name])
        assert torch.equal(views[0, number]["text.token_ids"], views[1, number]["text.token_ids"])


def test_a_sample_is_the_same_whatever_it_is_batched_with(dataset: ShardedDataset) -> None:
    first = {key: row for row, key in enumerate(read_batches(dataset, 1, global_batch=NUM_SAMPLES)[0].keys)}
    whole = read_batches(dataset, 1, global_batch=NUM_SAMPLES)[0]
    for batch in read_batches(dataset, 4, global_batch=3):
        for row, key in enumerate(batch.keys):
            for name, tensor in tensors(batch).items():
                assert torch.equal(tensor[row], tensors(whole)[name][first[key]]), (key, name)


def test_each_epoch_sees_another_window_of_picture_and_sound_alike(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "one", [make_sample(0, switching_members(), CLIP_S)], samples_per_shard=1)
    dataset, data = ShardedDataset(folder, "train"), data_config(window_s=4.0)
    towers = TOWERS.model_copy(update={"video": VideoTowerConfig(num_frames=20, size_px=8), "text": None})
    batch = next(iter(TrainLoader(dataset, data, towers, global_batch=10, seed=3)))
    fixed = next(iter(EvalLoader(dataset, data, towers, batch_size=1)))
    onsets_s = []
    for frames, waveform in (
        *zip(batch.inputs["video"]["frames"], batch.inputs["audio"]["waveform"], strict=True),
        (fixed.inputs["video"]["frames"][0], fixed.inputs["audio"]["waveform"][0]),
    ):
        onset_s = int((waveform.int().abs() > 500).int().argmax()) / SAMPLE_RATE_HZ
        first_bright = int((frames.float().mean(dim=(1, 2, 3)) > 120).int().argmax())
        assert first_bright * 0.2 - 0.1 - 0.005 <= onset_s <= first_bright * 0.2 + 0.1 + 0.005  # frames are 0.2 s apart
        onsets_s.append(onset_s)
    assert len(set(onsets_s)) == 11
    assert onsets_s[-1] == pytest.approx(SWITCH_S - (CLIP_S - 4.0) / 2, abs=0.005)
    assert min(onsets_s) < 1.6
    assert max(onsets_s) > 2.4
    assert all(1 <= onset_s <= 3 for onset_s in onsets_s)


def evaluation(dataset: ShardedDataset, batch_size: int = 5, num_workers: int = 0, **changes: int) -> list[Batch]:
    """All batches of one pass over the dataset."""
    loader = EvalLoader(dataset, data_config(num_workers=num_workers), TOWERS, batch_size=batch_size, **changes)
    return list(loader)


def test_missing_modalities_are_zero_and_masked(dataset: ShardedDataset) -> None:
    batch = evaluation(dataset, NUM_SAMPLES)[0]
    missing = {"video": {1, 6}, "audio": {0, 6}, "text": {2}}
    for modality in MODALITIES:
        absent = {n for n, here in enumerate(batch.present[modality].tolist()) if not here}
        assert absent == missing[modality]
        for name, tensor in batch.inputs[modality].items():
            assert not tensor[list(absent)].any(), name
            assert all(tensor[n].any() for n in range(NUM_SAMPLES) if n not in absent), name
    assert batch.inputs["video"]["frame_mask"].sum(dim=1).tolist() == [3, 0, 3, 1, 3, 1, 0, 3, 3, 3, 3, 3, 3, 3]
    assert batch.inputs["audio"]["num_samples"].tolist() == [
        {0: 0, 5: SAMPLE_RATE_HZ // 2, 6: 0}.get(n, SAMPLE_RATE_HZ) for n in range(NUM_SAMPLES)
    ]
    shapes = {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in tensors(batch).items()}
    assert shapes["video.frames"] == (torch.uint8, (3, 16, 16, 3))
    assert shapes["audio.waveform"] == (torch.int16, (SAMPLE_RATE_HZ,))
    assert shapes["text.token_ids"] == (torch.int64, (8,))
    assert shapes["text.token_mask"] == (torch.bool, (8,))


def test_undecodable_members_are_events_with_a_reason(dataset: ShardedDataset) -> None:
    events = [event for batch in evaluation(dataset) for event in batch.events]
    assert [(event.key, event.modality) for event in events] == [("clip-0006", "video"), ("clip-0006", "audio")]
    assert all(event.reason.startswith("UndecodableMedia: ") for event in events)


def damage(folder: Path, copy: Path, change: Callable[[Path, ShardedDataset], None]) -> ShardedDataset:
    """A copy of the dataset in which `change` has been done to the first shard."""
    copy.mkdir()
    for source in folder.iterdir():
        (copy / source.name).write_bytes(source.read_bytes())
    dataset = ShardedDataset(copy, "train")
    change(copy / dataset.shards[0].path, dataset)
    return dataset


def test_a_flipped_byte_masks_its_row_and_no_other(folder: Path, dataset: ShardedDataset, tmp_path: Path) -> None:
    def flip(tar: Path, index: ShardedDataset) -> None:
        data = bytearray(tar.read_bytes())
        data[index.row(2)["video_offset"] + 100] ^= 1
        tar.write_bytes(data)

    whole = evaluation(dataset, 4)[0]
    hurt = evaluation(damage(folder, tmp_path / "copy", flip), 4, num_workers=1)[0]
    reason = "DamagedMember: shard-000000.tar: checksum of clip-0002.mp4 differs"
    assert hurt.events == [LoadEvent(key="clip-0002", modality="video", reason=reason)]
    assert hurt.present["video"].tolist() == [True, False, False, True]
    for name, tensor in tensors(hurt).items():
        expected = tensors(whole)[name].clone()
        if "video" in name:
            expected[2] = 0
        assert torch.equal(tensor, expected), name


def test_a_lost_or_cut_tar_masks_what_was_in_it(folder: Path, tmp_path: Path) -> None:
    changes: list[Callable[[Path, ShardedDataset], None]] = [
        lambda tar, index: tar.unlink(),
        lambda tar, index: os.truncate(tar, 512),
    ]
    for number, change in enumerate(changes):
        batch = evaluation(damage(folder, tmp_path / str(number), change), 4)[0]
        assert batch.keys == [f"clip-{n:04d}" for n in range(4)]
        assert not batch.present["video"].any()
        assert not batch.present["audio"].any()
        assert batch.present["text"].tolist() == [True, True, False, True]
        assert len(batch.events) == 6  # of eight members two never were


def test_what_is_not_the_samples_fault_ends_the_run_instead(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tar that cannot be opened just now (too many open files) would mask other rows than the next time."""
    copy = damage(folder, tmp_path / "copy", lambda tar, index: None)

    def too_many(path: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("data_pipeline.shard_store.os.open", too_many)
    with pytest.raises(ShardUnavailable, match=r"shard-000000\.tar: Too many open files"):
        evaluation(copy, 4)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_dataset_that_is_away_ends_the_run_instead(folder: Path, tmp_path: Path) -> None:
    """An unmounted file system looks like lost files: no sample is masked for it, as one is for a lost tar."""
    copy = damage(folder, tmp_path / "copy", lambda tar, index: None)
    assert len(evaluation(copy, 4)) > 0
    copy.close()
    place = tmp_path / "copy"
    (place / "shard-000000.tar").unlink()
    lost = [batch.events for batch in evaluation(copy, 4)]
    assert any("No such file" in event.reason for events in lost for event in events)
    copy.close()
    place.rename(tmp_path / "elsewhere")
    with pytest.raises(ShardUnavailable, match=r"shard-000000\.tar: No such file"):
        evaluation(copy, 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: index.unlink(), "cannot be read"),
        (lambda index: os.truncate(index, 100), "its checksum is not that of dataset.json"),
        (lambda index: flip_a_bit(index), "its checksum is not that of dataset.json"),
        (lambda index: shutil.copy(index.with_name("shard-000001.parquet"), index), "is not that of dataset.json"),
    ],
)
def test_an_index_that_is_not_whole_is_one_line(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    change(tmp_path / "copy" / "shard-000000.parquet")
    with pytest.raises(UserError, match=said) as caught:
        ShardedDataset(tmp_path / "copy", "train")
    assert "shard-000000.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_evaluation_sees_each_sample_once_in_order(dataset: ShardedDataset) -> None:
    everything = evaluation(dataset, NUM_SAMPLES)[0]
    for world in (1, 3, NUM_SAMPLES + 2):
        for num_workers in (0, 2) if world == 1 else (0,):
            batches = [b for rank in range(world) for b in evaluation(dataset, 4, num_workers, rank=rank, world=world)]
            assert all(batch.epochs.eq(0).all() and 0 < batch.num_samples <= 4 for batch in batches)
            for name, tensor in tensors(everything).items():
                assert torch.equal(torch.cat([tensors(b)[name] for b in batches]), tensor), name
    some = evaluation(dataset, 4, max_samples=6)
    assert [batch.ids.tolist() for batch in some] == [[0, 1, 2, 3], [4, 5]]
    loader = EvalLoader(dataset, data_config(), TOWERS, batch_size=4)
    assert (loader.num_batches, len(list(loader)), len(list(loader))) == (4, 4, 4)  # again and again


def test_mistakes_are_one_line(dataset: ShardedDataset) -> None:
    with pytest.raises(UserError, match=r"^train.global_batch 8 is not divisible by 3 ranks; nearest: 6 or 9$"):
        read_batches(dataset, 1, rank=0, world=3)
    with pytest.raises(UserError, match=r"^train.global_batch 2 is not divisible by 4 ranks; nearest: 4$"):
        read_batches(dataset, 1, global_batch=2, world=4)


def test_chunks_are_rows_of_inputs_and_masks(dataset: ShardedDataset) -> None:
    batch = read_batches(dataset, 1)[0]
    parts = [batch.chunk(start, min(start + 3, 8)) for start in (0, 3, 6)]
    for modality in MODALITIES:
        assert torch.equal(torch.cat([present[modality] for _, present in parts]), batch.present[modality])
        for name, tensor in batch.inputs[modality].items():
            assert torch.equal(torch.cat([inputs[modality][name] for inputs, _ in parts]), tensor)


def test_loading_draws_nothing_from_the_trainers_generator(dataset: ShardedDataset) -> None:
    before = torch.get_rng_state()
    read_batches(dataset, 2, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)
