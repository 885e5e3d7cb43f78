"""What one execution leaves behind: the run folder, its paths and its JSON."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vit_finetune.files import sha256_of


class RunError(RuntimeError):
    """The work cannot go on; its text is the whole message: found, expected, what to write instead."""


class Diverged(RunError):
    """A loss, a weight or an answer of the model is NaN or infinite."""


STOPPING = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
"""Ctrl-C; what launchers, Slurm and spot machines send before they kill."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the work; the text says what was kept and how to go on.

    Like Ctrl-C's own exception it is none that libraries catch on the way.

    Args:
        message: the text.
        number: of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as shells have it; else 75, which sysexits.h calls EX_TEMPFAIL: say it again."""
        return 130 if self.number == signal.SIGINT else 75


class ClassScore(BaseModel):
    """Scores of one class, each in [0, 1]; `support` counts its images."""

    model_config = ConfigDict(frozen=True)
    precision: float
    recall: float
    f1: float
    support: int


class CalibrationBin(BaseModel):
    """Images whose top probability lies in (low, high]: how many, its mean, and the share that is right."""

    model_config = ConfigDict(frozen=True)
    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


CALIBRATION_KEY = "calibration_temperature"
"""Where a model's config.json holds its temperature; transformers keeps the key and gives it no meaning."""


class Calibrated(BaseModel):
    """A split's log loss (nats) and calibration with the logits divided by a temperature.

    What is predicted, and so every score of it, stays.
    """

    model_config = ConfigDict(frozen=True)
    temperature: float
    """Of least log loss on the validation split (Guo et al., 2017)."""
    log_loss: float
    ece: float
    calibration: list[CalibrationBin]


class Mistake(BaseModel):
    """An image that the model got wrong: how sure it was of the wrong class."""

    model_config = ConfigDict(frozen=True)
    id: str
    label: str
    predicted: str
    probability: float
    picture: str | None = None
    """File name below the run's `pictures/`."""
    map: str | None = None
    """The same of where the model looked."""


class Report(BaseModel):
    """The numbers of one split. Every score is in [0, 1] except `log_loss` (nats)."""

    model_config = ConfigDict(frozen=True)
    split: str
    num_images: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    """95% Wilson score interval."""
    top_5_accuracy: float | None = None
    """Only where there are more than 5 classes."""
    macro_f1: float
    balanced_accuracy: float
    log_loss: float
    ece: float
    """Expected calibration error over 15 bins of equal width (Guo et al., 2017)."""
    per_class: dict[str, ClassScore]
    confusion_matrix: list[list[int]]
    """Rows are the true classes, columns the predicted ones, both in the order of `labels`."""
    labels: list[str]
    """Class names in id order."""
    calibration: list[CalibrationBin]
    worst_mistakes: list[Mistake] = []
    calibrated: Calibrated | None = None
    """With the temperature that is published; all else is without, as a pipeline gives it."""

    def to_json(self) -> str:
        """The report as JSON, without what does not apply."""
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"

    @classmethod
    def load(cls, path: Path) -> Report:
        """The report in a JSON file."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


class FoundImage(BaseModel):
    """An image that a finding is about."""

    model_config = ConfigDict(frozen=True)
    split: str
    """train, validation or test; `all` where the data has no splits."""
    id: str
    detail: str = ""
    """What is the matter with this one, or its class where images of several are the same."""
    group: int | None = None
    """Images with one number belong together: they are the same, or nearly."""

    @property
    def name(self) -> str:
        """The id; after its split where the data has splits and the id does not begin with its folder."""
        folder = self.id.partition("/")[0].lower() if "/" in self.id else ""
        shown = self.split == "all" or folder.startswith(self.split[:3])
        return self.id if shown else f"{self.split} {self.id}"


TOLD = ("listing", "excluded")
"""Kinds of notes that people are told of as of warnings: what is not trained on."""


class Finding(BaseModel):
    """One kind of thing that a checkup saw in the data."""

    model_config = ConfigDict(frozen=True)
    kind: str
    """kebab-case, such as `near-duplicate`."""
    severity: Literal["error", "warning", "note"]
    """An error stops training."""
    message: str
    """What was found, without a full stop."""
    advice: str = ""
    """What to do about it, without a full stop."""
    count: int
    """Images; of what is said about classes or the listing, classes or sentences."""
    images: list[FoundImage] = []
    exclude: list[FoundImage] = []
    """What `data.exclude` leaves out, so that the finding is gone: of duplicates all but one."""

    @property
    def sentence(self) -> str:
        """What was found and what to do, in one line."""
        return f"{self.message}. {self.advice}" if self.advice else self.message

    def shortened(self, most: int = 20) -> Finding:
        """The finding with its first few images, and without what to exclude."""
        return self.model_copy(update={"images": self.images[:most], "exclude": []})


class Findings(BaseModel):
    """`findings.json`: everything that a checkup saw in the data, gravest first."""

    model_config = ConfigDict(frozen=True)
    path: str
    """`data.path` of the recipe."""
    num_images: dict[str, int]
    """Images by split, as the data has them before anything is carved or left out."""
    findings: list[Finding]
    whole: bool = True
    """Whether all images are listed; not so in a run."""

    def to_json(self) -> str:
        """The document as JSON."""
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"

    def shortened(self) -> Findings:
        """The document with the first few images of each finding, as a run keeps it."""
        findings = [finding.shortened() for finding in self.findings]
        return self.model_copy(update={"findings": findings, "whole": False})

    @classmethod
    def load(cls, path: Path) -> Findings:
        """The findings in a JSON file.

        Raises:
            RunError: there is no such file, or it is none that `vit-finetune check` wrote.
        """
        expected = "expected a findings.json that `vit-finetune check` wrote"
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise RunError(f"{path}: cannot be opened: {error.strerror}; {expected}") from None
        except ValidationError:
            raise RunError(f"{path}: not a findings document; {expected}") from None


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion; (0, 1) of nothing (Wilson, 1927)."""
    if total == 0:
        return (0.0, 1.0)
    z = 1.959963984540054
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # Exact at the ends, where rounding would leave 0.9999999999999999.
    low = 0.0 if correct == 0 else (centre - spread) / scale
    high = 1.0 if correct == total else (centre + spread) / scale
    return (low, high)


