"""What a person sees in a terminal: on stderr, from the main process only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from vit_finetune.run import Finding


_UNPRINTABLE = re.compile(
    # Controls but tab and newline; lone surrogates; marks that turn the direction of what follows.
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069\ufeff]"
)


def printable(text: str) -> str:
    """The text with � for what should not be shown: controls, lone surrogates, marks of direction."""
    return _UNPRINTABLE.sub("�", text.replace("\r\n", "\n"))


@cache
def terminal() -> Console:
    """The console of this process: stderr, or nothing where a launcher gave it another rank than 0."""
    from rich.console import Console

    quiet = int(os.environ.get("RANK", "0")) != 0
    return Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, emoji=False)


def say(message: str) -> None:
    """One line for the user; the text is shown as it is, but for what would steer the terminal."""
    terminal().print(printable(message), markup=False)


def warn(message: str) -> None:
    """One line that the user should not miss."""
    terminal().print(f"warning: {printable(message)}", style="yellow", markup=False)


def fail(message: str, every_process: bool = False) -> None:
    """Why the work stopped.

    Args:
        message: one line.
        every_process: whether all processes may speak, and say their number; else the first of each machine.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not (every_process or os.environ.get("LOCAL_RANK") == "0"):
        terminal().print(f"error: {printable(message)}", style="bold red", markup=False)
    else:
        from rich.console import Console

        console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        console.print(f"process {rank}: error: {printable(message)}", style="bold red", markup=False)


def answer(text: str) -> None:
    """What was asked for, on stdout: once, however many processes found it."""
    if os.environ.get("RANK", "0") == "0":
        print(text)  # noqa: T201 - the answer itself, which belongs on stdout


def show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], text_columns: int = 1
) -> None:
    """A table; the first columns are text, the others are aligned right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)), title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        table.add_column(
            Text(printable(column)), justify="left" if position < text_columns else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    # Soft wrapping, which `say` wants for long paths, would break a table's lines.
    terminal().print(table, soft_wrap=False)


def show_findings(findings: Sequence[Finding]) -> None:
    """A table of what a checkup found, with the first few images of each finding."""
    if not findings:
        say("checkup: nothing was found to be wrong")
        return
    rows = [
        [
            finding.severity,
            finding.kind,
            "\n".join([f"{finding.sentence}.", *name_images(finding)]),
            finding.count,
        ]
        for finding in findings
    ]
    show_table("checkup", ["", "finding", "what was found, and what to do", "count"], rows, text_columns=3)


def warn_of_findings(findings: Sequence[Finding]) -> None:
    """Warnings, and notes of what is left out, line by line; other notes are for the report."""
    from vit_finetune.run import TOLD

    for finding in findings:
        if finding.severity == "warning":
            warn("\n".join([finding.sentence, *name_images(finding)]))
        elif finding.kind in TOLD:
            say(finding.sentence)


def name_images(finding: Finding, most: int = 4) -> list[str]:
    """A line for each of a finding's first few images."""
    lines = [
        f"  {image.name}" + (f" ({image.detail})" if image.detail else "") for image in finding.images[:most]
    ]
    more = len(finding.images) - most
    return [*lines, f"  … and {more:,} more"] if more > 0 else lines


def build_progress(unit: str) -> Progress:
    """A progress bar with count, `unit` per second, time left and a text `status`; not started yet."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Any) -> Text:
            rate = task.fields.get("rate") or task.finished_speed or task.speed
            return Text(f"{rate:,.0f} {unit}/s" if rate else "")

    return Progress(
        TextColumn("{task.description}", markup=False),  # file names stand in it
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        TimeRemainingColumn(),
        console=terminal(),
        transient=True,
        disable=not terminal().is_terminal,
    )


@contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Any]:
    """A progress bar for the length of a block; yields a function that advances it by a number of units."""
    bar = build_progress(unit)
    task = bar.add_task(description, total=total, status="")
    with bar:
        yield lambda count=1: bar.advance(task, count)
