"""What must stay together, against joining sets in plain Python; and the hash that orders it."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from drawn_data import Drawn, components, draw, hash_of

from vit_finetune.data.splits.units import find_units, hash_keys


@pytest.mark.parametrize("seed", range(12))
def test_units_are_the_connected_components(seed: int) -> None:
    drawn = draw(seed, tied=True)
    units = find_units(drawn.dataset(), 7, drawn.twins)
    members = defaultdict(set)
    for identity, unit in zip(drawn.ids, units.of_image.tolist()):
        members[unit].add(identity)
    assert sorted(map(sorted, members.values())) == sorted(map(sorted, components(drawn)))
    row = {identity: number for number, identity in enumerate(drawn.ids)}
    assert drawn.groups is not None
    for unit, together in members.items():
        assert units.sizes[unit] == len(together)
        counts = Counter(drawn.labels[row[identity]] for identity in together)
        most = max(counts.values())
        assert units.labels[unit] == min(label for label, count in counts.items() if count == most)
        groups = {identity: drawn.groups[row[identity]] for identity in together}
        keys = [f"group {group}" if group else identity for identity, group in groups.items()]
        assert units.keys[unit] == min(hash_of(key, 7) for key in keys)


def test_what_ties_nothing_makes_every_image_a_unit() -> None:
    drawn = Drawn(["a", "b", "c"], [0, 1, 1], [None, "x", ""], ["", "1", ""], [("a", "nowhere")])
    units = find_units(drawn.dataset(), 0, drawn.twins)
    assert units.of_image.tolist() == [0, 1, 2]
    assert units.labels.tolist() == [0, 1, 1]
    assert units.keys.tolist() == [hash_of("a"), hash_of("group x"), hash_of("c")]


def test_hashes_are_the_same_for_ever() -> None:
    # printf '0\0cat/1.jpg' | b2sum -l 64
    expected = ["5e2712cb05756c6e", "732159c5a01a3c28"]
    assert hash_keys(0, ["cat/1.jpg", "Ä"]).astype("<u8").tobytes().hex() == "".join(expected)
