"""The bytes behind a path, a URL or a file handle."""

import base64
import contextlib
import errno
import functools
import http.client
import io
import ipaddress
import math
import os
import re
import socket
import ssl
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, cast
from urllib import parse

from torchtune_vl.media._errors import reason_of, refusing

Source = bytes | bytearray | memoryview | str | os.PathLike | BinaryIO

# Of the names of files that hold media
SUFFIXES = {
    "image": {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"},
    "video": {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"},
}

# More than the pixels of the largest RGB image that Pillow opens; ends the reading of /dev/zero
MAX_BYTES = 2**30
CHUNK = 2**20

CORRECT_PATH = "correct the path or remove it from the data"

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = {"User-Agent": "torchtune-vl"}
URL_CHARACTERS = "%/?:@!$&'()*+,;=[]"  # beside letters and digits; all others are escaped

# IPv6 addresses that stand for the IPv4 address in their last 32 bits (RFC 6052, RFC 4291)
_EMBEDDED_IPV4 = ("64:ff9b::/96", "::ffff:0:0/96")
# Older ones of IPv4 addresses (RFC 4291), those of a network's own translators (RFC 8215), tunnels
# of 6to4 (which is_global takes for public before Python 3.13) and multicast (which it always does)
_NOT_PUBLIC = ("::/96", "64:ff9b:1::/48", "2002::/16", "224.0.0.0/4", "ff00::/8")


@dataclass(frozen=True)
class RemoteLimits:
    """Allows https URLs, within limits; ``ValueError`` if one is not positive."""

    max_bytes: int = 50 * 2**20  # of a file
    # Of a file, redirects included. The system's name look-up has its own limit
    timeout_seconds: float = 20

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.timeout_seconds <= 0:
            raise ValueError(f"{self}: both limits must be positive")


def read_bytes(source: Source, remote: RemoteLimits | None = None) -> bytes:
    """Read a whole file of at most 1 GiB, as :func:`open_bytes` opens it."""
    with open_bytes(source, remote, MAX_BYTES) as file:
        return file.read()


def open_bytes(
    source: Source, remote: RemoteLimits | None = None, max_bytes: float = MAX_BYTES
) -> BinaryIO:
    """Open a file, wherever it is, at its start; a path or ``file://`` URL without reading it.

    A source is bytes; a path; a ``file://``, ``data:`` or ``https://`` URL; base64 too long to be a
    path; or a binary file handle, which is read from its start (if it cannot seek, from where it
    is), left at the position where it was, and not closed. ``https://`` URLs are refused without
    limits. Their certificate is verified, the address has to be on the public internet, and so does
    that of every redirect; proxies are not used. ``max_bytes`` is of paths; of a handle 1 GiB is
    read. ``ValueError`` for what cannot be read, is empty, too large or not allowed leaves it to
    the caller to name the source.
    """
    if isinstance(source, str):
        source = _path_or_bytes(source, remote)
    if isinstance(source, str | os.PathLike):
        return _open_path(source, max_bytes)
    if callable(getattr(source, "read", None)):
        source = _read_handle(cast(BinaryIO, source))
    if not isinstance(source, bytes | bytearray | memoryview):
        raise ValueError(
            "is no image or video; pass bytes, a path, a URL or a binary file handle, or pixels: "
            "a PIL image, or a uint8 array or tensor"
        )
    data = bytes(source)
    _check_size(len(data))
    return io.BytesIO(data)


def path_of_file_url(url: str) -> str:
    """Find the path of a ``file://`` URL.

    As it stands, which is how qwen-vl-utils takes it, if there is such a file; otherwise with its
    escapes resolved, which pathlib's ``as_uri()`` writes.
    """
    path = url[len("file://") :]
    with contextlib.suppress(ValueError):  # no file can have such a name
        if os.path.exists(path):
            return path
    return parse.unquote(path)


def scheme_of(text: str) -> str:
    """Find the scheme of a URL in lower case, "" for a path."""
    found = re.match(r"data(?=:)|[a-z][a-z0-9+.-]*(?=://)", text, re.IGNORECASE)
    return found.group().lower() if found else ""


def _path_or_bytes(text: str, remote: RemoteLimits | None) -> str | bytes:
    scheme = scheme_of(text)
    if not scheme:
        return text
    if scheme == "file":
        return path_of_file_url(text)
    if scheme == "data":  # RFC 2397
        header, comma, payload = text.partition(",")
        if not comma:
            raise ValueError("has no comma before its data; write data:image/png;base64,...")
        if not header.lower().endswith(";base64"):
            return parse.unquote_to_bytes(payload)
        return _decode_base64(parse.unquote(payload), "is not valid base64")
    if scheme != "https":
        raise ValueError(f"is a {scheme}:// URL, of which only https:// is read; download it first")
    if remote is None:
        raise ValueError("is a remote URL; download it first, or set remote=RemoteLimits()")
    return _fetch(text, remote)


def _decode_base64(text: str, problem: str) -> bytes:
    with refusing(problem, "encode it again", ValueError):
        return base64.b64decode("".join(text.split()), validate=True)


def _open_path(path: str | os.PathLike, max_bytes: float) -> BinaryIO:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        if getattr(error, "errno", 0) == errno.ENAMETOOLONG and isinstance(path, str):
            problem = "is neither a file, having too long a name, nor base64"
            return io.BytesIO(_decode_base64(path, problem))
        raise ValueError(f"cannot be read ({reason_of(error)}); {CORRECT_PATH}") from error
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device might never end
        raise ValueError(f"is a directory, pipe or device; {CORRECT_PATH}")
    _check_size(status.st_size, max_bytes)
    with refusing("cannot be read", CORRECT_PATH, OSError):
        return open(path, "rb")


def _read_handle(handle: BinaryIO) -> bytes:
    # Whatever is behind a handle raises what it likes
    with refusing("cannot be read", "pass a file that is open for reading in binary mode"):
        position = handle.tell() if handle.seekable() else None
        if position is not None:
            handle.seek(0)
        try:
            data = _read_up_to(MAX_BYTES, handle.read)
        finally:
            if position is not None:
                handle.seek(position)
    _check_size(len(data), MAX_BYTES)
    return data


def _read_up_to(limit: int, read: Callable[[int], bytes]) -> bytes:
    """Reads to the end, or until there is more than the limit."""
    chunks: list[bytes] = []
    size = 0
    while size <= limit and (chunk := read(CHUNK)):
        chunks.append(chunk)
        size += len(chunk)
    return b"".join(chunks)


def _check_size(size: int, limit: float = math.inf) -> None:
    if not size:
        raise ValueError("is empty (0 bytes); fetch it again or remove it from the data")
    if size > limit:
        raise ValueError(f"is larger than {limit:,} bytes; make it smaller or raise the limit")


def _fetch(url: str, limits: RemoteLimits) -> bytes:
    deadline = time.monotonic() + limits.timeout_seconds
    base = ""
    remedy = "try again, raise the limits or download it first"
    with refusing("cannot be fetched", remedy, (OSError, UnicodeError, http.client.HTTPException)):
        for _ in range(1 + MAX_REDIRECTS):
            parts = _checked_url(base, url)
            connection = http.client.HTTPConnection(str(parts.hostname), parts.port or 443)
            connection.default_port = 443
            with contextlib.closing(connection):
                connection.sock = _connect(connection.host, connection.port, deadline)
                target = parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
                connection.request("GET", parse.quote(target, safe=URL_CHARACTERS), headers=HEADERS)
                response = connection.getresponse()
                location = response.headers["Location"]
                if response.status not in REDIRECTS or not location:
                    return _body(response, limits.max_bytes)
                base, url = parts.geturl(), location
    raise ValueError(f"redirects more than {MAX_REDIRECTS} times; download it first")


def _checked_url(base: str, url: str) -> parse.SplitResult:
    with refusing(f"leads to {url[:500]!r}, no valid URL", "correct it", ValueError):
        parts = parse.urlsplit(parse.urljoin(base, url))
        _ = parts.port  # raises for an invalid one
    if parts.scheme != "https" or not parts.hostname or parts.username is not None:
        fetched = "only https://host/path is fetched, without a user's name"
        raise ValueError(f"leads to {url[:500]!r}; {fetched}")
    return parts


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        answer = f"{response.status} {response.reason}"
        raise ValueError(f"is answered by {answer}; correct the URL or remove it from the data")
    if response.length:
        _check_size(response.length, max_bytes)
    data = _read_up_to(max_bytes, response.read)
    _check_size(len(data), max_bytes)
    if response.length:
        raise ValueError(f"ends {response.length:,} bytes early; try again")
    return data


class _DeadlineSocket(ssl.SSLSocket):
    """Ends reading at one time, however slowly the bytes come."""

    deadline: float

    def recv_into(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.settimeout(_seconds_until(self.deadline))
        return super().recv_into(*args, **kwargs)


def _connect(host: str, port: int, deadline: float) -> ssl.SSLSocket:
    """Connects to the very address that was checked, which a second look-up could replace."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(info[4][0]) for info in found]
    for address in addresses:
        if not _is_public(address):
            where = f"{host} at {address}, which is not on the public internet"
            raise ValueError(f"leads to {where}; download it first")
    for address in addresses:
        try:
            plain = socket.create_connection((address, port), timeout=_seconds_until(deadline))
            break
        except OSError:
            if address == addresses[-1]:
                raise
    tls = cast(_DeadlineSocket, _tls_context().wrap_socket(plain, server_hostname=host))
    tls.deadline = deadline
    return tls


@functools.cache
def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    context.sslsocket_class = _DeadlineSocket
    return context


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    if any(ip in ipaddress.ip_network(n) for n in _EMBEDDED_IPV4):
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not any(ip in ipaddress.ip_network(n) for n in _NOT_PUBLIC)


def _seconds_until(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the time is up")
    return seconds
