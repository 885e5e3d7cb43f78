"""The routes of a loopback Hub about people, and what repositories they have."""

from __future__ import annotations

from typing import Any

from loopback_cards import check_card
from loopback_objects import HubError
from loopback_routes import Call, address, route
from loopback_store import Repo


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
        call.store.moved[repo.kind, asked["fromRepo"]] = repo.id
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
