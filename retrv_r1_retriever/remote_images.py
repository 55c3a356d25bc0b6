"""Pictures from elsewhere: HTTP hosts on a list, any file system of fsspec, your own function.

Each source takes what is its own and hands the rest to `then`, so that they can be put in front of one another; `LocalImages` at
the end decodes all of them under its limits. All are bounded: so many at a time, so many bytes, so many seconds.
"""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
import os
import posixpath
import socket
import ssl
import weakref
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urljoin, urlsplit

from retrv_r1_retriever.errors import ImageError, OptionsError, explain, missing_extra
from retrv_r1_retriever.images import ImageData, ImageSource, LocalImages
from retrv_r1_retriever.types import ImageInput

_Address: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"
_Network: TypeAlias = "ipaddress.IPv4Network | ipaddress.IPv6Network"
_IPV4_INSIDE = [
    ipaddress.IPv6Network(prefix) for prefix in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96")
]
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5


class _Turns:
    """At most so many at a time on each event loop, each within its time."""

    def __init__(self, concurrency: int, timeout_s: float) -> None:
        if concurrency < 1 or not timeout_s > 0:
            got = f"concurrency={concurrency}, timeout_s={timeout_s}"
            raise OptionsError(explain("image source", expected="both above 0", got=got, fix="Raise them."))
        self._concurrency, self._timeout_s = concurrency, timeout_s
        self._of_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]
        self._of_loop = weakref.WeakKeyDictionary()

        self._threads: ThreadPoolExecutor | None = None
        self._pid = 0

    async def in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Own threads: what hangs blocks these, never the default pool everybody shares."""
        if self._threads is None or self._pid != os.getpid():  # a forked child has the pool, but none of its threads
            self._threads, self._pid = ThreadPoolExecutor(self._concurrency, "retrv-remote"), os.getpid()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def take(self, work: Callable[[], Awaitable[Any]], what: str) -> Any:
        turns = self._of_loop.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._concurrency))
        async with turns:
            try:
                async with asyncio.timeout(self._timeout_s) as limit:
                    return await work()
            except TimeoutError:
                if not limit.expired():
                    raise
                raise _error(what, f"an answer within {self._timeout_s} s", "none", "Raise timeout_s.") from None


@dataclass(frozen=True, slots=True)
class _AllowList:
    """names: hosts, "*.example.com" for all below; networks: addresses that may be reached although they are private"""

    names: frozenset[str]
    networks: tuple[_Network, ...]

    @classmethod
    def of(cls, entries: Iterable[str]) -> _AllowList:
        names, networks = set(), []
        for entry in [entries] if isinstance(entries, str) else entries:
            try:
                networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                name = entry.removeprefix("*.")
                if not name or any(c in name for c in "/:*@ "):
                    raise OptionsError(
                        explain("hosts", expected='"example.com", "*.example.com", "10.0.0.5" or "10.0.0.0/8"',
                                got=repr(entry), fix="Leave out scheme, port and path.")
                    ) from None  # fmt: skip
                names.add(entry.lower())
        return cls(frozenset(names), tuple(networks))

    def names_host(self, host: str) -> bool:
        parts = host.split(".")
        below = {"*." + ".".join(parts[i:]) for i in range(1, len(parts))}
        return host in self.names or bool(below & self.names) or self._lists(host)

    def may_reach(self, address: str) -> bool:
        """Private addresses, also behind a listed name, must be listed themselves."""
        found: _Address = ipaddress.ip_address(address.partition("%")[0])
        inner = found if isinstance(found, ipaddress.IPv4Address) else _ipv4_in(found) or found
        public = inner.is_global and not inner.is_multicast and not getattr(inner, "is_site_local", False)
        return public or self._holds(inner) or self._holds(found)

    def _lists(self, host: str) -> bool:
        try:
            return self._holds(ipaddress.ip_address(host))
        except ValueError:
            return False

    def _holds(self, found: _Address) -> bool:
        return any(found in network for network in self.networks if network.version == found.version)


def _ipv4_in(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that packets to this one end at: mapped, compatible, translated (NAT64) or 6to4."""
    if any(address in network for network in _IPV4_INSIDE):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.sixtofour


