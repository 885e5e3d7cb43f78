"""The processes that train together: how they form, wait, agree, and notice that one of them is gone."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState

from vit_finetune.run import Run, RunError

PREPARING = timedelta(days=1)
"""How long processes wait for one that prepares the data: as long as it lives."""

ELSEWHERE = "198.51.100.1"
"""An address of no machine (RFC 5737): the way there is the way out."""

SHARED_WITHIN = 30.0
"""Seconds after which what one machine wrote is seen by all that share the disk."""


class PeerLost(RunError):
    """Another process of the run ended, or did not answer."""


class World:
    """The processes that train together, of one machine or several; one alone is a world too.

    Args:
        timeout: how long a process waits for one that does not answer, in seconds.
        use_cpu: whether they train on the CPU.

    Raises:
        RunError: the launcher meant more processes than train together.
    """

    def __init__(self, timeout: float, use_cpu: bool) -> None:
        check_launcher(os.environ, _environment_of_parent())
        if int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
            _choose_interface(os.environ)
        # Asked for explicitly: without it, processes launched on a machine without an accelerator stay apart.
        try:
            self.state = PartialState(cpu=use_cpu, timeout=timedelta(seconds=timeout))
        except dist.DistError as error:
            place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise RunError(
                f"the processes of this run did not meet at {place} within {timeout:g} s. Expected the "
                f"address of the first machine, which all others reach, and as many processes as launched"
            ) from error
        self.timeout = timeout
        self.size, self.rank = self.state.num_processes, self.state.process_index
        check_world(self.size)
        check_division(os.environ, self.state.distributed_type)
        self.group: Any = None
        if self.size > 1:  # over the CPU, so that what is agreed on does not wait for the device
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes and speaks."""
        return bool(self.rank == 0)

    def wait(self, timeout: timedelta | None = None) -> None:
        """Returns when all processes are here; waits as long as for any answer where nothing else is said."""
        if self.size > 1:
            dist.monitored_barrier(self.group, timeout or timedelta(seconds=self.timeout))

    @contextmanager
    def one_per_machine_first(self) -> Iterator[None]:
        """A block that one process of each machine passes first, however long it takes, then the others.

        They share what it leaves on the machine: prepared data, a filled cache.
        """
        first = self.state.is_local_main_process
        if not first:
            self.wait(PREPARING)
        yield
        if first:
            self.wait(PREPARING)

    def any(self, here: bool) -> bool:
        """Whether something is so in any process; the same answer in all."""
        if self.size == 1:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
        return bool(flag)

    def from_main(self, value: Any) -> Any:
        """The main process's value, in all."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, self.group)
        return values[0]

    def from_all(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self.group)
        return values

    @contextmanager
    def noticing_losses(self) -> Iterator[None]:
        """A block in which the libraries' words for a lost process become one of ours.

        Raises:
            PeerLost: another process ended, or did not answer in time.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and is_lost_connection(error):
                raise PeerLost(
                    f"another process of this run ended, or did not answer for {self.timeout:g} s "
                    f"(training.ddp_timeout)"
                ) from error
            raise


