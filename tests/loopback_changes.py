"""The routes of a loopback Hub that change a repository's files and refs."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

from loopback_cards import check_card
from loopback_http import copy_parts
from loopback_objects import Blob, HubError
from loopback_routes import Call, address, route

# ---------------------------------------------------------------------- changes


@route("POST", "/api/{T}/{id}/preupload/{rev}")
def _preupload(call: Call) -> None:
    repo, asked = call.writable("create_pr" in call.query), call.http.json()
    tree = repo.find(call.rev).tree
    ignored = [
        line.strip() for line in asked.get("gitIgnore", "").splitlines() if line.strip() and line[0] != "#"
    ]
    told = []
    for file in asked["files"]:
        path = file["path"]
        large = file["size"] > call.hub.lfs_bytes or repo.is_large(path, call.rev)
        parts = [path, *PurePosixPath(path).parts]
        told.append(
            {
                "path": path,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": any(fnmatch(part, line.rstrip("/")) for line in ignored for part in parts),
            }
            | ({"oid": tree[path].oid} if path in tree else {})
        )
    call.say({"files": told, "commitOid": repo.find(call.rev).id})


def _operations(call: Call) -> tuple[dict[str, Any], dict[str, Blob], list[str]]:
    """What a commit's body asks for: its header, files to write and paths to delete."""
    header: dict[str, Any] = {}
    files: dict[str, Blob] = {}
    deleted = []
    objects = call.store.objects
    for line in call.http.body:
        if not line.strip():
            continue
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "header":
            header = value
        elif key == "file":
            content = value["content"]
            raw = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
            if value["path"] == "README.md":
                check_card(raw.decode("utf-8", "replace"))
            files[value["path"]] = objects.regular(raw)
        elif key == "lfsFile":
            if not objects.has(value["oid"]) and not objects.xet_hash(value["oid"]):
                raise HubError(400, f"LFS pointer of {value['path']} points to a file that does not exist")
            size = objects.path(value["oid"]).stat().st_size if objects.has(value["oid"]) else value["size"]
            files[value["path"]] = objects.large(value["oid"], size)
        elif key == "deletedFile":
            deleted.append(value["path"])
        elif key == "deletedFolder":
            deleted.append(value["path"].rstrip("/") + "/")
        else:
            raise HubError(400, f"A commit knows no {key}")
    return header, files, deleted


@route("POST", "/api/{T}/{id}/commit/{rev}")
def _commit(call: Call) -> None:
    propose = call.query.get("create_pr") in ("1", "true")
    repo = call.writable(propose)
    header, files, deleted = _operations(call)
    commit, pull = call.store.add(
        repo,
        call.rev,
        call.known(),
        header["summary"],
        header.get("description", ""),
        files=files,
        deleted=deleted,
        parent=header.get("parentCommit"),
        propose=propose,
    )
    told = {
        "success": True,
        "commitOid": commit.id,
        "commitUrl": f"{address(call, repo)}/commit/{commit.id}",
    }
    if pull:
        told["pullRequestUrl"] = f"{address(call, repo)}/discussions/{pull.number}"
    call.say(told | {"hookOutput": ""})


@route("POST", "/api/{T}/{id}/tag/{rev}")
def _tag(call: Call) -> None:
    repo, asked = call.writable(), call.http.json()
    with call.store.lock:
        if asked["tag"] in repo.tags:
            raise HubError(409, f"Tag reference exists already: {asked['tag']}")
        repo.tags |= {asked["tag"]: repo.find(call.rev)}
    call.say({})


@route("DELETE", "/api/{T}/{id}/tag/{rev}")
def _untag(call: Call) -> None:
    repo = call.writable()
    with call.store.lock:
        if call.rev not in repo.tags:
            raise HubError(404, f"There is no tag {call.rev}", "RevisionNotFound")
        repo.tags = {name: commit for name, commit in repo.tags.items() if name != call.rev}
    call.say({})


@route("POST", "/api/{T}/{id}/branch/{rev}")
def _branch(call: Call) -> None:
    repo, asked = call.writable(), call.http.json()
    with call.store.lock:
        if call.rev in repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{call.rev}")
        repo.branches |= {call.rev: repo.find(asked.get("startingPoint") or "main")}
    call.say({})


