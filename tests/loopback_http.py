"""The HTTP side of a loopback Hub: bodies as streams, a log, faults, and a death that leaves nothing open."""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO, Literal
from urllib.parse import parse_qs, urlsplit

from loopback_objects import HubError

CHUNK = 1 << 16
UNLOGGED = "/api/agent-harnesses"
"""Asked once a day for nothing that matters here: neither logged nor counted by faults."""


@dataclass
class Request:
    """What a client asked; tokens are not kept."""

    method: str
    path: str
    """As it arrived, percent-encoded, without the query."""
    query: dict[str, str]
    user: str | None = None
    status: int = 0
    """Of the answer; 0 where there was none."""
    body_bytes: int = 0
    """How many bytes of the request's body arrived."""


@dataclass
class Fault:
    """What is to go wrong with some requests; see `LoopbackHub.fault`."""

    method: str
    pattern: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop_request_after: int | None = None
    drop_response_after: int | None = None
    delay: float | None = None
    times: int = 1
    skip: int = 0
    die: Literal["before", "after"] | None = None

    def matches(self, request: Request) -> bool:
        """Whether it goes for a request."""
        method = re.fullmatch(self.method, request.method)
        return bool(method and re.search(self.pattern, f"{request.method} {request.path}"))


class DroppedError(Exception):
    """The connection is to end, or has."""


class Body(io.RawIOBase):
    """What a request carries, as it comes in; ends where it ends, and fails where it ends too early."""

    def __init__(self, source: io.BufferedIOBase, headers: Any, request: Request, limit: int | None):
        self.source, self.request, self.limit = source, request, limit
        self.chunked = headers.get("Transfer-Encoding", "").lower() == "chunked"
        self.left = 0 if self.chunked else int(headers.get("Content-Length") or 0)
        self.ended = not self.chunked and not self.left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.chunked and not self.left and not self.ended:
            self.left = int(self.source.readline() or self.fail(), 16)
            if not self.left:
                self.source.readline()
                self.ended = True
        if self.ended:
            return 0
        wanted = min(len(buffer), self.left)
        if self.limit is not None:
            wanted = min(wanted, max(self.limit - self.request.body_bytes, 0))
        got = self.source.read1(wanted) if wanted else b""
        if not got:
            self.fail()
        buffer[: len(got)] = got
        self.request.body_bytes += len(got)
        self.left -= len(got)
        if not self.left:
            if self.chunked:
                self.source.readline()
            else:
                self.ended = True
        return len(got)

    def fail(self) -> bytes:
        """Says that there was to be more."""
        raise DroppedError


