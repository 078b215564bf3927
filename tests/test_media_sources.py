import base64
import gc
import gzip
import io
import itertools
import os
import socket
import ssl
import threading
import time
import warnings
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import psutil
import pytest

from torchtune_vl.media import _sources
from torchtune_vl.media._sources import RemoteLimits, read_bytes

DATA = bytes(range(256)) * 3


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "größe 100%25.bin"
    path.write_bytes(DATA)
    return path


def data_url(payload=None, header="data:image/png;base64"):
    return f"{header},{payload or base64.b64encode(DATA).decode()}"


# Bytes and files


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes(kind):
    data = read_bytes(kind(DATA))
    assert data == DATA
    assert type(data) is bytes


def test_path(path):
    assert read_bytes(path) == read_bytes(str(path)) == DATA


def test_file_url_with_and_without_escapes(path, monkeypatch):
    assert read_bytes(path.as_uri()) == DATA
    assert "%20" in path.as_uri()
    assert read_bytes(f"file://{path}") == DATA
    assert read_bytes(f"FILE://{path}") == DATA
    monkeypatch.chdir(path.parent)
    assert read_bytes(f"file://{path.name}") == DATA


def test_file_whose_name_is_escaped(tmp_path):
    (tmp_path / "a%20b").write_bytes(b"escaped")
    (tmp_path / "a b").write_bytes(b"plain")
    assert read_bytes(f"file://{tmp_path}/a%20b") == b"escaped"


@pytest.mark.parametrize(
    "name", ["nowhere/photo.jpg", "file://nowhere/photo.jpg", "a\0b", "\ud800"]
)
def test_missing_file(name):
    with pytest.raises(ValueError, match=r"cannot be read \(.+\); correct the path"):
        read_bytes(name)


def test_unreadable_file(path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"cannot be read \(PermissionError: Permission denied\)"):
        read_bytes(path)


def test_directory(tmp_path):
    with pytest.raises(ValueError, match="is a directory, pipe or device; correct the path"):
        read_bytes(tmp_path)


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for source in (pipe, "/dev/zero", "file:///dev/zero"):
        with pytest.raises(ValueError, match="is a directory, pipe or device"):
            read_bytes(source)


@pytest.mark.parametrize("source", [b"", "data:,", "data:;base64,", io.BytesIO()])
def test_empty(source):
    with pytest.raises(ValueError, match=r"is empty \(0 bytes\)"):
        read_bytes(source)


def test_empty_file(path):
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"is empty \(0 bytes\); fetch it again"):
        read_bytes(path)


def test_huge_file(path):
    os.truncate(path, 2**30 + 1)
    with pytest.raises(ValueError, match="larger than 1,073,741,824 bytes"):
        read_bytes(path)


@pytest.mark.parametrize("source", [None, 3, ["photo.jpg"], object()])
def test_no_source(source):
    with pytest.raises(ValueError, match="pass bytes, a path, a URL or a binary file handle"):
        read_bytes(source)


# Data URLs


@pytest.mark.parametrize(
    "url",
    [
        data_url(),
        data_url(header="data:;base64"),
        data_url(header="DATA:image/png;name=a;BASE64"),
        data_url(base64.encodebytes(DATA).decode()),  # with line breaks
        data_url(base64.b64encode(DATA).decode().replace("+", "%2B").replace("=", "%3D")),
        data_url("".join(f"%{byte:02x}" for byte in DATA), "data:image/png"),
        data_url("".join(f"%{byte:02x}" for byte in DATA), "data:"),
    ],
)
def test_data_url(url):
    assert read_bytes(url) == DATA


def test_base64_alone():
    text = base64.b64encode(DATA * 8).decode()
    assert read_bytes(text) == DATA * 8
    with pytest.raises(ValueError, match="cannot be read"):  # it could be a path
        read_bytes(text[:80])
    with pytest.raises(ValueError, match="is neither a file, having too long a name, nor base64"):
        read_bytes("a!" * 3000)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64", "has no comma"),
        (data_url()[:-3], r"is not valid base64 \(.+\); encode it again"),
        (data_url("QUJD*UJD"), "is not valid base64"),
        (data_url("QUJDÄUJD"), "is not valid base64"),
        (data_url("QUJD-_=="), "is not valid base64"),
    ],
)
def test_malformed_data_url(url, reason):
    with pytest.raises(ValueError, match=reason):
        read_bytes(url)


