"""Class weights and focal loss: the values and gradients of plain PyTorch, however a step is divided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_lopsided, tiny_recipe
from exactness import (
    AUGMENTED,
    DROPOUT,
    EPSILON,
    EVERY_SECOND,
    build_trainer,
    same,
    weights_of,
    with_and_without_a_break,
)
from fork_server import ForkServer
from invariants.test_streams import split_shards
from shard_files import NAMES
from sklearn.utils.class_weight import compute_class_weight
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader
from worlds import Division, Place, Trained, check_same, finish

from vit_finetune.checking import check
from vit_finetune.data.augmentation import generator_of
from vit_finetune.data.batches import EpochSampler
from vit_finetune.data.transforms import NO_LABEL, collate, normalize
from vit_finetune.finetuning import finetune
from vit_finetune.recipe import RecipeError, build_recipe
from vit_finetune.run import RunError
from vit_finetune.training.imbalance import count_classes, describe_classes, weigh_classes
from vit_finetune.training.loss import cross_entropy

WEIGHTS = torch.tensor([0.4, 1.0, 3.0, 0.7, 2.0])
MIXED = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def plain(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float, weights: torch.Tensor | None, gamma: float
) -> torch.Tensor:
    """The formula of the docstring, class by class and image by image; targets `(batch, classes)`."""
    total = torch.zeros((), dtype=logits.dtype)
    classes = logits.shape[1]
    for row, target in zip(logits, targets):
        p = row.exp() / row.exp().sum()
        for c in range(classes):
            share = target[c] * (1 - smoothing) + smoothing / classes
            weight = 1.0 if weights is None else weights[c]
            total = total - weight * share * (1 - p[c]) ** gamma * p[c].log()
    return total / len(logits)


# --------------------------------------------------------------------------- losses


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "soft"])
def test_values_and_gradients_are_those_of_the_formula(
    gamma: float, smoothing: float, weights: torch.Tensor | None, soft: bool
) -> None:
    torch.manual_seed(0)
    logits = (2 * torch.randn(8, 5)).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 0, 2])
    targets = torch.rand(8, 5).softmax(dim=1) if soft else one_hot(labels, 5).float()
    expected = plain(logits, targets, smoothing, weights, gamma)
    slopes = torch.autograd.grad(expected, logits)
    for given in [targets] if soft else [targets, labels]:
        for count in (None, 8):
            found = cross_entropy(logits, given, smoothing, count, weights, gamma)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
            torch.testing.assert_close(torch.autograd.grad(found, logits), slopes, atol=1e-6, rtol=0)
        # In parts of unequal sizes, some with what only fills a place.
        filled = [given[:3], given[3:]]
        if not given.is_floating_point():
            filled = [torch.cat([part, torch.full((2,), NO_LABEL)]) for part in filled]
        parts = [
            cross_entropy(torch.cat([part, torch.ones(len(there) - len(part), 5)]), there, smoothing, 8, weights, gamma)
            for part, there in zip([logits[:3], logits[3:]], filled)
        ]  # fmt: skip
        torch.testing.assert_close(sum(parts), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_are_torchs_but_for_what_it_divides_by(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 5), torch.tensor([0, 1, 2, 3, 4, 0, 0, 2])
    ours = cross_entropy(logits, labels, smoothing, 8, WEIGHTS)
    theirs = torch_cross_entropy(logits, labels, WEIGHTS, label_smoothing=smoothing)
    torch.testing.assert_close(ours * 8, theirs * WEIGHTS[labels].sum())
    # Of target probabilities torch's own mean divides by the number of images too.
    targets = one_hot(labels, 5).float()
    torch.testing.assert_close(ours, torch_cross_entropy(logits, targets, WEIGHTS, label_smoothing=smoothing))


def test_an_image_alone_in_its_batch_is_weighted() -> None:
    """What dividing by the sum of the weights would undo."""
    logits, label = torch.randn(1, 5), torch.tensor([2])
    torch.testing.assert_close(
        cross_entropy(logits, label, class_weights=WEIGHTS), 3 * cross_entropy(logits, label)
    )


def test_off_is_the_same_bit_for_bit() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 5), torch.randint(0, 5, (8,))
    assert cross_entropy(logits, labels, 0.1, None, None, 0.0).equal(
        torch_cross_entropy(logits, labels, label_smoothing=0.1)
    )
    assert cross_entropy(logits, labels, 0.1, 8, None, 0.0).equal(
        torch_cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum") / 8
    )
    assert weigh_classes(None, ["a", "b"], [1, 2]) is None
    assert describe_classes(None, False, ["a", "b"], [0, 1, 1]) == []


@pytest.mark.parametrize("gamma", [0.3, 2.0])
def test_certain_answers_have_finite_gradients(gamma: float) -> None:
    logits = torch.tensor([[80.0, -80.0, 0.0], [-80.0, 80.0, 0.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, 0]), 0.1, 2, None, gamma)
    (slopes,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and slopes.isfinite().all()
    right = cross_entropy(logits[:1], torch.tensor([0]), 0.0, 1, None, gamma)
    (slopes,) = torch.autograd.grad(right, logits)
    assert right == 0 and slopes.abs().max() < 1e-30


# --------------------------------------------------------------------------- weights


def test_auto_is_scikit_learns_balanced() -> None:
    labels = [0] * 12 + [1] * 5 + [3] * 2
    weights = weigh_classes("auto", list("abcd"), count_classes(labels, 4))
    assert weights is not None
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    assert [weights[n] for n in (0, 1, 3)] == pytest.approx(expected, abs=1e-12)
    assert weights[2] == 1  # a class that has no image
    assert np.mean([weights[label] for label in labels]) == pytest.approx(1)


def test_named_classes_have_their_weights_and_the_others_1() -> None:
    assert weigh_classes({"c": 2.5}, list("abc"), None) == [1, 1, 2.5]
    with pytest.raises(RunError, match=r"class_weights: there is no class gren; did you mean green\?"):
        weigh_classes({"gren": 2.0}, ["blue", "green"], [3, 3])
    with pytest.raises(RunError, match=r"there is no class zebra; the classes are blue, green"):
        weigh_classes({"zebra": 2.0}, ["blue", "green"], [3, 3])
    with pytest.raises(RunError, match="auto counts the training images, which a stream does not hold"):
        weigh_classes("auto", ["blue", "green"], None)


def test_what_was_chosen_is_said() -> None:
    labels = [0] * 12 + [1] * 4 + [2] * 2
    weights, sampling = describe_classes("auto", True, ["blue", "green", "red"], labels)
    assert weights.value == "blue 0.5, green 1.5, red 3"
    assert weights.reason == (
        "training images / (classes × images of the class); training images: blue 12, green 4, red 2"
    )
    assert sampling.value == "balanced" and "18 images 6 are of each class" in sampling.reason
    names = [f"class {number}" for number in range(40)]
    many = describe_classes({"class 7": 2.0}, True, names, [n for n in range(40) for _ in range(n + 1)])
    assert many[0].value == "from class 0 1 to class 7 2"
    assert "20 or 21 are of each class; training images: from class 0 1 to class 39 40" in many[1].reason


# --------------------------------------------------------------------------- recipes


SMALLEST: dict[str, Any] = {"data": {"path": "x"}, "model": {"config": {}}}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"training": {"class_weights": {"red": 0}}}, "training.class_weights: the weight of red is 0: expected"),
        ({"training": {"class_weights": {"red": -1.5}}}, "the weight of red is -1.5: expected a number above 0"),
        ({"training": {"class_weights": {"red": "much"}}}, "the weight of red is 'much': expected a number"),
        ({"training": {"class_weights": {"red": float("nan")}}}, "the weight of red is nan"),
        ({"training": {"class_weights": {"red": float("inf")}}}, "the weight of red is inf"),
        ({"training": {"class_weights": {"red": True}}}, "the weight of red is True"),
        ({"training": {"class_weights": {True: 2}}}, "named by text, found True: write the name in quotes"),
        ({"training": {"class_weights": "balanced"}}, "training.class_weights: found 'balanced', expected 'auto'"),
        ({"training": {"class_weights": False}}, "training.class_weights: found False, expected 'auto'"),
        ({"training": {"focal_gamma": -1}}, "training.focal_gamma: found -1, expected greater than or equal to 0"),
        ({"training": {"focal_gamma": float("inf")}}, "training.focal_gamma: found inf"),
        (
            {"training": {"class_weights": "auto"}, "data": {"path": "x", "balanced_sampling": True}},
            "data.balanced_sampling and training.class_weights=auto both even the classes out",
        ),
        (
            {"training": {"class_weights": "auto"}, "data": {"path": "x", "streaming": True}},
            "training.class_weights=auto counts the training images, which a stream does not hold",
        ),
        (
            {"data": {"path": "x", "streaming": True, "balanced_sampling": True}},
            "data: balanced_sampling draws from all images, so it does not go with streaming",
        ),
    ],
)  # fmt: skip
def test_what_a_recipe_shows_to_be_wrong_is_refused(sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_recipe(SMALLEST | sections)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_what_goes_together_is_taken() -> None:
    numbers = build_recipe(SMALLEST | {"training": {"class_weights": {7: 2, "8": 1}}}).training.class_weights
    assert numbers == {"7": 2.0, "8": 1.0}
    by_name = {"training": {"class_weights": {"red": 2}}}
    build_recipe(SMALLEST | by_name | {"data": {"path": "x", "streaming": True}})
    build_recipe(SMALLEST | by_name | {"data": {"path": "x", "balanced_sampling": True}})
    off = build_recipe(SMALLEST)
    assert off.training.class_weights is None and off.training.focal_gamma == 0
    assert not off.data.balanced_sampling


def test_an_unknown_class_is_refused_before_the_model_is_loaded(lopsided: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        lopsided,
        tmp_path / "run",
        model={"config": None, "path": str(tmp_path / "nowhere")},
        training={"class_weights": {"gren": 2}},
    )
    for verb in (finetune, check):
        with pytest.raises(RunError, match="there is no class gren; did you mean green"):
            verb(recipe)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------- training

BOTH = {"class_weights": "auto", "focal_gamma": 1.5, "label_smoothing_factor": 0.1, "num_train_epochs": 3}


def weighing(lopsided: Path, tmp_path: Path, name: str, callbacks: Any = None, mixed: bool = True, **training: Any) -> Any:  # fmt: skip
    augmentation = {**AUGMENTED, **(MIXED if mixed else {})}
    sections = {"model": DROPOUT, "augmentation": augmentation, "training": {**BOTH, **training}}
    return build_trainer(tiny_recipe(lopsided, tmp_path, **sections), tmp_path / name, callbacks)


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_training_equals_a_plain_loop(lopsided: Path, tmp_path: Path, gamma: float) -> None:
    """With MixUp, CutMix and smoothing; 14 images in batches of 4, so that the last is smaller."""
    trainer = weighing(
        lopsided, tmp_path, "ours", weight_decay=0.0, warmup_steps=0, lr_scheduler_type="constant",
        load_best_model_at_end=False, max_grad_norm=0.0, adam_epsilon=EPSILON, focal_gamma=gamma,
    )  # fmt: skip
    model = weighing(lopsided, tmp_path, "plain").model
    mixing, images, seed = trainer.mixing, trainer.train_dataset, trainer.args.seed
    assert np.bincount(images.labels).tolist() == [8, 4, 2]
    weights = torch.tensor(compute_class_weight("balanced", classes=np.arange(3), y=images.labels)).float()
    assert trainer.class_weights.equal(weights)
    trainer.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=EPSILON, weight_decay=0.0)
    sampler, step = EpochSampler(len(images), seed), 0
    model.train()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for one in DataLoader(images, batch_size=4, sampler=sampler, collate_fn=collate):
            torch.manual_seed(generator_of(seed, step, "batch 0").getrandbits(63))
            pixels, targets = mixing(normalize(one["pixel_values"], trainer.image_processor), one["labels"])
            p = model(pixels).logits.softmax(-1)
            loss = -(weights * (targets * 0.9 + 0.1 / 3) * (1 - p) ** gamma * p.log()).sum(-1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    assert step == trainer.state.max_steps
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, atol=2e-6, rtol=0)
    assert trainer.model.config.problem_type == "single_label_classification"


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_a_batch_of_8_equals_4_times_2_accumulated(lopsided: Path, tmp_path: Path, gamma: float) -> None:
    """14 training images: the last accumulated batch is smaller, and batches' weights add up to different sums."""
    results = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        recipe = tiny_recipe(
            lopsided,
            tmp_path,
            training={
                **BOTH,
                "focal_gamma": gamma,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulation,
                "optim": "sgd",
                "learning_rate": 0.1,
                "max_grad_norm": 0.0,  # clipping would hide a wrong scale
            },
        )
        trainer = build_trainer(recipe, tmp_path / f"b{batch}")
        trainer.train()
        results.append(weights_of(trainer.model))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(lopsided: Path, tmp_path: Path) -> None:
    whole, resumed = with_and_without_a_break(
        lambda name, callbacks=None: weighing(lopsided, tmp_path, name, callbacks, **EVERY_SECOND),
        tmp_path,
        5,
    )
    assert same(weights_of(resumed.model), weights_of(whole.model))


