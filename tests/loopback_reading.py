"""The routes of a loopback Hub that tell what is in a repository."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs

from loopback_cards import card_tags, check_card
from loopback_http import send_file
from loopback_objects import Blob, HubError, pointer
from loopback_routes import Call, iso, route
from loopback_store import Commit, Repo


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
