"""The configuration's table `[engine]`: where the clients of a run train."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from fed.config.fields import CountOrNone, NotNegative, PathName, Table

_ADDRESS = re.compile(r"(https?://)?([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\]):([0-9]{1,5})")


class EngineConfig(Table):
    """Where clients train: in this process ("local"), or on machines that Flower connects ("flower").

    `address` is HOST:PORT of Flower's SuperLink, over TLS; `http://HOST:PORT` is without it. `root_certificates` is the
    PEM file of the authority that signed the SuperLink's certificate; without it, those that the system trusts.

    `mode` says what a SuperNode is. "simulation": a machine, which is sent many of the configured clients at a time.
    "deployment": one client, with its own data; its node config tells rank and rows. A run waits `wait` seconds for at
    least `nodes` of them. In a round a client has `deadline` seconds to answer, 0: as long as its node is connected.
    A client whose node is lost in a round is sent again `resends` times: to another node, or in a deployment to its
    own once that is back. A client that ends its machine each time must not end all of them.
    """

    name: Literal["local", "flower"] = "local"
    address: str = ""
    root_certificates: PathName | None = None
    mode: Literal["simulation", "deployment"] = "simulation"
    nodes: Annotated[int, Field(ge=1, le=10_000)] = 1
    wait: CountOrNone = 300
    deadline: NotNegative = 0.0
    resends: Annotated[int, Field(ge=0, le=1000)] = 1

    @field_validator("address")
    @classmethod
    def _is_address(cls, value: str) -> str:
        found = _ADDRESS.fullmatch(value)
        if value and (found is None or not 0 < int(found[3]) < 65536):
            raise ValueError(f"engine.address is {value!r}: HOST:PORT or http://HOST:PORT would be right")
        return value