class Handler(BaseHTTPRequestHandler):
    """Carries one connection."""

    protocol_version = "HTTP/1.1"
    server: Server
    request_log: Request
    fault: Fault | None
    body: io.BufferedReader
    answered: bool

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, *_: Any) -> None:
        """Says nothing: tests read the log."""

    def handle(self) -> None:
        with suppress(OSError, DroppedError):
            super().handle()

    def serve(self) -> None:
        """Answers one request, or does to it what is to go wrong."""
        address = urlsplit(self.path)
        query = {key: ",".join(values) for key, values in parse_qs(address.query, True).items()}
        self.request_log = Request(self.command, address.path, query)
        self.answered = False
        hub = self.server
        self.fault = None if address.path == UNLOGGED else hub.log(self.request_log)
        fault = self.fault
        if fault and fault.die == "before":
            hub.kill()
        if fault and fault.delay:
            hub.dead.wait(fault.delay)
        if hub.dead.is_set():
            raise DroppedError
        limit = fault.drop_request_after if fault else None
        self.body = io.BufferedReader(Body(self.rfile, self.headers, self.request_log, limit), CHUNK)
        try:
            if limit is not None:
                self.drain()
                raise DroppedError  # the body was shorter than that
            if fault and fault.status:
                raise HubError(fault.status, "This is a fault that a test asked for.", headers=fault.headers)
            hub.answer(self)
        except HubError as error:
            headers = {"X-Error-Message": error.message.replace("\n", " ")} | error.headers
            headers |= {"X-Error-Code": error.code} if error.code else {}
            self.say(error.status, {"error": error.message} | error.body, headers)
        except DroppedError:
            self.cut()
            raise
        assert self.answered, f"{self.command} {self.path} has no answer"

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = serve

    def drain(self) -> None:
        """Reads what the handler left of the body: the next request comes after it."""
        while self.body.read1(CHUNK):
            pass

    def json(self) -> Any:
        """The body, small and of JSON."""
        try:
            return json.loads(self.body.read() or b"{}")
        except ValueError as error:
            raise HubError(400, "The request is no JSON") from error

    def chunks(self) -> Iterator[bytes]:
        """The body, bit by bit."""
        while chunk := self.body.read1(CHUNK):
            yield chunk

    def say(
        self,
        status: int,
        content: Any = b"",
        headers: dict[str, str] | None = None,
        *,
        file: BinaryIO | None = None,
        length: int | None = None,
    ) -> None:
        """Answers.

        Args:
            status: of the answer.
            content: bytes, or what becomes JSON.
            headers: on top of the length.
            file: is sent in the place of the content, from where it stands.
            length: of the file's part to send; of what a GET would send, for a HEAD.
        """
        self.drain()
        self.answered = True
        self.request_log.status = status
        fault = self.fault
        if fault and fault.die == "after":
            self.server.kill()
        if self.server.dead.is_set():
            raise DroppedError
        headers = {"Content-Type": "application/octet-stream"} | (headers or {})
        if not isinstance(content, bytes):
            content = json.dumps(content, default=str).encode()  # cards hold dates
            headers["Content-Type"] = "application/json; charset=utf-8"
        length = len(content) if length is None else length
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        left = length if not fault or fault.drop_response_after is None else fault.drop_response_after
        source = file or io.BytesIO(content)
        while left > 0 and (chunk := source.read(min(CHUNK, left))):
            self.wfile.write(chunk)
            left -= len(chunk)
        if fault and fault.drop_response_after is not None:
            self.cut()
            raise DroppedError

    def cut(self) -> None:
        """Ends the connection early, but in order: what was sent arrives, which a reset could overtake."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class Server(ThreadingHTTPServer):
    """Listens until it is killed.

    Args:
        port: 0 for any.
        log: keeps a request and answers what is to go wrong with it.
        answer: answers a request.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, port: int, log: Callable[[Request], Fault | None], answer: Callable[[Handler], None]):
        self.log, self.answer = log, answer
        self.dead = threading.Event()
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)
        self.port = self.server_address[1]
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            if self.dead.is_set():
                _reset(request)
                request.close()
                return
            self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_: Any) -> None:
        """A mistake of the server's own is told where its answer is missed."""
        import sys
        import traceback

        error = sys.exc_info()[1]
        if not isinstance(error, OSError | DroppedError):
            traceback.print_exc()

    def kill(self) -> None:
        """Ends it and all its connections at once."""
        with self.lock:
            first = not self.dead.is_set()
            self.dead.set()
            for connection in self.connections:
                _reset(connection)
        if first:
            self.socket.close()
            self.shutdown()


def _reset(connection: socket.socket) -> None:
    """Ends a connection whoever reads or writes it just now."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)


def send_file(handler: Handler, file: BinaryIO, size: int, headers: dict[str, str]) -> None:
    """Answers with a file, or the part of it that the client asks for."""
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", handler.headers.get("Range", ""))
    if not asked or asked[0] == "bytes=-":
        handler.say(200, headers=headers | {"Accept-Ranges": "bytes"}, file=file, length=size)
        return
    first = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
    last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
    if first > last:
        raise HubError(416, "There is no such part", headers={"Content-Range": f"bytes */{size}"})
    file.seek(first)
    headers = headers | {"Accept-Ranges": "bytes", "Content-Range": f"bytes {first}-{last}/{size}"}
    handler.say(206, headers=headers, file=file, length=last - first + 1)


def copy_parts(parts: list[BinaryIO]) -> Iterator[bytes]:
    """The contents of files one after the other."""
    for part in parts:
        with part:
            while chunk := part.read(CHUNK):
                yield chunk


def discard(folder: Any) -> None:
    """Removes a folder that a late thread may still write to."""
    shutil.rmtree(folder, ignore_errors=True)
