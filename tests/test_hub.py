"""The hub is asked once, and what does not answer is not waited for."""

import socket
import threading
import time

import pytest
from huggingface_hub import constants

from train import hub


@pytest.fixture
def online(monkeypatch):
    """The hub's clients as they are where nothing was set, and a server in the hub's place."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    # what `settle` sets is taken back
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "SECONDS", 1)
    hub._silence.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server
    hub._silence.cache_clear()


def test_a_hub_that_answers_is_asked_once(online):
    asked = []

    def serve():
        connection, _ = online.accept()
        asked.append(connection.recv(1000))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        connection.close()

    threading.Thread(target=serve, daemon=True).start()
    for _ in range(2):
        hub.settle()
        assert not constants.HF_HUB_OFFLINE and hub.why_offline() == ""
    assert len(asked) == 1 and asked[0].startswith(b"HEAD ")


def test_a_hub_that_says_nothing(online):
    began = time.monotonic()
    hub.settle()
    hub.settle()  # not asked again
    assert time.monotonic() - began < 2
    assert constants.HF_HUB_OFFLINE
    assert hub.why_offline() in (
        f"{constants.ENDPOINT} does not answer (nothing in 1 s)",
        f"{constants.ENDPOINT} does not answer (ReadTimeout: timed out)",
    )


def test_a_hub_that_is_not_there(online):
    online.close()
    hub.settle()
    assert constants.HF_HUB_OFFLINE and "does not answer (ConnectError: " in hub.why_offline()


def test_what_the_user_has_said(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub._silence.cache_clear()
    hub.settle()
    assert hub.why_offline() == "HF_HUB_OFFLINE is set"
    assert hub._silence.cache_info().currsize == 0  # nobody was asked
