"""A Hub on this machine that the real clients talk to: its state and faults for tests; the routes are elsewhere."""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import loopback_changes
import loopback_people
import loopback_reading
from loopback_http import Fault, Handler, Request, Server, discard
from loopback_objects import HubError
from loopback_routes import ROUTES, Call
from loopback_store import Repo, Store

__all__ = ["LoopbackHub", "Repo", "Request", "loopback_hub"]

_ROUTED = (loopback_people, loopback_reading, loopback_changes)
"""Importing them registers their routes."""


class LoopbackHub:
    """A Hub; killed and started again, it remembers everything that it had answered for.

    Args:
        folder: where objects are kept.
    """

    lfs_bytes = 10_000_000
    """Files of more are large ones, whatever they are called."""
    multipart_bytes = 50_000_000
    """Large files of more are sent in parts."""
    part_bytes = 20_000_000
    page = 1000
    """Entries in one answer of a list."""

    def __init__(self, folder: Path):
        self.store = Store(folder)
        self.requests: list[Request] = []
        self.unknown: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.port = 0
        self.server: Server | None = None
        self.start()

    # ------------------------------------------------------------------ the scene

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def content_url(self) -> str:
        """The other origin, which serves and takes large files without a token."""
        return f"http://localhost:{self.port}"

    def token(self, user: str, role: str = "write") -> str:
        """A new token of a user, who is made where new; the role is read, write or fineGrained."""
        self.store.users.add(user)
        token = f"hf_{secrets.token_hex(17)}"
        self.store.tokens[token] = (user, role)
        return token

    def add_org(self, name: str, members: dict[str, str]) -> None:
        """An organization; its members' roles are admin, write, contributor or read."""
        self.store.orgs[name] = dict(members)

    def create(
        self,
        repo_id: str,
        kind: str = "model",
        private: bool = False,
        gated: bool = False,
        files: dict[str, bytes] | None = None,
    ) -> Repo:
        """A repository, straight into the store; files come with a second commit."""
        owner = repo_id.split("/")[0]
        repo = self.store.create(kind, repo_id, owner, private)
        repo.gated = gated
        if files:
            blobs = {}
            for path, content in files.items():
                blob = self.store.objects.regular(content)
                if content and (repo.is_large(path, "main") or len(content) > self.lfs_bytes):
                    blob = self.store.objects.large(blob.sha256, blob.size)
                blobs[path] = blob
            self.store.add(repo, "main", owner, "Set the scene", files=blobs)
        return repo

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        """A repository; KeyError where there is none."""
        return self.store.repos[kind, repo_id]

    def environment(self, token: str | None, home: Path, xet: bool = False) -> dict[str, str]:
        """The variables of a client's process.

        Args:
            token: none for somebody who has not logged in.
            home: of its caches.
            xet: whether large files go through Xet.
        """
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE_"))
        }
        told = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return kept | told | ({"HF_TOKEN": token} if token else {})

    # ------------------------------------------------------------------ what goes wrong

    def fault(
        self,
        method: str,
        pattern: str,
        *,
        status: int | None = None,
        headers: dict[str, str] | None = None,
        drop_request_after: int | None = None,
        drop_response_after: int | None = None,
        delay: float | None = None,
        times: int = 1,
        skip: int = 0,
        die: Literal["before", "after"] | None = None,
    ) -> None:
        """Lets something go wrong with the next requests that match.

        Args:
            method: a pattern for the whole of it, such as `PUT|POST` or `.*`.
            pattern: is searched for in "METHOD path", the path percent-encoded and without its query.
            status: answered in the place of the true answer; nothing is done.
            headers: of that answer.
            drop_request_after: so many bytes of the request's body the connection is cut; nothing is done.
            drop_response_after: the same for the answer's body.
            delay: seconds before anything else.
            times: how many requests.
            skip: after how many that match.
            die: the whole server is killed before the request is handled, or after and before any answer.
        """
        limits = (drop_request_after, drop_response_after)
        with self.lock:
            self.faults.append(
                Fault(method, pattern, status, headers or {}, *limits, delay, times, skip, die)
            )

    def kill(self) -> None:
        """Ends the server with all its connections at once; what it keeps stays."""
        if self.server:
            self.server.kill()

    def start(self) -> None:
        """Starts the server, again on the same port."""
        self.server = Server(self.port, self._log, self._answer)
        self.port = self.server.port

    # ------------------------------------------------------------------ requests

    def _log(self, request: Request) -> Fault | None:
        """Keeps a request in the log and answers what is to go wrong with it."""
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times <= 0 or not fault.matches(request):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def _answer(self, handler: Handler) -> None:
        """Answers a request."""
        request = handler.request_log
        for method, pattern, function in ROUTES:
            found = pattern.fullmatch(request.path)
            if found and (request.method == method or (request.method == "HEAD" and method == "GET")):
                call = Call(self, handler, found.groupdict())
                request.user = call.user
                function(call)
                return
        with self.lock:
            self.unknown.append(f"{request.method} {request.path}")
        raise HubError(404, f"The loopback Hub does not know {request.method} {request.path}")


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A Hub for the length of a block; fails where something was asked that it does not know."""
    folder = Path(tempfile.mkdtemp(prefix="loopback-hub-"))
    hub = LoopbackHub(folder)
    try:
        yield hub
    finally:
        hub.kill()
        discard(folder)
    assert not hub.unknown, f"the loopback Hub does not know {hub.unknown}"
