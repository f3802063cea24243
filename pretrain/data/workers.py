"""Batches of a list of positions, in order, decoded by worker processes.

Workers ignore the signals that ask a trainer to stop, and end when it closes them or is no more.
"""

from __future__ import annotations

import atexit
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from data_pipeline.settings import UserError
from pretrain.data.batch import Batch
from pretrain.data.reader import BatchReader

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
PARENT_CHECK_S = 1.0
# A fork takes milliseconds. But CPython (3.11: PyOS_AfterFork_Child takes a lock before it renews it) leaves a child
# waiting for ever where another thread was just beginning or ending; such a child is killed, and another one forked.
HELLO_S = 20.0
MAX_STARTS = 5
DEATH_S = 1.0  # a dying process closes its pipes some time before it is gone

ReadAt = Callable[[int, Callable[[], None]], Batch]


class LoaderClosed(Exception):
    """Ends a worker's current batch when nobody waits for it any more."""


class _Positions(Dataset[Batch | UserError]):
    def __init__(self, read: ReadAt, stop: mmap.mmap) -> None:
        self._read = read
        self._stop = stop

    def __getitem__(self, position: int) -> Batch | UserError:
        try:
            batch = self._read(position, self._check)
            if get_worker_info() is not None:
                _make_ready(batch)
        except UserError as error:  # handed over as it is: torch would wrap its one line into a traceback
            return error
        return batch

    def _check(self) -> None:
        if self._stop[0]:
            raise LoaderClosed


class BatchStream:
    """Iterates `read(position, check)` over `positions`, in their order, whatever the number of processes.

    Workers are forked at the first batch. Each makes whole batches, `prefetch` of them ahead. A signal to the process
    group leaves them alone, so that the trainer can finish its step; they end with `close`, or with their parent.

    Raises (while iterating):
        RuntimeError: a worker died; its pid and how. UserError: a shard cannot be fetched, or there is
        no room to hand a batch over.
    """

    def __init__(
        self, reader: BatchReader, read: ReadAt, positions: Iterable[int], num_workers: int, prefetch: int
    ) -> None:
        # Bytes shared with the workers; a lock could be held by one that died. The first: stop. One each: it has begun.
        self._stop = mmap.mmap(-1, 1 + num_workers)
        self._num_workers = num_workers
        self._running: Any = None
        self._loader: DataLoader[Batch | UserError] = DataLoader(
            _Positions(read, self._stop),
            batch_size=None,
            sampler=positions,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            multiprocessing_context="fork" if num_workers else None,
            worker_init_fn=_WorkerStart(reader, self._stop),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # torch draws a seed for its workers: not from the trainer's stream
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stop[0]:
            raise StopIteration
        if self._running is None:
            self._start()
        try:
            batch = next(self._running)
        except (OSError, EOFError, RuntimeError) as error:  # a pipe whose other end is gone, or torch in its own words
            raise self._death() or error from error
        if isinstance(batch, UserError):
            raise batch
        assert isinstance(batch, Batch)
        return batch

    def _death(self) -> RuntimeError | None:
        """How a worker died; None: all live. torch's own signal handler may raise the like in here."""
        if self._running is None or not self._num_workers:
            return None
        deadline = time.monotonic() + DEATH_S
        while time.monotonic() < deadline:
            for process in self._running._workers:
                if not process.is_alive():
                    return RuntimeError(f"DataLoader worker (pid {process.pid}) ended with code {process.exitcode}")
            time.sleep(0.01)
        return None

    def _start(self) -> None:
        """Fork until every worker has begun.

        Raises:
            RuntimeError: one never does.
        """
        for _ in range(MAX_STARTS):
            self._fork()
            if self._have_begun():
                break
            self._end_workers(self._running)
            self._stop[1:] = bytes(self._num_workers)
        else:
            self._running = None
            raise RuntimeError(f"DataLoader workers did not begin within {HELLO_S:g} s, {MAX_STARTS} times")
        if self._num_workers:
            atexit.register(self.close)  # multiprocessing would wait for ever for children that ignore SIGTERM

    def _fork(self) -> None:
        """With the stop signals held back: a worker must not meet one before it ignores them."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._running = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _have_begun(self) -> bool:
        """Wait for all workers; one that has died has begun, too, and is told of at the first batch."""
        deadline = time.monotonic() + HELLO_S
        for number in range(self._num_workers):
            while not self._stop[1 + number] and self._running._workers[number].is_alive():
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.001)
        return True

    def close(self) -> None:
        """End the workers: each after the sample it is at. Nothing can be read afterwards."""
        self._stop[0] = 1
        running, self._running = self._running, None
        if running is None or not self._num_workers:
            return
        atexit.unregister(self.close)
        self._end_workers(running)

    def _end_workers(self, running: Any) -> None:
        """Those that never began are killed at once: torch would wait for each of them, and they hold nothing of it."""
        if running._worker_pids_set:  # of a worker it watches, torch's SIGCHLD handler raises
            signal_handling._remove_worker_pids(id(running))
            running._worker_pids_set = False
        for number, process in enumerate(running._workers):
            if not self._stop[1 + number]:
                process.kill()
        running._shutdown_workers()  # the only way of torch's that does not wait for the garbage collector
        for process in running._workers:
            if process.is_alive():
                process.kill()
                process.join()


class _WorkerStart:
    """Runs in each worker before its first batch."""

    def __init__(self, reader: BatchReader, begun: mmap.mmap) -> None:
        self._reader = reader
        self._begun = begun
        self._parent = os.getpid()

    def __call__(self, worker: int) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        torch.set_num_threads(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._reader.dataset.close()  # this process's copies of descriptors; shards are opened again when needed
        threading.Thread(target=_end_with, args=(self._parent,), daemon=True).start()
        self._begun[1 + worker] = 1


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


def _make_ready(batch: Batch) -> None:
    """Do what the thread that sends would do, which drops a batch it cannot send: the trainer would wait for ever."""
    try:
        batch.share_memory()
    except RuntimeError as error:
        raise UserError(
            f"data.num_workers: a decoding process cannot hand over its batch: {error}; give the job more shared "
            "memory (/dev/shm; docker run --shm-size), or lower data.num_workers and data.prefetch_batches"
        ) from error


def _as_it_is(batch: Any) -> Any:
    return batch
