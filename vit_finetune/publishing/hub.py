"""Repositories of the Hub written to: asked for permission before, and changed in one commit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash

from vit_finetune.console import warn
from vit_finetune.hub_repos import Kind, explaining_errors, persist, web_address
from vit_finetune.run import RunError

OURS = "vit-finetune"
"""The tag that every card of ours has: what carries it may be published over."""
WRITING_ROLES = ("admin", "write", "contributor")
"""Roles in an organization that may make repositories."""
MAIN = constants.DEFAULT_REVISION


@dataclass(frozen=True)
class Access:
    """What was found where something is to be published, before anything is sent."""

    user: str
    exists: bool
    private: bool | None
    """Of a repository that exists."""


@dataclass(frozen=True)
class Commit:
    """What a repository looks like after a push."""

    repo_id: str
    oid: str
    """Of the commit that holds the files: a new one, or the one that held them already."""
    address: str
    """Where people look at it: the commit, or the pull request."""
    sent: list[str]
    """Files that were other ones before, or not there."""
    deleted: list[str]


# --------------------------------------------------------------------------- before


def check_access(
    repo_id: str, kind: Kind = "model", private: bool | None = None, create_pr: bool = False
) -> Access:
    """What is there where something is to be published; makes sure that it may be, and changes nothing.

    Args:
        repo_id: `owner/name`.
        kind: of the repository.
        private: whether it shall be; None where it does not matter.
        create_pr: whether only a pull request is opened, which those who may not write can do too.

    Raises:
        RunError: no token or one that may not write there, no valid name, a repository that holds something
            else or is seen by others than asked for, or no connection.
    """
    with explaining_errors(repo_id, kind):
        who = persist(f"asking {constants.ENDPOINT} who you are", HfApi().whoami)
        user = str(who["name"])
        check_name(repo_id, user)
        _check_role(who)
        info = persist(f"looking at {repo_id}", lambda: _info(repo_id, kind))
        if info is None:
            _check_no_other_kind(repo_id, kind)
            if create_pr:
                raise RunError(
                    f"{repo_id}: there is no such {kind} to open a pull request on; leave out create_pr"
                )
            _check_namespace(repo_id, who)
            return Access(user, exists=False, private=None)
        if not create_pr:
            _check_may_write(repo_id, kind, user)
            _check_is_ours(repo_id, kind, info)
        if private is not None and private != info.private:
            raise RunError(
                f"{repo_id} is {'private' if info.private else 'public'} already, and was asked to be "
                f"{'private' if private else 'public'}. Change it on {web_address(repo_id, kind)}/settings, "
                f"or leave out what asks for it"
            )
        return Access(user, exists=True, private=bool(info.private))


def _info(repo_id: str, kind: str, revision: str | None = None) -> Any:
    """The repository with its files' checksums; None where there is none."""
    try:
        return HfApi().repo_info(repo_id, repo_type=kind, revision=revision, files_metadata=True)
    except RepositoryNotFoundError:
        return None


def check_license(license: str, kind: Kind) -> None:
    """Raises RunError where the Hub would refuse a card for its licence: better before all else is done."""
    card = RepoCard(f"---\nlicense: {json.dumps(license)}\n---\n")
    with explaining_errors(license, kind):
        try:
            persist("asking the Hub about the licence", lambda: card.validate(repo_type=kind))
        except ValueError:
            raise RunError(
                f"{license!r} is no licence that the Hub knows. Write its identifier, such as apache-2.0 or "
                f"cc-by-4.0; all of them: {constants.ENDPOINT}/docs/hub/repositories-licenses"
            ) from None


def check_name(repo_id: str, user: str = "owner") -> None:
    """Raises RunError where the Hub takes no such name for a repository, or it does not say whose it is."""
    owner, slash, name = repo_id.partition("/")
    if not slash:
        raise RunError(f"{repo_id!r} does not say whose it is: write {user}/{repo_id}")
    bad = (
        not all(
            re.fullmatch(r"[A-Za-z0-9]([\w.-]{0,94}[A-Za-z0-9_])?", part, re.ASCII) for part in (owner, name)
        )
        or "--" in repo_id
        or ".." in repo_id
        or name.endswith(".git")
    )
    if bad:
        raise RunError(
            f"{repo_id!r} is no name that the Hub takes: expected owner/name, each up to 96 letters, digits, "
            f"- _ and ., beginning and ending with a letter or digit, without -- and .."
        )


