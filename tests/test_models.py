"""A model by its name: the hub is asked once, and an error says what to do."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from hf_quest import models, tiny


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine that answers every request with `hub.answer`, a status and headers, or hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            if "such-model" in self.path:
                server.paths.append(self.path)
            if server.answer is None:
                self.connection.close()
                return
            status, headers = server.answer
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.paths, server.answer = [], None
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, r"it was not fetched before, and the hub does not answer \(.+\)\.$"),
        ((404, {"X-Error-Code": "RepoNotFound"}), r"the hub has no such model, or not for everybody\.$"),
        ((403, {"X-Error-Code": "GatedRepo"}), r"its owner asks for consent, at https://huggingface.co/no/such-model"),
        ((503, {}), r"it was not fetched before, and the hub does not answer \(.+503.+\)\.$"),
    ],
    ids=["hangs up", "no such model", "gated", "busy"],
)
def test_a_name_is_looked_up_once(hub, answer, message):
    hub.answer = answer
    with pytest.raises(ValueError, match=r"^no/such-model cannot be loaded: .*" + message):
        models.load("no/such-model", "cpu")
    assert hub.paths == ["/no/such-model/resolve/main/config.json"]


def test_a_folder_asks_nobody(hub):
    model, tokenizer = models.load(tiny.PATH, "cpu")
    assert model.config._attn_implementation == "quest"
    assert tokenizer("a").input_ids
    assert hub.paths == []


@pytest.mark.parametrize("name", ["/nowhere/at/all", "a b", ""])
def test_what_is_no_name_is_said_so(name):
    with pytest.raises(ValueError, match="there is no such folder, and it is no name of the hub"):
        models.load(name, "cpu")


def test_offline_is_said_so():
    with pytest.raises(ValueError, match="it was not fetched before, and HF_HUB_OFFLINE is set"):
        models.load("no/such-model", "cpu")
