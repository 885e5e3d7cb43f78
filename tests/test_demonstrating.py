"""What the story around the demo's page decides: which images of the data are shown, who can reach the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import COLOURS
from PIL import Image

from vit_finetune import demonstrating
from vit_finetune.demonstrating import check_address, load_examples
from vit_finetune.evaluation.images import own_split
from vit_finetune.recipe import load_recipe
from vit_finetune.run import Run, RunError

NAMES = ["blue", "green", "red"]


def mean_colour(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).reshape(-1, 3).mean(axis=0)


def test_examples_are_validation_images_of_the_class(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(
        demonstrating, "own_split", lambda run, split: read.append(split) or own_split(run, split)
    )
    pictures = load_examples(trained, NAMES)
    assert pictures is not None and read == ["validation"]
    in_split = len(own_split(trained, "validation")) // 3
    for number, name in enumerate(NAMES):
        drawn = pictures(number)
        assert len(drawn) == min(6, in_split)
        for picture in drawn:
            assert max(picture.size) == 192
            distances = {
                other: np.abs(mean_colour(picture) - colour).sum() for other, colour in COLOURS.items()
            }
            assert min(distances, key=distances.__getitem__) == name
    # Ids are the model's, whatever order the data has its classes in; one that the data lacks has no pictures.
    turned = load_examples(trained, ["red", "violet", "blue"])
    assert turned is not None
    assert [picture.tobytes() for picture in turned(2)] == [picture.tobytes() for picture in pictures(0)]
    assert turned(1) == []


def test_a_run_without_validation_shows_training_images(
    trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(Run, "read_provenance", lambda run: {"data": {"splits": {"train": {}, "test": {}}}})
    monkeypatch.setattr(
        demonstrating, "own_split", lambda run, split: read.append(split) or _raise("as far as this")
    )
    assert load_examples(trained, NAMES) is None
    assert read == ["train"]


def _raise(message: str) -> None:
    raise RunError(message)


def test_without_the_data_there_are_no_examples(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(run.recipe)
    moved = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"path": str(tmp_path / "gone")})}
    )
    run.recipe.write_text(moved.to_yaml(resolved=True))
    assert load_examples(run, NAMES) is None
    assert "warning: the page shows no images of the classes: " in capsys.readouterr().err


def test_images_that_went_bad_are_passed_over(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    images = own_split(trained, "validation")
    monkeypatch.setattr(demonstrating, "own_split", lambda run, split: images)
    whole = load_examples(trained, NAMES)
    again = load_examples(trained, NAMES)
    assert whole is not None and again is not None
    count = len(whole(0))

    def fail(dataset: object, row: int) -> None:
        raise OSError("gone")

    monkeypatch.setattr(demonstrating, "open_image", fail)
    assert again(0) == [] and len(whole(0)) == count  # what was drawn once is kept


@pytest.mark.parametrize(
    ("host", "private"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_who_reaches_an_address_is_known(host: str, private: bool) -> None:
    assert check_address(host, None) is private


def test_a_host_that_is_not_ascii_is_refused() -> None:
    with pytest.raises(RunError, match="no such host"):
        check_address("h" * 70 + ".é", None)