def _check_role(who: Mapping[str, Any]) -> None:
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise RunError(
            f"your token may only read. Make one that may write on {constants.ENDPOINT}/settings/tokens, and "
            f"log in with it: `hf auth login`, or HF_TOKEN"
        )


def _check_namespace(repo_id: str, who: Mapping[str, Any]) -> None:
    owner = repo_id.partition("/")[0]
    orgs = {org["name"]: org.get("roleInOrg") for org in who.get("orgs") or []}
    if owner != who["name"] and orgs.get(owner, "") not in (*WRITING_ROLES, None):
        known = ", ".join([str(who["name"]), *(name for name, role in orgs.items() if role in WRITING_ROLES)])
        raise RunError(
            f"{repo_id}: you are {who['name']} and may not make repositories for {owner}, only for {known}"
        )
    token = (who.get("auth") or {}).get("accessToken") or {}
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and scopes is not None:
        writable = [s["entity"].get("name") for s in scopes if "repo.write" in s.get("permissions", [])]
        if owner not in writable:
            warn(f"your token is fine-grained and does not list writing for {owner}: the push may be refused")


def _check_no_other_kind(repo_id: str, kind: Kind) -> None:
    for other in ("model", "dataset", "space"):
        if other != kind and HfApi().repo_exists(repo_id, repo_type=other):
            raise RunError(f"{repo_id} is a {other} on the Hub, and no {kind}. Name another repository")


def _check_may_write(repo_id: str, kind: Kind, user: str) -> None:
    try:
        HfApi().auth_check(repo_id, repo_type=kind, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):
            raise
        raise RunError(
            f"{repo_id} is there, but you ({user}) may not write to it. Name a repository of "
            f"yours{_or_ask(kind)}"
        ) from None


def _or_ask(kind: Kind) -> str:
    return ", or open a pull request with create_pr" if kind == "model" else ""


def _check_is_ours(repo_id: str, kind: Kind, info: Any) -> None:
    """Raises RunError where a repository holds something that was not published by us."""
    files = [file.rfilename for file in info.siblings or []]
    others = [name for name in files if name not in (".gitattributes", "README.md", "LICENSE")]
    if others and OURS not in (info.tags or []):
        what = getattr(info, "pipeline_tag", None) or kind
        listed = f"{what}, {len(files)} files ({', '.join(others[:3])} …)"
        raise RunError(
            f"{repo_id} holds something else already: {listed}, and no card with the tag {OURS}. Name "
            f"another repository{_or_ask(kind)}"
        )


# --------------------------------------------------------------------------- the commit


class Files:
    """Files on their way to a repository: read once, however often they are compared and sent.

    Args:
        contents: a file, or bytes, by path in the repository.
    """

    def __init__(self, contents: Mapping[str, Path | bytes]) -> None:
        self.operations = {
            path: CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in contents.items()
        }
        self.sizes = {path: operation.upload_info.size for path, operation in self.operations.items()}

    def sha256(self, path: str) -> str:
        """The checksum of one, in hex."""
        return str(self.operations[path].upload_info.sha256.hex())

    def differing(self, there: Iterable[RepoSibling] | None) -> list[str]:
        """The paths of those that are not, or are other ones, among a repository's files."""
        known = {file.rfilename: file for file in there or []}
        return [path for path in self.operations if not self._is_same(path, known.get(path))]

    def _is_same(self, path: str, there: RepoSibling | None) -> bool:
        if there is None:
            return False
        if there.lfs is not None:
            return bool(there.lfs.sha256 == self.sha256(path))
        if there.size != self.sizes[path]:
            return False
        with self.operations[path].as_file() as opened:
            return bool(git_hash(opened.read()) == there.blob_id)


