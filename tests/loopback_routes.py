"""How the routes of a loopback Hub are written: `loopback_people`, `loopback_reading` and `loopback_changes` have them."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlencode

from loopback_http import Handler
from loopback_objects import HubError
from loopback_store import KINDS, Repo

if TYPE_CHECKING:
    from loopback_hub import LoopbackHub

ROUTES: list[tuple[str, re.Pattern[str], Callable[[Call], None]]] = []
"""Method, path and what answers; the first that matches does."""

_PARTS = {
    "{T}": "(?P<kinds>models|datasets|spaces)",
    "{P}": "(?:(?P<kinds>datasets|spaces)/)?",
    "{id}": "(?P<id>[^/]+/[^/]+?)",
    "{rev}": "(?P<rev>refs/(?:pr|convert)/[^/]+|[^/]+)",
    "{path}": "(?P<path>.+)",
    "{oid}": "(?P<oid>[0-9a-f]{64})",
    "{name}": "(?P<name>[^/]+)",
}


def route(methods: str, path: str) -> Callable[[Callable[[Call], None]], Callable[[Call], None]]:
    """Registers what answers a path; what stands in brackets may be left out."""
    path = path.replace("[", "(?:").replace("]?", ")?")
    for part, pattern in _PARTS.items():
        path = path.replace(part, pattern)
    compiled = re.compile(path)

    def register(function: Callable[[Call], None]) -> Callable[[Call], None]:
        ROUTES.extend((method, compiled, function) for method in methods.split())
        return function

    return register


class Call:
    """A request on its way to the answer: who asks, for which repository and revision."""

    def __init__(self, hub: LoopbackHub, handler: Handler, parts: dict[str, str | None]):
        self.hub, self.store, self.http = hub, hub.store, handler
        self.query = handler.request_log.query
        self.parts = {key: unquote(value) for key, value in parts.items() if value is not None}
        self.path = self.parts.get("path", "").strip("/")
        self.rev = self.parts.get("rev", "main")
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user: str | None = None
        self.role = ""
        if token:
            if token not in self.store.tokens:
                raise HubError(401, "Invalid credentials in Authorization header")
            self.user, self.role = self.store.tokens[token]

    @property
    def kind(self) -> str:
        """Of the repository."""
        return KINDS[self.parts.get("kinds", "models")]

    @property
    def repo(self) -> Repo:
        """The repository; an error where this user may not know of it, a redirection where it has moved."""
        moved = (self.kind, self.parts["id"])
        if moved in self.store.moved and moved not in self.store.repos:
            log = self.http.request_log
            place = log.path.replace(quote(moved[1]), quote(self.store.moved[moved]), 1)
            place += f"?{urlencode(log.query)}" if log.query else ""
            raise HubError(307, f"Moved to {place}", headers={"Location": place})
        return self.store.readable(self.kind, self.parts["id"], self.user)

    def known(self) -> str:
        """The user; an error where nobody has logged in."""
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        return self.user

    def writable(self, propose: bool = False) -> Repo:
        """The repository; an error where this user may not write to it, or propose to."""
        repo = self.repo
        if self.user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if not self.store.may_write(self.user, self.role, repo.owner, repo):
            if self.role == "read":
                raise HubError(403, "Forbidden: your token has the role read; this takes write")
            if not propose or self.role == "fineGrained":
                raise HubError(403, "Forbidden: you don't have the rights to write to this repository")
        return repo

    def say(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answers."""
        self.http.say(status, content, headers)

    def pages(self, entries: list[Any], show: Callable[[Any], Any]) -> None:
        """Answers with a list, from where the client is, and where there is more of it."""
        start, limit = (
            int(self.query.get("cursor", 0)),
            min(int(self.query.get("limit", 1000)), self.hub.page),
        )
        headers = {}
        if start + limit < len(entries):
            query = urlencode(self.query | {"cursor": str(start + limit)})
            headers["Link"] = f'<{self.hub.url}{self.http.request_log.path}?{query}>; rel="next"'
        self.say([show(entry) for entry in entries[start : start + limit]], headers=headers)


def iso(date: datetime) -> str:
    """A date as the Hub writes it."""
    return date.strftime("%Y-%m-%dT%H:%M:%S.") + f"{date.microsecond // 1000:03}Z"


def address(call: Call, repo: Repo) -> str:
    """Of a repository, for people."""
    return f"{call.hub.url}/{repo.prefix}{repo.id}"
