"""What a loopback Hub keeps: users and their rights, repositories with their commits, and the objects on disk."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path

from loopback_objects import Blob, HubError, Objects

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
"""How a route names a kind of repository, and how everything else does."""

_ALWAYS_LARGE = (
    "7z arrow bin bz2 ckpt ftz gz h5 joblib mlmodel model msgpack npy npz onnx ot parquet pb pickle pkl pt pth "
    "rar safetensors tar tflite tgz wasm xz zip zst"
)
_LARGE_IN_DATASETS = "wav mp3 flac ogg bmp gif png tiff jpg jpeg webp mp4 webm"


@dataclass(frozen=True)
class Commit:
    """A state of all files."""

    id: str
    title: str
    message: str
    user: str
    date: datetime
    parent: Commit | None = field(repr=False)
    tree: dict[str, Blob] = field(repr=False)

    def history(self) -> Iterator[Commit]:
        """This and all before, newest first."""
        commit: Commit | None = self
        while commit:
            yield commit
            commit = commit.parent


@dataclass
class PullRequest:
    """A commit that somebody proposes; `refs/pr/N` leads to it."""

    number: int
    title: str
    author: str
    created: datetime
    status: str = "open"


@dataclass
class Repo:
    """A repository; what is kept of it is only ever replaced, so that reading needs no lock."""

    kind: str
    id: str
    objects: Objects = field(repr=False)
    private: bool = False
    gated: bool = False
    creator: str = ""
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    granted: set[str] = field(default_factory=set)
    """Who may read a gated one, but for its owners."""
    branches: dict[str, Commit] = field(default_factory=dict, repr=False)
    tags: dict[str, Commit] = field(default_factory=dict, repr=False)
    pulls: dict[int, PullRequest] = field(default_factory=dict, repr=False)
    proposed: dict[int, Commit] = field(default_factory=dict, repr=False)

    @property
    def owner(self) -> str:
        """The user or organization that it belongs to."""
        return self.id.split("/")[0]

    @property
    def prefix(self) -> str:
        """What stands before its name in addresses."""
        return "" if self.kind == "model" else f"{self.kind}s/"

    def refs(self) -> dict[str, str]:
        """The commit of every branch, tag and pull request, by the full name of the ref."""
        return (
            {f"refs/heads/{name}": commit.id for name, commit in self.branches.items()}
            | {f"refs/tags/{name}": commit.id for name, commit in self.tags.items()}
            | {f"refs/pr/{number}": commit.id for number, commit in self.proposed.items()}
        )

    def find(self, rev: str) -> Commit:
        """The commit that a branch, a tag, a pull request or a digest (or its beginning) leads to."""
        if rev in self.branches:
            return self.branches[rev]
        if rev in self.tags:
            return self.tags[rev]
        if proposed := re.fullmatch(r"refs/pr/(\d+)", rev):
            if int(proposed[1]) in self.proposed:
                return self.proposed[int(proposed[1])]
        elif re.fullmatch("[0-9a-f]{7,40}", rev):
            for head in [*self.branches.values(), *self.tags.values(), *self.proposed.values()]:
                for commit in head.history():
                    if commit.id.startswith(rev):
                        return commit
        raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    def commits(self, rev: str = "main") -> list[Commit]:
        """Its history, newest first."""
        return list(self.find(rev).history())

    def files(self, rev: str = "main") -> dict[str, bytes]:
        """What its files hold."""
        return {path: self.objects.read(blob) for path, blob in self.find(rev).tree.items()}

    def lfs_paths(self, rev: str = "main") -> set[str]:
        """The files that are large ones."""
        return {path for path, blob in self.find(rev).tree.items() if blob.lfs}

    def is_large(self, path: str, rev: str) -> bool:
        """Whether `.gitattributes` says that a file is a large one."""
        attributes = self.find(rev).tree.get(".gitattributes")
        lines = self.objects.read(attributes).decode().splitlines() if attributes else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        return any(fnmatch(path if "/" in pattern else Path(path).name, pattern) for pattern in patterns)

    def commit(
        self, tree: dict[str, Blob], user: str, title: str, message: str = "", parent: Commit | None = None
    ) -> Commit:
        """A commit that no ref leads to yet."""
        date = datetime.now(UTC)
        said = [self.kind, self.id, parent.id if parent else "", user, title, message, date.isoformat()]
        said += [f"{path} {blob.git}" for path, blob in sorted(tree.items())]
        digest = hashlib.sha1("\0".join(said).encode()).hexdigest()
        return Commit(digest, title, message, user, date, parent, dict(sorted(tree.items())))


class Store:
    """Everything that a loopback Hub remembers; survives its server."""

    def __init__(self, folder: Path):
        self.objects = Objects(folder)
        self.lock = threading.RLock()
        self.tokens: dict[str, tuple[str, str]] = {}
        """User and role by token."""
        self.users: set[str] = set()
        self.orgs: dict[str, dict[str, str]] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.moved: dict[tuple[str, str], str] = {}
        """New ids by kind and old id."""

    # ------------------------------------------------------------------ rights

    def is_member(self, user: str | None, owner: str) -> bool:
        """Whether somebody is an owner, or belongs to it."""
        return user is not None and (user == owner or user in self.orgs.get(owner, {}))

    def may_write(self, user: str | None, role: str, owner: str, repo: Repo | None = None) -> bool:
        """Whether somebody with a token of that role may write below a name; to a repository of it where given."""
        if user is None or role == "read":
            return False
        if user == owner:
            return True
        if role == "fineGrained":  # as `whoami` says, it goes for the user's own repositories only
            return False
        member = self.orgs.get(owner, {}).get(user)
        own = repo is None or repo.creator == user
        return member in ("admin", "write") or (member == "contributor" and own)

    def readable(self, kind: str, repo_id: str, user: str | None) -> Repo:
        """A repository that somebody may know of."""
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and not self.is_member(user, repo.owner)):
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def check_gate(self, repo: Repo, user: str | None) -> None:
        """Refuses the files of a gated repository to who has not been let in."""
        if repo.gated and user not in repo.granted and not self.is_member(user, repo.owner):
            ask = "You need to" if user else "Access to it is restricted. Log in to"
            message = f"{ask} be let in at {repo.id} before you can read its files."
            raise HubError(403 if user else 401, message, "GatedRepo")

    # ------------------------------------------------------------------ repositories

    def create(self, kind: str, repo_id: str, user: str, private: bool = False) -> Repo:
        """A new repository with its first commit.

        Raises:
            HubError: the name is bad, or taken.
        """
        name = repo_id.split("/")[1]
        good = re.fullmatch(r"[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?", name, re.ASCII)
        if not good or "--" in name or ".." in name or name.endswith(".git"):
            raise HubError(
                400, f"Invalid repo name: {repo_id} - repo names use letters, digits, '-', '_' and '.', to 96"
            )
        with self.lock:
            if (kind, repo_id) in self.repos:
                raise HubError(409, f"You already created this {kind} repo: {repo_id}")
            repo = Repo(kind, repo_id, self.objects, private=private, creator=user)
            names = _ALWAYS_LARGE + (" " + _LARGE_IN_DATASETS if kind == "dataset" else "")
            lines = [f"*.{suffix} filter=lfs diff=lfs merge=lfs -text" for suffix in names.split()]
            lines.append("*tfevents* filter=lfs diff=lfs merge=lfs -text\n")
            tree = {".gitattributes": self.objects.regular("\n".join(lines).encode())}
            repo.branches = {"main": repo.commit(tree, user, "initial commit")}
            self.repos[kind, repo_id] = repo
        return repo

    def add(
        self,
        repo: Repo,
        rev: str,
        user: str,
        title: str,
        message: str = "",
        *,
        files: dict[str, Blob],
        deleted: Iterable[str] = (),
        parent: str | None = None,
        propose: bool = False,
    ) -> tuple[Commit, PullRequest | None]:
        """Commits to a branch or a pull request, or proposes to; all of it or nothing.

        Args:
            repo: to commit to.
            rev: the name of a branch, or `refs/pr/N`.
            user: who does.
            title: first line of what is said about it.
            message: the rest.
            files: to write.
            deleted: files, and folders with a slash at the end.
            parent: what the branch must lead to.
            propose: as a pull request.
        """
        with self.lock:
            head = repo.find(rev)
            if parent and not head.id.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(head.tree)
            for path in deleted:
                gone = [
                    name for name in tree if name == path or (path.endswith("/") and name.startswith(path))
                ]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del tree[name]
            for path, blob in files.items():
                if any(str(above) in tree | files for above in Path(path).parents):
                    raise HubError(400, f"A folder of {path} is a file")
                tree[path] = blob
            commit = repo.commit(tree, user, title, message, head)
            if propose:
                number = len(repo.pulls) + 1
                repo.pulls |= {number: PullRequest(number, title, user, commit.date)}
                repo.proposed |= {number: commit}
                return commit, repo.pulls[number]
            if rev in repo.branches:
                repo.branches |= {rev: commit}
            elif rev.startswith("refs/pr/"):
                repo.proposed |= {int(rev.split("/")[2]): commit}
            else:
                raise HubError(400, f"{rev} is not a branch")
            return commit, None
