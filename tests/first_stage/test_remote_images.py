"""Pictures over HTTP from listed hosts, from fsspec, from a function. The HTTP server is real, on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fsspec
import pytest
from PIL import Image

from retrv_r1_retriever.errors import ImageError, MissingExtraError, OptionsError
from retrv_r1_retriever.images import ImageSource, LocalImages, image_hash
from retrv_r1_retriever.remote_images import CallableImages, FsspecImages, HttpImages, _AllowList

from .conftest import png

RED = png("red")


class Server(ThreadingHTTPServer):
    """paths: what is answered; hosts: Host headers seen; busy, most: requests at the same time"""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.paths: dict[str, Any] = {"/red.png": RED}
        self.hosts: list[str] = []
        self.busy = self.most = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.hosts.append(self.headers["Host"])
        server.busy += 1
        server.most = max(server.most, server.busy)
        try:
            self._answer(server.paths.get(self.path))
        finally:
            server.busy -= 1

    def _answer(self, found: Any) -> None:
        if callable(found):
            found = found()
        if isinstance(found, str):
            self.send_response(302)
            self.send_header("Location", found)
            self.end_headers()
            return
        if found is None:
            self.send_error(404)
            return
        headers, body = found if isinstance(found, tuple) else ({"Content-Length": str(len(found))}, found)
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client has seen enough
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


async def test_a_picture_from_a_listed_host(server: Server) -> None:
    images = HttpImages(["127.0.0.1"])
    loaded = await images.load(f"{server.url}/red.png")
    assert loaded.image.getpixel((0, 0)) == (255, 0, 0)
    assert loaded.hash == image_hash(RED)
    assert isinstance(images, ImageSource)
    server.paths["/a"] = "/b"
    server.paths["/b"] = f"{server.url}/red.png"
    assert (await images.load(f"{server.url}/a")).hash == loaded.hash


async def test_everything_else_goes_on(server: Server, tmp_path: Any) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    images = HttpImages(["127.0.0.1"], then=LocalImages(tmp_path))
    for image in ("a.png", RED, Image.new("RGB", (2, 2), "red")):
        assert (await images.load(image)).image.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ImageError, match="LocalImages fetches nothing"):
        await images.load("ftp://127.0.0.1/a.png")
    assert server.hosts == []


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/red.png",
        "http://127.0.0.2/red.png",
        "http://localhost/red.png",
        "http://127.0.0.1.evil.example/",
        "http://127.0.0.1@evil.example/red.png",
        "http:///red.png",
        "http://[::1]/red.png",
        "http://2130706433/red.png",
    ],
)
async def test_hosts_that_are_not_listed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("looked up"))
    with pytest.raises(ImageError, match=r"expected a host on the list"):
        await HttpImages(["127.0.0.1", "*.example.org"]).load(url)


def resolving(monkeypatch: pytest.MonkeyPatch, names: dict[str, str]) -> None:
    original = socket.getaddrinfo

    def look_up(host: Any, *rest: Any, **more: Any) -> Any:
        return original(names.get(host, host), *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "169.254.169.254", "192.168.1.1", "::1", "fe80::1", "fec0::1", "0.0.0.0", "::ffff:127.0.0.1",
        "::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::169.254.169.254", "2002:7f00:1::",
    ],
)  # fmt: skip
async def test_private_addresses_behind_a_listed_name(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, {"img.example.com": address})
    with pytest.raises(ImageError, match=r"expected a public address, got img\.example\.com at .*List the address"):
        await HttpImages(["img.example.com"]).load("http://img.example.com/a.png")


async def test_the_address_that_was_checked_is_the_one_that_is_asked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is resolved once, so that it cannot lead elsewhere the second time; the server still sees the name."""
    asked: list[str] = []
    original = socket.getaddrinfo

    def look_up(host: Any, *rest: Any, **more: Any) -> Any:
        asked.append(host)
        return original("127.0.0.1" if host == "img.example.com" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    images = HttpImages(["img.example.com", "127.0.0.0/8"])
    await images.load(f"http://img.example.com:{server.server_port}/red.png")
    assert asked.count("img.example.com") == 1
    assert server.hosts == [f"img.example.com:{server.server_port}"]


@pytest.fixture
def certificate(tmp_path: Any) -> Any:
    """Of img.example.com, signed by itself: the folder of cert.pem and key.pem."""
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with openssl")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=img.example.com", "-addext", "subjectAltName=DNS:img.example.com",
         "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return tmp_path


async def test_certificates_are_checked_against_the_name(
    server: Server, monkeypatch: pytest.MonkeyPatch, certificate: Any
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    resolving(monkeypatch, {"img.example.com": "127.0.0.1", "www.example.com": "127.0.0.1"})
    images = HttpImages(["*.example.com", "127.0.0.1"])
    with pytest.raises(ImageError, match="self-signed certificate"):
        await images.load(f"https://img.example.com:{server.server_port}/red.png")
    images._tls = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    assert (await images.load(f"https://img.example.com:{server.server_port}/red.png")).hash == image_hash(RED)
    for host in ("www.example.com", "127.0.0.1"):
        with pytest.raises(ImageError, match="certificate is not valid for"):
            await images.load(f"https://{host}:{server.server_port}/red.png")


async def test_redirects_stay_on_the_list(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    images = HttpImages(["127.0.0.1"])
    server.paths["/out"] = "http://evil.example/red.png"
    server.paths["/inside"] = "http://169.254.169.254/latest/meta-data"
    server.paths["/file"] = "file:///etc/passwd"
    server.paths["/loop"] = "/loop"
    for path in ("/out", "/inside", "/file"):
        with pytest.raises(ImageError, match="expected a host on the list"):
            await images.load(server.url + path)
    with pytest.raises(ImageError, match="expected at most 5 redirects, got more"):
        await images.load(f"{server.url}/loop")


async def test_size_and_time_are_limited(server: Server) -> None:
    images = HttpImages(["127.0.0.1"], max_bytes=1000, timeout_s=0.5)
    server.paths["/says"] = ({"Content-Length": "999999999"}, b"")
    server.paths["/hides"] = ({}, b"x" * 5000)
    server.paths["/zip"] = ({"Content-Encoding": "gzip"}, b"x")
    server.paths["/slow"] = lambda: time.sleep(1.5) or RED
    server.paths["/text"] = b"<html>"
    for path, message in {
        "/says": "expected at most 1,000 bytes",
        "/hides": "expected at most 1,000 bytes",
        "/zip": "got a compressed answer",
        "/slow": "expected an answer within 0.5 s",
        "/none": "expected status 200, got 404",
        "/text": "expected a readable",
    }.items():
        with pytest.raises(ImageError, match=message):
            await images.load(server.url + path)
    for url in ("http://127.0.0.1:9/a.png", "http://127.0.0.1:99999/a", "http://127.0.0.1:x/"):
        with pytest.raises(ImageError, match="expected a picture, got"):
            await images.load(url)


async def test_so_many_at_a_time(server: Server) -> None:
    server.paths["/slow.png"] = lambda: time.sleep(0.05) or RED
    images = HttpImages(["127.0.0.1"], concurrency=3)
    await asyncio.gather(*(images.load(f"{server.url}/slow.png") for _ in range(12)))
    assert server.most == 3


def test_names_on_the_list() -> None:
    allowed = _AllowList.of(["a.example.com", "*.cdn.example.com", "10.1.0.0/16", "::1"])
    for host in ("a.example.com", "x.cdn.example.com", "x.y.cdn.example.com", "10.1.2.3", "::1"):
        assert allowed.names_host(host), host
    for host in ("b.example.com", "cdn.example.com", "xcdn.example.com", "10.2.0.1", "example.com", ""):
        assert not allowed.names_host(host), host
    for address in ("8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "::ffff:10.1.2.3", "::1", "2606:4700::1"):
        assert allowed.may_reach(address), address
    for entry in ("https://a.example.com", "a.example.com:80", "a/b", "", "*", "a.*.com"):
        with pytest.raises(OptionsError, match="hosts: expected"):
            _AllowList.of([entry])


def test_one_loop_after_the_other(server: Server) -> None:
    images = HttpImages(["127.0.0.1"])
    for _ in range(2):
        assert asyncio.run(images.load(f"{server.url}/red.png")).hash == image_hash(RED)


async def test_fsspec_below_its_root() -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/cards/a/red.png", RED)
    files.pipe("/secret/red.png", RED)
    files.pipe("/cards-too/red.png", RED)
    images = FsspecImages("memory://cards", max_bytes=2000)
    assert (await images.load("memory://cards/a/red.png")).hash == image_hash(RED)
    assert (await images.load(RED)).hash == image_hash(RED)
    for outside in ("memory://secret/red.png", "memory://cards/../secret/red.png", "memory://cards-too/red.png"):
        with pytest.raises(ImageError, match="expected a file below /cards"):
            await images.load(outside)
    with pytest.raises(ImageError, match=r"expected a readable file, got FileNotFoundError"):
        await images.load("memory://cards/none.png")
    files.pipe("/cards/big.png", b"x" * 3000)
    with pytest.raises(ImageError, match="expected at most 2,000 bytes"):
        await images.load("memory://cards/big.png")
    with pytest.raises(OptionsError, match="root: expected protocol://path"):
        FsspecImages("simplecache::memory://cards")
    with pytest.raises(ImageError, match="LocalImages fetches nothing"):
        await images.load("s3://cards/a/red.png")


async def test_your_own_function() -> None:
    def sync(name: str) -> Any:
        return {"db:1": RED, "db:2": Image.new("RGB", (2, 2), "red"), "db:3": "text"}.get(name)

    async def asynchronous(name: str) -> Any:
        await asyncio.sleep(0)
        return sync(name)

    for function in (sync, asynchronous, lambda name: asynchronous(name)):
        images = CallableImages(function)
        assert (await images.load("db:1")).hash == image_hash(RED)
        assert (await images.load("db:2")).image.getpixel((0, 0)) == (255, 0, 0)
        with pytest.raises(ImageError, match="got a str from your function"):
            await images.load("db:3")
        with pytest.raises(ImageError, match="LocalImages without a root"):
            await images.load("db:4")
    with pytest.raises(ImageError, match="expected a picture from your function, got KeyError: 'x'"):
        await CallableImages(lambda name: {}[name]).load("x")
    with pytest.raises(ImageError, match=r"expected an answer within 0\.05 s"):
        await CallableImages(lambda name: time.sleep(0.3), timeout_s=0.05).load("x")


async def test_sources_in_a_row(server: Server, tmp_path: Any) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    fsspec.filesystem("memory").pipe("/row/red.png", RED)
    local = LocalImages(tmp_path)
    images = HttpImages(
        ["127.0.0.1"], then=FsspecImages("memory://row", then=CallableImages({"k": RED}.get, then=local))
    )
    for image in (f"{server.url}/red.png", "memory://row/red.png", "k", "a.png"):
        assert (await images.load(image)).hash == image_hash(RED)


@pytest.mark.parametrize(
    ("make", "extra"), [(lambda: HttpImages(["a.b"]), "http"), (lambda: FsspecImages("s3://b"), "fsspec")]
)
def test_missing_extra(make: Callable[[], Any], extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    original = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name in ("httpx", "fsspec"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingExtraError, match=rf"retrv-r1-retriever\[{extra}\]"):
        make()
