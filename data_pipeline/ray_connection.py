"""A connection to Ray: one of our own on this machine, or a running cluster, whose token is checked first."""

from __future__ import annotations

import os
import secrets
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.config import RayConfig
from data_pipeline.settings import UserError

OBJECT_STORE_BYTES = 128 << 20  # results are small records; Ray would take a third of the memory
TOKEN, TOKEN_PATH, MODE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"
USAGE = "RAY_USAGE_STATS_ENABLED"
CLIENT = "ray://"
# Any call that a head with token authentication answers only to those who have it, and any head answers at once.
PROBE, CLIENT_PROBE = "/ray.rpc.NodeInfoGcsService/CheckAlive", "/ray.rpc.RayletDriver/ClusterInfo"
PROBE_TIMEOUT_S = 10.0
CLIENT_ATTEMPTS = 4


@contextmanager
def connected(config: RayConfig) -> Iterator[Any]:
    """The `ray` module, connected. A cluster that is already there is left running; an own one is shut down.

    Raises:
        UserError: Ray is not installed, nobody can be reached at `config.address`, or the token is not right.
    """
    environment = {name: os.environ.get(name) for name in (TOKEN, MODE, USAGE)}
    if os.environ.get(TOKEN) or os.environ.get(TOKEN_PATH):
        os.environ.setdefault(MODE, "token")  # Ray reads it when it is imported
    os.environ[USAGE] = "0"
    ray = _import_ray()
    if ray.is_initialized():
        yield ray
        return
    common = {"logging_level": "ERROR", "log_to_driver": False}
    try:
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
            _join(ray, config.address, common)
        yield ray
    finally:
        ray.shutdown()
        for name, value in environment.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("Ray is not installed here; expected: pip install 'parallelotope[train]'") from error
    return ray


def _join(ray: Any, address: str, common: dict[str, Any]) -> None:
    """Connect to a running cluster."""
    try:
        found = _bootstrap_address(address)
        if found is not None:
            _knock(address, found)
        for attempt in range(1, CLIENT_ATTEMPTS + 1):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # ray:// warns of what it then raises
                    ray.init(address=address, **common)
                return
            except ConnectionAbortedError:
                # The head of ray:// forks a process for every client from one with gRPC's threads, and now and then
                # that process dies before its first line (ray-project/ray issue 63202; 5 of 64 clients of Ray 2.60).
                if attempt == CLIENT_ATTEMPTS:
                    raise
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(f"ray.address {address}: no Ray cluster can be reached there: {words}") from error


def _bootstrap_address(address: str) -> str | None:
    """HOST:PORT of the head behind `address`; None where Ray alone knows how to find it."""
    if address.startswith(CLIENT):
        return address.removeprefix(CLIENT)
    if "://" in address:
        return None
    from ray._private.services import canonicalize_bootstrap_address  # there is no public way to resolve "auto"

    found = canonicalize_bootstrap_address(address)
    return None if found is None else str(found)


def _knock(address: str, found: str) -> None:
    """Find out at once what Ray itself would try for half a minute: nobody listens at `found`, or wants a token.

    Raises:
        OSError: nobody listens.
        UserError: somebody else listens, or the token is missing or wrong.
    """
    host, _, port = found.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S).close()
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    import grpc  # type: ignore[import-untyped]  # comes with ray[default]

    path = CLIENT_PROBE if address.startswith(CLIENT) else PROBE
    code = _probe(found, path, None)
    if code is grpc.StatusCode.UNAVAILABLE:
        raise UserError(
            f"ray.address {address}: what listens there is no head of a Ray cluster; expected its port of "
            "'ray start --head --port' (6379 by default)"
        )
    if code is not grpc.StatusCode.UNAUTHENTICATED:
        return
    token, source = _token()
    if token is None:
        raise UserError(
            f"ray.address {address}: the cluster wants a token, and there is none{source}; expected {TOKEN_PATH} in "
            "the environment, the path of a file that holds it"
        )
    if _probe(found, path, token) is grpc.StatusCode.UNAUTHENTICATED:
        raise UserError(f"ray.address {address}: the cluster refuses the token{source}; expected the one of its head")
    if os.environ.get(MODE, "token") != "token":
        raise UserError(f"ray.address {address}: the cluster wants a token; expected {MODE}=token in the environment")


def _probe(found: str, path: str, token: str | None) -> Any:
    """The status code of a call at `found`; None: it was answered."""
    import grpc

    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(found) as channel:
        try:
            channel.unary_unary(path)(b"", metadata=metadata, timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError as error:
            return error.code()
    return None


def _token() -> tuple[str | None, str]:
    """The token where Ray looks for it, and a clause that says where that is."""
    if os.environ.get(TOKEN):
        return os.environ[TOKEN].strip(), f" in {TOKEN}"
    path = Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text(encoding="utf-8").strip() or None, f" in {path}"
    except OSError as error:
        return None, f" in {path} ({error.strerror})"
