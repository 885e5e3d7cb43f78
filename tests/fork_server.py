"""Command lines in processes of their own that start at once: forked from one that has imported everything.

Importing torch and transformers takes seconds of a core, too many for tests that start a hundred processes in
order to kill them. What is forked is a process like any other: its own session, signals, exit code, stderr.

Run as a script, this is the server: it reads jobs from stdin and tells on stdout which processes ended and how.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 90
"""Seconds after which a process is taken to hang. Nothing here takes a tenth of it on an idle machine."""

IMPORTED = [
    *("vit_finetune.cli", "vit_finetune.finetuning", "matplotlib.figure", "matplotlib.backends.backend_svg"),
    *("torch", "torch._dynamo", "sklearn.metrics", "transformers.models.vit.modeling_vit"),
]
"""What a run imports on its way. Importing computes nothing: that would start threads, which a fork loses."""

QUICK = """
from vit_finetune import finetuning
from vit_finetune.training import hardware, loading
hardware.STEP_SECONDS = loading.READING_SECONDS = 0.01
finetuning.write_report = lambda run: run.report_html.write_text("left out")
"""
"""Source to run before where what is measured and drawn does not matter: it takes longer than such a run trains."""

IMPATIENT = "\nimport time\ntime.sleep = lambda seconds: None\n"
"""Source to run before where only the number of further tries matters, not how long they wait."""


ONLINE = """
import importlib
import datasets.config
from huggingface_hub import constants, hf_api
importlib.reload(constants)
importlib.reload(datasets.config)
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # for the threads of old versions of pyarrow
hf_api.api.endpoint = constants.ENDPOINT
"""
"""Source to run before where a Hub is to be found at the place that the environment names: the server's own libraries
have read another."""


class Hangs(AssertionError):
    """A process did not end by itself."""


@dataclass
class Child:
    """A process that the server forked."""

    server: ForkServer
    pid: int
    folder: Path
    """Where its `stdout` and `stderr` go."""
    store: Any = None
    """Where the processes of its run meet, kept by the launcher."""

    def signal(self, number: int) -> None:
        """Sends a signal to this process alone; nothing where it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit code, -9 and the like where a signal ended it.

        Raises:
            Hangs: it takes longer than the timeout; it is killed then.
        """
        code = self.server.wait(self.pid, timeout)
        if code is None:
            self.signal(signal.SIGKILL)
            self.server.wait(self.pid, PATIENCE)
            raise Hangs(f"still running after {timeout:.0f} s; it had said:\n{self.stderr}")
        return code

    @property
    def ended(self) -> bool:
        """Whether it has ended by now."""
        return self.server.wait(self.pid, 0) is not None

    @property
    def stderr(self) -> str:
        """What it has said to people so far."""
        return (self.folder / "stderr").read_text(encoding="utf-8", errors="replace")


@dataclass
class ForkServer:
    """The server, seen from the tests; may be used by several threads."""

    process: subprocess.Popen[str]
    started: list[int] = field(default_factory=list)
    ended: dict[int, int] = field(default_factory=dict)
    news: threading.Condition = field(default_factory=threading.Condition)
    asking: threading.Lock = field(default_factory=threading.Lock)

    def start(self, folder: Path, *words: object, before: str = "", **environment: str) -> Child:
        """Starts `vit-finetune WORDS` in a forked process.

        Args:
            folder: made for its output; the process works in it.
            words: what stands after `vit-finetune`.
            before: Python source that the process runs first.
            environment: variables on top of this process's own.
        """
        folder.mkdir(parents=True)
        (folder / "stderr").touch()  # may be read before the process has said anything
        job = {
            "folder": str(folder),
            "words": [str(word) for word in words],
            "before": before,
            "environment": {**os.environ, **environment},
        }
        with self.asking:  # answers come in the order of the questions
            count = len(self.started)
            assert self.process.stdin
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            with self.news:
                told = self.news.wait_for(lambda: len(self.started) > count, PATIENCE)
                assert told, "the fork server does not answer"
                return Child(self, self.started[count], folder)

    def start_world(
        self,
        folder: Path,
        processes: int,
        *words: object,
        before: str = "",
        launcher: bool = True,
        **environment: str,
    ) -> list[Child]:
        """Starts the processes of one run on this machine.

        Args:
            folder: as for `start`; each has its own below it.
            processes: how many.
            words: as for `start`.
            before: as for `start`.
            launcher: whether they meet at the launcher's place, as under torchrun and accelerate, or at the first
                of them, as where they are started by hand. Nobody ends the others where one fails.
            environment: as for `start`.
        """
        from torch.distributed import TCPStore

        store, place = None, {"TORCHELASTIC_USE_AGENT_STORE": str(launcher)}
        if launcher:
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            place["MASTER_PORT"] = str(store.port)
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                place["MASTER_PORT"] = str(free.getsockname()[1])
        children = []
        for rank in range(processes):
            told = place | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
            }
            child = self.start(folder / f"process-{rank}", *words, before=before, **told, **environment)
            child.store = store
            children.append(child)
        return children

    def wait(self, pid: int, timeout: float) -> int | None:
        """The exit code of a process; None where it has none after some seconds."""
        with self.news:
            self.news.wait_for(lambda: pid in self.ended, timeout)
            return self.ended.get(pid)

    def listen(self) -> None:
        """Takes in what the server tells, until it ends."""
        assert self.process.stdout
        for line in self.process.stdout:
            told = json.loads(line)
            with self.news:
                if "code" in told:
                    self.ended[told["pid"]] = told["code"]
                else:
                    self.started.append(told["pid"])
                self.news.notify_all()


@contextmanager
def fork_server() -> Iterator[ForkServer]:
    """A server for the length of a block; kills what it forked and is still there then."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    server = ForkServer(process)
    listener = threading.Thread(target=server.listen, daemon=True)
    listener.start()
    try:
        yield server
    finally:
        for pid in server.started:  # each leads a session of its own, its loader processes included
            if pid not in server.ended:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        assert process.stdin
        process.stdin.close()
        process.wait()
        listener.join()
        assert process.stdout
        process.stdout.close()


