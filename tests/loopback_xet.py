"""What hf_xet's own store on disk holds: it stands in for the service that keeps large files on the real Hub.

The client writes to it by itself and only says by their sha256 which files it has written. What Xet calls them, and
their contents, are read from its files: its index is locked while a client works.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow

_RECORD = 48
_END = b"\xff" * 32
_VERIFIED, _DESCRIBED = 1 << 31, 1 << 30
Segment = tuple[str, int, int]
"""Chunks of a file that follow each other: which block they are in, the first, and the one after the last."""


def hashes(folder: Path) -> dict[str, str]:
    """What Xet calls the files of a store, by their sha256."""
    return {sha256: name for name, (sha256, _) in _files(folder).items()}


def fetch(folder: Path, name: str) -> Iterator[bytes]:
    """The content of a file, chunk by chunk."""
    for block, start, end in _files(folder)[name][1]:
        yield from _chunks(folder / "xet/xorbs/xorbs" / f"default.{block}", start, end)


def _hex(digest: bytes) -> str:
    """A digest as Xet writes it: four numbers, and not 32 bytes."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def _files(folder: Path) -> dict[str, tuple[str, list[Segment]]]:
    """The files of a store: their sha256, and where their chunks are."""
    found = {}
    for shard in (folder / "xet/xorbs/shards").glob("*.mdb"):
        content = shard.read_bytes()
        records = iter(content[at : at + _RECORD] for at in range(_RECORD, len(content), _RECORD))
        while (head := next(records))[:32] != _END:
            flags, count = struct.unpack_from("<II", head, 32)
            entries = [next(records) for _ in range(count)]
            segments = [(_hex(entry[:32]), *struct.unpack_from("<II", entry, 40)) for entry in entries]
            for _ in range(count if flags & _VERIFIED else 0):
                next(records)
            if flags & _DESCRIBED:
                found[_hex(head[:32])] = (_hex(next(records)[:32]), segments)
    return found


def _chunks(block: Path, start: int, end: int) -> Iterator[bytes]:
    """Some of the chunks of a block, which follow each other, each with a head of its own."""
    with block.open("rb") as file:
        for number in range(end):
            head = file.read(8)
            packed, scheme, size = (
                int.from_bytes(head[1:4], "little"),
                head[4],
                int.from_bytes(head[5:8], "little"),
            )
            content = file.read(packed)
            if number < start:
                continue
            if scheme:
                content = pyarrow.decompress(content, size, codec="lz4", asbytes=True)
            yield _together(content) if scheme == 2 else content


def _together(grouped: bytes) -> bytes:
    """Bytes that were put apart for packing: the first ones of all groups of four, then the second ones and so on."""
    content, at = bytearray(len(grouped)), 0
    for place in range(4):
        length = len(content[place::4])
        content[place::4] = grouped[at : at + length]
        at += length
    return bytes(content)
