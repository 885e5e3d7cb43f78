"""The dataset card: README.md of a published dataset, every number in it counted in the data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import datasets
from huggingface_hub import DatasetCardData

from vit_finetune.data.checkup.checkup import Checkup
from vit_finetune.data.sources.folders import ALL
from vit_finetune.data.sources.labels import count_labels, is_multi_label
from vit_finetune.data.splits.prepared import fingerprint
from vit_finetune.publishing.markdown import MOST_NAMED, build_environment, join_card, join_tags, read_card
from vit_finetune.publishing.redaction import Markdown, fenced
from vit_finetune.run import TOLD

COUNTED = ("size_categories", "dataset_info", "configs")
"""Keys of the front matter that say what is there, and not what somebody wants said of it."""
_OURS = re.compile(r"<!-- vit-finetune: .*<!-- vit-finetune ends -->", re.DOTALL)
"""What an upload writes anew."""
_SIZES = {"1K": 10**3, "10K": 10**4, "100K": 10**5, "1M": 10**6, "10M": 10**7, "100M": 10**8, "1B": 10**9}


@dataclass
class SplitFacts:
    """The Parquet files of one split."""

    features: datasets.Features
    num_bytes: int = 0
    """In memory, as Arrow."""
    file_bytes: int = 0


def build_dataset_card(
    repo_id: str, checkup: Checkup, facts: Mapping[str, SplitFacts], located: int, license: str | None
) -> str:
    """The card as Markdown under YAML front matter.

    Args:
        repo_id: `owner/name`.
        checkup: of what is published.
        facts: of the files, by split as they are published.
        located: how many images tell where they were taken.
        license: identifier of the images' licence.
    """
    source = checkup.source
    splits = {"train" if name == ALL else name: split for name, split in source.splits.items()}
    counts = {name: count_labels(split).tolist() for name, split in splits.items()}
    told = [f for f in checkup.findings if f.severity != "note" or f.kind in TOLD]
    keys = " data.group=group" if "group" in next(iter(facts.values())).features else ""
    if is_multi_label(next(iter(splits.values()))):
        # `imagefolder` has smoothing, which is for images of one class.
        keys += " data.multi_label=true training.label_smoothing_factor=0"
    loading = f'from datasets import load_dataset\n\ndataset = load_dataset("{repo_id}")'
    return build_environment().get_template("dataset_card.md.jinja").render(
        front_matter=Markdown(_metadata(repo_id, splits, facts, license).to_yaml()),
        title=repo_id.partition("/")[2],
        num_images=sum(map(len, splits.values())),
        labels=source.labels,
        counts=counts,
        fingerprints={name: fingerprint(split) for name, split in splits.items()},
        sizes={name: len(split) for name, split in splits.items()},
        features=next(iter(facts.values())).features,
        loading=fenced(loading, "python"),
        training=fenced(f"vit-finetune train imagefolder data.path={repo_id}{keys}", "bash"),
        findings=[finding.shortened(MOST_NAMED) for finding in told],
        located=located,
        version=version("vit-finetune"),
    )  # fmt: skip


def renew_dataset_card(there: str, card: str, license: str | None) -> str:
    """The new card with what people wrote into the one that is there.

    Theirs are the text around our marks and the front matter, but for what was counted; where the marks are
    gone, or never were, ours goes below.

    Args:
        there: the card that the repository has.
        card: as `build_dataset_card` has it.
        license: as it was asked for; theirs if None.
    """
    (old, text), (new, ours) = read_card(there.replace("\r\n", "\n")), read_card(card)
    asked = {} if license is None else {"license": license}
    counted = {key: new[key] for key in COUNTED}
    front = new | old | counted | asked | {"tags": join_tags(old, new)}
    block = _OURS.search(ours)
    assert block is not None  # the template has the marks
    renewed = _OURS.sub(lambda _: block[0], text, count=1)
    if not _OURS.search(text):
        renewed = f"{text.rstrip()}\n\n{block[0]}\n" if text.strip() else ours
    return there if (front, renewed) == (old, text) else join_card(front, renewed)


def _metadata(
    repo_id: str,
    splits: Mapping[str, datasets.Dataset],
    facts: Mapping[str, SplitFacts],
    license: str | None,
) -> DatasetCardData:
    sizes = {name: len(split) for name, split in splits.items()}
    info: dict[str, Any] = datasets.DatasetInfo(
        features=next(iter(facts.values())).features,
        splits=datasets.SplitDict(
            {name: datasets.SplitInfo(name, split.num_bytes, sizes[name]) for name, split in facts.items()}
        ),
        download_size=sum(split.file_bytes for split in facts.values()),
        dataset_size=sum(split.num_bytes for split in facts.values()),
    )._to_yaml_dict()
    return DatasetCardData(
        license=license,
        pretty_name=repo_id.partition("/")[2],
        task_categories=["image-classification"],
        size_categories=[_size_category(sum(sizes.values()))],
        tags=["vit-finetune"],
        dataset_info=info,
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"data/{name}-*"} for name in splits],
            }
        ],
    )


def _size_category(count: int) -> str:
    """The Hub's word for a number of images."""
    below = "0"
    for name, limit in _SIZES.items():
        if count < limit:
            return f"n<{name}" if below == "0" else f"{below}<n<{name}"
        below = name
    return "n>1B"
