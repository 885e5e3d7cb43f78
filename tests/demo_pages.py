"""A demo's page in a process of its own, for tests that open it."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fork_server import Child, ForkServer, wait_for
from gradio_client import Client
from playwright.sync_api import Page


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Served:
    """A page and the process that serves it."""

    child: Child
    url: str
    port: int
    temporary: Path
    """The process's folder for temporary files."""

    @property
    def uploads(self) -> list[Path]:
        """Files that lie where uploads do."""
        return [path for path in self.temporary.rglob("*") if path.is_file()]

    def peak(self) -> int:
        """The most memory since the last time that this was asked, in kB."""
        lines = Path(f"/proc/{self.child.pid}/status").read_text().splitlines()
        Path(f"/proc/{self.child.pid}/clear_refs").write_text("5")  # resets the peak (proc_pid_clear_refs(5))
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

    def client(self) -> closing[Client]:
        """gradio's own client, for the length of a block."""
        return closing(Client(self.url, verbose=False, analytics_enabled=False, download_files=False))


@contextmanager
def served(forks: ForkServer, folder: Path, target: Path, *words: str, before: str = "") -> Iterator[Served]:
    """The page of a model for the length of a block; the process is stopped as by Ctrl-C where it still runs.

    Whatever it asks of other machines would go through a proxy, which nothing may have come to in the end.
    """
    temporary, port = folder / "tmp", free_port()
    temporary.mkdir(parents=True)
    words = ("demo", str(target), "--port", str(port), *words)
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        ways = {
            name: address
            for kind in ("http", "https", "all")
            for name in (f"{kind}_proxy", f"{kind.upper()}_PROXY")
        }
        ways |= {"no_proxy": "", "NO_PROXY": ""}
        before += "\nimport tempfile\ntempfile.tempdir = None\n"  # the server's own, chosen before the fork
        child = forks.start(folder / "session", *words, before=before, TMPDIR=str(temporary), **ways)
        try:
            wait_for(lambda: "the page is at" in child.stderr, child, pause=0.05)
            yield Served(child, f"http://127.0.0.1:{port}/", port, temporary)
        finally:
            if not child.ended:
                child.signal(2)
            assert child.wait() == 0, child.stderr
            assert "Traceback" not in child.stderr, child.stderr
            assert select.select([proxy], [], [], 0)[0] == [], "something was asked of another machine"


DROP = """
([selector, name, type, content]) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, {type}));
    const target = document.querySelector(selector);
    for (const kind of ["dragenter", "dragover", "drop"]) {
        target.dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
    }
}
"""
"""Drops a file as a person's mouse would, as far as a page can tell."""
ZONE = "button[aria-dropeffect='copy']"
"""Where images are dropped."""


def drop(page: Page, name: str, content: str, kind: str = "image/jpeg") -> None:
    """Drops a file, whose content is base64, on the open page."""
    page.wait_for_selector(ZONE)
    page.evaluate(DROP, [ZONE, name, kind, content])
