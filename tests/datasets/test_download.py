"""Downloads against a server on this machine that misbehaves in every way that servers do."""

import hashlib
import http.server
import threading
from contextlib import contextmanager

import pytest

from datasets.download import DownloadFailed, digest, download, md5_of, published_checksum

BODY = bytes(range(256)) * 4096  # 1 MiB


@contextmanager
def server(respond):
    """`respond(handler, number of requests before)`; yields (url of a file, headers of all requests)."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(dict(self.headers))
            respond(self, len(seen) - 1)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/set.zip", seen
        running.shutdown()


def send(handler, cut=None, ranges=True, body=BODY):
    """The body or the part asked for; `cut`: hang up after so many bytes."""
    start = int(handler.headers["Range"].split("=")[1].rstrip("-")) if ranges and handler.headers["Range"] else 0
    if start >= len(body):
        handler.send_response(416)
        handler.send_header("Content-Range", f"bytes */{len(body)}")
        handler.end_headers()
        return
    handler.send_response(206 if start else 200)
    handler.send_header("Content-Length", str(len(body) - start))
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    handler.end_headers()
    handler.wfile.write(body[start : None if cut is None else start + cut])


def fetch(url, target, **changes):
    return download(url, target, **{"wait": 0.001, **changes})


@pytest.mark.smoke
def test_a_cut_connection_is_resumed_where_it_broke(tmp_path):
    with server(lambda handler, number: send(handler, cut=300_000)) as (url, seen):
        target = fetch(url, tmp_path / "deep" / "set.zip", checksum=f"sha256:{hashlib.sha256(BODY).hexdigest()}")
    assert target.read_bytes() == BODY and not target.with_name("set.zip.part").exists()
    ranges = [headers.get("Range") for headers in seen]
    assert ranges == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_later_run_continues_what_an_earlier_one_left(tmp_path):
    (tmp_path / "set.zip.part").write_bytes(BODY[:1000])
    with server(lambda handler, number: send(handler)) as (url, seen):
        assert fetch(url, tmp_path / "set.zip").read_bytes() == BODY
    assert [headers.get("Range") for headers in seen] == ["bytes=1000-"]


def test_a_part_that_was_complete_is_recognised(tmp_path):
    (tmp_path / "set.zip.part").write_bytes(BODY)
    with server(lambda handler, number: send(handler)) as (url, seen):
        assert fetch(url, tmp_path / "set.zip").read_bytes() == BODY
    assert len(seen) == 1


def test_a_part_longer_than_the_file_is_thrown_away(tmp_path):
    (tmp_path / "set.zip.part").write_bytes(BODY + b"more")
    with server(lambda handler, number: send(handler)) as (url, _):
        assert fetch(url, tmp_path / "set.zip").read_bytes() == BODY


def test_a_server_without_ranges_sends_it_all_again(tmp_path):
    with server(lambda handler, number: send(handler, cut=None if number else 500, ranges=False)) as (url, _):
        assert fetch(url, tmp_path / "set.zip").read_bytes() == BODY


def test_a_wrong_checksum_is_refused_and_the_file_deleted(tmp_path):
    with server(lambda handler, number: send(handler)) as (url, _):
        with pytest.raises(DownloadFailed, match="sha256 is .*, not 1234; it was deleted"):
            fetch(url, tmp_path / "set.zip", checksum="sha256:1234")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_told_at_once(tmp_path):
    with server(lambda handler, number: handler.send_error(404)) as (url, seen):
        with pytest.raises(DownloadFailed, match="the server answers 404 Not Found") as caught:
            fetch(url, tmp_path / "set.zip")
    assert len(seen) == 1 and url in str(caught.value)


def test_a_busy_server_is_asked_again(tmp_path):
    with server(lambda handler, number: send(handler) if number > 1 else handler.send_error(503)) as (url, seen):
        assert fetch(url, tmp_path / "set.zip").read_bytes() == BODY
    assert len(seen) == 3


def test_no_progress_ends_after_the_retries_and_keeps_the_part(tmp_path):
    (tmp_path / "set.zip.part").write_bytes(BODY[:10])
    with server(lambda handler, number: handler.send_error(500)) as (url, seen):
        with pytest.raises(DownloadFailed, match="500 .* 4 times in a row\n.*10 bytes are kept"):
            fetch(url, tmp_path / "set.zip", retries=3)
    assert len(seen) == 4 and (tmp_path / "set.zip.part").read_bytes() == BODY[:10]


def test_a_server_that_restarts_and_breaks_each_time_is_given_up(tmp_path):
    def respond(handler, number):
        send(handler, cut=1000 + 500 * (number % 2), ranges=False)

    with server(respond) as (url, _):
        with pytest.raises(DownloadFailed, match="ended early"):
            fetch(url, tmp_path / "set.zip", retries=2)


def test_nobody_listening_is_told_after_the_retries(tmp_path):
    with server(lambda handler, number: None) as (url, _):
        pass
    with pytest.raises(DownloadFailed, match="refused"):
        fetch(url, tmp_path / "set.zip", retries=1)


def test_an_existing_file_is_checked_and_kept(tmp_path):
    (tmp_path / "set.zip").write_bytes(BODY)
    checksum = f"md5:{hashlib.md5(BODY).hexdigest()}"
    assert fetch("http://127.0.0.1:1/never", tmp_path / "set.zip", checksum=checksum) == tmp_path / "set.zip"
    assert digest(tmp_path / "set.zip") == hashlib.sha256(BODY).hexdigest()


def test_checksums_of_an_archive_item_are_read_from_its_listing():
    listing = b'<files><file name="a.zip"><md5>aa</md5></file><file name="b.zip"><md5>bb</md5></file></files>'
    assert md5_of(listing, "b.zip") == "md5:bb" and md5_of(listing, "c.zip") is None
    assert published_checksum("http://127.0.0.1:1/a.zip") is None
