"""Joining a Ray cluster when its head does not begin a process for us; the rest is in tests/test_launch_ray.py."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import ray

from data_pipeline import ray_connection
from data_pipeline.config import RayConfig
from data_pipeline.settings import UserError

DIED = "Initialization failure from server: Starting Ray client server failed."


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where somebody listens, who does not want a token."""
    monkeypatch.setattr(ray_connection, "_probe", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"ray://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("deaths", [0, 1, ray_connection.CLIENT_ATTEMPTS - 1, ray_connection.CLIENT_ATTEMPTS])
def test_a_client_whose_process_died_asks_for_another(
    address: str, deaths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray loses a fork of its head now and then, which cannot be had on purpose: `ray.init` raises what it raised."""
    asked: list[str] = []

    def init(*, address: str, **_: object) -> None:
        asked.append(address)
        if len(asked) <= deaths:
            raise ConnectionAbortedError(DIED)

    monkeypatch.setattr(ray, "init", init)
    if deaths < ray_connection.CLIENT_ATTEMPTS:
        with ray_connection.connected(RayConfig(address=address)) as joined:
            assert joined is ray
        assert asked == [address] * (deaths + 1)
    else:
        with pytest.raises(UserError, match=f"{address}: no Ray cluster can be reached there: {DIED}"):
            with ray_connection.connected(RayConfig(address=address)):
                raise AssertionError("joined")
        assert len(asked) == ray_connection.CLIENT_ATTEMPTS


def test_what_another_attempt_would_not_mend_is_said_at_once(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def init(*, address: str, **_: object) -> None:
        asked.append(address)
        raise RuntimeError("Version mismatch")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match="Version mismatch"):
        with ray_connection.connected(RayConfig(address=address)):
            raise AssertionError("joined")
    assert len(asked) == 1
