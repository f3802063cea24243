"""Sharding as a Ray job: `parallelotope shard` runs on the cluster's head and hands its tasks to the workers.

The cluster needs parallelotope installed on every node, and the manifest, its media and out_dir at the same paths;
nothing is uploaded but the config. The token of a cluster that wants one is read by Ray from the environment.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_pipeline.config import ShardConfig
from data_pipeline.settings import UserError
from launch.delivery import VARIABLE, check_size, with_config

TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
OVERRULING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray prefers them to the address it is given
KNOCK_TIMEOUT_S, POLL_S = 10.0, 1.0


def job_request(config: ShardConfig) -> dict[str, Any]:
    """What is submitted: the command and, in its environment, the config, against the cluster it runs on."""
    values = config.model_dump(mode="json")
    values["manifest"], values["out_dir"] = _absolute(config.manifest), _absolute(config.out_dir)
    values["ray"]["address"] = "auto"
    # Ray would expand $NAME in a variable's value; JSON can write the sign in another way.
    text = check_size(json.dumps(values, ensure_ascii=False)).replace("$", "\\u0024")
    return {
        "entrypoint": shlex.join(with_config(("parallelotope", "shard"))),
        "runtime_env": {"env_vars": {VARIABLE: text, "PYTHONUNBUFFERED": "1"}},
    }


def _absolute(path: str) -> str:
    return path if "://" in path or "::" in path else os.path.abspath(path)


@contextmanager
def job_client(address: str) -> Iterator[Any]:
    """A client of the cluster whose dashboard is at `address`, http://HOST:8265.

    Raises:
        UserError: not such an address, nobody there, a token missing or wrong, or Ray not installed here.
    """
    _knock(address)
    has_token = _has_token()
    if has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported
    for name in OVERRULING:
        os.environ.pop(name, None)
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise UserError("launch ray: no Ray here; expected: pip install 'parallelotope[train]'") from error
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        yield JobSubmissionClient(address)
    except AuthenticationError as error:
        found = "refuses the token it is given" if has_token else "wants a token"
        raise UserError(
            f"--address {address}: the cluster {found}; expected {TOKEN_PATH} in the environment, the path of a "
            "file that holds the token of its head"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--address {address}: {' '.join(str(error).split())[:300]}") from error


def _has_token() -> bool:
    """Whether Ray will find a token. Raises UserError where the environment names a file that cannot be read."""
    if os.environ.get(TOKEN):
        return True
    path = os.environ.get(TOKEN_PATH)
    if not path:
        return (Path.home() / ".ray" / "auth_token").is_file()
    try:
        with open(path, encoding="utf-8"):
            return True
    except OSError as error:
        raise UserError(f"{TOKEN_PATH} {path}: cannot be read: {error.strerror}") from error


def _knock(address: str) -> None:
    """Raises UserError at once where nobody listens; Ray itself would wait for minutes."""
    parts = urlsplit(address)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError
    except ValueError:
        raise UserError(f"--address {address}: expected the address of a Ray dashboard, as http://HOST:8265") from None
    try:
        socket.create_connection((parts.hostname, port), timeout=KNOCK_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(f"--address {address}: nobody answers there: {error}") from error


def follow(client: Any, job_id: str) -> None:
    """Print the job's log as it grows, until the job ends."""
    asyncio.run(_follow(client, job_id))


async def _follow(client: Any, job_id: str) -> None:
    async for text in client.tail_job_logs(job_id):
        print(text, end="", flush=True)


def exit_code(client: Any, job_id: str) -> tuple[int, str]:
    """The code of a job that has ended, or is about to, and how it ended in words."""
    while not (info := client.get_job_info(job_id)).status.is_terminal():
        time.sleep(POLL_S)
    if info.status == "SUCCEEDED":
        return 0, "finished"
    if info.driver_exit_code:
        return info.driver_exit_code, f"{info.status.value.lower()} with code {info.driver_exit_code}; see above"
    return 1, f"{info.status.value.lower()}: {' '.join((info.message or '').split())[:200]}"
