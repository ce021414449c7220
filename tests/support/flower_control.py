"""What a test asks a SuperLink: its nodes, its runs, what they wrote."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor


@dataclass(frozen=True)
class RunEnd:
    """How a run ended: `completed`, `failed` or `stopped`, why, and what its ServerApp wrote.

    `moments`: when it was submitted, when its ServerApp was started and when it ended, in seconds since 1970.
    """

    run_id: int
    result: str
    details: str
    log: str
    moments: tuple[float, float, float]


class Control:
    """A client of a SuperLink's Control API; a call opens a connection of its own, so that a SuperLink may restart."""

    def __init__(self, address: str, authority: Path | None) -> None:
        self._address, self._authority = address, authority

    def _call(self, work: Callable[[ControlHttpClient], Any]) -> Any:
        client = ControlHttpClient.from_server_address(
            server_address=self._address,
            insecure=self._authority is None,
            root_certificates=self._authority.read_bytes() if self._authority else None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        try:
            return work(client)
        finally:
            client.close()

    def answers(self) -> bool:
        """Return whether the SuperLink answers already."""
        try:
            self.nodes()
        except httpx.TransportError:
            return False
        return True

    def nodes(self) -> dict[int, str]:
        """Return the status of every node by its id: `registered`, `online`, `offline` or `unregistered`."""
        found = self._call(lambda client: client.ListNodes(ListNodesRequest()))
        return {node.node_id: node.status for node in found.nodes_info}

    def register(self, public_key: bytes) -> int:
        """Register the key (PEM) of a node and return the node's id."""
        return int(self._call(lambda client: client.RegisterNode(RegisterNodeRequest(public_key=public_key))).node_id)

    def unregister(self, node_id: int) -> None:
        """Remove a node and its key."""
        self._call(lambda client: client.UnregisterNode(UnregisterNodeRequest(node_id=node_id)))

    def run(self, run_id: int) -> Any:
        """Return Flower's message about a run."""
        return self._call(lambda client: client.ListRuns(ListRunsRequest(run_id=run_id))).run_dict[run_id]

    def finished(self, run_id: int) -> bool:
        return bool(self.run(run_id).status.status == "finished")

    def log(self, run_id: int) -> str:
        """Return what a run's ServerApp wrote; the run must have ended."""
        request = StreamLogsRequest(run_id=run_id, after_timestamp=0.0)
        return "".join(self._call(lambda client: [part.log_output for part in client.StreamLogs(request)]))

    def end(self, run_id: int) -> RunEnd:
        """Return how a run ended."""
        from datetime import datetime

        run = self.run(run_id)
        moments = (run.pending_at, run.running_at or run.finished_at, run.finished_at)
        begin, running, finished = (datetime.fromisoformat(moment).timestamp() for moment in moments)
        return RunEnd(run_id, run.status.sub_status, run.status.details, self.log(run_id), (begin, running, finished))


def until(condition: Callable[[], bool], seconds: float, interval: float = 0.05) -> bool:
    """Wait until a condition holds, and return whether it does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return condition()
        time.sleep(interval)
    return True
