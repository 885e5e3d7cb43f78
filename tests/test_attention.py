"""Where a model looks, against references written out by hand: rollout, distances, class activation maps, heat."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_image
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BitImageProcessor,
    CLIPConfig,
    CLIPForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    IJepaConfig,
    IJepaForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from vit_finetune.evaluation import attention
from vit_finetune.evaluation.attention import (
    GRADIENTS,
    ROLLOUT,
    NoGlobalAttention,
    NoMap,
    attention_maps,
    attention_rollout,
    attentions_of,
    explain_pixels,
    gradient_maps,
    grid_of,
    mean_attention_distance,
    over_patches,
    overlay,
    reads_class_token,
    seen_images,
)

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "patch_size": 4,
    "image_size": 20, "initializer_range": 0.2, "num_labels": 5,
}  # fmt: skip
TEXT = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def two_towers(model: type[PreTrainedModel], config: Callable[..., object]) -> PreTrainedModel:
    return model(config(vision_config=SMALL, text_config=TEXT, num_labels=5))


BUILD: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SMALL)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**SMALL)),
    "dinov2 with registers": lambda: Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**SMALL)
    ),
    "beit": lambda: BeitForImageClassification(BeitConfig(**SMALL)),
    "ijepa": lambda: IJepaForImageClassification(IJepaConfig(**SMALL)),
    "clip": lambda: two_towers(CLIPForImageClassification, CLIPConfig),
    "siglip": lambda: two_towers(SiglipForImageClassification, SiglipConfig),
}
WITHOUT: dict[str, Callable[[], PreTrainedModel]] = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    ),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=5)
    ),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 2],
            window_size=4,
            num_labels=5,
        )
    ),
}


def built(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = (BUILD | WITHOUT)[name]().eval()
    for path, parameter in model.named_parameters():
        if path.endswith(("q_proj.weight", "k_proj.weight")):  # CLIP's and SigLIP's begin small
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def recomputed_attentions(model: PreTrainedModel, pixel_values: torch.Tensor) -> list[np.ndarray]:
    """Softmax of query times key by hand, in float64, from what the layers' projections say in the fast kernel's pass."""
    said: dict[str, list[np.ndarray]] = {"q_proj": [], "k_proj": []}
    handles = []
    for name, module in model.named_modules():
        kind = name.rsplit(".", 1)[-1]
        if kind in said and "text" not in name:
            keep = said[kind]
            handles.append(
                module.register_forward_hook(lambda _, __, out, keep=keep: keep.append(out.double().numpy()))
            )
    with torch.no_grad():
        model(pixel_values=pixel_values)
    for handle in handles:
        handle.remove()
    layers = []
    for queries, keys in zip(said["q_proj"], said["k_proj"]):
        q, k = (
            x.reshape(*x.shape[:2], 4, 8).transpose(0, 2, 1, 3) for x in (queries, keys)
        )  # (B, heads, T, 8)
        scores = np.exp(q @ k.transpose(0, 1, 3, 2) / math.sqrt(8))
        layers.append(scores / scores.sum(-1, keepdims=True))
    return layers


def reference_rollout(layers: list[np.ndarray]) -> np.ndarray:
    """Abnar and Zuidema, 2020, equation 1 and the paragraph before it, image by image."""
    images = []
    for image in range(layers[0].shape[0]):
        rollout = None
        for layer in layers:
            heads = layer[image]
            mean = sum(heads) / len(heads)
            mixed = 0.5 * mean + 0.5 * np.eye(len(mean))
            for row in mixed:
                row /= row.sum()
            rollout = mixed if rollout is None else mixed @ rollout
        images.append(rollout)
    return np.stack(images)


# --------------------------------------------------------------------------- attention


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2 with registers", "clip", "siglip"])
def test_attentions_and_rollout_are_those_computed_by_hand(name: str) -> None:
    model, pixel_values = built(name), noise(3, 3, 20, 20)
    layers = recomputed_attentions(model, pixel_values)
    assert len(layers) == 3 and layers[0].max() > 0.2  # far from uniform, or anything would agree
    attentions = attentions_of(model, pixel_values)
    for ours, theirs in zip(attentions, layers, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-6)
    expected = reference_rollout(layers)
    np.testing.assert_allclose(attention_rollout(attentions).numpy(), expected, rtol=0, atol=1e-6)
    exact = attention_rollout([torch.from_numpy(layer) for layer in layers])
    assert exact.dtype == torch.float64
    np.testing.assert_allclose(exact.numpy(), expected, rtol=0, atol=1e-14)
    # The map: by hand, which row, and which columns.
    prefix = expected.shape[-1] - 25
    row = (
        expected[:, 0]
        if name in ("vit", "deit", "dinov2 with registers")
        else expected[:, prefix:].mean(axis=1)
    )
    by_hand = row[:, prefix:].reshape(3, 5, 5)
    np.testing.assert_allclose(attention_maps(model, pixel_values).numpy(), by_hand, rtol=0, atol=1e-6)


def test_rows_of_unequal_sums_are_normalised() -> None:
    """Dropout in training, or half precision, leaves rows that do not sum to 1."""
    layers = [
        torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        for n in range(3)
    ]
    rollout = attention_rollout(layers)
    np.testing.assert_allclose(rollout.numpy(), reference_rollout([x.numpy() for x in layers]), atol=1e-14)
    np.testing.assert_allclose(rollout.sum(-1).numpy(), 1, atol=1e-14)
    with pytest.raises(ValueError, match="at least one layer"):
        attention_rollout([])


@pytest.mark.parametrize("name", BUILD)
def test_kernel_mode_and_logits_stay_as_they_were(name: str) -> None:
    model, pixel_values = built(name), noise(2, 3, 20, 20)
    model.train()
    kernels = [
        part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)
    ]
    assert set(kernels) == {"sdpa"}

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(pixel_values=pixel_values).logits

    before = logits()
    model.train()
    first, second = attentions_of(model, pixel_values), attentions_of(model, pixel_values)
    assert model.training, "the mode stays"
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two), "no dropout"
        assert not one.requires_grad and not one.is_inference()
        torch.testing.assert_close(one.sum(-1), torch.ones(one.shape[:-1]))
    after = [
        part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)
    ]
    assert after == kernels
    assert torch.equal(logits(), before)


def test_kernel_and_mode_come_back_after_a_failure() -> None:
    model = built("vit").train()
    with pytest.raises(ValueError, match="doesn't match model"):
        attentions_of(model, noise(1, 3, 32, 32))
    assert model.training and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", BUILD)
def test_the_row_is_that_of_the_token_that_the_head_reads(name: str) -> None:
    """Found by the gradient of the logits at the last layer's output."""
    model, pixel_values = built(name), noise(2, 3, 20, 20)
    (layers,) = (
        module
        for path, module in model.named_modules()
        if path.endswith((".layers", ".layer")) and "text" not in path
    )
    last: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: object, output: torch.Tensor | tuple[torch.Tensor]) -> None:
        last.append(output if isinstance(output, torch.Tensor) else output[0])
        last[0].retain_grad()

    handle = layers[-1].register_forward_hook(keep)
    model(pixel_values=pixel_values).logits[:, 0].sum().backward()
    handle.remove()
    read = last[0].grad.abs().sum(dim=(0, 2)) > 0  # (T,)
    tokens, grid = len(read), grid_of(model, pixel_values)
    assert grid == (5, 5)
    from_class_token = reads_class_token(model, tokens, grid)
    assert from_class_token == (bool(read[0]) and tokens > 25)
    if not from_class_token:
        assert read[-25:].all() and not read[:-25].any()