# File handles


@pytest.mark.parametrize("position", [0, 5, len(DATA)])
def test_handle_is_read_from_its_start_and_left_where_it_was(path, position):
    with path.open("rb") as file, path.open("rb", buffering=0) as raw:
        for handle in (file, raw, io.BytesIO(DATA)):
            handle.seek(position)
            assert read_bytes(handle) == read_bytes(handle) == DATA
            assert handle.tell() == position
            assert not handle.closed


def test_large_handle(monkeypatch):
    monkeypatch.setattr(_sources, "CHUNK", 7)
    assert read_bytes(io.BytesIO(DATA)) == DATA


def test_handle_that_cannot_seek():
    read_end, write_end = os.pipe()
    os.write(write_end, DATA)
    os.close(write_end)
    with open(read_end, "rb") as handle:
        assert read_bytes(handle) == DATA


def test_handle_that_never_ends(monkeypatch):
    monkeypatch.setattr(_sources, "MAX_BYTES", 10**6)
    with open("/dev/zero", "rb") as handle:
        with pytest.raises(ValueError, match="larger than 1,000,000 bytes"):
            read_bytes(handle)
        assert not handle.closed


def test_text_handle(path):
    with path.open(encoding="latin-1") as handle:
        for text in (handle, io.StringIO("abc")):
            with pytest.raises(ValueError, match="open for reading in binary mode"):
                read_bytes(text)


def test_broken_handle(path):
    with path.open("rb") as closed:
        pass
    write_only = open(path.parent / "new", "wb")  # noqa: SIM115
    damaged = gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(DATA)[:-20]))
    with write_only, damaged:
        for handle in (closed, write_only, damaged):
            with pytest.raises(
                ValueError, match=r"cannot be read \(.+\); pass a file that is open"
            ):
                read_bytes(handle)
        assert damaged.tell() == 0


def test_closes_every_file(path):
    read_bytes(path)
    assert str(path) not in {file.path for file in psutil.Process().open_files()}


# Remote


@pytest.mark.parametrize("limits", [{"max_bytes": 0}, {"timeout_seconds": 0}])
def test_limits_are_positive(limits):
    with pytest.raises(ValueError, match=r"RemoteLimits\(.*must be positive"):
        RemoteLimits(**limits)


@pytest.mark.parametrize("scheme", ["http", "HTTP", "ftp", "s3"])
@pytest.mark.parametrize("remote", [None, RemoteLimits()])
def test_other_schemes(scheme, remote):
    with pytest.raises(ValueError, match=f"{scheme.lower()}:// URL, of which only https"):
        read_bytes(f"{scheme}://images.test/photo.jpg", remote)


@pytest.mark.parametrize("url", ["https://images.test/photo.jpg", "HTTPS://images.test"])
def test_refused_unless_enabled(url):
    with pytest.raises(ValueError, match="download it first, or set remote="):
        read_bytes(url)


