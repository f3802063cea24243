"""Hand tasks to Ray: one CPU each, tried again a bounded number of times, every result looked at."""

from __future__ import annotations

import os
import secrets
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from data_pipeline.config import RayConfig
from data_pipeline.plan import Task
from data_pipeline.settings import UserError

OBJECT_STORE_BYTES = 128 << 20  # results are small records; Ray would take a third of the memory
TOKEN, MODE, USAGE = "RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"


def run_on_ray(
    tasks: Sequence[Task],
    work: Callable[..., dict[str, Any]],
    arguments: dict[str, Any],
    config: RayConfig,
    on_done: Callable[[Task, dict[str, Any]], None],
) -> dict[str, str]:
    """Run `work(task, **arguments)` for every task; `on_done` gets each result as it comes.

    Returns: for each task that failed `max_attempts` times, its name and the last error. The others are unaffected.
    """
    failures: dict[str, str] = {}
    with _ray(config) as ray:
        remote = ray.remote(num_cpus=1, max_retries=0)(work)  # attempts are counted here, whatever the cause
        waiting = deque((task, 1) for task in tasks)
        running: dict[Any, tuple[Task, int]] = {}
        most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        while waiting or running:
            while waiting and len(running) < most:
                task, attempt = waiting.popleft()
                running[remote.remote(task, **arguments)] = (task, attempt)
            for reference in ray.wait(list(running), num_returns=1)[0]:
                task, attempt = running.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayError as error:
                    if attempt < config.max_attempts:
                        waiting.append((task, attempt + 1))
                    else:
                        failures[task.name] = f"{_first_words(error)} ({attempt} attempts)"
                else:
                    on_done(task, result)
    return failures


def _first_words(error: Exception) -> str:
    """The cause in one line: a task's own exception, or what Ray says of a dead worker."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


@contextmanager
def _ray(config: RayConfig) -> Iterator[Any]:
    """The `ray` module, connected. A cluster that is already there is left running; an own one is shut down."""
    import ray

    if ray.is_initialized():
        yield ray
        return
    environment = {name: os.environ.get(name) for name in (TOKEN, MODE, USAGE)}
    common = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        os.environ[USAGE] = "0"
        if config.address is None:
            # Without a token in the environment, Ray would write one into the home folder and then demand it there.
            os.environ.setdefault(TOKEN, secrets.token_hex(32))
            num_cpus = config.num_cpus or len(os.sched_getaffinity(0))
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **common,
            )
        else:
            try:
                _knock(config.address)
                ray.init(address=config.address, **common)
            except (OSError, RuntimeError, ValueError) as error:
                words = " ".join(str(error).split())[:200]
                raise UserError(
                    f"ray.address {config.address}: no Ray cluster can be reached there: {words}"
                ) from error
        yield ray
    finally:
        ray.shutdown()
        for name, value in environment.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _knock(address: str) -> None:
    """Raises OSError at once where nobody listens at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=10).close()
