"""What becomes of errors and signals: one message and an exit code.

0 done; 1 the work failed; 2 the words or the recipe are wrong; 130 stopped by Ctrl-C; 75 stopped by SIGTERM
or SIGUSR1, to be gone on with.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import typer

from vit_finetune.console import fail, say
from vit_finetune.files import is_disk_full
from vit_finetune.run import STOPPING, Interrupted, RunError


def guarded(work: Callable[[], None], debug: bool) -> None:
    """Does the work; an error becomes one message and exit code 1, or with --debug its traceback."""
    failed = False
    try:
        work()
    except Interrupted as stop:
        answer_signals(signal.SIG_IGN)  # one answer is enough
        say(str(stop))
        answer_signals(signal.SIG_DFL)
        raise typer.Exit(stop.exit_code) from None
    except KeyboardInterrupt:
        fail("stopped")
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            raise
        failed = True
        # The launcher ends the others as soon as it sees that one is gone: not before they have said why.
        answer_signals(signal.SIG_IGN)
        _fail_once(_explain(error))
        answer_signals(signal.SIG_DFL)
        raise typer.Exit(1) from None
    finally:
        if not failed:  # with others that are gone, taking leave could wait for them
            _leave_world()


def listen() -> None:
    """Lets SIGTERM and SIGUSR1 end the command with their own exit code, from the first second on."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name} before anything was begun", number)

    answer_signals(stop)


def answer_signals(handler: Any) -> None:
    """Gives the signals that stop a command, but for Ctrl-C, another handler."""
    for number in STOPPING:
        if number != signal.SIGINT:  # Ctrl-C stays Python's
            signal.signal(number, handler)


def _fail_once(message: str) -> None:
    """Says why the work stopped; of several processes that stop together the first one does."""
    if not _is_in_world():
        fail(message)
        return
    from vit_finetune.training.world import is_first_to_fail

    if is_first_to_fail(os.environ):
        fail(message, every_process=True)


def _explain(error: Exception) -> str:
    if isinstance(error, RunError):
        return str(error)
    if is_disk_full(error):
        place = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return (
            f"the disk is full{place}. Free some space and say the same again; `train` goes on with --resume"
        )
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"{error.filename or 'a file'}: {error.strerror}. Make it writable or name another folder, and "
            f"say the same again; `train` goes on with --resume"
        )
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _is_in_world() -> bool:
    torch = sys.modules.get("torch")
    return bool(torch and torch.distributed.is_available() and torch.distributed.is_initialized())


def _leave_world() -> None:
    """Takes leave of the other processes of a launcher; without it they complain."""
    if _is_in_world():
        sys.modules["torch"].distributed.destroy_process_group()