class _InFront:
    """A source that hands on to `then` what is not its own."""

    _then: ImageSource

    @property
    def root(self) -> Path | None:
        """The folder that relative paths start from, as far as a source behind this one has any."""
        return getattr(self._then, "root", None)


class HttpImages(_InFront):
    """Pictures behind http and https URLs, from `hosts` only. Needs the extra `http`.

    hosts: "img.example.com", "*.example.com", an address or a network. Every redirect must stay on the list. A name is resolved
        once and the connection goes to that very address; private, loopback and link-local ones must be listed as addresses
    then: takes everything that is no such URL, and decodes; max_bytes: of one picture; timeout_s: for one, redirects included
    """

    def __init__(
        self,
        hosts: Iterable[str],
        *,
        then: ImageSource | None = None,
        max_bytes: int = 20_000_000,
        timeout_s: float = 30.0,
        concurrency: int = 16,
    ) -> None:
        self._httpx = _import("httpx", "http")
        self._allowed, self._then = _AllowList.of(hosts), then or LocalImages()
        self._max_bytes, self._turns = max_bytes, _Turns(concurrency, timeout_s)
        self._tls = ssl.create_default_context()

    async def load(self, image: ImageInput) -> ImageData:
        if not (isinstance(image, str) and image[:8].lower().startswith(("http://", "https://"))):
            return await self._then.load(image)
        data: bytes = await self._turns.take(lambda: self._fetch(image), image)
        return await self._then.load(data)

    async def _fetch(self, url: str) -> bytes:
        # No proxy and no kept connections: both would reach hosts that were not checked here.
        limits = self._httpx.Limits(max_keepalive_connections=0)
        try:
            async with self._httpx.AsyncClient(
                verify=self._tls, trust_env=False, follow_redirects=False, timeout=None, limits=limits
            ) as client:
                for _ in range(_MAX_REDIRECTS + 1):
                    answer = await self._get(client, url)
                    if isinstance(answer, bytes):
                        return answer
                    url = urljoin(url, answer)
        except (ImageError, TimeoutError):
            raise
        except (self._httpx.HTTPError, self._httpx.InvalidURL, OSError, ValueError) as error:
            raise _error(url, "a picture", f"{type(error).__name__}: {error}", "Check the URL.") from error
        raise _error(url, f"at most {_MAX_REDIRECTS} redirects", "more", "Use the URL they lead to.")

    async def _get(self, client: Any, url: str) -> bytes | str:
        """The body, or where to look instead."""
        parts, address = await self._checked(url)
        host = parts.hostname or ""
        request = client.build_request(
            "GET",
            parts._replace(netloc=_netloc(address, parts.port)).geturl(),
            headers={"Host": parts.netloc.rpartition("@")[2], "Accept": "image/*", "Accept-Encoding": "identity"},
            extensions={"sni_hostname": host},
        )
        answer = await client.send(request, stream=True)
        try:
            if answer.status_code in _REDIRECTS and "location" in answer.headers:
                return str(answer.headers["location"])
            if answer.status_code != 200:
                raise _error(url, "status 200", answer.status_code, "Check the URL.")
            return await self._body(url, answer)
        finally:
            await answer.aclose()

    async def _checked(self, url: str) -> tuple[Any, str]:
        """Its parts, and an address of its host that may be reached."""
        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
        if parts.scheme not in ("http", "https") or not self._allowed.names_host(host):
            raise _error(url, "a host on the list", repr(host), "Add it to hosts if pictures may come from there.")
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, parts.port or 0, type=socket.SOCK_STREAM)
        addresses = [str(one[4][0]) for one in found]
        for address in addresses:
            if not self._allowed.may_reach(address):
                fix = "List the address itself in hosts if that is meant."
                raise _error(url, "a public address", f"{host} at {address}", fix)
        return parts, addresses[0]

    async def _body(self, url: str, answer: Any) -> bytes:
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise _error(url, "the picture as it is", "a compressed answer", "Let the server send it uncompressed.")
        body = bytearray()
        if int(answer.headers.get("content-length", "0")) <= self._max_bytes:
            async for chunk in answer.aiter_raw():
                body += chunk
                if len(body) > self._max_bytes:
                    break
            else:
                return bytes(body)
        raise _error(url, f"at most {self._max_bytes:,} bytes", "more", "Shrink it, or raise max_bytes.")


