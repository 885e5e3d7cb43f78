"""Processes that form a world, or stop where they do not."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import psutil
import pytest
import torch

from vit_finetune.run import RunError
from vit_finetune.training import world
from vit_finetune.training.hardware import divide_step
from vit_finetune.training.world import check_division, check_launcher, check_same_division, check_world


def test_a_world_that_did_not_form_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="2 processes, but 1"):
        check_world(1)
    check_world(2)


def test_a_launcher_that_starts_one_process_instead_of_several_is_an_error() -> None:
    alone = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}
    address = {"MASTER_ADDR": "127.0.0.1"}
    check_launcher(alone, {})
    with pytest.raises(RunError, match=r"started one .* recipes/accelerate/cpu\.yaml"):
        check_launcher(alone | address, {})
    check_launcher(alone | address, address)  # which was there before the launcher was called
    check_launcher(alone | address | {"WORLD_SIZE": "2"}, {})
    check_launcher(address, {})  # without a launcher


@pytest.mark.parametrize(
    ("images", "processes", "batch_size", "expected"),
    [
        (32, 1, 8, (8, 4)),
        (32, 4, 8, (8, 1)),
        (32, 8, 8, (4, 1)),
        (24, 2, 8, (6, 2)),  # 8 does not divide 12
        (30, 2, 8, (5, 3)),
        (7, 7, 32, (1, 1)),
    ],
)
def test_a_step_is_divided_over_other_processes(
    images: int, processes: int, batch_size: int, expected: tuple[int, int]
) -> None:
    size, accumulation = divide_step(images, processes, batch_size)
    assert (size, accumulation) == expected
    assert size * accumulation * processes == images


def test_a_step_that_cannot_be_divided_names_the_counts_that_can() -> None:
    with pytest.raises(
        RunError, match=r"6 images per step, which 4 processes .* one of 1, 2, 3, 6 processes"
    ):
        divide_step(6, 4, 2)


FSDP, DEEPSPEED = {"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}


def test_a_model_that_was_to_be_divided_is_not_trained_whole() -> None:
    check_division(FSDP, "MULTI_GPU")
    check_division({}, "MULTI_CPU")
    for formed in ("MULTI_CPU", "NO"):
        with pytest.raises(RunError, match=r"divided \(FSDP\)"):
            check_division(FSDP, formed)


def test_checkpoints_are_read_by_the_kind_of_world_that_wrote_them() -> None:
    check_same_division({}, {"processes": 1})  # of runs that did not note it
    check_same_division(FSDP | {"WORLD_SIZE": "4"}, {"processes": 2, "division": "FSDP"})
    check_same_division(DEEPSPEED, {"processes": 2, "division": "DEEPSPEED"})
    with pytest.raises(RunError, match=r"begun with the model FSDP, .* wants it whole in each process"):
        check_same_division({}, {"processes": 2, "division": "FSDP"})
    with pytest.raises(RunError, match="expected --num_processes 4, found 2"):
        check_same_division(DEEPSPEED, {"processes": 4, "division": "DEEPSPEED"})


@pytest.mark.parametrize(
    ("address", "chosen"),
    [
        ("10.0.0.2", "eth0"),
        ("10.0.0.1", "eth0"),  # its own
        ("first", "eth0"),  # its own name, which Debian gives to 127.0.1.1
        ("192.168.0.9", "ib0"),
        ("fe80::2", "ib0"),
        ("127.0.0.1", None),
        ("::1", None),
        ("localhost", None),
        ("no such machine", "eth0"),
        (None, None),
    ],
)
def test_gloo_is_told_the_network_that_leads_to_the_others(
    monkeypatch: pytest.MonkeyPatch, address: str | None, chosen: str | None
) -> None:
    names = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.1"], "ib0": ["192.168.0.1", "fe80::1%ib0"]}
    ways = {
        **{
            "10.0.0.2": "10.0.0.1",
            "10.0.0.1": "10.0.0.1",
            "first": "127.0.0.1",
            "127.0.0.1": "127.0.0.1",
            "::1": "::1",
        },
        **{"192.168.0.9": "192.168.0.1", "fe80::2": "fe80::1", world.ELSEWHERE: "10.0.0.1"},
    }
    monkeypatch.setattr(world, "_own_address", ways.get)
    found = {name: [SimpleNamespace(address=one) for one in given] for name, given in names.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    environment = {} if address is None else {"MASTER_ADDR": address}
    world._choose_interface(environment)
    assert environment.get("GLOO_SOCKET_IFNAME") == chosen


def test_the_way_to_another_machine_is_asked_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world._own_address("127.0.0.1") == "127.0.0.1"

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert world._own_address("nowhere.invalid") is None


def test_processes_that_do_not_meet_say_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(**_: object) -> None:
        raise torch.distributed.DistNetworkError("The client socket has timed out")

    monkeypatch.setattr(world, "PartialState", alone)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(RunError, match=r"did not meet at 10\.0\.0\.1:29500 within 600 s"):
        world.World(600, use_cpu=True)
