"""The trials of a search on disk: optuna's study, gone on with where it was killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from vit_finetune.data.augmentation import generator_of
from vit_finetune.recipe import Recipe, find_changes
from vit_finetune.run import RunError
from vit_finetune.search_space import Dimension

JOURNAL = "journal.log"
"""The file in the folder of a search that has all there is to know of its trials."""
LOCK = ".lock"
"""What its process holds, and a killed one leaves there."""


def open_study(recipe: Recipe, folder: Path) -> Any:
    """The trials on disk, as lines of JSON; to be `held` by this process."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = (folder / JOURNAL).absolute()  # of a relative one, optuna's lock would point to nothing
    _mend(journal)
    backend = JournalFileBackend(str(journal))
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="tune",
        direction="minimize" if recipe.training.metric_for_best_model == "loss" else "maximize",
        pruner=optuna.pruners.MedianPruner(),
        load_if_exists=True,
    )


def _mend(journal: Path) -> None:
    """Takes away what a process that was killed, or a full disk, left: a lock, and half of a last line."""
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)  # optuna waits for it
    if journal.is_file():
        whole = journal.read_bytes().rfind(b"\n") + 1
        os.truncate(journal, whole)  # or what is added would continue the half line


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A block in which no other process makes trials there.

    Raises:
        RunError: another process does.
    """
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RunError(f"{folder}: another process makes trials there. Let it end, or end it") from None
    try:
        yield
    finally:
        lock.release()
        (folder / LOCK).unlink(missing_ok=True)


def asked(recipe: Recipe, dimensions: list[Dimension], images: dict[str, Any]) -> dict[str, Any]:
    """What a search was begun with, to be compared with what it is gone on with.

    Args:
        recipe: of all trials.
        dimensions: what is searched.
        images: of each split, how many and their fingerprint.
    """
    search = [str(dimension) for dimension in dimensions]
    return {"recipe": recipe.model_dump(mode="json"), "search": search, "images": images}


def check_same(study: Any, now: dict[str, Any], folder: Path) -> None:
    """Makes sure that a search is gone on with as it was begun.

    Args:
        study: the trials so far.
        now: as `asked` has it.
        folder: of the search.

    Raises:
        RunError: recipe, search or images are others, or it was stopped before it began.
    """
    before = study.user_attrs.get("asked")
    if before is None or "pinned" not in study.user_attrs:
        raise RunError(
            f"{folder}: the search was stopped before it began: remove the folder, and say the same again "
            f"without --resume"
        )
    changed = list(find_changes(before["recipe"], now["recipe"]).values())
    if before["search"] != now["search"]:
        changed.append(f"the search was {before['search']}, is {now['search']}")
    if before["images"] != now["images"]:
        changed.append("the images are others")
    if changed:
        raise RunError(
            f"{folder}: cannot go on with another search: {'; '.join(changed)}. Say the same words, or set "
            f"another training.output_dir=…"
        )


def finished(study: Any) -> list[Any]:
    """The trials that were scored or pruned, in their order; not those that were killed."""
    from optuna.trial import TrialState

    found: list[Any] = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return found


def forget_killed(study: Any) -> None:
    """Trials that a killed process was making are made again, from their beginning."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)


def ask(study: Any, seed: int, number: int, dimensions: list[Dimension]) -> tuple[Any, dict[str, Any]]:
    """The next trial, and its settings by recipe key.

    They depend on the seed, the number and the finished trials before alone.

    Args:
        study: the trials so far.
        seed: of the search.
        number: of finished trials.
        dimensions: what is searched.
    """
    import optuna

    chance = generator_of(seed, number, "trial").getrandbits(32)
    study.sampler = optuna.samplers.TPESampler(seed=chance)
    trial = study.ask()
    settings = {dimension.key: _suggest(trial, dimension) for dimension in dimensions}
    trial.set_user_attr("settings", settings)
    return trial, settings


def _suggest(trial: Any, dimension: Dimension) -> Any:
    if dimension.choices:  # by number: optuna knows no lists
        return dimension.choices[
            trial.suggest_categorical(dimension.key, list(range(len(dimension.choices))))
        ]
    if dimension.is_integer:
        return trial.suggest_int(dimension.key, dimension.low, dimension.high)
    value = trial.suggest_float(dimension.key, dimension.low, dimension.high, log=dimension.is_logarithmic)
    # As many digits as people read; never beyond the ends.
    return min(max(float(f"{value:.4g}"), dimension.low), dimension.high)