class FsspecImages(_InFront):
    """Pictures below one place of any fsspec file system: `FsspecImages("s3://bucket/cards", {"anon": True})`. Extra `fsspec`.

    root: files are read below it only; a picture is named by its full URL. options: of the file system, credentials included
    then: takes everything else, and decodes
    """

    def __init__(
        self,
        root: str,
        options: dict[str, Any] | None = None,
        *,
        then: ImageSource | None = None,
        max_bytes: int = 20_000_000,
        timeout_s: float = 30.0,
        concurrency: int = 16,
    ) -> None:
        protocol, separator, _ = root.partition("://")
        if not separator or "::" in root:
            raise OptionsError(
                explain("root", expected="protocol://path", got=repr(root), fix="E.g. s3://bucket/cards.")
            )
        self._files = _import("fsspec", "fsspec").filesystem(protocol, **(options or {}))
        self._prefix = f"{protocol}://"
        self._root = posixpath.normpath(self._files._strip_protocol(root))
        self._then, self._max_bytes = then or LocalImages(), max_bytes
        self._turns = _Turns(concurrency, timeout_s)

    async def load(self, image: ImageInput) -> ImageData:
        if not (isinstance(image, str) and image.startswith(self._prefix)):
            return await self._then.load(image)
        path = posixpath.normpath(self._files._strip_protocol(image))
        if "::" in image or not path.startswith(self._root.rstrip("/") + "/"):
            raise _error(image, f"a file below {self._root}", path, "Move it there, or pass another root.")
        data: bytes = await self._turns.take(lambda: self._turns.in_thread(self._read, path, image), image)
        return await self._then.load(data)

    def _read(self, path: str, shown: str) -> bytes:
        try:
            with self._files.open(path, "rb") as file:
                data: bytes = file.read(self._max_bytes + 1)
        except Exception as error:  # every file system has its own
            raise _error(shown, "a readable file", f"{type(error).__name__}: {error}", "Check the path.") from error
        if len(data) > self._max_bytes:
            raise _error(shown, f"at most {self._max_bytes:,} bytes", "more", "Shrink it, or raise max_bytes.")
        return data


class CallableImages(_InFront):
    """Pictures from your own function, sync (run in a thread) or async: a reference in, bytes or a Pillow image out.

    It is asked for every string that is no data URI; None = not one of its own. then: takes everything else, and decodes
    """

    def __init__(
        self,
        function: Callable[[str], Any],
        *,
        then: ImageSource | None = None,
        timeout_s: float = 30.0,
        concurrency: int = 16,
    ) -> None:
        self._function, self._then = function, then or LocalImages()
        self._turns = _Turns(concurrency, timeout_s)

    async def load(self, image: ImageInput) -> ImageData:
        if not isinstance(image, str) or image[:5].lower() == "data:":
            return await self._then.load(image)
        found = await self._turns.take(lambda: self._ask(image), image)
        if isinstance(found, str):
            raise _error(image, "bytes or a Pillow image", "a str from your function", "Read it there.")
        return await self._then.load(image if found is None else found)

    async def _ask(self, image: str) -> Any:
        try:
            if inspect.iscoroutinefunction(self._function):
                return await self._function(image)
            found = await self._turns.in_thread(self._function, image)
            return await found if inspect.isawaitable(found) else found
        except (ImageError, TimeoutError):
            raise
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            raise _error(image, "a picture from your function", got, "Fix the function.") from error


def _netloc(address: str, port: int | None) -> str:
    host = f"[{address}]" if ":" in address else address
    return host if port is None else f"{host}:{port}"


def _error(what: str, expected: str, got: object, fix: str) -> ImageError:
    shown = what if len(what) <= 120 else f"{what[:60]}..."
    return ImageError(explain(f"image {shown}", expected=expected, got=got, fix=fix))


def _import(name: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing_extra(name, extra) from error
