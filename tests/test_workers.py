"""Decoding processes: deaf to the signals that ask a trainer to stop, gone when it closes them or dies."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from data_pipeline.settings import UserError
from data_pipeline.shards import ShardedDataset
from pretrain.data import tokenize
from pretrain.data import workers as workers_module
from pretrain.data.loader import EvalLoader, TrainLoader
from tests.tiny_dataset import TOWERS, data_config, make_sample, write_dataset, write_mixed_dataset, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The mixed dataset, with a tokenizer made for it."""
    base = tmp_path_factory.mktemp("workers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "DEFAULT_PATH", write_tokenizer(base / "tokenizer.json"))
        yield write_mixed_dataset(base / "dataset")


@pytest.fixture
def dataset(folder: Path) -> Iterator[ShardedDataset]:
    opened = ShardedDataset(folder, "train")
    yield opened
    opened.close()


def train_loader(dataset: ShardedDataset, num_workers: int, global_batch: int = 2) -> TrainLoader:
    """A loader from position 0."""
    return TrainLoader(dataset, data_config(num_workers=num_workers), TOWERS, global_batch=global_batch, seed=0)


def workers() -> list[int]:
    """Process ids of this process's children."""
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def run_apart(
    function: Callable[[Path, Connection], None], folder: Path
) -> Iterator[tuple[Connection, multiprocessing.process.BaseProcess]]:
    """`function` in a process of its own, and what it tells."""
    listen, tell = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=function, args=(folder, tell))
    process.start()
    tell.close()
    try:
        yield listen, process
    finally:
        process.kill()
        process.join()


def test_stop_signals_leave_workers_alone_and_close_ends_them(dataset: ShardedDataset) -> None:
    expected = [batch.keys for batch in islice(train_loader(dataset, 0), 8)]
    loader = train_loader(dataset, 2)
    batches = [next(iter(loader))]
    pids = workers()
    assert len(pids) == 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for pid in pids:
            os.kill(pid, number)
        batches += islice(loader, 2)
    batches += islice(loader, 1)
    assert workers() == pids
    assert [batch.keys for batch in batches] == expected
    loader.close()
    loader.close()
    assert not any(is_running(pid) for pid in pids)
    with pytest.raises(StopIteration):
        next(iter(loader))


def _load_under_fire(folder: Path, tell: Connection) -> None:
    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
    loader = train_loader(ShardedDataset(folder, "train"), 2)
    tell.send([batch.keys for batch in islice(loader, 2)])
    loader.close()


def test_a_signal_at_the_moment_of_the_fork_does_not_kill_a_worker(folder: Path, dataset: ShardedDataset) -> None:
    with run_apart(_load_under_fire, folder) as (listen, _):
        assert listen.recv() == [batch.keys for batch in islice(train_loader(dataset, 0), 2)]


def test_an_unfinished_evaluation_leaves_no_process(dataset: ShardedDataset) -> None:
    loader = EvalLoader(dataset, data_config(num_workers=2), TOWERS, batch_size=2)
    batches = iter(loader)
    next(batches)
    assert len(workers()) == 2
    loader.close()
    assert not workers()


def _kill_and_go_on(pid: int, loader: TrainLoader) -> None:
    os.kill(pid, signal.SIGKILL)  # torch's handler may raise at once
    list(islice(loader, 20))


def test_a_dead_worker_is_an_error_that_names_it(dataset: ShardedDataset) -> None:
    loader = train_loader(dataset, 1)
    next(iter(loader))
    (pid,) = workers()
    try:
        with pytest.raises(RuntimeError, match=rf"DataLoader worker \(pid {pid}\) "):
            _kill_and_go_on(pid, loader)
    finally:
        loader.close()


def _train_and_die(folder: Path, tell: Connection) -> None:
    loader = train_loader(ShardedDataset(folder, "train"), 2, global_batch=8000)
    next(iter(loader))
    tell.send(workers())
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    """Batches are so long that their keys do not fit into the pipe that nobody empties any more."""
    folder = write_dataset(tmp_path / "texts", [make_sample(n, {}, 1.0) for n in range(4)], samples_per_shard=4)
    with run_apart(_train_and_die, folder) as (listen, trainer):
        pids = listen.recv()
        trainer.join()
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their trainer"
        time.sleep(0.1)


def test_a_batch_that_cannot_be_handed_over_is_a_line(dataset: ShardedDataset) -> None:
    """Shared memory has run out: torch's sending thread would drop the batch, and the trainer wait for ever."""
    with closing(train_loader(dataset, 1)) as loader:
        next(iter(loader))
        resource.prlimit(workers()[0], resource.RLIMIT_FSIZE, (1, 1))
        with pytest.raises(UserError, match=r"data.num_workers: .* cannot hand over its batch: .*File too large"):
            list(loader)


def hang_once(seen: Path, times: int) -> Callable[[workers_module._WorkerStart, int], None]:
    """What a worker runs first: the first `times` of them wait for ever, like a child forked at a bad moment."""
    begin = workers_module._WorkerStart.__call__

    def start(self: workers_module._WorkerStart, worker: int) -> None:
        with open(seen, "a") as log:
            log.write("x")
        while seen.stat().st_size <= times:
            time.sleep(60)
        begin(self, worker)

    return start


def test_a_worker_that_never_begins_is_forked_again(
    dataset: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [batch.ids.tolist() for batch in islice(train_loader(dataset, 0), 5)]
    monkeypatch.setattr(workers_module, "HELLO_S", 4.0)
    monkeypatch.setattr(workers_module._WorkerStart, "__call__", hang_once(tmp_path / "seen", 3))
    loader = train_loader(dataset, 2)
    assert [batch.ids.tolist() for batch in islice(loader, 5)] == expected
    assert (tmp_path / "seen").stat().st_size >= 4  # of the second two the first may come too early
    assert len(workers()) == 2
    loader.close()
    assert workers() == []


def test_workers_that_never_begin_are_said(
    dataset: ShardedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "HELLO_S", 0.5)
    monkeypatch.setattr(workers_module._WorkerStart, "__call__", hang_once(tmp_path / "seen", 1000))
    loader = train_loader(dataset, 1)
    with pytest.raises(RuntimeError, match=r"did not begin within 0\.5 s, 5 times"):
        next(iter(loader))
    loader.close()
    assert workers() == []
