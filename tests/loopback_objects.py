"""The contents that a loopback Hub keeps on disk, and what its requests are refused with."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO


class HubError(Exception):
    """What a request is refused with.

    Args:
        status: of the answer.
        message: for people, also in the header that the client reads.
        code: `RepoNotFound` and the like, which the client tells its exceptions by.
        headers: on top of those.
        body: on top of `error` in the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "",
        headers: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers, self.body = headers or {}, body or {}


@dataclass(frozen=True)
class Blob:
    """A file's content, by its digests."""

    sha256: str
    size: int
    git: str
    """Git's digest of what git holds: the content, or the pointer to it where it is large."""
    lfs: bool

    @property
    def oid(self) -> str:
        """What the Hub compares with what is about to be uploaded."""
        return self.sha256 if self.lfs else self.git


def git_digest(content: bytes) -> str:
    """What git calls a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """What git holds in the place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Objects:
    """Contents on disk by their sha256, shared by all repositories."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.partial = folder / "partial"
        self.partial.mkdir(parents=True)
        self.xet = folder / "cas"
        """Where clients with Xet put their files by themselves."""

    def path(self, sha256: str) -> Path:
        """Where a content is, or would be."""
        return self.folder / sha256

    def add(self, chunks: Iterable[bytes], expected: str = "") -> tuple[str, int]:
        """Keeps a content as it comes in and answers its digest and size; nothing of it where the digest is wrong."""
        unfinished = self.partial / f"{threading.get_ident()}-{id(chunks)}"
        digest, size = hashlib.sha256(), 0
        try:
            with unfinished.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    size += file.write(chunk)
            found = digest.hexdigest()
            if expected and found != expected:
                raise HubError(400, f"The content has the digest {found}, not {expected}")
            unfinished.replace(self.path(found))
        finally:
            unfinished.unlink(missing_ok=True)
        return found, size

    def regular(self, content: bytes) -> Blob:
        """Keeps a small content."""
        sha256, size = self.add([content])
        return Blob(sha256, size, git_digest(content), lfs=False)

    def large(self, sha256: str, size: int) -> Blob:
        """A large content that has been uploaded before."""
        return Blob(sha256, size, git_digest(pointer(sha256, size)), lfs=True)

    def has(self, sha256: str) -> bool:
        """Whether a content has arrived over LFS."""
        return self.path(sha256).is_file()

    def open(self, blob: Blob) -> BinaryIO:
        """A content to read."""
        if not self.has(blob.sha256) and (found := self.xet_hash(blob.sha256)):
            from loopback_xet import fetch

            self.add(fetch(self.xet, found), blob.sha256)
        return self.path(blob.sha256).open("rb")

    def read(self, blob: Blob) -> bytes:
        """A content as a whole."""
        with self.open(blob) as file:
            return file.read()

    def xet_hash(self, sha256: str) -> str | None:
        """What Xet calls a content, None where it did not arrive that way."""
        if not self.xet.is_dir():
            return None
        from loopback_xet import hashes

        return hashes(self.xet).get(sha256)
