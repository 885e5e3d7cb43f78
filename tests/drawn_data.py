"""Drawn data sets without pictures: labels, groups, duplicates and twins, and what carving makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from vit_finetune.data.sources.columns import Source, build_dataset, column_values
from vit_finetune.data.splits.carving import carve
from vit_finetune.recipe import DataConfig

Split = dict[str, list[str]]


@dataclass
class Drawn:
    """A drawn data set: one entry per image."""

    ids: list[str]
    labels: list[int]
    groups: list[str | None] | None = None
    digests: list[str] | None = None
    twins: list[tuple[str, str]] = field(default_factory=list)

    def dataset(self) -> datasets.Dataset:
        names = [f"c{number}" for number in range(max(self.labels, default=0) + 1)]
        images = pa.StructArray.from_arrays(
            [pa.nulls(len(self.ids), pa.binary()), pa.array(self.ids)], names=["bytes", "path"]
        )
        groups = None if self.groups is None else pa.array(self.groups, pa.string())
        dataset = build_dataset(self.ids, images, self.labels, names, groups)
        return dataset if self.digests is None else dataset.add_column("digest", self.digests)

    def source(self) -> Source:
        dataset = self.dataset()
        return Source("folder", {"all": dataset}, dataset.features["label"].names)

    def rows(self, numbers: Sequence[int]) -> Drawn:
        def taken(values: Any) -> Any:
            return None if values is None else [values[number] for number in numbers]

        return replace(
            self,
            ids=taken(self.ids),
            labels=taken(self.labels),
            groups=taken(self.groups),
            digests=taken(self.digests),
        )


def draw(seed: int, tied: bool = False, smallest: int = 3) -> Drawn:
    """Up to 6 classes with some to some hundred images; where tied, in small groups, with duplicates and twins."""
    random = np.random.default_rng(seed)
    sizes = random.integers(smallest, [12, 40, 200][seed % 3], size=random.integers(2, 7))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    ids = [f"c{label}/{number}.jpg" for number, label in enumerate(labels.tolist())]
    if not tied:
        return Drawn(ids, labels.tolist())
    # Groups lie in one class, but for one in twenty images, and one in five images has none.
    groups = [
        None if random.random() < 0.2 else f"{label if random.random() < 0.95 else 0}-{random.integers(12)}"
        for label in labels.tolist()
    ]
    digests = [
        f"d{number if random.random() < 0.9 else random.integers(len(ids))}" for number in range(len(ids))
    ]
    twins = [(str(one), str(other)) for one, other in random.choice(ids, (len(ids) // 20, 2))]
    return Drawn(ids, labels.tolist(), groups, digests, [*twins, (ids[0], "elsewhere.jpg")])


def ids_of(splits: datasets.DatasetDict | dict[str, datasets.Dataset]) -> Split:
    return {name: column_values(split, "id") for name, split in splits.items()}


def carve_ids(drawn: Drawn, **options: Any) -> Split:
    return ids_of(carve(drawn.source(), DataConfig(path="drawn", **options), drawn.twins))


def split_by_id(splits: Split) -> dict[str, str]:
    return {identity: name for name, rows in splits.items() for identity in rows}


def components(drawn: Drawn) -> list[set[str]]:
    """Images that belong together, by joining sets until nothing changes."""
    sets = {identity: {identity} for identity in drawn.ids}

    def join(one: str, other: str) -> None:
        if sets[one] is not sets[other]:
            sets[one] |= sets[other]
            for identity in sets[other]:
                sets[identity] = sets[one]

    for values in (drawn.groups, drawn.digests):
        first: dict[str, str] = {}
        for identity, value in zip(drawn.ids, values or []):
            if value:
                join(first.setdefault(value, identity), identity)
    for one, other in drawn.twins:
        if one in sets and other in sets:
            join(one, other)
    return list({id(members): members for members in sets.values()}.values())


def hash_of(text: str, seed: int = 0) -> int:
    return int.from_bytes(blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest(), "little")


def label_names(source: Source, split: str) -> dict[str, str]:
    """Class name by id."""
    rows = zip(column_values(source.splits[split], "id"), column_values(source.splits[split], "label"))
    return {identity: source.labels[label] for identity, label in rows}


def groups(source: Source, split: str = "all") -> dict[str, str | None]:
    """Group by id."""
    return dict(zip(column_values(source.splits[split], "id"), column_values(source.splits[split], "group")))
