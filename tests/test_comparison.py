"""Runs side by side: counts and tests against scipy and plain loops, the same images or a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from scipy import stats

from vit_finetune.evaluation.comparison import (
    Answers,
    adjust,
    check_comparable,
    compare_pairs,
    difference_interval,
    load_answers,
    mcnemar,
    right_alone,
)
from vit_finetune.run import Run, RunError


def write_predictions(path: Path, ids: list[str], labels: list, predicted: list) -> Run:
    run = Run(path)
    run.predictions("test").parent.mkdir(parents=True)
    table = pa.table(
        {"id": ids, "label": labels, "predicted": predicted, "probabilities": [[1.0, 0.0]] * len(ids)}
    )
    pyarrow.parquet.write_table(table, run.predictions("test"))
    return run


def answers(name: str, right: list[bool]) -> Answers:
    labels = ["cat"] * len(right)
    predicted = ["cat" if one else "dog" for one in right]
    ids = np.asarray([f"{number:04}" for number in range(len(right))], dtype=object)
    return Answers(name, ids, labels, predicted, np.asarray(right))


def test_counts_of_two_known_runs(tmp_path: Path) -> None:
    """Written by hand: of ten images, 3 both right, 4 only the first, 1 only the second, 2 both wrong."""
    ids = [f"{number}.jpg" for number in range(10)]
    labels = ["cat", "dog"] * 5
    other = {"cat": "dog", "dog": "cat"}
    first_right, second_right = [1, 1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 1, 0, 0]

    def said(right: list[int]) -> list[str]:
        return [label if one else other[label] for label, one in zip(labels, right)]

    one = write_predictions(tmp_path / "one", ids, labels, said(first_right))
    # The same images in another order.
    order = [7, 3, 0, 9, 1, 2, 8, 6, 5, 4]
    two = write_predictions(
        tmp_path / "two",
        [ids[place] for place in order],
        [labels[place] for place in order],
        [said(second_right)[place] for place in order],
    )
    loaded = [load_answers(run, run.path.name, "test") for run in (one, two)]
    check_comparable(loaded)
    (pair,) = compare_pairs(loaded)
    assert (pair.both_right, pair.only_first, pair.only_second, pair.both_wrong) == (3, 4, 1, 2)
    assert pair.difference == pytest.approx(-0.3)
    # 2 · (C(5,0) + C(5,1)) / 2⁵
    assert pair.p_value == pair.adjusted_p_value == pytest.approx(12 / 32)
    assert pair.interval[0] < -0.3 < pair.interval[1]
    alone = right_alone(loaded)
    assert [loaded[0].ids[row] for row in alone["one"]] == ["3.jpg", "4.jpg", "5.jpg", "6.jpg"]
    assert [loaded[0].ids[row] for row in alone["two"]] == ["7.jpg"]


def test_identical_runs_do_not_differ() -> None:
    (pair,) = compare_pairs(
        [answers("a", [True] * 90 + [False] * 10), answers("b", [True] * 90 + [False] * 10)]
    )
    assert (pair.difference, pair.p_value, pair.only_first, pair.only_second) == (0, 1, 0, 0)
    assert pair.interval[0] < 0 < pair.interval[1]


def test_several_labels_are_right_when_all_are(tmp_path: Path) -> None:
    labels, predicted = [["a", "b"], ["a"], []], [["a", "b"], ["a", "b"], []]
    loaded = load_answers(write_predictions(tmp_path, ["1", "2", "3"], labels, predicted), "run", "test")
    assert loaded.is_right.tolist() == [True, False, True]


def test_mcnemar_is_the_binomial_test_summed_by_hand() -> None:
    from math import comb

    for first, second in ((0, 0), (1, 0), (5, 12), (30, 30), (0, 9), (41, 7)):
        total = first + second
        tail = sum(comb(total, k) for k in range(max(first, second), total + 1)) / 2**total
        assert mcnemar(first, second) == pytest.approx(min(1, 2 * tail), abs=1e-12)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """3,000 drawn test splits of 200 images: an interval of 95% that holds 94 to 98 of 100 differences."""
    generator = np.random.default_rng(0)
    shares = [0.6, 0.15, 0.08, 0.17]  # both right, only first, only second, both wrong
    counts = generator.multinomial(200, shares, size=3000)
    truth = shares[2] - shares[1]
    held = [
        low <= truth <= high for low, high in (difference_interval(int(c[1]), int(c[2]), 200) for c in counts)
    ]
    assert 0.94 < np.mean(held) < 0.98


def test_p_values_are_adjusted_as_holm_does() -> None:
    # The step-down procedure by hand: 0.01·3, 0.03·2, 0.04·1 raised to the one before.
    assert adjust([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert adjust([0.9, 0.8]) == [1.0, 1.0] and adjust([0.2]) == [0.2] and adjust([]) == []
    # Never below the raw value, never above Bonferroni's.
    raw = np.random.default_rng(0).uniform(0, 0.2, 20).tolist()
    assert all(p <= a <= min(1, p * 20) for p, a in zip(raw, adjust(raw)))
    # And never below the false discovery rate, which forgives more.
    assert np.all(np.asarray(adjust(raw)) >= stats.false_discovery_control(raw) - 1e-12)


def test_other_images_and_other_labels_are_refused(tmp_path: Path) -> None:
    one = load_answers(write_predictions(tmp_path / "1", ["a", "b"], ["x", "y"], ["x", "x"]), "one", "test")
    two = load_answers(write_predictions(tmp_path / "2", ["a", "c"], ["x", "y"], ["x", "x"]), "two", "test")
    with pytest.raises(RunError, match="not scored on the same images: 2 and 2, of which 1 are"):
        check_comparable([one, two])
    three = load_answers(
        write_predictions(tmp_path / "3", ["a", "b"], ["x", "x"], ["x", "x"]), "three", "test"
    )
    with pytest.raises(RunError, match="b is 'y' to one and 'x' to the other"):
        check_comparable([one, three])
    with pytest.raises(RunError, match="no predictions of the validation split"):
        load_answers(Run(tmp_path / "1"), "one", "validation")
    Run(tmp_path / "1").predictions("test").write_bytes(b"PAR1 no")
    with pytest.raises(RunError, match="no predictions of a run"):
        load_answers(Run(tmp_path / "1"), "one", "test")