@route("DELETE", "/api/{T}/{id}/branch/{rev}")
def _unbranch(call: Call) -> None:
    repo = call.writable()
    with call.store.lock:
        if call.rev not in repo.branches:
            raise HubError(404, f"There is no branch {call.rev}", "RevisionNotFound")
        if call.rev == "main":
            raise HubError(403, "The branch main cannot be deleted")
        repo.branches = {name: commit for name, commit in repo.branches.items() if name != call.rev}
    call.say({})


# ---------------------------------------------------------------------- large files


@route("POST", "/{P}{id}.git/info/lfs/objects/batch")
def _batch(call: Call) -> None:
    repo, asked, hub = call.writable(propose=True), call.http.json(), call.hub
    told = []
    for entry in asked["objects"]:
        oid, size = entry["oid"], entry["size"]
        if not call.store.objects.has(oid):
            upload: dict[str, Any] = {"href": f"{hub.content_url}/lfs/{oid}"}
            if size > hub.multipart_bytes and "multipart" in asked.get("transfers", []):
                parts = {
                    f"{n:05}": f"{hub.content_url}/lfs/{oid}/{n}"
                    for n in range(1, -(-size // hub.part_bytes) + 1)
                }
                upload = {
                    "href": f"{hub.url}/lfs/{oid}/complete",
                    "header": {"chunk_size": str(hub.part_bytes)} | parts,
                }
            verify = {"href": f"{address(call, repo)}.git/info/lfs/verify"}
            entry = {
                "oid": oid,
                "size": size,
                "authenticated": True,
                "actions": {"upload": upload, "verify": verify},
            }
        told.append(entry)
    multipart = any("header" in entry.get("actions", {}).get("upload", {}) for entry in told)
    headers = {"Content-Type": "application/vnd.git-lfs+json"}
    call.say({"transfer": "multipart" if multipart else "basic", "objects": told}, headers=headers)


@route("PUT", "/lfs/{oid}")
def _put(call: Call) -> None:
    call.store.objects.add(call.http.chunks(), call.parts["oid"])
    call.say({}, headers={"ETag": f'"{call.parts["oid"]}"'})


@route("PUT", "/lfs/{oid}/{name}")
def _put_part(call: Call) -> None:
    objects = call.store.objects
    sha256, _ = objects.add(call.http.chunks())
    objects.path(sha256).replace(objects.partial / f"{call.parts['oid']}.{call.parts['name']}")
    call.say({}, headers={"ETag": f'"{sha256}"'})


@route("POST", "/lfs/{oid}/complete")
def _complete(call: Call) -> None:
    objects, oid, asked = call.store.objects, call.parts["oid"], call.http.json()
    if objects.has(oid):  # asked again
        call.say({})
        return
    paths = [objects.partial / f"{oid}.{part['partNumber']}" for part in asked["parts"]]
    if not all(path.is_file() for path in paths):
        raise HubError(400, "A part is missing")
    for path, part in zip(paths, asked["parts"]):
        if hashlib.sha256(path.read_bytes()).hexdigest() != part["etag"].strip('"'):
            raise HubError(400, "A part is not what its ETag says")
    objects.add(copy_parts([path.open("rb") for path in paths]), oid)
    for path in paths:
        path.unlink(missing_ok=True)
    call.say({})


@route("POST", "/{P}{id}.git/info/lfs/verify")
def _verify(call: Call) -> None:
    asked, objects = call.http.json(), call.store.objects
    call.writable(propose=True)
    if not objects.has(asked["oid"]) or objects.path(asked["oid"]).stat().st_size != asked["size"]:
        raise HubError(404, "The object has not arrived")
    call.say({})


@route("GET", "/api/{T}/{id}/xet-(?P<name>read|write)-token/{rev}")
def _xet_token(call: Call) -> None:
    if call.parts["name"] == "write":
        call.writable("create_pr" in call.query)
    else:
        call.store.check_gate(call.repo, call.user)
    call.store.objects.xet.mkdir(exist_ok=True)
    address, ends = f"local://{call.store.objects.xet}", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(ends)}
    call.say({"casUrl": address, "accessToken": "xet", "exp": ends}, headers=headers)