@pytest.mark.slow
def test_validation_is_not_weighted(lopsided: Path, tmp_path: Path) -> None:
    weighted = weighing(lopsided, tmp_path, "weighted")
    alike = weighing(lopsided, tmp_path, "alike", class_weights=None, focal_gamma=0.0)
    assert weighted.evaluate()["eval_loss"] == alike.evaluate()["eval_loss"]
    batch = weighted._prepare_inputs(collate([weighted.eval_dataset[row] for row in range(4)]))
    weighted.model.eval()
    loss, outputs = weighted.compute_loss(weighted.model, batch, return_outputs=True)
    assert loss == torch_cross_entropy(outputs.logits, batch["labels"])


@pytest.mark.slow
def test_a_run_and_its_card_name_the_weights(lopsided: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(lopsided, tmp_path / "run", training={"class_weights": "auto", "focal_gamma": 2.0})
    looked = {choice["name"]: choice for choice in check(recipe, tmp_path / "checked")["choices"]}
    run = finetune(recipe)
    chosen = {choice["name"]: choice for choice in json.loads(run.provenance.read_text())["choices"]}
    assert looked["class weights"] == chosen["class weights"]
    assert chosen["class weights"]["value"] == "blue 0.583, green 1.17, red 2.33"
    card = (run.model / "README.md").read_text()
    assert "| Class weights | blue 0.583, green 1.17, red 2.33 (training images /" in card
    assert "blue 8, green 4, red 2" in card and "focal_gamma: 2.0" in card
    config = json.loads((run.model / "config.json").read_text())
    assert not {"class_weights", "focal_gamma"} & set(config)


@pytest.mark.slow
def test_streamed_images_are_weighted_by_name(tmp_path: Path) -> None:
    shards = split_shards(tmp_path / "shards", [7, 5, 6])
    recipe = tiny_recipe(
        shards,
        tmp_path / "run",
        data={"streaming": True},
        training={"class_weights": {NAMES[1]: 3.0}, "focal_gamma": 1.0, "max_steps": 2},
    )
    run = finetune(recipe)
    chosen = {choice["name"]: choice for choice in json.loads(run.provenance.read_text())["choices"]}
    assert f"{NAMES[1]} 3" in chosen["class weights"]["value"]
    assert chosen["class weights"]["reason"] == "the recipe says so"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("mixed", [False, True], ids=["ids", "mixed"])
def test_two_processes_weigh_as_one(forks: ForkServer, tmp_path: Path, mixed: bool) -> None:
    """With mixed images and focal loss the batches are equal: each is mixed by its place in the step."""
    photos = draw_lopsided(tmp_path / "photos", {"blue": 32, "green": 16, "red": 12})
    place = Place(forks, tmp_path, photos)
    words = ["training.class_weights=auto"]
    if mixed:
        words += [
            "training.focal_gamma=1.5",
            *(f"augmentation.{key}={value}" for key, value in MIXED.items()),
        ]
    found = []
    for name, division in {"one": Division(1, 2, 4) if mixed else Division(1, 8, 1), "two": Division(2, 2, 2)}.items():  # fmt: skip
        run, children = place.start(name, division, *words)
        told = finish(children)
        assert told.count("class weights: blue 0.625, green 1.25, red 1.67") == 1
        found.append(Trained(run, [children]))
    assert found[0].steps() == found[1].steps()
    check_same(found[1], found[0])
