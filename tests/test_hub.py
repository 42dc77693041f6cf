"""The hub is asked once, and what does not answer is not waited for; uploads go to a stand-in of it."""

import shlex
import socket
import subprocess
import sys
import threading
import time

import pytest
from huggingface_hub import constants

from tests.hub_server import Hub, Repository
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


# Uploads.

HERE = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def server(monkeypatch):
    """A stand-in of the hub in its place, with a token for it."""
    with Hub() as stand_in:
        for name, value in HERE.items():
            monkeypatch.setenv(name, value)
            if hasattr(constants, name):
                monkeypatch.setattr(constants, name, value == "1")
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.address)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", stand_in.address)
        monkeypatch.setenv("HF_ENDPOINT", stand_in.address)
        monkeypatch.setenv("HF_TOKEN", stand_in.token)
        hub._silence.cache_clear()
        yield stand_in
    hub._silence.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """A model directory, as far as an upload looks at it."""
    path = tmp_path / "model"
    (path / "adapter").mkdir(parents=True)
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# It\n")
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    (path / "adapter/adapter_config.json").write_text("{}")
    return path


def test_a_folder_arrives_whole_and_private(server, folder):
    assert hub.check_upload("org/it", public=False) == ""
    assert server.repositories == {}  # looking leaves nothing behind
    assert hub.upload(folder, "org/it", public=False) == f"{server.address}/org/it"
    there = server.repositories["org/it"]
    assert there.private
    assert there.files == {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    hub.upload(folder, "me/open", public=True)
    assert not server.repositories["me/open"].private
    # once more, to what is there
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.upload(folder, "org/it", public=False)
    assert there.files["README.md"] == b"---\nlicense: mit\n---\n"


def test_what_stands_against_an_upload_is_said_at_the_start(server, monkeypatch, tmp_path):
    def refusal(name, public=False):
        with pytest.raises(ValueError) as error:
            hub.check_upload(name, public)
        return str(error.value)

    assert refusal("it").endswith("write ORG/NAME, where ORG may be your own name on the hub")
    assert (
        refusal("me/a..b") == "--push_to_hub me/a..b: Cannot have -- or .. in repo_id: 'me/a..b'."
    )
    assert "must be in the form" in refusal("a/b/c") and "alphanumeric" in refusal("me/a b")
    assert server.requests == []  # nobody was asked
    assert refusal("you/it") == (
        "--push_to_hub you/it: the token is for me and org; set HF_TOKEN to one for you"
    )
    server.repositories["me/open"] = Repository(private=False)
    assert refusal("me/open") == (
        "--push_to_hub me/open: everybody sees that repository; --hub_public agrees"
    )
    assert hub.check_upload("me/open", public=True) == ""
    server.repositories["me/it"] = Repository(private=True)
    assert hub.check_upload("me/it", public=False) == hub.check_upload("ME/it", public=True) == ""
    server.role = "read"
    assert "the token may read only; set HF_TOKEN" in refusal("me/it")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    said = refusal("me/it")
    assert "the hub does not take the token (" in said and "\n" not in said
    assert "hf_expired" not in said
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert refusal("me/it").endswith("`hf auth login`, or set HF_TOKEN to one that may write")


def test_a_hub_that_fails_is_no_refusal(server, monkeypatch):
    server.refuses = "/whoami-v2"
    assert "507" in hub.check_upload("me/it", public=False)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    hub._silence.cache_clear()
    said = hub.check_upload("me/it", public=False)
    assert said.startswith(f"http://127.0.0.1:{port} does not answer (ConnectError: ")


def test_a_hub_that_answers_at_the_end_is_enough(server, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as `settle` had it at the start
    hub.upload(folder, "me/it", public=False)
    assert "README.md" in server.repositories["me/it"].files


def test_offline_by_choice_is_a_refusal(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="HF_HUB_OFFLINE is set; unset it, or leave --push_to_hub out"
    ):
        hub.check_upload("me/it", public=False)


def test_nothing_private_goes_where_everybody_sees(server, folder):
    server.repositories["me/open"] = Repository(private=False)  # made while the run trained
    with pytest.raises(ValueError, match="everybody sees"):
        hub.upload(folder, "me/open", public=False)
    assert server.repositories["me/open"].files == {}


def test_an_upload_that_fails_raises(server, folder):
    server.refuses = "/commit/main"
    with pytest.raises(Exception, match="507"):
        hub.upload(folder, "me/it", public=False)


@pytest.mark.slow
@pytest.mark.parametrize("public", [False, True])
def test_the_command_for_later_does_the_same(server, folder, public):
    command = shlex.split(hub.upload_command(folder, "org/it", public))
    assert command[0] == "hf"
    tool = f"{sys.executable.rpartition('/')[0]}/hf"
    done = subprocess.run([tool, *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = server.repositories["org/it"]
    assert there.private is not public
    assert set(there.files) == {"README.md", "model.safetensors", "adapter/adapter_config.json"}
