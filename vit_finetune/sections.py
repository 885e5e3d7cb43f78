"""The sections of a recipe: closed, immutable models of their keys, with defaults that suit images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A part of a recipe: immutable, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DataConfig(Section):
    """Section `data:`: where the images are and how they are split."""

    path: str
    """A folder, an archive (.zip, .tar…), a table (.csv, .jsonl, .parquet), a Hub dataset, or `digits`; or
    shards (WebDataset .tar, .parquet with image bytes): a folder or a pattern (`train-{000..010}.tar`)."""
    subset: str | None = None
    """Configuration name of a Hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    image_column: str | None = None
    """Column of a table or Hub dataset with the image or its file name; found by name and type if unset."""
    label_column: str | list[str] | None = None
    """Column of a table or Hub dataset that holds the class; found by name and type if unset. With
    `multi_label`, a column of lists of names; or a list of columns, one per label, that hold 0 or 1."""
    multi_label: bool = False
    """Whether an image may have several labels, or none: a table or Hub dataset says which."""
    class_folder: Literal["first", "last"] | None = None
    """Which folder above an image names its class; needed only where folders are nested in two ways."""
    validation_fraction: Fraction = 0.1
    """Share of the training images carved out for validation where the data has no validation split."""
    test_fraction: Fraction = 0.1
    """Share of the training images carved out for the test where the data has no test split."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Decides which images are carved out; apart from `training.seed`, so that runs stay comparable."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do about images that cannot be decoded: stop and list them, or leave them out and say so."""
    exclude: str | None = None
    """A `findings.json` that `vit-finetune check` wrote: the images it would exclude are left out."""
    group: str | None = None
    """Images of one group are never carved apart: a column of a table or Hub dataset, or a regular expression
    whose match in an image's id (its first parenthesis, where there is one) names the group."""
    fold: str | None = None
    """`2/5`: the second of five equal parts of the training images is the validation split, in place of
    `validation_fraction`; the test split is the same for all five."""
    per_class: Positive | None = None
    """At most so many training images of each class, chosen by `split_seed` (few-shot); validation and test
    stay whole."""
    balanced_sampling: bool = False
    """An epoch draws as many images as there are to train on, and each class as often as another
    (class-balanced sampling; Kang et al., 2020): some of the images of frequent classes, those of rare ones
    several times, varied anew each time."""
    splits: str | None = None
    """A run, its `splits/` folder or a csv file (columns id, label, split) whose splits to repeat; fractions
    and seed then decide nothing."""
    streaming: bool = False
    """Read training images from front to back out of shards (WebDataset, Parquet, a Hub dataset); only the
    validation and test images are kept on disk."""
    shuffle_buffer: Positive = 2000
    """Images that a streamed epoch is shuffled among, beside the order of its shards; each loader process
    holds so many, encoded."""
    cache: str = "auto"
    """Keep training images shrunk to just above training size: `auto` where it pays, `off`, or a folder."""

    @field_validator("path")
    @classmethod
    def _names_no_revision(cls, value: str) -> str:
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)@([^/\\]+)", value)
        if match and not Path(value).expanduser().exists():
            raise ValueError(f"does not name a revision: write path {match[1]} and revision {match[2]}")
        return value

    @field_validator("cache", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads `off` as false

    @field_validator("fold")
    @classmethod
    def _is_fold(cls, value: str | None) -> str | None:
        match = re.fullmatch(r"(\d+)/(\d+)", value) if value is not None else None
        if value is not None and not (match and 1 <= int(match[1]) <= int(match[2]) and int(match[2]) > 1):
            raise ValueError("is a part and the number of parts, at least two: 1/5 to 5/5 for five")
        return value

    @model_validator(mode="after")
    def _says_several_labels(self) -> DataConfig:
        if not self.multi_label:
            if isinstance(self.label_column, list):
                raise ValueError(
                    "label_column names one column per label, and images of one class have one column: write "
                    "multi_label: true, or label_column with one name"
                )
            return self
        if isinstance(self.label_column, list) and len({*self.label_column}) < max(2, len(self.label_column)):
            raise ValueError(
                "label_column is a list of at least two columns, each named once; a single column of lists "
                "is written without brackets"
            )
        if self.path == "digits":
            raise ValueError("each of the `digits` has one class: leave out multi_label")
        for key in ("streaming", "class_folder", "per_class", "balanced_sampling"):
            if getattr(self, key):
                raise ValueError(
                    f"{key} needs one class per image, so it does not go with multi_label: leave out one of "
                    f"them"
                )
        return self

    @property
    def class_column(self) -> str | None:
        """The one column that was asked for; None where none was, or one per label."""
        return self.label_column if isinstance(self.label_column, str) else None

    @model_validator(mode="after")
    def _splits_say_all(self) -> DataConfig:
        beside = [name for name in ("group", "fold", "per_class") if getattr(self, name) is not None]
        if self.splits is not None and beside:
            raise ValueError(
                f"splits names the split of every image already: leave out {' and '.join(beside)}, or splits"
            )
        return self

    @model_validator(mode="after")
    def _leaves_training_images(self) -> DataConfig:
        if self.validation_fraction + self.test_fraction >= 0.9:
            raise ValueError(
                "validation_fraction + test_fraction must stay below 0.9: something is needed to train on"
            )
        return self

    @model_validator(mode="after")
    def _can_be_streamed(self) -> DataConfig:
        if not self.streaming:
            return self
        for key in ("group", "fold", "per_class", "splits", "exclude"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"{key} needs all images at once, so it does not go with streaming: leave out one of them"
                )
        if self.balanced_sampling:
            raise ValueError(
                "balanced_sampling draws from all images, so it does not go with streaming: leave out one of "
                "them, or write training.class_weights by name"
            )
        if self.path == "digits":
            raise ValueError("streaming reads shards, and `digits` has none: leave it out")
        if self.cache not in ("auto", "off"):
            raise ValueError(
                "streaming keeps no images, so it does not go with a cache: leave out one of them"
            )
        return self


class AugmentationConfig(Section):
    """Section `augmentation:`: how training images are varied (torchvision.transforms.v2 on uint8)."""

    crop_scale: tuple[float, float] | None = (0.5, 1.0)
    """Share of an image's area that a random resized crop keeps; `null` resizes as in evaluation instead."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width by height of the random crop, before it is resized."""
    horizontal_flip: Probability = 0.5
    policy: Literal["none", "trivialaugment", "randaugment", "threeaugment"] = "none"
    """TrivialAugmentWide (Müller and Hutter, 2021), RandAugment (Cubuk et al., 2019) or 3-Augment (Touvron et
    al., 2022, DeiT III: grey, solarised or blurred, then jittered in brightness, contrast and saturation)."""
    randaugment_num_ops: Positive = 2
    randaugment_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    random_erasing: Probability = 0.0
    """Share of training images with one rectangle painted over in the mean colour (Zhong et al., 2017)."""
    repeats: Positive = 1
    """Repeated augmentation (Hoffer et al., 2020; Berman et al., 2019; DeiT has 3): an epoch reads each of so
    many fewer images this many times, near one another and varied anew; 1 is off."""
    mixup_alpha: Annotated[float, Field(ge=0)] = 0.0
    """Each image of a batch is blended with another by a share drawn from Beta(α, α), and so are the targets
    (Zhang et al., 2018); 0 is off."""
    cutmix_alpha: Annotated[float, Field(ge=0)] = 0.0
    """A rectangle of another image, its share of the area drawn from Beta(α, α), is pasted into each (Yun et
    al., 2019); 0 is off. With `mixup_alpha`, each batch gets one of the two."""

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _is_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError("must be [low, high] with 0 < low <= high")
        return value

    @field_validator("crop_scale")
    @classmethod
    def _is_share(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[1] > 1:
            raise ValueError("is a share of the image's area: at most 1")
        return value


DROP_PATH_MODELS = (
    *("vit", "deit", "vit_msn", "ijepa", "beit", "data2vec-vision", "dinov2", "dinov2_with_registers"),
    *("swin", "swinv2", "donut-swin", "hiera", "focalnet", "pvt", "pvt_v2", "segformer"),
    *("convnext", "convnextv2", "bit"),
)
"""Architectures, by transformers' `model_type`, whose residual branches `model.drop_path_rate` can drop."""


class ModelConfig(Section):
    """Section `model:`: pretrained from `path`, or from scratch by `config`."""

    path: str | None = None
    """A Hub id or a checkpoint folder to fine-tune."""
    revision: str | None = None
    """Branch, tag or commit of a Hub checkpoint."""
    config: dict[str, Any] | None = None
    """A configuration to train from scratch, in transformers' names; `model_type` is `vit` if unset."""
    image_size: Positive | tuple[Positive, Positive] | None = None
    """Side, or [height, width], in pixels; the checkpoint's own if unset."""
    resize: Literal["squash", "crop"] | None = None
    """How evaluation fits an image: squashed to `image_size`, or shortest edge resized and centre cropped;
    the checkpoint's own way if unset."""
    crop_fraction: Annotated[float, Field(gt=0, le=1)] = 0.875
    """With `resize: crop`, the crop's side by the shortest edge it is cut from."""
    method: Literal["full", "lora", "head", "linear_probe"] = "full"
    """What is trained: all weights; the head and small matrices beside frozen weights (LoRA); the head alone,
    on what the frozen encoder makes of augmented images; or `linear_probe`: the head, fitted in seconds to
    features that are computed once."""
    lora_r: Positive = 8
    """Rank of LoRA's matrices (Hu et al., 2022): each layer's product is of `r × in` and `out × r`."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    """The product is scaled by `lora_alpha / lora_r`."""
    lora_targets: Annotated[list[str], Field(min_length=1)] = ["q_proj", "v_proj"]
    """Layers that have LoRA's matrices beside them, by the ends of their names in transformers."""
    lora_merge: bool = True
    """Publish a stock model, with LoRA's products added to the weights; else the adapter alone, in PEFT's
    form, which needs the checkpoint that it was trained beside."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    drop_path_rate: Fraction | None = None
    """Stochastic depth (Huang et al., 2016): share of the images for which the last layer's residual branches
    are left out of a training step, falling linearly to 0 in the first layer. The published model has none of
    it. Unset, the architecture's own, which is 0 for ViT."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.config is None):
            raise ValueError(
                "write one of `path` (a checkpoint to fine-tune) and `config` (a model to train from scratch)"
            )
        return self

    @model_validator(mode="after")
    def _keeps_what_was_learnt(self) -> ModelConfig:
        if self.config is not None and self.method in ("lora", "linear_probe"):
            raise ValueError(
                f"method {self.method} keeps the encoder as it is, and from `config` it would be random: "
                f"write `path`, a pretrained checkpoint"
            )
        fields = {name: field for name, field in type(self).model_fields.items() if name.startswith("lora_")}
        said = [name for name, field in fields.items() if getattr(self, name) != field.default]
        if said and self.method != "lora":
            raise ValueError(f"{said[0]} belongs to method lora, and method is {self.method}: leave out one")
        if not self.lora_merge and self.image_size is not None:
            raise ValueError(
                "lora_merge: false publishes what is loaded beside the checkpoint, which others have at its "
                "own size: leave out image_size, or lora_merge"
            )
        return self

    @model_validator(mode="after")
    def _drops_what_learns(self) -> ModelConfig:
        if self.drop_path_rate and self.method in ("head", "linear_probe"):
            raise ValueError(
                f"drop_path_rate drops layers that learn, and with method {self.method} none does: leave it "
                f"out"
            )
        return self

    @model_validator(mode="after")
    def _can_drop_paths(self) -> ModelConfig:
        if self.drop_path_rate is None or self.config is None:
            return self
        if "drop_path_rate" in self.config:
            raise ValueError(
                "drop_path_rate and config.drop_path_rate say it twice: leave out one of them. The config's "
                "is published with the model"
            )
        model_type = str(self.config.get("model_type", "vit"))
        if self.drop_path_rate and model_type not in DROP_PATH_MODELS:
            raise ValueError(
                f"drop_path_rate cannot drop layers of {model_type} models; it goes with "
                f"{', '.join(DROP_PATH_MODELS)}. Leave it out"
            )
        return self


class EvaluationConfig(Section):
    """Section `evaluation:`: how splits are scored."""

    batch_size: Positive = 64
    """Images per device and step when scoring; scores do not depend on it."""
    num_mistakes: Annotated[int, Field(ge=0, le=200)] = 24
    """How many of the worst mistakes the report shows."""
    calibrate: bool = False
    """Fit a temperature to the validation images (Guo et al., 2017) and publish it in config.json as
    `calibration_temperature`; `predict --calibrated` and `evaluate --calibrated` divide the logits by it."""


_NO_REF = re.compile(
    r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^@$|(?:^|/)[.-]|^/|[./]$|\.lock(?:/|$)|^HEAD$|^refs/"
)
"""What git's check-ref-format refuses in the name of a branch or tag; and whole refs, which are no names."""


class HubConfig(Section):
    """Section `hub:`: where the model is published, and what its card says beside the numbers."""

    push: bool = False
    """Publish the model once it is scored; whether that is permitted is asked before training."""
    model_id: str | None = None
    """`owner/name` of the model on the Hub."""
    private: bool | None = None
    """Whether a new repository is seen by its owners only; the owner's own default if unset."""
    license: str | None = None
    """Licence identifier of the published weights, such as `apache-2.0`."""
    tags: list[str] = []
    """Words that the model is found by, beside those that every card has."""
    revision: str | None = None
    """Branch to push to, made where it is not there; `main` if unset."""
    tag: str | None = None
    """Git tag for this run's commit, so that it can be loaded when others came after it."""
    create_pr: bool = False
    """Open a pull request instead of pushing, or renew the one that is open."""
    verify: Literal["sample", "full", "files"] = "sample"
    """After the push everything is downloaded again and compared; how many test images are then scored anew:
    64, all, or none."""

    @field_validator("revision", "tag")
    @classmethod
    def _names_a_ref(cls, value: str | None) -> str | None:
        if value is not None and (not value or _NO_REF.search(value)):
            raise ValueError(
                "is no name for a branch or tag: expected letters, digits and - _ . /, beginning and ending "
                "with a letter or digit, such as v1.0"
            )
        return value

    @model_validator(mode="after")
    def _says_where(self) -> HubConfig:
        if self.push and not self.model_id:
            raise ValueError("push needs to know where to: write model_id (owner/name)")
        if self.tag in (self.revision or "main", "main"):
            raise ValueError(f"{self.tag} is a branch already: write another tag, such as v1.0")
        if self.create_pr and self.tag is not None:
            raise ValueError("a pull request may never be merged: leave out tag, or create_pr")
        if self.create_pr and self.revision is not None:
            raise ValueError("a pull request goes to main: leave out revision, or create_pr")
        return self
