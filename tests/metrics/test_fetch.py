import hashlib
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from metrics import fetch

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def asked(monkeypatch):
    """A server of this machine in place of the publishers'; the list of what was asked of it."""
    paths = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setitem(fetch.WEIGHTS, "inception", fetch.Weights(f"{url}/inception.pt", "unused", DIGEST))
    yield paths
    server.shutdown()
    thread.join()
    server.server_close()


def test_weights_are_fetched_once(tmp_path, asked):
    path = tmp_path / "deep" / "weights.pt"
    for _ in range(2):
        assert fetch.fetch("inception", str(path)) == path and path.read_bytes() == CONTENT
    assert len(asked) == 1


def test_a_wrong_file_in_the_weights_place_is_refused_and_left_alone(tmp_path, asked):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="another file: its sha256"):
        fetch.fetch("inception", str(path))
    assert not asked and path.read_bytes() == b"something else"


def test_a_file_that_is_not_the_promised_one_is_an_error_of_the_command(tmp_path, asked, monkeypatch):
    monkeypatch.setitem(fetch.WEIGHTS, "inception", fetch.WEIGHTS["inception"]._replace(sha256="0" * 64))
    monkeypatch.setattr(sys, "argv", ["fetch", "inception", "--path", str(tmp_path / "w")])
    with pytest.raises(SystemExit, match="sha256"):
        fetch.main()
    assert not (tmp_path / "w").exists()


def test_the_command_line_fetches_to_a_path_and_knows_its_names(tmp_path, asked, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fetch", "inception", "--path", str(tmp_path / "w")])
    fetch.main()
    assert str(tmp_path / "w") in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["fetch", "vgg"])
    with pytest.raises(SystemExit):
        fetch.main()
    assert "inception" in capsys.readouterr().err
