"""Small Flower apps without torch, written where a test wants them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

# The run's settings: the file that replies go to, how many nodes to wait for, and for how long.
SETTINGS: dict[str, object] = {"replies": "", "nodes": 0, "seconds": 60.0}
PROJECT = """
[project]
name = "{name}"
version = "1.0.0"
description = "An app of the tests."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "{name}.server:app"
clientapp = "{name}.client:app"

[tool.flwr.app.config]
{settings}
"""

# Asks each node once, and writes what came back as JSON to the file `replies`.
SERVER = """
import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


def answers(grid: Grid, questions: list[Message], end: float) -> list[Message]:
    open_ones, found = set(grid.push_messages(questions)), []
    while open_ones and time.time() < end:
        found += grid.pull_messages(open_ones)
        open_ones -= {reply.metadata.reply_to_message_id for reply in found}
        time.sleep(0.05)
    return found


@app.main()
def main(grid: Grid, context: Context) -> None:
    end = time.time() + context.run_config["seconds"]
    while len(nodes := sorted(grid.get_node_ids())) < context.run_config["nodes"] and time.time() < end:
        time.sleep(0.05)
    content = RecordDict({"config": ConfigRecord({"asked_at": time.time()})})
    replies = answers(grid, [Message(content, node, "query") for node in nodes], end)
    facts = [
        {"node": reply.metadata.src_node_id, **dict(reply.content["config"])}
        if reply.has_content()
        else {"node": reply.metadata.src_node_id, "code": reply.error.code, "reason": reply.error.reason}
        for reply in replies
    ]
    Path(context.run_config["replies"]).write_text(json.dumps({"nodes": nodes, "replies": facts}))
"""

# Replies with the node's configuration and how often this node was asked in this run.
CLIENT = """
import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    seen = context.state.config_records.setdefault("seen", ConfigRecord({"count": 0}))
    seen["count"] += 1
    facts = {"count": seen["count"], "called_at": time.time(), **context.node_config}
    return Message(RecordDict({"config": ConfigRecord(facts)}), reply_to=message)
"""


def write_app(
    folder: Path,
    name: str = "echo",
    server: str = SERVER,
    client: str = CLIENT,
    settings: Mapping[str, object] | None = None,
) -> Path:
    """Write a Flower app `name` of two modules into a folder, and return the folder.

    settings: the run's, and their defaults; a run may change those that are named here or in SETTINGS.
    """
    package = folder / name
    package.mkdir(parents=True)
    # The JSON of text, numbers and booleans is TOML as well.
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in (SETTINGS | dict(settings or {})).items())
    (folder / "pyproject.toml").write_text(PROJECT.format(name=name, settings=lines))
    for module, code in (("__init__", ""), ("server", server), ("client", client)):
        (package / f"{module}.py").write_text(code)
    return folder
