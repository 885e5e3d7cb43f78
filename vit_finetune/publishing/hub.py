"""Repositories of the Hub written to: asked for permission before, and changed in one commit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash

from vit_finetune.console import warn
from vit_finetune.hub_repos import Kind, explaining_errors, hub_address, persist, web_address
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
    if constants.is_offline_mode():
        raise RunError(
            f"{repo_id}: HF_HUB_OFFLINE keeps this command from the network, so nothing can be "
            f"published. Unset it"
        )
    if not (get_token() or "").isascii():
        raise RunError(
            "your token holds characters that no token has. Copy it again: `hf auth login`, or HF_TOKEN"
        )
    with explaining_errors(repo_id, kind):
        who = persist(f"asking {hub_address()} who you are", HfApi().whoami)
        user = str(who["name"])
        check_name(repo_id, user)
        _check_role(who)
        info = persist(f"looking at {repo_id}", lambda: _info(repo_id, kind))
        if info is None:
            if kind != "space":  # one beside a model often has its name
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


def check_card(repo_id: str, text: str, kind: Kind = "model") -> None:
    """Makes sure, before all else is done, that the Hub will take the front matter of a card.

    Raises:
        RunError: it will not, and why.
    """
    card = RepoCard(text)
    with explaining_errors(repo_id, kind):
        try:
            persist(f"showing the card to {hub_address()}", lambda: card.validate(repo_type=kind))
        except ValueError as error:  # the Hub's answer, JSON
            found = re.findall(r'"message":\s*("(?:[^"\\]|\\.)*")', str(error))
            reasons = "; ".join(" ".join(json.loads(reason).split()) for reason in dict.fromkeys(found))
            raise RunError(f"{repo_id}: the Hub does not take what the card says: {reasons}") from None


def _info(repo_id: str, kind: str, revision: str | None = None) -> Any:
    """The repository with its files' checksums; None where there is none."""
    try:
        return HfApi().repo_info(repo_id, repo_type=kind, revision=revision, files_metadata=True)
    except RepositoryNotFoundError:
        return None


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
            f"your token may only read. Make one that may write on {hub_address()}/settings/tokens, and "
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
        exists = partial(HfApi().repo_exists, repo_id, repo_type=other)
        if other != kind and persist(f"looking at {repo_id}", exists):
            raise RunError(f"{repo_id} is a {other} on the Hub, and no {kind}. Name another repository")


def _check_may_write(repo_id: str, kind: Kind, user: str) -> None:
    try:
        persist(f"looking at {repo_id}", lambda: HfApi().auth_check(repo_id, repo_type=kind, write=True))
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

    def text(self, path: str) -> str:
        """What stands in one, which is UTF-8."""
        with self.operations[path].as_file() as opened:
            return opened.read().decode()

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
    pr_author: str | None = None,
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
        pr_author: the user who opens a pull request instead, or renews their own that is open.

    Raises:
        RunError: the Hub does not take it.
    """
    api = HfApi()

    def attempt() -> Commit:
        if not pr_author and not api.repo_exists(repo_id, repo_type=kind):
            sdk = "gradio" if kind == "space" else None
            api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True, space_sdk=sdk)
        branch = (
            _open_pr(repo_id, kind, message, pr_author) if pr_author else _branch(repo_id, kind, revision)
        )
        info = _info(repo_id, kind, branch)
        if info is None:
            raise RunError(f"{repo_id}: the repository is gone")
        sent = files.differing(info.siblings)
        there = [file.rfilename for file in info.siblings or []]
        deleted = [path for path in there if path not in files.operations and is_stale(path)]
        if not sent and not deleted:
            return Commit(repo_id, info.sha, _address(repo_id, kind, branch, info.sha), [], [])
        opens_pr = pr_author is not None and branch == MAIN
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


def _branch(repo_id: str, kind: Kind, revision: str | None) -> str:
    """The branch to commit to, made where it is not there."""
    if revision is None or revision == MAIN:
        return MAIN
    HfApi().create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)
    return revision


def _open_pr(repo_id: str, kind: Kind, title: str, user: str) -> str:
    """The ref of a user's open pull request of this title; `main` where there is none.

    Others' may have the same title: runs are often called the same.
    """
    found = HfApi().get_repo_discussions(
        repo_id, author=user, repo_type=kind, discussion_type="pull_request", discussion_status="open"
    )
    numbers = [request.num for request in found if request.title == title]
    return f"refs/pr/{max(numbers)}" if numbers else MAIN


def _address(repo_id: str, kind: Kind, branch: str, commit: str) -> str:
    number = branch.removeprefix("refs/pr/")
    if number != branch:
        return f"{web_address(repo_id, kind)}/discussions/{number}"
    return web_address(repo_id, kind, commit)


# --------------------------------------------------------------------------- tags


def check_tag_free(repo_id: str, tag: str, files: Files | None) -> None:
    """Raises RunError where a tag names other files than these already; any, where they are not known."""
    with explaining_errors(repo_id):
        target, held = persist(f"looking at the tags of {repo_id}", lambda: _tagged(repo_id, tag))
    if target is not None and (files is None or files.differing(held)):
        raise RunError(
            f"{repo_id}: the tag {tag} names another commit already ({target[:7]}). Choose another tag"
        )


def _tagged(repo_id: str, tag: str) -> tuple[str | None, list[RepoSibling]]:
    """The commit that a tag of a model names, and its files; None where there is no such tag."""
    refs = HfApi().list_repo_refs(repo_id)
    if any(branch.name == tag for branch in refs.branches):
        raise RunError(f"{repo_id}: {tag} is a branch there, so it cannot be a tag too. Choose another tag")
    target = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
    info = _info(repo_id, "model", target) if target else None
    return target, (info.siblings or [] if info else [])


def set_tag(repo_id: str, tag: str, commit: Commit, files: Files) -> None:
    """Gives a commit of a model a tag; it stays at an earlier one that holds the same files.

    Raises:
        RunError: a commit of other files has it.
    """

    def attempt() -> None:
        HfApi().create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True)

    with explaining_errors(repo_id):
        persist(f"tagging {repo_id}", attempt)
    try:
        check_tag_free(repo_id, tag, files)
    except RunError as error:  # somebody was faster
        raise RunError(f"{commit.address} is published, but {error}") from None
