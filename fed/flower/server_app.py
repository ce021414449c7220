"""The ServerApp: plays a run whose clients train on the SuperNodes, with all that `python -m fed run` does and writes.

The run config of Flower's run names it: `config` is a preset or a TOML file on the machine of the SuperLink, `set` more
settings as `key=value`, separated by spaces, `out` the run's directory, `resume` whether to go on with the run there.
`python -m fed run … --flower ADDRESS` gives the settings themselves as `settings` instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()

OPTIONS = {
    "config": "digits",
    "set": "",
    "settings": "",
    "out": "",
    "overwrite": False,
    "centralised": True,
    "resume": False,
}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play the run that the run config names; raise FedError if it cannot be played, for Flower to show."""
    from fed import config as configuration
    from fed.errors import FedError
    from fed.flower.strategy import FederatedRun

    asked: dict[str, Any] = {**OPTIONS, **context.run_config}
    if not asked["out"]:
        raise FedError("out is empty: the path of a directory for the run would be right")
    if asked["settings"]:
        config = configuration.parse(json.loads(str(asked["settings"])), where="the run's settings")
    else:
        config = configuration.load(str(asked["config"]), str(asked["set"]).split())
    flags = {name: bool(asked[name]) for name in ("overwrite", "centralised", "resume")}
    FederatedRun(config, Path(str(asked["out"])), **flags).start(grid)
