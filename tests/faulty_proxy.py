"""Servers with faults: a proxy that imitates those of networks, one that refuses requests as S3 does, and one that
answers whatever a test wants.
"""

import contextlib
import http.client
import random
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

MODES = ("pass", "refuse", "hang", "error", "reset")


class FaultyProxy:
    """Listens on loopback and passes connections on to `target`, an address and port, as `mode` says.

    Modes: "pass" forwards all bytes, "refuse" closes at once, "hang" accepts and never answers, "error" answers 500,
    "reset" closes after a random number of bytes. A new mode closes the open connections and holds for later ones.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target, self._mode = target, "pass"
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def mode(self) -> str:
        """How new connections are treated."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        assert mode in MODES
        self._mode = mode
        for connection in list(self._open):
            self._close(connection)

    def close(self) -> None:
        """Stop listening and close all connections."""
        self._listener.close()
        self.mode = "refuse"

    def _close(self, connection: socket.socket) -> None:
        self._open.discard(connection)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._open.add(client)
            threading.Thread(target=self._serve, args=(client, self._mode), daemon=True).start()

    def _serve(self, client: socket.socket, mode: str) -> None:
        with contextlib.suppress(OSError):
            if mode == "refuse":
                self._close(client)
            elif mode == "error":
                client.recv(65536)
                client.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                self._close(client)
            elif mode in ("pass", "reset"):
                server = socket.create_connection(self._target)
                self._open.add(server)
                threading.Thread(target=self._copy, args=(server, client, None), daemon=True).start()
                self._copy(client, server, random.randrange(100, 20_000) if mode == "reset" else None)
            # "hang": the connection stays open without an answer

    def _copy(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        """Copy until one side closes, or until at least `limit` bytes have passed; then close both."""
        with contextlib.suppress(OSError):
            copied = 0
            while (content := source.recv(65536)) and (limit is None or copied < limit):
                target.sendall(content)
                copied += len(content)
        self._close(source)
        self._close(target)


@dataclass(frozen=True)
class S3Request:
    """A request to an S3 server."""

    method: str
    path: str  # /bucket/key, or /bucket
    query: dict[str, list[str]]
    conditions: frozenset[str] = field(default_factory=frozenset)  # the names of its conditional headers

    @property
    def right(self) -> str:
        """The IAM action that allows it."""
        is_bucket = "/" not in self.path.strip("/")
        if self.method == "GET" and is_bucket:
            return "s3:ListBucketMultipartUploads" if "uploads" in self.query else "s3:ListBucket"
        if self.method == "DELETE":
            return "s3:AbortMultipartUpload" if "uploadId" in self.query else "s3:DeleteObject"
        return "s3:GetObject" if self.method in ("GET", "HEAD") else "s3:PutObject"


@dataclass(frozen=True)
class Refusal:
    """An error of S3. Without a code, the answer has no body."""

    status: int
    code: str = ""
    message: str = ""


Rule = Callable[[S3Request], Refusal | None]


class S3Proxy:
    """Listens on loopback and passes requests on to an S3 server, unless `rule` gives the error to answer with."""

    def __init__(self, endpoint: str, rule: Rule) -> None:
        self.rule = rule
        self.requests: list[S3Request] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = urlsplit(self.path)
                names = frozenset(name for name in self.headers if name.startswith("If-"))
                request = S3Request(self.command, parts.path, parse_qs(parts.query, keep_blank_values=True), names)
                proxy.requests.append(request)
                refusal = proxy.rule(request)
                if refusal:
                    self._send(refusal.status, {"Content-Type": "application/xml"}, _error_body(refusal))
                else:
                    self._pass_on(body)

            def _pass_on(self, body: bytes) -> None:
                connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=60)
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        connection.putheader(name, value)
                connection.endheaders(body)
                with contextlib.closing(connection), connection.getresponse() as response:
                    dropped = ("transfer-encoding", "connection")
                    headers = {name: value for name, value in response.getheaders() if name.lower() not in dropped}
                    self._send(response.status, headers, response.read())

            def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() != "content-length" or self.command == "HEAD":
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def pass_all(request: S3Request) -> None:
    """A rule that refuses nothing."""


def deny(*rights: str) -> Rule:
    """A rule that denies what these IAM actions allow."""
    return lambda request: access_denied(request) if request.right in rights else None


def allow(*rights: str) -> Rule:
    """A rule that denies everything except what these IAM actions allow."""
    return lambda request: None if request.right in rights else access_denied(request)


def access_denied(request: S3Request) -> Refusal:
    """The answer of S3 to a request without the right."""
    return Refusal(403, "AccessDenied", f"User: arn:aws:iam::1:user/x is not authorized to perform: {request.right}")


def _error_body(refusal: Refusal) -> bytes:
    if not refusal.code:
        return b""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f"<Error><Code>{refusal.code}</Code><Message>{refusal.message}</Message></Error>"
    ).encode()


@contextlib.contextmanager
def answering(content: bytes | None) -> Iterator[tuple[int, list[bytes]]]:
    """A server that answers each connection with these bytes; None: never. Yields its port and what it received."""
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as connections:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = connections.enter_context(listener.accept()[0])
                    received.append(connection.recv(65536))
                    if content is not None:
                        connection.sendall(content)
                        connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1], received