def wait_for(
    condition: Any, child: Child | None = None, timeout: float = PATIENCE, pause: float = 0.002
) -> Any:
    """What a condition answers as soon as it is true; fails where the process ends before, or time runs out."""
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        if child is not None and child.ended and not (answer := condition()):
            raise AssertionError(f"ended with {child.wait()} before it came to that:\n{child.stderr}")
        if answer:
            break
        if time.monotonic() > deadline:
            raise Hangs(f"did not come to that in {timeout:.0f} s" + (f":\n{child.stderr}" if child else ""))
        time.sleep(pause)
    return answer


# --------------------------------------------------------------------------- the other side


def _serve() -> int:
    """Forks a process for each job; answers the exit code of the process that it is, server or forked."""
    for name in IMPORTED:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    sys.modules["PIL.Image"].init()
    gc.freeze()  # or every process goes through all that was imported, and copies it
    # A handler, so that the descriptor below is written to; the work is done in the loop.
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever prints does not disturb the answers

    def answer(**told: int) -> None:
        os.write(answers, (json.dumps(told) + "\n").encode())

    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    read, alive = b"", set()
    while True:
        ready = [key.fd for key, _ in selector.select()]
        if woken in ready:
            with suppress(BlockingIOError):
                os.read(woken, 4096)
        for pid in list(alive):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                alive.remove(pid)
                answer(pid=pid, code=os.waitstatus_to_exitcode(status))
        if 0 not in ready:
            continue
        more = os.read(0, 1 << 20)
        if not more:
            return 0
        *lines, read = (read + more).split(b"\n")
        for line in lines:
            sys.stdout.flush(), sys.stderr.flush()
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                for descriptor in (woken, waker, answers):
                    os.close(descriptor)
                return _run(json.loads(line))
            alive.add(pid)
            answer(pid=pid)


def _run(job: dict[str, Any]) -> int:
    """Carries out a job in the process that was forked for it; answers its exit code."""
    os.setsid()
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(job["folder"])
    for descriptor, name in enumerate([os.devnull, "stdout", "stderr"]):
        opened = os.open(name, os.O_RDWR | (os.O_CREAT if descriptor else 0), 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(job["environment"], OMP_NUM_THREADS="1")
    sys.argv = ["vit-finetune", *job["words"]]
    from vit_finetune.cli import main

    try:
        exec(compile(job["before"], "<before>", "exec"), {})
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:  # noqa: BLE001 - as the interpreter would
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    ended_with = _serve()
    # As the interpreter ends, but for taking down a hundred thousand objects, which takes it a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended_with)
