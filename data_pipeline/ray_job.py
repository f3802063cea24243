"""Hand tasks to Ray: one CPU each, tried again a bounded number of times, every result looked at."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from data_pipeline.config import RayConfig
from data_pipeline.plan import Task
from data_pipeline.ray_connection import connected


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
    with connected(config) as ray:
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
    if isinstance(cause, ModuleNotFoundError):
        return f"{cause}: a worker's machine lacks it; expected the same parallelotope on every node of the cluster"
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
