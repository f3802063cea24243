"""Where the ranks of several nodes meet: the first node's name, a free port there, an interface that leads out."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping

from data_pipeline.settings import UserError
from launch.plan import Place
from pretrain.preflight import first_host, slurm_port, slurm_variable

NAME_TIMEOUT_S = 180.0  # a pod's name is published some time after it has started
SIOCGIFADDR = 0x8915  # linux/sockios.h


def place_of_this_node(
    num_nodes: int, ranks_per_node: int, node: int | None, master_host: str | None, master_port: int | None,
    interface: str | None, environment: Mapping[str, str],
) -> Place:  # fmt: skip
    """This node's place: what is given, else what a step of Slurm or an indexed Job of Kubernetes says.

    Raises:
        UserError: nobody says which node this is, or which is the first.
    """
    if node is None:
        index = slurm_variable("SLURM_NODEID") or environment.get("JOB_COMPLETION_INDEX")
        if index is None:
            raise UserError("launch node: which node is this? expected --node-rank, srun, or an indexed Job's pod")
        node = int(index)
    if master_host is None:
        nodelist = slurm_variable("SLURM_STEP_NODELIST")
        if nodelist is None:
            raise UserError("launch node: which node has rank 0? expected --master-host, or to be started by srun")
        master_host = first_host(nodelist)
    if master_port is None:
        master_port = slurm_port(environment.get("SLURM_JOB_ID") or "0")
    if not 0 <= node < num_nodes:
        raise UserError(f"launch node: --node-rank {node}: expected 0 to {num_nodes - 1} of {num_nodes} nodes")
    found = interface or (leading_interface() if num_nodes > 1 and own_name_is_loopback() else None)
    return Place(
        node=node, num_nodes=num_nodes, ranks_per_node=ranks_per_node, master_host=master_host,
        master_port=master_port, interface=found,
    )  # fmt: skip


def check_meeting_point(place: Place, timeout_s: float = NAME_TIMEOUT_S) -> None:
    """Wait until the first node's name resolves; on that node make sure that the port is free.

    Raises:
        UserError: the name is unknown after `timeout_s`, or somebody listens on the port.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.getaddrinfo(place.master_host, place.master_port)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(f"master host '{place.master_host}': cannot be resolved here: {error}") from error
            time.sleep(1.0)
    if place.node == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", place.master_port))
            except OSError as error:
                raise UserError(
                    f"port {place.master_port} of {socket.gethostname()} is taken ({error.strerror}); "
                    "expected a free one: --master-port"
                ) from error


def own_name_is_loopback() -> bool:
    """Whether this host's name leads to itself only (Debian's 127.0.1.1), where gloo would listen in vain."""
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    except OSError:
        return True
    return all(address.startswith("127.") for address in addresses)


def leading_interface() -> str | None:
    """The interface that packets to the outside leave by; None where there is none. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1 (RFC 5737): any address that is not here
            own = probe.getsockname()[0]
        except OSError:
            return None
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", os.fsencode(name)[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None


def describe(place: Place) -> str:
    """The place in one line for the log."""
    via = f", gloo over {place.interface}" if place.interface else ""
    first = place.node * place.ranks_per_node
    last = first + place.ranks_per_node - 1
    return (
        f"node {place.node} of {place.num_nodes} ({socket.gethostname()}): ranks {first} to {last}, "
        f"meeting at {place.master_host}:{place.master_port}{via}"
    )


def say(line: str) -> None:
    """A line of the launcher."""
    sys.stderr.write(f"{line}\n")  # at once: the launchers of other nodes may write into the same log
    sys.stderr.flush()