def commit_files(
    repo_id: str,
    kind: Kind,
    files: Files,
    is_stale: Callable[[str], bool],
    message: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Commit:
    """Makes a repository hold these files, in one commit; none where it does already.

    Faults that may pass are met by trying again. Whenever it is interrupted, saying the same again completes
    it: what was sent is not sent again, and what was committed is not committed again.

    Args:
        repo_id: `owner/name`.
        kind: of the repository; it is made where it is not there.
        files: all that it shall hold of ours.
        is_stale: whether a path that is there and none of ours is what an earlier push left, to be deleted.
        message: of the commit; the title of the pull request.
        private: whether a new repository is; the owner's default if None.
        revision: branch to commit to, made where it is not there; `main` if None.
        create_pr: whether to open a pull request instead, or renew the one that is open.

    Raises:
        RunError: the Hub does not take it.
    """
    api = HfApi()

    def attempt() -> Commit:
        if not create_pr and not api.repo_exists(repo_id, repo_type=kind):
            api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
        branch = _branch(repo_id, kind, revision, message if create_pr else None)
        info = _info(repo_id, kind, branch)
        if info is None:
            raise RunError(f"{repo_id}: the repository is gone")
        sent = files.differing(info.siblings)
        there = [file.rfilename for file in info.siblings or []]
        deleted = [path for path in there if path not in files.operations and is_stale(path)]
        if not sent and not deleted:
            return Commit(repo_id, info.sha, _address(repo_id, kind, branch, info.sha), [], [])
        opens_pr = create_pr and branch == MAIN
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(files.operations[path] for path in sent),
            *map(CommitOperationDelete, deleted),
        ]
        done = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            repo_type=kind,
            revision=branch,
            create_pr=opens_pr,
            parent_commit=info.sha,  # who pushed in between is noticed, and looked at, before trying again
        )
        address = done.pr_url if opens_pr else _address(repo_id, kind, branch, done.oid)
        return Commit(repo_id, str(done.oid), str(address), sent, deleted)

    with explaining_errors(repo_id, kind, revision):
        return persist(f"pushing to {repo_id}", attempt)


def _branch(repo_id: str, kind: Kind, revision: str | None, pull_request: str | None) -> str:
    """The branch to commit to: made where it is not there; of a pull request of this title that is open."""
    api = HfApi()
    if pull_request is not None:
        found = api.get_repo_discussions(
            repo_id, repo_type=kind, discussion_type="pull_request", discussion_status="open"
        )
        numbers = [request.num for request in found if request.title == pull_request]
        return f"refs/pr/{max(numbers)}" if numbers else MAIN
    if revision not in (None, MAIN):
        api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)
        return revision
    return MAIN


def _address(repo_id: str, kind: Kind, branch: str, commit: str) -> str:
    number = branch.removeprefix("refs/pr/")
    if number != branch:
        return f"{web_address(repo_id, kind)}/discussions/{number}"
    return web_address(repo_id, kind, commit)


# --------------------------------------------------------------------------- tags


def check_tag_free(repo_id: str, tag: str, files: Files | None) -> None:
    """Raises RunError where a tag names other files than these already; any, where they are not known."""
    with explaining_errors(repo_id):
        target = tag_target(repo_id, tag)
        if target is None:
            return
        held = _info(repo_id, "model", target)
    if files is None or files.differing(held.siblings):
        raise RunError(
            f"{repo_id}: the tag {tag} names another commit already ({target[:7]}). Choose another tag"
        )


def tag_target(repo_id: str, tag: str) -> str | None:
    """The commit that a tag of a model names; None where there is no such tag, or no such model."""
    try:
        refs = HfApi().list_repo_refs(repo_id)
    except RepositoryNotFoundError:
        return None
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)


def set_tag(repo_id: str, tag: str, commit: str) -> None:
    """Gives a commit of a model a tag; nothing where it has it.

    Raises:
        RunError: another commit has it.
    """

    def attempt() -> None:
        if tag_target(repo_id, tag) != commit:
            HfApi().create_tag(repo_id, tag=tag, revision=commit)

    with explaining_errors(repo_id):
        persist(f"tagging {repo_id}", attempt)
