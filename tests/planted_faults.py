"""Faults to plant in the drawn corpus, one function each, that know which images they spoil."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from drawn_corpus import COUNTS, draw_scene, encode, scene_of
from PIL import Image, ImageDraw

ORIENTATION = 0x0112


@dataclass(frozen=True)
class Fault:
    """Something wrong with a corpus."""

    plant: Callable[[Path], set[str]]
    """Spoils the corpus at a path; answers the ids of the images that are to be named."""
    kinds: dict[str, str] = field(default_factory=dict)
    """Severity by kind of the findings that it is to cause, and no others."""

    @property
    def name(self) -> str:
        return self.plant.__name__


FAULTS: list[Fault] = []


def fault(**kinds: str) -> Callable[[Callable[[Path], set[str]]], Callable[[Path], set[str]]]:
    def note(plant: Callable[[Path], set[str]]) -> Callable[[Path], set[str]]:
        FAULTS.append(Fault(plant, {kind.replace("_", "-"): severity for kind, severity in kinds.items()}))
        return plant

    return note


def write(root: Path, name: str, data: bytes) -> set[str]:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)
    return {name}


# --------------------------------------------------------------------------- what cannot be read


@fault(unreadable="error")
def empty_file(root: Path) -> set[str]:
    return write(root, "train/cat/empty.jpg", b"")


@fault(unreadable="error")
def text_file(root: Path) -> set[str]:
    return write(root, "train/cat/text.jpg", b"Dear diary,\n")


@fault(unreadable="error")
def web_page(root: Path) -> set[str]:
    return write(root, "test/dog/page.jpg", b"<!doctype html><title>404 Not Found</title>" * 30)


@fault(unreadable="error")
def zeros_where_a_disk_failed(root: Path) -> set[str]:
    whole = (root / "train/dog/1.jpg").read_bytes()
    return write(root, "train/dog/1.jpg", bytes(len(whole)))


@fault(unreadable="error")
def decompression_bomb(root: Path) -> set[str]:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    return write(root, "train/owl/bomb.png", b"\x89PNG\r\n\x1a\n" + body)


@fault(unreadable="error")
def broken_png_data(root: Path) -> set[str]:
    data = bytearray(encode(draw_scene(800), "PNG"))
    start = data.index(b"IDAT") + 60
    data[start : start + 40] = b"\xff" * 40
    return write(root, "train/owl/broken.png", bytes(data))


@fault(truncated="error")
def truncated_jpeg(root: Path) -> set[str]:
    data = encode(draw_scene(801), "JPEG", quality=95)
    return write(root, "train/cat/cut.jpg", data[: len(data) // 2])


@fault(truncated="error")
def truncated_png(root: Path) -> set[str]:
    data = encode(draw_scene(802), "PNG")
    return write(root, "test/cat/cut.png", data[: len(data) * 2 // 3])


# --------------------------------------------------------------------------- odd pixels


@fault(cmyk="note")
def cmyk_jpeg(root: Path) -> set[str]:
    return write(root, "train/cat/cmyk.jpg", encode(draw_scene(810).convert("CMYK"), "JPEG"))


@fault(transparent="note")
def transparent_png(root: Path) -> set[str]:
    image = draw_scene(811)
    image.putalpha(Image.fromarray(np.tile(np.arange(72, dtype=np.uint8), (56, 1))))
    return write(root, "train/cat/glass.png", encode(image, "PNG"))


@fault(transparent="note")
def palette_with_a_transparent_colour(root: Path) -> set[str]:
    image = draw_scene(812).quantize(16)
    return write(
        root, "train/dog/sticker.png", encode(image, "PNG", transparency=int(image.getpixel((9, 9))))
    )


@fault(greyscale="note")
def greyscale_jpeg(root: Path) -> set[str]:
    return write(root, "train/owl/grey.jpg", encode(draw_scene(813).convert("L"), "JPEG"))


@fault(greyscale="note")
def black_and_white_png(root: Path) -> set[str]:
    return write(root, "test/owl/ink.png", encode(draw_scene(814).convert("1"), "PNG"))


@fault(sixteen_bit="note")
def sixteen_bit_png(root: Path) -> set[str]:
    deep = np.asarray(draw_scene(815).convert("L")).astype(np.uint16) * 257
    return write(root, "train/dog/deep.png", encode(Image.fromarray(deep), "PNG"))


@fault(odd_mode="note")
def floating_point_tiff(root: Path) -> set[str]:
    return write(root, "train/dog/float.tif", encode(draw_scene(816).convert("F"), "TIFF"))


@fault(blank="warning")
def black_jpeg(root: Path) -> set[str]:
    return write(root, "train/cat/lens-cap.jpg", encode(Image.new("RGB", (72, 56)), "JPEG"))


@fault(blank="warning")
def nearly_white_png(root: Path) -> set[str]:
    noise = np.random.default_rng(0).integers(251, 255, (56, 72, 3), dtype=np.uint8)
    return write(root, "train/cat/placeholder.png", encode(Image.fromarray(noise), "PNG"))


# --------------------------------------------------------------------------- odd sizes and files


@fault(tiny="warning")
def icon(root: Path) -> set[str]:
    return write(root, "train/owl/icon.png", encode(draw_scene(820, (12, 9)), "PNG"))


@fault(tiny="warning")
def tracking_pixel(root: Path) -> set[str]:
    return write(root, "train/dog/pixel.gif", encode(draw_scene(821, (2, 1)), "GIF"))


@fault(huge="note")
def panorama_of_42_megapixels(root: Path) -> set[str]:
    image = draw_scene(822).resize((7500, 5600))
    return write(root, "train/cat/panorama.jpg", encode(image, "JPEG", quality=50))


@fault(elongated="note")
def banner(root: Path) -> set[str]:
    return write(root, "train/dog/banner.jpg", encode(draw_scene(823, (300, 50)), "JPEG"))


@fault(elongated="note")
def tall_strip(root: Path) -> set[str]:
    return write(root, "test/dog/strip.jpg", encode(draw_scene(824, (40, 220)), "JPEG"))


@fault(exif_rotated="note")
def turned_by_exif(root: Path) -> set[str]:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return write(root, "train/owl/turned.jpg", encode(draw_scene(825), "JPEG", exif=exif))


@fault(exif_rotated="note")
def mirrored_by_exif(root: Path) -> set[str]:
    exif = Image.Exif()
    exif[ORIENTATION] = 2
    return write(root, "train/owl/mirror.png", encode(draw_scene(826), "PNG", exif=exif))


def _frames(seed: int, kind: str) -> bytes:
    first, second = draw_scene(seed), draw_scene(seed + 1)
    return encode(first, kind, save_all=True, append_images=[second])


@fault(animated="warning")
def animated_gif(root: Path) -> set[str]:
    return write(root, "train/cat/clip.gif", _frames(830, "GIF"))


@fault(animated="warning")
def animated_webp(root: Path) -> set[str]:
    return write(root, "train/dog/clip.webp", _frames(832, "WEBP"))


@fault(animated="warning")
def animated_png(root: Path) -> set[str]:
    return write(root, "test/cat/clip.png", _frames(834, "PNG"))


@fault(animated="warning")
def scan_of_two_pages(root: Path) -> set[str]:
    return write(root, "test/owl/scan.tiff", _frames(836, "TIFF"))


@fault(wrong_suffix="note")
def png_called_jpg(root: Path) -> set[str]:
    return write(root, "train/cat/really-png.jpg", encode(draw_scene(838), "PNG"))


@fault(wrong_suffix="note")
def webp_called_png(root: Path) -> set[str]:
    return write(root, "test/dog/really-webp.PNG", encode(draw_scene(839), "WEBP"))


# --------------------------------------------------------------------------- the same image twice


def _copy(root: Path, old: str, new: str) -> set[str]:
    shutil.copy(root / old, root / new)
    return {old, new}


@fault(duplicate="warning")
def copy_in_one_class(root: Path) -> set[str]:
    return _copy(root, "train/cat/2.jpg", "train/cat/2 (1).jpg") | _copy(
        root, "train/cat/2.jpg", "train/cat/2 (2).jpg"
    )


@fault(leak="warning")
def copy_in_test(root: Path) -> set[str]:
    return _copy(root, "train/dog/2.jpg", "test/dog/copy.jpg")


@fault(two_labels="warning")
def copy_under_another_label(root: Path) -> set[str]:
    return _copy(root, "train/dog/3.jpg", "train/owl/copy.jpg")


@fault(leak="warning", two_labels="warning")
def copy_in_test_under_another_label(root: Path) -> set[str]:
    return _copy(root, "train/dog/4.jpg", "test/cat/copy.jpg")


@fault(near_duplicate="note")
def saved_again(root: Path) -> set[str]:
    data = encode(scene_of(root, "train/cat/4.jpg"), "JPEG", quality=35)
    return write(root, "train/cat/again.jpg", data) | {"train/cat/4.jpg"}


@fault(near_duplicate="note")
def the_same_pixels_as_png(root: Path) -> set[str]:
    data = encode(scene_of(root, "train/cat/5.jpg"), "PNG")
    return write(root, "train/cat/5.png", data) | {"train/cat/5.jpg"}


@fault(near_duplicate="note")
def larger(root: Path) -> set[str]:
    image = scene_of(root, "train/cat/6.jpg")
    return write(root, "train/cat/6-large.jpg", encode(image.resize((700, 560)), "JPEG")) | {
        "train/cat/6.jpg"
    }


@fault(near_duplicate="note")
def brighter(root: Path) -> set[str]:
    image = scene_of(root, "train/dog/5.jpg").point(lambda value: min(255, value * 0.8 + 50))
    return write(root, "train/dog/bright.jpg", encode(image, "JPEG")) | {"train/dog/5.jpg"}


@fault(near_duplicate="note")
def with_a_watermark(root: Path) -> set[str]:
    image = scene_of(root, "train/dog/6.jpg")
    ImageDraw.Draw(image).text((3, 42), "(c) ann", fill="white")
    return write(root, "train/dog/stock.jpg", encode(image, "JPEG")) | {"train/dog/6.jpg"}


@fault(near_duplicate="note")
def cut_at_the_edge(root: Path) -> set[str]:
    image = scene_of(root, "train/dog/7.jpg")
    image = image.crop((1, 1, image.width - 1, image.height))
    return write(root, "train/dog/crop.jpg", encode(image, "JPEG", quality=90)) | {"train/dog/7.jpg"}


@fault(near_leak="warning")
def smaller_in_test(root: Path) -> set[str]:
    image = scene_of(root, "train/owl/4.jpg")
    return write(root, "test/owl/small.jpg", encode(image.resize((50, 40)), "JPEG")) | {"train/owl/4.jpg"}


@fault(near_two_labels="warning")
def saved_again_under_another_label(root: Path) -> set[str]:
    image = scene_of(root, "train/owl/5.jpg")
    return write(root, "train/cat/owl.jpg", encode(image, "JPEG", quality=40)) | {"train/owl/5.jpg"}


@fault(near_leak="warning", near_two_labels="warning")
def smaller_in_test_under_another_label(root: Path) -> set[str]:
    image = scene_of(root, "train/owl/6.jpg")
    return write(root, "test/dog/owl.jpg", encode(image.resize((50, 40)), "JPEG")) | {"train/owl/6.jpg"}


# --------------------------------------------------------------------------- classes and the listing


@fault(class_missing="warning")
def class_missing_from_test(root: Path) -> set[str]:
    shutil.rmtree(root / "test" / "dog")
    return set()


@fault(imbalance="warning")
def rare_class(root: Path) -> set[str]:
    for number in range(2, 10):
        (root / "train" / "owl" / f"{number}.jpg").unlink()
    for number in range(10, 20):
        write(root, f"train/cat/{number}.jpg", encode(draw_scene(840 + number), "JPEG"))
    return set()


@fault(label_names_alike="warning")
def label_in_capitals(root: Path) -> set[str]:
    for number in range(4):
        for split in COUNTS:
            write(
                root, f"{split}/Cat/{number}.jpg", encode(draw_scene(900 + 10 * number + len(split)), "JPEG")
            )
    return set()


@fault(label_names_alike="warning")
def label_with_a_space(root: Path) -> set[str]:
    for number in range(4):
        for split in COUNTS:
            seed = 1000 + 10 * number + len(split)
            write(root, f"{split}/barn owl/{number}.jpg", encode(draw_scene(seed), "JPEG"))
            write(root, f"{split}/barn_owl /{number}.jpg", encode(draw_scene(seed + 500), "JPEG"))
    return set()


@fault(listing="note")
def file_that_is_no_image(root: Path) -> set[str]:
    (root / "train" / "cat" / "notes.txt").write_text("do not forget")
    return set()


@fault(listing="note")
def image_outside_the_classes(root: Path) -> set[str]:
    write(root, "train/cover.jpg", encode(draw_scene(890), "JPEG"))
    return set()
