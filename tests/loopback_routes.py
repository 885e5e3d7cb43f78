"""The routes of a loopback Hub, as far as huggingface_hub, datasets and transformers ask for them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlencode

from loopback_cards import card_tags, check_card
from loopback_http import Handler, send_file
from loopback_objects import Blob, HubError, pointer
from loopback_store import KINDS, Commit, Repo

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
        """The repository; an error where this user may not know of it."""
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


# ---------------------------------------------------------------------- people and repositories


@route("GET", "/api/agent-harnesses")
@route(
    "GET", "/(?:info|parquet|splits|is-valid|croissant)"
)  # the dataset viewer, which knows no dataset here
def _nothing(call: Call) -> None:
    call.say({"error": "Not found"}, 404)


@route("GET", "/api/whoami-v2")
def _whoami(call: Call) -> None:
    user = call.known()
    orgs = [
        {
            "type": "org",
            "id": name,
            "name": name,
            "fullname": name,
            "roleInOrg": members[user],
            "isEnterprise": False,
        }
        for name, members in call.store.orgs.items()
        if user in members
    ]
    token: dict[str, Any] = {
        "displayName": "a test's",
        "role": call.role,
        "createdAt": "2026-01-01T00:00:00.000Z",
    }
    if call.role == "fineGrained":
        entity = {"_id": user, "type": "user", "name": user}
        scope = {"entity": entity, "permissions": ["repo.content.read", "repo.write"]}
        token["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": [scope]}
    auth = {"type": "access_token", "accessToken": token}
    call.say(
        {
            "type": "user",
            "id": user,
            "name": user,
            "fullname": user,
            "isPro": False,
            "orgs": orgs,
            "auth": auth,
        }
    )


@route("POST", "/api/validate-yaml")
def _validate(call: Call) -> None:
    try:
        card = check_card(call.http.json()["content"])
    except HubError as error:
        call.say({"errors": [{"message": error.message}], "warnings": [], "error": error.message}, 400)
        return
    warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
    call.say({"errors": [], "warnings": warnings})


def _owned(call: Call, repo_id: str, repo: Repo | None = None) -> None:
    """Refuses who may not make, move or delete repositories of that name."""
    owner = repo_id.split("/")[0]
    if not call.store.may_write(call.known(), call.role, owner, repo):
        what = "your token has the role read" if call.role == "read" else f"not the rights for {owner}"
        raise HubError(403, f"You don't have the rights to do this under the namespace {owner}: {what}")


def address(call: Call, repo: Repo) -> str:
    """Of a repository, for people."""
    return f"{call.hub.url}/{repo.prefix}{repo.id}"


@route("POST", "/api/repos/create")
def _create(call: Call) -> None:
    asked = call.http.json()
    kind = asked.get("type") or "model"
    repo_id = f"{asked.get('organization') or call.known()}/{asked['name']}"
    taken = call.store.repos.get((kind, repo_id))
    if taken and call.store.is_member(call.user, taken.owner):
        message = f"You already created this {kind} repo: {repo_id}"
        raise HubError(409, message, body={"url": address(call, taken)})
    _owned(call, repo_id)
    private = asked.get("visibility") == "private" or asked.get("private") is True
    repo = call.store.create(kind, repo_id, call.known(), private)
    call.say({"url": address(call, repo), "name": repo_id, "id": repo_id, "private": private})


@route("DELETE", "/api/repos/delete")
def _delete(call: Call) -> None:
    asked = call.http.json()
    repo_id = f"{asked.get('organization') or call.known()}/{asked['name']}"
    repo = call.store.readable(asked.get("type") or "model", repo_id, call.user)
    _owned(call, repo_id, repo)
    del call.store.repos[repo.kind, repo_id]
    call.say({})


@route("POST", "/api/repos/move")
def _move(call: Call) -> None:
    asked = call.http.json()
    repo = call.store.readable(asked.get("type") or "model", asked["fromRepo"], call.user)
    _owned(call, repo.id, repo)
    _owned(call, asked["toRepo"])
    with call.store.lock:
        if (repo.kind, asked["toRepo"]) in call.store.repos:
            raise HubError(409, f"{asked['toRepo']} is there already")
        del call.store.repos[repo.kind, repo.id]
        repo.id = asked["toRepo"]
        call.store.repos[repo.kind, repo.id] = repo
    call.say({})


@route("PUT", "/api/{T}/{id}/settings")
def _settings(call: Call) -> None:
    repo, asked = call.writable(), call.http.json()
    if "visibility" in asked or "private" in asked:
        repo.private = asked.get("visibility") == "private" or asked.get("private") is True
    repo.gated = bool(asked.get("gated", repo.gated))
    call.say({"private": repo.private, "gated": repo.gated})


@route("GET", "/api/{T}/{id}/auth-check")
def _auth_check(call: Call) -> None:
    call.store.check_gate(call.repo, call.user)
    call.say({})


@route("GET", "/api/{T}/{id}/auth-check/write")
def _auth_check_write(call: Call) -> None:
    call.writable()
    call.say({})


# ---------------------------------------------------------------------- what is there


def _info(call: Call, repo: Repo, commit: Commit, listed: bool = False) -> dict[str, Any]:
    """What the Hub says of a repository."""
    readme = commit.tree.get("README.md")
    card = check_card(repo.objects.read(readme).decode("utf-8", "replace")) if readme else {}
    siblings = []
    for path, blob in commit.tree.items():
        sibling: dict[str, Any] = {"rfilename": path}
        if call.query.get("blobs") == "true":
            sibling |= {"size": blob.size, "blobId": blob.git} | (
                {"lfs": _lfs(blob, "sha256")} if blob.lfs else {}
            )
        siblings.append(sibling)
    tags = card_tags(card) + (
        ["safetensors"] if any(path.endswith(".safetensors") for path in commit.tree) else []
    )
    told: dict[str, Any] = {
        "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "author": repo.owner,
        "sha": commit.id,
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "disabled": False,
        "lastModified": iso(commit.date),
        "createdAt": iso(repo.created),
        "downloads": 0,
        "likes": 0,
        "tags": [*dict.fromkeys(tags), "region:us"],
        "siblings": siblings,
        "usedStorage": sum(blob.size for blob in commit.tree.values()),
    }
    if card and not listed:
        told["cardData"] = card
    if repo.kind == "model":
        told |= {"modelId": repo.id}
        told |= {key: card[key] for key in ("pipeline_tag", "library_name", "model-index") if key in card}
        if "model-index" in card and isinstance(card["model-index"], list):
            told["model-index"] = card["model-index"]
    wanted = call.query.get("expand") or call.query.get("expand[]")
    if wanted:
        return {key: told[key] for key in told if key in ("_id", "id", *wanted.split(","))}
    return told


def _lfs(blob: Blob, digest: str = "oid") -> dict[str, Any]:
    return {digest: blob.sha256, "size": blob.size, "pointerSize": len(pointer(blob.sha256, blob.size))}


@route("GET", "/api/{T}/{name}")
def _info_of_nothing(call: Call) -> None:
    call.store.readable(call.kind, call.parts["name"], call.user)  # there are none without an owner


@route("GET", "/api/{T}/{id}[/revision/{rev}]?")
def _repo_info(call: Call) -> None:
    repo = call.repo
    call.say(_info(call, repo, repo.find(call.rev)))


@route("GET", "/api/{T}")
def _list(call: Call) -> None:
    asked = call.query
    found = [
        repo
        for repo in call.store.repos.values()
        if repo.kind == call.kind
        and (not repo.private or call.store.is_member(call.user, repo.owner))
        and asked.get("author") in (None, repo.owner)
        and asked.get("search", "").lower() in repo.id.lower()
    ]
    call.pages(found, lambda repo: _info(call, repo, repo.find("main"), True))


def _entry(call: Call, repo: Repo, commit: Commit, path: str) -> dict[str, Any]:
    """What a list of files says of a file or folder."""
    if path not in commit.tree:
        inside = "".join(
            f"{name}{blob.git}" for name, blob in commit.tree.items() if name.startswith(path + "/")
        )
        told: dict[str, Any] = {
            "type": "directory",
            "oid": hashlib.sha1(inside.encode()).hexdigest(),
            "size": 0,
        }
    else:
        blob = commit.tree[path]
        told = {"type": "file", "oid": blob.git, "size": blob.size}
        if blob.lfs:
            told["lfs"] = _lfs(blob)
            if found := repo.objects.xet_hash(blob.sha256):
                told["xetHash"] = found
    told["path"] = path
    if call.query.get("expand") == "true":
        last = commit
        for earlier in commit.history():
            if earlier.tree.get(path) != commit.tree.get(path):
                break
            last = earlier
        told["lastCommit"] = {"id": last.id, "title": last.title, "date": iso(last.date)}
    return told


def _folders(paths: Iterable[str]) -> set[str]:
    return {str(above) for path in paths for above in PurePosixPath(path).parents} - {"."}


@route("GET", "/api/{T}/{id}/tree/{rev}[/{path}]?")
def _tree(call: Call) -> None:
    repo = call.repo
    commit = repo.find(call.rev)
    paths = sorted({*commit.tree, *_folders(commit.tree)})
    if call.path:
        if call.path not in _folders(commit.tree):
            raise HubError(404, f"{call.path} does not exist on {call.rev}", "EntryNotFound")
        paths = [path for path in paths if path.startswith(call.path + "/")]
    if call.query.get("recursive") not in ("true", "1", "True"):
        depth = call.path.count("/") + 1 if call.path else 0
        paths = [path for path in paths if path.count("/") == depth]
    call.pages(paths, lambda path: _entry(call, repo, commit, path))


@route("POST", "/api/{T}/{id}/paths-info/{rev}")
def _paths_info(call: Call) -> None:
    repo = call.repo
    commit = repo.find(call.rev)
    if "json" in call.http.headers.get("Content-Type", ""):
        asked = call.http.json()
        paths = asked["paths"]
    else:
        asked = parse_qs(call.http.body.read().decode())
        paths = asked.get("paths", [])
    if str(asked.get("expand", "")).strip("[]'").lower() in ("true", "1"):
        call.query["expand"] = "true"
    there = {*commit.tree, *_folders(commit.tree)}
    call.say(
        [_entry(call, repo, commit, path) for path in (path.strip("/") for path in paths) if path in there]
    )


@route("GET", "/api/{T}/{id}/refs")
def _refs(call: Call) -> None:
    told: dict[str, Any] = {"branches": [], "tags": [], "converts": []}
    if call.query.get("include_prs") in ("1", "true"):
        told["pullRequests"] = []
    groups = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
    for ref, commit in call.repo.refs().items():
        start, group = next((start, group) for start, group in groups.items() if ref.startswith(start))
        if group in told:
            name = ref if group == "pullRequests" else ref.removeprefix(start)
            told[group].append({"name": name, "ref": ref, "targetCommit": commit})
    call.say(told)


@route("GET", "/api/{T}/{id}/commits/{rev}")
def _commits(call: Call) -> None:
    def show(commit: Commit) -> dict[str, Any]:
        return {
            "id": commit.id,
            "title": commit.title,
            "message": commit.message,
            "date": iso(commit.date),
            "authors": [{"user": commit.user}],
        }

    call.pages(call.repo.commits(call.rev), show)


@route("GET", "/api/{T}/{id}/discussions")
def _discussions(call: Call) -> None:
    repo, asked = call.repo, call.query
    shown = [
        {
            "num": pull.number,
            "title": pull.title,
            "author": {"name": pull.author, "type": "user"},
            "createdAt": iso(pull.created),
            "status": pull.status,
            "isPullRequest": True,
            "repo": {"name": repo.id, "type": repo.kind},
        }
        for pull in reversed(repo.pulls.values())
        if asked.get("author") in (None, pull.author)
        and asked.get("status", "all") in ("all", pull.status)
        and asked.get("type", "all") != "discussion"
    ]
    call.say({"discussions": shown, "count": len(shown), "start": 0, "numClosedDiscussions": 0})


@route("GET", "/{name}/resolve/{rev}/{path}")
def _resolve_nothing(call: Call) -> None:
    call.store.readable("model", call.parts["name"], call.user)


@route("GET", "/{P}{id}/(?:resolve|raw)/{rev}/{path}")
def _resolve(call: Call) -> None:
    repo = call.repo
    call.store.check_gate(repo, call.user)
    commit = repo.find(call.rev)
    headers = {"X-Repo-Commit": commit.id}
    blob = commit.tree.get(call.path)
    if blob is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    headers |= {
        "ETag": f'"{blob.oid}"',
        "Content-Disposition": f'inline; filename="{PurePosixPath(call.path).name}"',
    }
    if not blob.lfs:
        with repo.objects.open(blob) as file:
            send_file(call.http, file, blob.size, headers)
        return
    headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"'}
    if found := repo.objects.xet_hash(blob.sha256):
        route = f"{call.hub.url}/api/{repo.kind}s/{repo.id}/xet-read-token/{commit.id}"
        headers |= {"X-Xet-Hash": found, "X-Xet-Refresh-Route": route, "Link": f'<{route}>; rel="xet-auth"'}
    headers["Location"] = f"{call.hub.content_url}/content/{blob.sha256}?size={blob.size}"
    call.http.say(302, f"Found. Redirecting to {headers['Location']}".encode(), headers)


@route("GET", "/content/{oid}")
def _content(call: Call) -> None:
    blob = call.store.objects.large(call.parts["oid"], int(call.query["size"]))
    with call.store.objects.open(blob) as file:
        send_file(call.http, file, blob.size, {"ETag": f'"{blob.sha256}"'})
