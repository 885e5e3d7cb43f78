"""What stands before gradio's server on the page of a model: who is let through, and with how much.

It stands alone, as `demo.py` does: a Space has this file beside its page.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_FILE = 20 * 1024 * 1024
"""Bytes of an image at most."""
LARGEST_REQUEST = 100_000
"""Bytes of any other request at most; and of what an upload holds around its image."""
TOO_LARGE = f"This page takes images of up to {LARGEST_FILE // 1024**2} MB"
NO_UPLOAD = "there is no such upload; drop the image again"
LOCAL = re.compile(r"localhost|127(?:\.\d+){3}|\[?::1\]?")
"""Hosts that are this machine for everybody, whatever names servers give to addresses."""


class Gate:
    """Stands before gradio's server: lets through what the page needs, and no more bytes than an image has.

    The server has more to offer than this page: it fetches addresses, takes recordings, tells statistics. And
    it reads a request to its end before it looks how long it was.

    Args:
        app: the server.
        is_local: whether only this machine reaches it. Then it has to be called by a name of this machine: a
            page of somebody else's, open in the same browser, could have a name that leads here too (DNS
            rebinding), and read what is shown.
    """

    OPEN = re.compile(
        r"/(?:config|theme\.css|favicon\.ico|robots\.txt|(?:assets|static)/.+)?"
        r"|/gradio_api/(?:info|startup-events|upload|upload_progress|queue/join|queue/data|cancel|theme\.css"
        r"|call/predict(?:/\w+)?|heartbeat/\w+|file=/.+)"
    )
    """Paths that the page and `gradio_client` ask for; a file is one of this machine, never an address."""
    UPLOAD = "/gradio_api/upload"

    def __init__(self, app: ASGIApp, is_local: bool) -> None:
        self.app, self.is_local = app, is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers or hands on one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http" or not self.OPEN.fullmatch(scope["path"]):
            await PlainTextResponse("Not found", 404)(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self.is_local and not LOCAL.fullmatch(re.sub(r":\d+$", "", headers.get("host", ""))):
            await PlainTextResponse("This page is for its own machine", 403)(scope, receive, send)
            return
        is_upload = scope["path"] == self.UPLOAD
        most = LARGEST_REQUEST + (LARGEST_FILE if is_upload else 0)
        length = headers.get("content-length", "0")
        # What is refused is read no further, but by the server itself, which throws it away: browsers show
        # the answer to a request only when they have sent all of it.
        if not length.isdecimal() or int(length) > most:
            await PlainTextResponse(TOO_LARGE, 413)(scope, receive, send)
        elif is_upload:
            await self.app(scope, _limited(receive, most), send)
        else:
            await self._hand_on(scope, receive, send, most)

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        """Lets the server have a request that is no upload, if it is short and every file in it is an upload.

        The server itself would fetch whatever a request names by an address in the place of a path.
        """
        body = b""
        try:
            async for piece in Request(scope, _limited(receive, most)).stream():
                body += piece
            if body and not all(map(find_upload, paths_in(json.loads(body)))):
                await PlainTextResponse(NO_UPLOAD, 400)(scope, receive, send)
                return
        except MultiPartException:
            await PlainTextResponse(TOO_LARGE, 413)(scope, receive, send)
            return
        except (ValueError, RecursionError):
            await PlainTextResponse("Not JSON", 400)(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": body}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, again, send)


def _limited(receive: Receive, most: int) -> Receive:
    """Hands on the pieces of a body, which need not say how long it is, up to a number of bytes.

    Raises:
        MultiPartException: it is longer: the error on which gradio removes what it has written of an upload.
    """
    taken = 0

    async def count() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > most:
            raise MultiPartException(f"more than the maximum allowed size of {most} bytes")
        return message

    return count


def paths_in(value: Any) -> Iterator[Any]:
    """What stands as `path` anywhere in a JSON value: gradio takes it for a file."""
    if isinstance(value, dict):
        yield from (part for key, part in value.items() if key == "path")
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from paths_in(part)


def find_upload(said: Any) -> Path | None:
    """The file in the folder of uploads that somebody names; None of anything else."""
    path = Path(os.path.realpath(said)) if isinstance(said, str) and "\0" not in said else None
    folder = os.path.realpath(get_upload_folder())
    return path if path is not None and path.is_relative_to(folder) and path.is_file() else None
