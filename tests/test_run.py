"""Run folders: what may be written where, and that nothing is ever half written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vit_finetune.files import write_text
from vit_finetune.run import Run, RunError


def started(path: Path) -> Run:
    write_text(path / "recipe.yaml", "data: {}\n")
    return Run(path)


def test_a_new_or_empty_folder_is_free_and_stays_as_it_is(tmp_path: Path) -> None:
    Run(tmp_path / "new").check_free(resume=False)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    Run(tmp_path / "empty").check_free(resume=False)


def test_a_run_is_only_free_to_be_resumed(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.check_free(resume=True)
    with pytest.raises(RunError, match=r"already holds a run\. Continue it with --resume, or .*output_dir=…"):
        run.check_free(resume=False)


@pytest.mark.parametrize("name", ["nothing", "empty", "other", "file"])
def test_what_holds_no_run_cannot_be_resumed(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    write_text(tmp_path / "other" / "notes.txt", "keep me")
    write_text(tmp_path / "file", "keep me")
    with pytest.raises(RunError, match="there is no run to resume; leave out --resume"):
        Run(tmp_path / name).check_free(resume=True)


def test_a_folder_with_other_things_and_a_file_are_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "other" / "notes.txt", "keep me")
    with pytest.raises(RunError, match="other is not empty and holds no run; write to another folder"):
        Run(tmp_path / "other").check_free(resume=False)
    with pytest.raises(RunError, match=r"notes\.txt is a file; expected a new or empty folder"):
        Run(tmp_path / "other" / "notes.txt").check_free(resume=False)
    assert (tmp_path / "other" / "notes.txt").read_text() == "keep me"


def test_a_run_that_never_began_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"provenance\.json is missing: .* Continue it with --resume"):
        started(tmp_path / "run").read_provenance()


def test_only_one_process_at_a_time_holds_a_run(tmp_path: Path) -> None:
    """Locks are between processes: the other one is a child."""
    run = Run(tmp_path / "run")
    other = (
        "import sys; from vit_finetune.run import Run, RunError\n"
        "try:\n with Run(sys.argv[1]).held(): print('held')\n"
        "except RunError as error: print(error)"
    )

    def try_it() -> str:
        done = subprocess.run([sys.executable, "-c", other, str(run.path)], capture_output=True, text=True)
        return done.stdout.strip()

    with run.held():
        assert try_it().startswith(f"{run.path}: another process is training there")
    assert try_it() == "held"
    assert not list(run.checkpoints.iterdir())
