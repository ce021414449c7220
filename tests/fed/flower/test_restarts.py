"""What Flower keeps when its processes are killed and started again, on which resuming a run over it rests."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.support.flower_app import write_app
from tests.support.flower_control import until
from tests.support.flower_keys import make_key
from tests.support.flower_network import WAIT_SECONDS, FlowerNetwork

pytestmark = pytest.mark.slow

# Asks the first node again and again, and writes after each reply how often it was asked in this run.
ASKS = """
import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    counts, path = [], Path(context.run_config["replies"])
    end = time.time() + context.run_config["seconds"]
    while len(counts) < context.run_config["times"] and time.time() < end:
        for node in grid.get_node_ids():
            open_ones = set(grid.push_messages([Message(RecordDict(), node, "query")]))
            while open_ones:
                for reply in grid.pull_messages(open_ones):
                    open_ones.clear()
                    if reply.has_content():
                        counts.append(reply.content["config"]["count"])
                        path.write_text(json.dumps(counts))
                time.sleep(0.05)
        time.sleep(0.05)
"""


def asked(path: Path) -> list[int]:
    """Return the replies so far."""
    return json.loads(path.read_text() or "[]") if path.exists() else []


def app_of(folder: Path, times: int) -> tuple[Path, Path]:
    """Write the app above, and return it and the file of its replies."""
    replies = folder / "replies.json"
    return write_app(folder / "app", server=ASKS, settings={"replies": str(replies), "times": times}), replies


def test_a_superlink_with_a_database_finds_its_nodes_again_but_not_the_run(tmp_path: Path) -> None:
    with FlowerNetwork(tmp_path / "network", [{}], database=True) as network:
        (node,), app = network.nodes, write_app(tmp_path / "app", settings={"replies": str(tmp_path / "replies.json")})
        before = network.node_id(node)
        waiting, replies = app_of(tmp_path / "waiting", times=1000)
        run = network.start_run(waiting)
        assert until(lambda: bool(asked(replies)), 60), network.tails()
        network.kill(network.link)
        network.start_superlink()
        network.wait_online([node])
        assert network.node_id(node) == before
        # The ServerApp died with the SuperLink; Flower sees that from the heartbeats that stay away.
        end = network.wait_for_run(run, seconds=120)
        assert end.result == "failed"
        assert network.submit(app, {"nodes": 1}).result == "completed"
        assert [reply["node"] for reply in json.loads((tmp_path / "replies.json").read_text())["replies"]] == [before]


def test_nodes_end_when_a_superlink_comes_back_without_its_database(tmp_path: Path) -> None:
    with FlowerNetwork(tmp_path, [{}]) as network:
        (node,) = network.nodes
        network.kill(network.link)
        network.start_superlink()
        assert node.running.wait(WAIT_SECONDS) == 0, node.running.tail()
        network.start_node(node)
        network.wait_online([node])


def test_a_node_s_key_keeps_its_number_and_its_process_what_a_run_left_with_it(tmp_path: Path) -> None:
    app, replies = app_of(tmp_path, times=4)
    with FlowerNetwork(tmp_path / "network", authentication=True) as network:
        key = make_key(tmp_path / "keys", "node")
        number, node = network.register(key), network.add_node(key=key)
        network.wait_online([node])
        run = network.start_run(app)
        assert until(lambda: len(asked(replies)) >= 2, 90), network.tails()
        network.stop(node)
        before = asked(replies)
        assert before == list(range(1, len(before) + 1))
        network.start_node(node)
        network.wait_online([node])
        assert network.node_id(node) == number
        assert network.wait_for_run(run).result == "completed"
        # What a ClientApp keeps in `context.state` is in its SuperNode's memory.
        assert asked(replies)[len(before)] == 1


def test_a_node_without_a_key_is_another_one_after_a_restart(tmp_path: Path) -> None:
    with FlowerNetwork(tmp_path, [{}]) as network:
        (node,) = network.nodes
        before = network.node_id(node)
        network.stop(node)
        network.start_node(node)
        network.wait_online([node])
        assert network.node_id(node) != before
        assert network.control.nodes()[before] == "unregistered"


def test_a_key_counts_as_in_use_for_a_while_after_its_node_was_killed(tmp_path: Path) -> None:
    with FlowerNetwork(tmp_path / "network", authentication=True) as network:
        key = make_key(tmp_path / "keys", "node")
        number, node = network.register(key), network.add_node(key=key)
        network.wait_online([node])
        network.kill(node.running)
        network.start_node(node)
        assert node.running.wait(WAIT_SECONDS) == 1
        assert "[code: 2004] Failed to activate SuperNode" in node.running.text()
        assert until(lambda: network.control.nodes()[number] == "offline", 90)
        network.start_node(node)
        network.wait_online([node])
        node.running.send(signal.SIGTERM)
        assert node.running.wait(WAIT_SECONDS) == 0
