"""Near duplicates are never carved apart."""

from pathlib import Path

from drawn_corpus import draw_scene, encode

from vit_finetune.data.sources.columns import column_values
from vit_finetune.data.splits.prepared import prepare_splits
from vit_finetune.recipe import DataConfig


def test_near_duplicates_stay_on_one_side(tmp_path: Path) -> None:
    seed = 0
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(12):
            seed += 1
            scene = draw_scene(seed)
            for quality in (95, 40):
                (tmp_path / name / f"{number}-{quality}.jpg").write_bytes(
                    encode(scene, "JPEG", quality=quality)
                )
    data = prepare_splits(DataConfig(path=str(tmp_path), validation_fraction=0.25, test_fraction=0.25))
    for split in data.splits.values():
        ids = column_values(split, "id")
        scenes = {name.partition("-")[0] for name in ids}
        assert len(ids) == 2 * len(scenes)