@pytest.mark.parametrize("name", WITHOUT)
def test_where_there_is_no_global_attention_it_is_said(name: str) -> None:
    model = built(name)
    with pytest.raises(NoGlobalAttention, match=type(model).__name__):
        attentions_of(model, noise(2, 3, 32, 32))
    assert explain_pixels(model, noise(2, 3, 32, 32))[1] == GRADIENTS


def test_maps_of_oblong_images_lie_the_right_way() -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SMALL | {"image_size": [12, 20]})).eval()
    pixel_values = noise(2, 3, 12, 20)
    maps, method = explain_pixels(model, pixel_values)
    assert method == ROLLOUT and maps.shape == (2, 3, 5)
    rollout = attention_rollout(attentions_of(model, pixel_values))
    for patch in range(15):
        assert torch.equal(maps[:, patch // 5, patch % 5], rollout[:, 0, 1 + patch])


@pytest.mark.parametrize(
    ("grid", "patch", "prefix"), [((3, 4), (4, 6), 1), ((2, 2), (16, 16), 5), ((5, 1), (2, 3), 0)]
)
def test_the_attention_distance_is_that_of_three_loops(
    grid: tuple[int, int], patch: tuple[int, int], prefix: int
) -> None:
    tokens = prefix + grid[0] * grid[1]
    attentions = [torch.softmax(3 * noise(2, 3, tokens, tokens).double() + n, dim=-1) for n in range(2)]
    places = [(row * patch[0], column * patch[1]) for row in range(grid[0]) for column in range(grid[1])]
    expected = np.zeros((2, 3))
    for layer, weights in enumerate(attentions):
        for head in range(3):
            means = []
            for image in range(2):
                for query, there in enumerate(places):
                    row = weights[image, head, prefix + query, prefix:].tolist()
                    distances = [math.dist(there, here) for here in places]
                    means.append(sum(w * d for w, d in zip(row, distances)) / sum(row))
            expected[layer, head] = sum(means) / len(means)
    found = mean_attention_distance(attentions, grid, patch)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_attention_to_oneself_is_no_distance_and_to_the_class_token_alone_neither() -> None:
    own = torch.eye(10)[None, None].clone()
    to_class = torch.zeros(1, 1, 10, 10)
    to_class[..., 0] = 1
    assert mean_attention_distance([own, to_class], (3, 3), (4, 4)).flatten().tolist() == [0, 0]


# --------------------------------------------------------------------------- gradients


def test_the_gradient_map_of_a_resnet_is_its_class_activation_map() -> None:
    """Zhou et al., 2016: the head's weights, laid over the last feature map."""
    model, pixel_values = built("resnet"), noise(3, 3, 64, 48)
    classes = torch.tensor([0, 3, 4])
    with torch.no_grad():
        features = model.resnet(pixel_values).last_hidden_state  # (3, 16, 8, 6)
    weights = model.classifier[-1].weight.detach()[classes]  # (3, 16)
    by_hand = torch.einsum("bc,bchw->bhw", weights, features).clamp_min(0) / 48
    found = gradient_maps(model, pixel_values, classes)
    assert found.shape == (3, 8, 6) and 0 < (found > 0).float().mean() < 1
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=0)
    assert not torch.equal(found, gradient_maps(model, pixel_values, classes.roll(1))), (
        "it is the class's own"
    )


def test_the_gradient_map_of_swins_windows() -> None:
    model, pixel_values = built("swin"), noise(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.swin(pixel_values).last_hidden_state  # (2, 64, 32)
        best = model(pixel_values=pixel_values).logits.argmax(-1)
    by_hand = torch.einsum("bc,btc->bt", model.classifier.weight.detach()[best], tokens).clamp_min(0) / 64
    found, method = explain_pixels(model, pixel_values)
    assert method == GRADIENTS
    torch.testing.assert_close(found, by_hand.unflatten(1, (8, 8)), atol=1e-6, rtol=0)


def test_the_gradient_map_of_a_model_that_reads_its_class_token_is_not_empty() -> None:
    """Behind the last attention nothing leads from the patches to the logits: an earlier layer is taken."""
    model = built("vit")
    found = gradient_maps(model, noise(2, 3, 20, 20), torch.tensor([0, 1]))
    assert found.shape == (2, 5, 5) and found.flatten(1).amax(dim=1).min() > 0


def test_gradients_leave_no_trace() -> None:
    model, pixel_values = built("convnext").train(), noise(2, 3, 32, 32)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        found = gradient_maps(model, pixel_values + 0, torch.tensor([0, 1]))
    assert model.training and not pixel_values.requires_grad and not found.requires_grad
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(found, gradient_maps(model, pixel_values, torch.tensor([0, 1])))


def test_too_small_a_map_is_refused() -> None:
    with pytest.raises(
        NoMap, match="ResNetForImageClassification makes no map of at least 4 x 4 cells of images of 6 x 6"
    ):
        gradient_maps(built("resnet"), noise(1, 3, 6, 6), torch.tensor([0]))


def test_a_deep_map_of_few_cells_gives_way_to_the_one_before() -> None:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], layer_type="basic"
    )
    assert gradient_maps(
        ResNetForImageClassification(config), noise(1, 3, 32, 32), torch.tensor([0])
    ).shape == (1, 4, 4)