def check_launcher(environment: Mapping[str, str], launcher: Mapping[str, str]) -> None:
    """Makes sure that `accelerate launch` did not start one process where it was asked for several.

    Its `--cpu` does so, without a word (accelerate 1.15); what remains of the wish is an address to meet at.

    Args:
        environment: of this process.
        launcher: of the process that started it.

    Raises:
        RunError: so it is.
    """
    asked = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(environment)
    asked = asked and "MASTER_ADDR" not in launcher  # else it was there before
    if asked and not {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & set(environment):
        raise RunError(
            "accelerate was told of several processes, but started one (its `--cpu` does that). Start them "
            "with `accelerate launch --config_file recipes/accelerate/cpu.yaml --num_processes 2 -m "
            "vit_finetune train …`"
        )


def _environment_of_parent() -> Mapping[str, str]:
    """What the process that started this one was started with; nothing, where the system does not tell."""
    try:
        return psutil.Process().parent().environ()  # type: ignore[union-attr]
    except (psutil.Error, AttributeError):
        return {}


def check_world(world_size: int) -> None:
    """Makes sure that the processes that were launched found each other.

    Raises:
        RunError: the launcher started another number of processes than train together. Each would believe it
            is alone.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != world_size:
        raise RunError(
            f"the launcher started {launched} processes, but {world_size} train together. Expected one world "
            f"of {launched}; on machines without an accelerator launch with `accelerate launch --config_file "
            f"recipes/accelerate/cpu.yaml`"
        )


def division_of(environment: Mapping[str, str]) -> str | None:
    """How the launcher wants the model divided over the processes: FSDP, DEEPSPEED; None is not at all."""
    for name in ("FSDP", "DEEPSPEED"):
        if environment.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            return name
    return None


def check_undivided(key: str, environment: Mapping[str, str]) -> None:
    """Makes sure that a model which has to be whole in each process is not divided over them.

    Args:
        key: of the recipe, that needs it whole; for the message.
        environment: what the launcher left.

    Raises:
        RunError: it would be divided.
    """
    if division := division_of(environment):
        name = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}[division]
        raise RunError(
            f"{key} needs the whole model in each process, and the launcher wants it divided ({name}). "
            f"Launch with recipes/accelerate/ddp.yaml, or leave out {key}"
        )


def check_division(environment: Mapping[str, str], formed: str) -> None:
    """Makes sure that a model which the launcher wants divided is not trained whole in every process.

    accelerate 1.15 does so on CPUs, without a word.

    Args:
        environment: what the launcher left.
        formed: accelerate's kind of world.

    Raises:
        RunError: it would be.
    """
    if division_of(environment) == "FSDP" and formed in ("NO", "MULTI_CPU"):
        raise RunError(
            "the launcher wants the model divided (FSDP), which accelerate does over GPUs only. Launch with "
            "recipes/accelerate/cpu.yaml, or where there are GPUs"
        )


def check_same_division(environment: Mapping[str, str], hardware: dict[str, Any]) -> None:
    """Makes sure that checkpoints are read by the kind of world that wrote them.

    Args:
        environment: what the launcher left.
        hardware: of the provenance of the run that is resumed.

    Raises:
        RunError: the model was divided otherwise, or by DeepSpeed over another number of processes.
    """
    names = {None: "whole in each process", "FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}
    before, now = hardware.get("division"), division_of(environment)
    if before != now:
        raise RunError(
            f"the run was begun with the model {names[before]}, and this launcher wants it {names[now]}: it "
            f"cannot read those checkpoints. Launch it as it was begun (see recipes/accelerate/)"
        )
    processes = int(environment.get("WORLD_SIZE", "1"))
    if now == "DEEPSPEED" and processes != hardware["processes"]:
        raise RunError(
            f"DeepSpeed reads its checkpoints with as many processes as wrote them only: expected "
            f"--num_processes {hardware['processes']}, found {processes}"
        )


def check_machines_agree(world: World, run: Run, provenance: dict[str, Any]) -> None:
    """Makes sure that all processes have the same images, and the folder that the main one has just opened.

    Args:
        world: the processes.
        run: where the main process has written the provenance.
        provenance: as this process would have written it.

    Raises:
        RunError: another machine found other images, or its disk is another one.
    """
    expected, text = world.from_main(
        (provenance["data"], run.provenance.read_text(encoding="utf-8") if world.is_main else "")
    )
    for name, split in expected["splits"].items():
        here = provenance["data"]["splits"].get(name)
        if here != split:
            raise RunError(
                f"{expected['path']}: process {world.rank} finds other images in {name} than the main "
                f"process: {here} instead of {split}. Put the same images on every machine"
            )
    deadline = time.monotonic() + SHARED_WITHIN
    while not run.provenance.is_file() or run.provenance.read_text(encoding="utf-8") != text:
        if time.monotonic() > deadline:
            raise RunError(
                f"{run.path.absolute()}: process {world.rank} does not see what the main process wrote "
                f"there. Set training.output_dir to a folder that all machines share"
            )
        time.sleep(0.2)
    world.wait()


def _choose_interface(environment: MutableMapping[str, str]) -> None:
    """Lets gloo use the network that leads to the other machines.

    It looks its address up by the host's name, which on many machines is 127.0.1.1. To the first machine so
    may be the name to meet at, which is its own: it takes the network that leads out.
    """
    address = environment.get("MASTER_ADDR")
    if "GLOO_SOCKET_IFNAME" in environment or not address or is_loopback(address):
        return
    for own in (_own_address(address), _own_address(ELSEWHERE)):
        if own is None or is_loopback(own):
            continue
        for name, addresses in psutil.net_if_addrs().items():
            if any(found.address.partition("%")[0] == own for found in addresses):
                environment["GLOO_SOCKET_IFNAME"] = name
                return


def is_loopback(address: str) -> bool:
    """Whether a machine calls only itself by this address."""
    return address.startswith("127.") or address in ("localhost", "::1")


def _own_address(other: str) -> str | None:
    """The address of this machine on the way to another; None where there is no way."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing, but asks for the way
            own: str = probe.getsockname()[0]
            return own
    except OSError:  # the address is wrong, or the network down: forming the world says so
        return None


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception is torch.distributed's about a process that is gone or silent."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        words in text
        for words in ("gloo", "Connection closed by peer", "Connection reset by peer", "monitoredBarrier")
    )


def is_first_to_fail(environment: Mapping[str, str]) -> bool:
    """Whether this process is the first of its world that fails, and so has to say why.

    What others say after it is that they lost it. Where the place that they meet at is gone, all speak.
    """
    size = int(environment.get("WORLD_SIZE", "1"))
    if size == 1:
        return True
    try:
        host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        # Where the main process kept the place and is just dying, its sockets close within a moment. torch
        # tries one that is closed for many seconds, and tells of each attempt in a page of C++.
        time.sleep(0.2)
        socket.create_connection((host, port), timeout=2).close()
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))  # type: ignore[attr-defined]
        rank = environment.get("RANK", "0").encode()
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        return bool(store.compare_set(f"vit_finetune/failed/{attempt}", "", rank.decode()) == rank)
    except (OSError, RuntimeError, KeyError, ValueError):
        return True
