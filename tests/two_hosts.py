"""Two hosts on one machine: each a network namespace with its own loopback, joined by a cable that can be pulled."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from fork_server import Child, ForkServer

PORT = 29511
"""Where processes meet; whatever else this machine does, in the first host's network the port is free."""

ENTER = """
import ctypes, os
network = os.open("/var/run/netns/{name}", os.O_RDONLY)
if ctypes.CDLL(None, use_errno=True).setns(network, {kind}):
    raise OSError(ctypes.get_errno(), "cannot enter the network of {name}")
os.close(network)
"""
"""Source with which a process moves to a host."""
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Host:
    """A place with a network of its own; its disks are the machine's."""

    name: str
    address: str
    rank: int

    @property
    def enter(self) -> str:
        """Source to run before, for a process that is forked elsewhere."""
        return ENTER.format(name=self.name, kind=CLONE_NEWNET)

    def pull_cable(self) -> None:
        """From now on nothing arrives, and nobody is told."""
        ip("-n", self.name, "link", "set", "cable", "down")

    def plug_in(self) -> None:
        """Undoes it."""
        ip("-n", self.name, "link", "set", "cable", "up")

    def kill(self) -> None:
        """Ends all of the host's processes at once."""
        while pids := ip("netns", "pids", self.name).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    def launch(self, first: Host, folder: Path, *words: object, **environment: str) -> subprocess.Popen[str]:
        """Starts `accelerate launch … -m vit_finetune WORDS` here, one process of two; its words go to a file.

        Args:
            first: the host that the others meet at.
            folder: for its output, `stderr`.
            words: what stands after `-m vit_finetune`.
            environment: variables on top of this process's own.
        """
        folder.mkdir(parents=True)
        options = {
            "num_machines": 2,
            "machine_rank": self.rank,
            "num_processes": 2,
            "main_process_ip": first.address,
            "main_process_port": PORT,
            "rdzv_backend": "static",
            "mixed_precision": "no",
            "dynamo_backend": "no",
        }
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        for name, value in options.items():
            launcher += [f"--{name}", str(value)]
        with (folder / "stderr").open("w", encoding="utf-8") as stderr:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *launcher, "-m", "vit_finetune", *map(str, words)],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "CUDA_VISIBLE_DEVICES": "",
                    "TMPDIR": str(folder),  # killed launchers leave folders behind
                    **environment,
                },
            )


def fork_on(
    forks: ForkServer,
    hosts: Sequence[Host],
    folder: Path,
    *words: object,
    before: str = "",
    each: int = 1,
) -> list[Child]:
    """Starts the processes of a run on hosts, as a launcher would, but without the time that importing takes.

    Args:
        forks: what forks them.
        hosts: the first is where they meet.
        folder: for their output; each works in a folder of its own, and each host has its own `cache`.
        words: what stands after `vit-finetune`.
        before: Python source that they run first.
        each: processes of a host.
    """
    return [
        forks.start(
            folder / str(host.rank) / str(place),
            *words,
            before=host.enter + before,
            RANK=str(number * each + place),
            LOCAL_RANK=str(place),
            WORLD_SIZE=str(len(hosts) * each),
            LOCAL_WORLD_SIZE=str(each),
            MASTER_ADDR=hosts[0].address,
            MASTER_PORT=str(PORT),
            VIT_FINETUNE_CACHE=str(folder / str(host.rank) / "cache"),
        )
        for number, host in enumerate(hosts)
        for place in range(each)
    ]


def ip(*words: str) -> str:
    """What `ip` answers."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two hosts for the length of a block; skips where this machine does not allow them."""
    if not shutil.which("ip"):
        pytest.skip("two hosts need the command `ip` (iproute2)")
    hosts = [Host(f"vit-{os.getpid()}-{rank}", f"10.77.0.{rank + 1}", rank) for rank in range(2)]
    try:
        try:
            for host in hosts:
                ip("netns", "add", host.name)
            ends = [("name", "cable", "netns", host.name) for host in hosts]
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        except OSError as error:
            pytest.skip(f"two hosts need network namespaces, which are not permitted here: {error}")
        for host in hosts:
            ip("-n", host.name, "link", "set", "lo", "up")
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "cable")
            host.plug_in()
        yield hosts
    finally:
        for host in hosts:
            with suppress(OSError):  # of what was not made
                host.kill()
                ip("netns", "delete", host.name)