class Run:
    """The folder of one execution; knows where everything in it lies, and makes nothing until asked."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.recipe = self.path / "recipe.yaml"
        self.provenance = self.path / "provenance.json"
        self.splits = self.path / "splits"
        self.findings = self.path / "findings.json"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.adapter = self.path / "adapter"
        self.history = self.path / "history.json"
        self.seeing = self.path / "seeing.json"
        self.pictures = self.path / "pictures"
        self.report_html = self.path / "report.html"

    def report(self, split: str) -> Path:
        """Where the report of a split lies."""
        return self.path / "reports" / f"{split}.json"

    def predictions(self, split: str) -> Path:
        """Where the predictions of a split lie."""
        return self.path / "predictions" / f"{split}.parquet"

    def exists(self) -> bool:
        """Whether the folder holds a run, finished or not."""
        return self.recipe.is_file()

    def check_free(self, resume: bool) -> None:
        """Makes sure that a run may be written here, or resumed; makes nothing.

        Raises:
            RunError: it holds a run and `resume` is off, holds something else, has nothing to resume, or
                nothing can be written there.
        """
        if resume and not self.exists():
            raise RunError(f"{self.path}: there is no run to resume; leave out --resume to start one")
        if self.exists() and not resume:
            raise RunError(
                f"{self.path} already holds a run. Continue it with --resume, or write to another folder "
                f"with training.output_dir=…"
            )
        if not resume and self.path.exists():
            if not self.path.is_dir():
                raise RunError(f"{self.path} is a file; expected a new or empty folder for the run")
            if not all(map(self._is_left_behind, self.path.iterdir())):
                raise RunError(
                    f"{self.path} is not empty and holds no run; write to another folder with "
                    f"training.output_dir=…"
                )
        places = (self.path, *self.path.absolute().parents)
        there = next(folder for folder in places if folder.exists())
        if not os.access(there, os.W_OK):
            raise RunError(
                f"{there}: read-only, or not yours to write to. Make it writable, or write to another "
                f"folder with training.output_dir=…"
            )

    def _is_left_behind(self, path: Path) -> bool:
        """Whether a path is of a run that was killed before it had its recipe."""
        empty = path == self.checkpoints and path.is_dir() and not any(path.iterdir())
        return empty or path.name.startswith(f".{self.recipe.name}.")

    def claim(self) -> None:
        """Makes the folder; whichever process does, it is its own.

        Raises:
            RunError: another process was faster.
        """
        for again in (True, False):
            try:
                self.checkpoints.mkdir(parents=True)
                return
            except FileExistsError:
                if again:
                    time.sleep(1)  # another process that has just made it writes its recipe at once
                    if not self.exists():  # or it was killed before
                        with suppress(OSError):
                            self.checkpoints.rmdir()
        raise RunError(f"{self.path}: another process has just begun a run there; set training.output_dir=…")

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block in which no other process writes to the run, of any machine whose file system knows locks.

        Raises:
            RunError: another process is writing to it.
        """
        lock = self.checkpoints / ".lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise RunError(
                        f"{self.path}: another process is training there. Let it end, or end it, and say the "
                        f"same again"
                    ) from None
            try:
                yield
            finally:
                with suppress(OSError):  # such as a disk that has become read-only, of which the block told
                    lock.unlink()

    def sum_scored(self) -> dict[str, str]:
        """SHA-256 in hex of every file that was scored or that says how it went, by its path in the run.

        That is `model/` but for the card, `reports/` and `predictions/`.
        """
        files = [
            path
            for name in ("model", "reports", "predictions")
            for path in self.visible_files(self.path / name)
        ]
        card = self.model / "README.md"
        return {path.relative_to(self.path).as_posix(): sha256_of(path) for path in files if path != card}

    def visible_files(self, folder: Path) -> list[Path]:
        """The files of one of its folders, sorted, but for those that file browsers, editors and git hide."""
        return [
            path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        ]

    def remove_leftovers(self) -> None:
        """Removes what a killed process was writing: `written_whole`'s and `folder_written_whole`'s."""
        for path in list(self.path.rglob(".*")):
            if re.fullmatch(r"\..+\.[a-z0-9_]{8}", path.name):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def read_provenance(self) -> dict[str, Any]:
        """Where this run came from: versions, hardware, data, times.

        Raises:
            RunError: the run was stopped while its folder was being made.
        """
        if not self.provenance.is_file():
            raise RunError(
                f"{self.path}: {self.provenance.name} is missing: the run stopped before its first step. "
                f"Continue it with --resume"
            )
        facts: dict[str, Any] = json.loads(self.provenance.read_text(encoding="utf-8"))
        return facts