# A key of this test alone, for images.test and other.test, valid from 2020 to 2120
CERTIFICATE = """
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgeiHKkwmTUKtSBCjb
5yF5j3tVj1bZeZccM950h8BB3cShRANCAARvN50xgAXSP9o4Moc76B9dSpHEQban
3O70iL62IkAL7XfMjUHcQmxOP5rMwJnLhcJFGp5TKpF1MFWv2sWQLlYk
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBgzCCASmgAwIBAgIBATAKBggqhkjOPQQDAjAWMRQwEgYDVQQDDAtpbWFnZXMu
dGVzdDAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowFjEUMBIGA1UE
AwwLaW1hZ2VzLnRlc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARvN50xgAXS
P9o4Moc76B9dSpHEQban3O70iL62IkAL7XfMjUHcQmxOP5rMwJnLhcJFGp5TKpF1
MFWv2sWQLlYko2YwZDAdBgNVHQ4EFgQU3kXt7v4RhfswWbRj/9Qz9RaNpWowDwYD
VR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMCAoQwIgYDVR0RBBswGYILaW1hZ2Vz
LnRlc3SCCm90aGVyLnRlc3QwCgYIKoZIzj0EAwIDSAAwRQIgQJxqJjfQFH3D5N1/
wxDFJHvc48ZQnBX6cYN1FNqF0AMCIQC0vSRy7SbEXSx1kLP3wSiB8vLRS8GtEbql
Bj/uUtaSQg==
-----END CERTIFICATE-----
"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.headers["Host"], self.path))
        getattr(self, self.path.strip("/").partition("?")[0] or "data")()

    def answer(self, body=DATA, status=200, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", len(body) if length is None else length)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def data(self):
        self.answer()

    def missing(self):
        self.answer(status=404)

    def empty(self):
        self.answer(b"")

    def short(self):
        self.answer(length=len(DATA) + 9)

    def redirect(self):
        self.answer(b"", 302, Location=self.path.partition("?")[2])

    def loop(self):
        self.answer(b"", 302, Location="/loop")

    def chunks(self, count=3, pause=0.0):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(count):
            self.wfile.write(b"100\r\n" + DATA[:256] + b"\r\n")
            time.sleep(pause)
        self.wfile.write(b"0\r\n\r\n")

    def endless(self):
        self.chunks(10**9)

    def drip(self):
        self.chunks(10**9, pause=0.05)

    def drip_headers(self):
        for _ in range(10**9):
            self.wfile.write(b"H")
            time.sleep(0.05)

    def silence(self):
        self.server.released.wait(60)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_text(CERTIFICATE)
    return path


@pytest.fixture(scope="module")
def server(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # the client hangs up
    server.released = threading.Event()
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


class Internet:
    """Names, the addresses they stand for, and connections to the server wherever they go."""

    def __init__(self, port):
        self.port = port
        self.addresses = {"images.test": ["93.184.216.34"], "other.test": ["93.184.216.35"]}
        self.look_ups = []
        self.connections = []
        self.unreachable = set()
        self.connect = socket.create_connection

    def getaddrinfo(self, host, port, **_):
        self.look_ups.append(host)
        if host not in self.addresses:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in self.addresses[host]
        ]

    def create_connection(self, address, timeout):
        self.connections.append(address)
        if address[0] in self.unreachable:
            raise OSError(101, "Network is unreachable")
        with patched(socket, getaddrinfo=SYSTEM_GETADDRINFO):
            return self.connect(("127.0.0.1", self.port), timeout)


SYSTEM_GETADDRINFO = socket.getaddrinfo


@contextmanager
def patched(module, **replacements):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in replacements.items():
            patch.setattr(module, name, value)
        yield


@pytest.fixture
def internet(server, certificate, monkeypatch):
    internet = Internet(server.server_port)
    server.requests = []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(socket, "getaddrinfo", internet.getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", internet.create_connection)
    _sources._tls_context.cache_clear()
    yield internet
    _sources._tls_context.cache_clear()


def fetch(path="", host="images.test", **limits):
    return read_bytes(f"https://{host}/{path}", RemoteLimits(**limits))


def test_fetches(internet, server):
    assert fetch() == DATA
    assert internet.connections == [("93.184.216.34", 443)]
    assert server.requests == [("images.test", "/")]
    assert read_bytes("https://images.test", RemoteLimits()) == DATA
    assert read_bytes("HTTPS://images.test:8443?a=ä b%20c#part", RemoteLimits()) == DATA
    assert internet.connections[-1] == ("93.184.216.34", 8443)
    assert server.requests[-1] == ("images.test:8443", "/?a=%C3%A4%20b%20c")


def test_connects_to_the_address_that_was_checked(internet):
    """And looks it up once only: the next answer could be another."""
    fetch()
    assert internet.look_ups == ["images.test"]
    internet.addresses["images.test"] = ["2606:2800:220:1::1", "93.184.216.34"]
    internet.unreachable = {"2606:2800:220:1::1"}
    assert fetch() == DATA
    assert internet.connections[1:] == [("2606:2800:220:1::1", 443), ("93.184.216.34", 443)]
    assert internet.look_ups == ["images.test"] * 2


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.9.9.9",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.2.1",
        "224.0.0.1",
        "239.255.255.250",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%2",
        "fc00::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "::ffff:127.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::1",
        "64:ff9b:1::8.8.8.8",
        "::8.8.8.8",
        "::7f00:1",
        "2002:7f00:1::1",
        "2001:db8::1",
    ],
)
def test_addresses_of_the_local_network(internet, address):
    internet.addresses["images.test"] = [address]
    with pytest.raises(ValueError, match=f"leads to images.test at {address}, which is not"):
        fetch()
    internet.addresses["images.test"] = ["93.184.216.34", address]
    with pytest.raises(ValueError, match="not on the public internet; download it first"):
        fetch()
    assert internet.connections == []


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "0x7f.1", "2130706433", "localhost"])
def test_local_hosts(server, host):
    """As the system itself resolves them."""
    with pytest.raises(ValueError, match="public internet"):
        fetch(host=f"{host}:{server.server_port}")


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1", "64:ff9b::8.8.8.8"])
def test_public_addresses(internet, address):
    internet.addresses["images.test"] = [address]
    assert fetch() == DATA


def test_certificate_has_to_be_that_of_the_host(internet):
    internet.addresses["wrong.test"] = ["93.184.216.34"]
    with pytest.raises(ValueError, match=r"cannot be fetched \(SSLCertVerificationError"):
        fetch(host="wrong.test")


def test_certificate_has_to_be_trusted(internet, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(ValueError, match=r"cannot be fetched \(SSLCertVerificationError"):
        fetch()


def test_redirects(internet, server):
    assert fetch("redirect?https://other.test/data") == DATA
    assert [host for host, _ in internet.connections] == ["93.184.216.34", "93.184.216.35"]
    assert fetch("redirect?/redirect?data") == DATA
    assert [path for _, path in server.requests[2:]] == [
        "/redirect?/redirect?data", "/redirect?data", "/data"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://other.test/data", "leads to 'http://other.test/data'; only https"),
        ("file:///etc/passwd", "leads to 'file:///etc/passwd'; only https"),
        ("https://192.168.0.1/data", "192.168.0.1, which is not on the public internet"),
        ("//127.0.0.1/data", "127.0.0.1, which is not on the public internet"),
        ("https://user:word@other.test/", "without a user"),
        ("https://[::1/", "no valid URL"),
    ],
)
def test_redirects_are_checked(internet, target, reason):
    with pytest.raises(ValueError, match=reason):
        fetch(f"redirect?{target}")
    assert len(internet.connections) == 1


def test_redirects_end(internet):
    with pytest.raises(ValueError, match="redirects more than 5 times"):
        fetch("loop")
    assert len(internet.connections) == 6


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing", "is answered by 404 Not Found; correct the URL"),
        ("redirect", "is answered by 302"),
        ("empty", "is empty"),
        ("short", "ends 9 bytes early; try again"),
    ],
)
def test_answers_that_are_no_file(internet, path, reason):
    with pytest.raises(ValueError, match=reason):
        fetch(path)


def test_chunks(internet):
    assert fetch("chunks") == DATA


@pytest.mark.parametrize(
    "url", ["https://", "https:///a", "https://a:b/", "https://images.test:0x/"]
)
def test_invalid_url(internet, url):
    with pytest.raises(ValueError, match=r"only https://host/path|no valid URL"):
        read_bytes(url, RemoteLimits())


@pytest.mark.parametrize("host", ["a" * 70 + ".test", "nowhere.invalid"])
def test_unknown_host(host):
    with pytest.raises(ValueError, match=r"cannot be fetched \(.+\); try again"):
        fetch(host=host)


def test_limit_of_bytes(internet):
    assert fetch(max_bytes=len(DATA)) == DATA
    assert fetch("chunks", max_bytes=len(DATA)) == DATA
    for path in ("", "chunks", "endless"):
        with pytest.raises(ValueError, match="larger than 767 bytes"):
            fetch(path, max_bytes=len(DATA) - 1)


@pytest.mark.parametrize("path", ["drip", "drip_headers", "silence"])
def test_limit_of_time(internet, path):
    """However slowly bytes keep coming."""
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot be fetched \((TimeoutError|LineTooLong)"):
        fetch(path, timeout_seconds=0.5)
    assert time.monotonic() - started < 20


def test_limit_of_time_holds_for_all_redirects(internet, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(_sources, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(ValueError, match="TimeoutError"):
        fetch("loop", timeout_seconds=4)


def test_closes_every_connection(internet):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        fetch()
        for path in ("missing", "loop", "endless"):
            with pytest.raises(ValueError, match=r"answered|redirects|larger"):
                fetch(path, max_bytes=10**6)
        gc.collect()
    assert not [str(warning.message) for warning in caught]
    remote = {connection.raddr for connection in psutil.Process().net_connections()}
    assert ("127.0.0.1", internet.port) not in remote