# --------------------------------------------------------------------------- pictures


def test_what_is_seen_is_what_the_image_processor_cut_out() -> None:
    processor = BitImageProcessor(
        size={"shortest_edge": 20},
        crop_size={"height": 16, "width": 24},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.25],
    )
    image = draw_image((200, 60, 30), 0, (40, 30))
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    cut = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    (seen,) = seen_images(pixel_values, processor)
    assert seen.mode == "RGB" and seen.size == (24, 16)
    assert np.array_equal(np.asarray(seen), cut[0].permute(1, 2, 0).numpy())


def test_heat_is_brightest_where_the_map_is_most_and_grey_where_there_is_none() -> None:
    image = draw_image((200, 60, 30), 0, (60, 40))
    heat = torch.zeros(4, 6)
    heat[1, 4] = 0.03
    shown = overlay(image, heat, opacity=0.7)
    assert shown.mode == "RGB" and shown.size == image.size
    light = np.asarray(shown.convert("L"), dtype=float)
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert (row // 10, column // 10) == (1, 4)
    assert np.array_equal(np.asarray(overlay(image, heat * 1000 + 5, 0.7)), np.asarray(shown)), "of any range"
    assert np.array_equal(np.asarray(overlay(image, heat.numpy(), 0.7)), np.asarray(shown))
    grey = np.asarray(image.convert("L"))
    for flat in (torch.zeros(4, 6), torch.full((4, 6), 2.0)):
        assert np.array_equal(np.asarray(overlay(image, flat))[..., 1], grey)
    assert np.array_equal(np.asarray(overlay(image, heat, opacity=0))[..., 0], grey)


def test_the_module_stands_alone() -> None:
    """A Space carries the file beside its app."""
    tree = ast.parse(Path(attention.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    allowed = {
        "torch",
        "numpy",
        "PIL",
        "matplotlib",
        "transformers",
        "captum",
        "collections",
        "contextlib",
        "typing",
        "__future__",
    }
    assert {name.split(".")[0] for name in imported} <= allowed


def test_over_patches_takes_heads_too() -> None:
    weights = noise(2, 4, 7, 7)
    assert torch.equal(over_patches(weights, (2, 3), True), weights[:, :, 0, 1:].reshape(2, 4, 2, 3))
    means = weights[:, :, 1:, 1:].mean(dim=2).reshape(2, 4, 2, 3)
    torch.testing.assert_close(over_patches(weights, (2, 3), False), means)
