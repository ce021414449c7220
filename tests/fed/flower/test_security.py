"""Who a SuperLink lets in, and what somebody sees whom it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.flower_app import write_app
from tests.support.flower_control import Control
from tests.support.flower_keys import make_certificates, make_key, public_pem
from tests.support.flower_network import WAIT_SECONDS, FlowerNetwork, SuperNode, free_port
from tests.support.path_proxy import PathProxy

pytestmark = pytest.mark.slow

REFUSED = 1  # the exit status of a SuperNode that is not let in


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerNetwork]:
    """A network whose SuperLink has a certificate, with one SuperNode."""
    with FlowerNetwork(tmp_path_factory.mktemp("encrypted"), [{"city": "Lund"}], tls=True) as network:
        yield network


@pytest.fixture(scope="module")
def authenticated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerNetwork]:
    """A network whose SuperLink asks SuperNodes for registered keys; none is there yet."""
    with FlowerNetwork(tmp_path_factory.mktemp("authenticated"), authentication=True) as network:
        yield network


def refusal(node: SuperNode) -> str:
    """Return what a SuperNode wrote that must have ended because it was refused."""
    assert node.running.wait(WAIT_SECONDS) == REFUSED, node.running.tail()
    return node.running.text()


def ask_all(network: FlowerNetwork, tmp_path: Path, nodes: int) -> dict[int, dict[str, object]]:
    """Run an app that asks every node once, and return the replies by the nodes' ids."""
    replies = tmp_path / "replies.json"
    end = network.submit(write_app(tmp_path / "app"), {"replies": str(replies), "nodes": nodes})
    assert end.result == "completed", f"{end.details}\n{end.log}\n{network.tails()}"
    return {reply.pop("node"): reply for reply in json.loads(replies.read_text())["replies"]}


def test_a_run_goes_through_tls(encrypted: FlowerNetwork, tmp_path: Path) -> None:
    replies = ask_all(encrypted, tmp_path, nodes=1)
    assert list(replies) == [encrypted.node_id(encrypted.nodes[0])]
    assert [reply["city"] for reply in replies.values()] == ["Lund"]


@pytest.mark.parametrize("trusts", ["another authority", "the system's authorities"])
def test_a_node_that_does_not_know_the_authority_refuses_the_superlink(
    encrypted: FlowerNetwork, tmp_path: Path, trusts: str
) -> None:
    other = ["--root-certificates", str(make_certificates(tmp_path).authority)] if trusts == "another authority" else []
    before = encrypted.control.nodes()
    assert "certificate verify failed: unable to get local issuer" in refusal(encrypted.add_node(trust=other))
    assert encrypted.control.nodes() == before


def test_a_node_without_tls_never_gets_in(encrypted: FlowerNetwork) -> None:
    before = encrypted.control.nodes()
    node = encrypted.add_node(trust=["--insecure", "--max-retries", "1"])
    text = refusal(node)
    assert "Connection attempt failed, retrying" in text
    assert "Failed to initialize the connection to the SuperLink" in text
    assert encrypted.control.nodes() == before


@pytest.mark.parametrize("trust", ["insecure = true", ""], ids=["without TLS", "without the authority"])
def test_a_command_that_does_not_trust_the_superlink_sees_nothing(encrypted: FlowerNetwork, trust: str) -> None:
    assert "online" in encrypted.flwr("supernode", "list", "network").out
    outcome = encrypted.flwr("supernode", "list", "network", trust=trust)
    assert outcome.status == 1
    assert "Connection to the SuperLink is unavailable" in outcome.err
    assert "online" not in outcome.out


def test_a_registered_key_gets_in(authenticated: FlowerNetwork, tmp_path: Path) -> None:
    key = make_key(tmp_path / "keys", "node")
    node_id = authenticated.register(key)
    node = authenticated.add_node({"city": "Umeå"}, key=key)
    authenticated.wait_online([node])
    assert authenticated.node_id(node) == node_id
    assert ask_all(authenticated, tmp_path, nodes=1)[node_id]["city"] == "Umeå"
    authenticated.stop(node)


def test_a_key_that_is_removed_is_refused_from_then_on(authenticated: FlowerNetwork, tmp_path: Path) -> None:
    key = make_key(tmp_path / "keys", "node")
    node_id = authenticated.register(key)
    node = authenticated.add_node(key=key)
    authenticated.wait_online([node])
    authenticated.control.unregister(node_id)
    # The connected node learns it when it next asks for work, and ends as if it had been asked to.
    assert node.running.wait(WAIT_SECONDS) == 0, node.running.tail()
    authenticated.start_node(node)
    assert "[code: 2004] Failed to activate SuperNode" in refusal(node)
    assert authenticated.control.nodes()[node_id] == "unregistered"


def test_an_unknown_key_is_refused(authenticated: FlowerNetwork, tmp_path: Path) -> None:
    node = authenticated.add_node(key=make_key(tmp_path, "unknown"))
    assert "[code: 2004] Failed to activate SuperNode" in refusal(node)


def test_a_node_without_a_key_is_refused_where_keys_are_asked_for(authenticated: FlowerNetwork) -> None:
    assert "SuperNode authentication is enabled" in refusal(authenticated.add_node())


def test_a_key_is_in_use_by_one_process_at_a_time(authenticated: FlowerNetwork, tmp_path: Path) -> None:
    key = make_key(tmp_path, "twice")
    authenticated.register(key)
    first = authenticated.add_node(key=key)
    authenticated.wait_online([first])
    assert "[code: 2004] Failed to activate SuperNode" in refusal(authenticated.add_node(key=key))
    assert first.running.status is None
    authenticated.stop(first)


def test_a_key_that_was_removed_cannot_be_registered_again(authenticated: FlowerNetwork, tmp_path: Path) -> None:
    key = make_key(tmp_path, "removed")
    authenticated.control.unregister(authenticated.register(key))
    with pytest.raises(Exception, match="412 Precondition Failed") as refused:
        authenticated.register(key)
    assert "Public key already in use" in refused.value.response.text


def test_a_node_needs_no_other_path_than_that_of_the_fleet(authenticated: FlowerNetwork, tmp_path: Path) -> None:
    """The proxy of the guide lets nodes work, and nobody register keys or start runs through it."""
    assert authenticated.certificates is not None
    key = make_key(tmp_path / "keys", "behind")
    node_id, port = authenticated.register(key), free_port()
    with PathProxy(port, authenticated.address, authenticated.certificates, "/v1/fleet/") as proxy:
        node = authenticated.add_node(key=key, superlink=f"127.0.0.1:{port}")
        authenticated.wait_online([node])
        assert node_id in ask_all(authenticated, tmp_path, nodes=1)
        assert proxy.refused == set()
        assert {"/v1/fleet/pull-messages", "/v1/fleet/push-messages", "/v1/fleet/get-fab"} <= proxy.passed

        behind = Control(f"127.0.0.1:{port}", authenticated.certificates.authority)
        with pytest.raises(httpx.HTTPStatusError, match="403 Forbidden"):
            behind.register(public_pem(make_key(tmp_path / "keys", "stranger")))
        assert proxy.refused == {"/v1/control/register-node"}
        authenticated.stop(node)
