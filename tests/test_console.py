"""What a person sees: on stderr, as it is, and from the main process only."""

from __future__ import annotations

import io

import pytest

from vit_finetune import console


@pytest.fixture(autouse=True)
def fresh_terminal() -> None:
    console.terminal.cache_clear()


def test_messages_are_shown_on_stderr_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "photos/[bold]/:cat:/[/red] " + "long " * 60
    console.say(text)
    console.warn(text)
    console.fail(text)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"{text}\nwarning: {text}\nerror: {text}\n"


def test_names_of_files_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2J\x1b]0;title\x07\x9b31m\r\u202egnp.jpg"
    for tell in (console.say, console.warn, console.fail):
        tell(name)
    console.show_table(name, [f"{name}[/red]"], [[name]])  # `compare` has the names of runs above its columns
    err = capsys.readouterr().err
    assert not set("\x1b\x07\x9b\r\u202e") & set(err) and err.count("gnp.jpg") == 6 and "[/red]" in err


def test_only_the_main_process_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    console.say("hello")
    console.fail("hello")
    console.show_table("hello", ["a"], [["b"]])
    console.answer("hello")
    console.terminal.cache_clear()
    monkeypatch.setenv("RANK", "0")
    console.say("from the first")
    console.answer("{}")
    out, err = capsys.readouterr()
    assert (out, err) == ("{}\n", "from the first\n")
    console.terminal.cache_clear()


def test_each_machine_is_told_why_its_own_processes_stop(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a recipe that only the first machine has: nobody else would say so there."""
    for rank, local in (("9", "1"), ("8", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        console.fail("no such recipe")
    assert capsys.readouterr().err == "process 8: error: no such recipe\n"


def test_tables_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_table("images [by] class", ["class", "train"], [["[red]:cat:", 3], ["b", 12]])
    out, err = capsys.readouterr()
    assert out == ""
    assert "images [by] class" in err
    assert "[red]:cat:" in err
    assert err.index(" 3 ") and err.index("12 ")


def test_progress_is_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("reading", 3, "images") as advance:
        advance(2)
        advance()
    assert capsys.readouterr() == ("", "")


def test_a_progress_bar_shows_file_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(console, "terminal", lambda: terminal)
    with console.progress("unpacking photos [/b].zip", 4, "files") as advance:
        advance(2)
        advance(2)
    assert "unpacking photos [/b].zip" in screen.getvalue()
    assert "4/4" in screen.getvalue()
    assert "files/s" in screen.getvalue()
