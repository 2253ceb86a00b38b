"""Fetching a file over HTTP so that nothing is lost when the line is: resumed, retried, checked, then named."""

import hashlib
import http.client
import socket
import time
import urllib.error
import urllib.request
import xml.etree.ElementTree
from pathlib import Path

from tqdm import tqdm

BLOCK = 1 << 18


class DownloadFailed(RuntimeError):
    """The file could not be fetched, or is not the one that was promised. The text says what was tried."""


def download(
    url: str, target: Path, *, checksum: str | None = None, retries: int = 5, wait: float = 2.0, timeout: float = 30.0
) -> Path:
    """Fetch `url` into `target` by way of `target`.part, which a later call continues.

    Args:
        checksum: "sha256:…" or "md5:…" in hexadecimal, or None.
        retries: attempts that may fail in a row without one new byte.
        wait: seconds before the second attempt; doubled each time.
    An existing target is checked and kept. Raises: DownloadFailed.
    """
    if target.exists():
        _check(target, checksum, url)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    failures, most = 0, _size(part)
    while True:
        try:
            if _fetch(url, part, timeout):
                break
            problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise DownloadFailed(f"{url}\n  the server answers {error.code} {error.reason}") from error
            problem = f"the server answers {error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
            if isinstance(getattr(error, "reason", None), socket.gaierror):
                problem, retries = f"no network, or no such host ({problem})", min(retries, 1)
        failures = 1 if _size(part) > most else failures + 1
        most = max(most, _size(part))
        if failures > retries:
            kept = f"\n  {_size(part)} bytes are kept in {part}; run again to continue" if part.exists() else ""
            raise DownloadFailed(f"{url}\n  {problem}, {failures} times in a row{kept}")
        time.sleep(wait * 2 ** (failures - 1))
    _check(part, checksum, url)
    part.replace(target)
    return target


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch(url: str, part: Path, timeout: float) -> bool:
    """One attempt to complete `part`. False if the body ended before its announced length."""
    have = _size(part)
    headers = {"User-Agent": "gan3d", **({"Range": f"bytes={have}-"} if have else {})}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing after what we have: complete, or a part of some other file
            total = error.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(have):
                return True
            part.unlink()
            return False
        raise
    with response:
        continued = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not continued:
            have = 0  # the server sends the whole file again
        length = response.headers.get("Content-Length")
        size = have + int(length) if length is not None else None
        with open(part, "ab" if continued else "wb") as file, tqdm(
            total=size, initial=have, unit="B", unit_scale=True, desc=part.stem, mininterval=1
        ) as bar:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    return size is None or _size(part) == size


def digest(path: Path, algorithm: str = "sha256") -> str:
    state = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            state.update(block)
    return state.hexdigest()


def _check(path: Path, checksum: str | None, url: str) -> None:
    if checksum is None:
        return
    algorithm, _, expected = checksum.rpartition(":")
    found = digest(path, algorithm or "sha256")
    if found != expected.lower():
        path.unlink()
        raise DownloadFailed(f"{url}\n  the file's {algorithm or 'sha256'} is {found}, not {expected}; it was deleted")


def published_checksum(url: str, timeout: float = 30.0) -> str | None:
    """The md5 that archive.org publishes for a file of an item; None for other hosts, or if it cannot be had."""
    base, _, name = url.rpartition("/")
    if "//archive.org/download/" not in url:
        return None
    try:
        with urllib.request.urlopen(f"{base}/{base.rpartition('/')[2]}_files.xml", timeout=timeout) as response:
            return md5_of(response.read(), name)
    except (OSError, http.client.HTTPException, xml.etree.ElementTree.ParseError):
        return None


def md5_of(listing: bytes, name: str) -> str | None:
    """From archive.org's *_files.xml, the checksum of the file `name`, as `download` takes it."""
    for entry in xml.etree.ElementTree.fromstring(listing).iter("file"):
        if entry.get("name") == name and entry.findtext("md5"):
            return f"md5:{entry.findtext('md5')}"
    return None
