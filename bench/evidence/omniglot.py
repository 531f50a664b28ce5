"""Omniglot: handwritten characters of many alphabets, 20 drawings each; identities that training never saw.

The protocol of person re-identification in small: train a classifier of characters, then find the other drawings of a
character that was in no training class by the distance of embeddings. The two zip files are those of
https://github.com/brendenlake/omniglot, folder `python` (MIT licence); they are read as they are, in memory.
"""

import io
import stat
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.evidence import networks
from bench.evidence.data import DataError, Dataset, Split
from bench.evidence.metrics import retrieval

SOURCE = "https://github.com/brendenlake/omniglot (folder python)"
DRAWINGS = 20  # of each character
PIXELS, SIDE = 105, 28  # of a drawing: in the file, and as the network sees it
VALIDATION_CHARACTERS = 24
LARGEST_ENTRY = 1 << 20  # bytes; a drawing takes some 300


class Half(NamedTuple):
    """One of the two files."""

    name: str
    characters: int
    alone: tuple[str, ...]  # its alphabets that the other does not have; Greek and Latin are in both
    characters_alone: int


SMALL1 = Half("images_background_small1.zip", 136, ("Balinese", "Early_Aramaic", "Korean"), 86)
SMALL2 = Half("images_background_small2.zip", 156, ("Japanese_(katakana)", "Sanskrit", "Tagalog"), 106)


def read_drawings(path: Path, characters: int) -> dict[str, Tensor]:
    """Alphabet/character -> (20, 28, 28), ink 1 on paper 0, from a zip with entries FOLDER/ALPHABET/CHARACTER/*.png.

    Raises DataError for a file that is missing, damaged, or not of this form and count.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing: it comes from {SOURCE}")
    drawings: dict[str, list[Tensor]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                place = inside(path, entry)
                if not entry.is_dir():
                    drawings.setdefault("/".join(place.parts[1:3]), []).append(drawing(path, archive, entry))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path} is not a readable zip file: {error}") from error
    if len(drawings) != characters:
        raise DataError(f"{path} should hold {characters} characters, found {len(drawings)}")
    for name, found in drawings.items():
        if len(found) != DRAWINGS:
            raise DataError(f"{path} should hold {DRAWINGS} drawings of {name}, found {len(found)}")
    return {name: torch.stack(found) for name, found in sorted(drawings.items())}


def inside(path: Path, entry: zipfile.ZipInfo) -> PurePosixPath:
    """Where the entry says that it lies. Nothing is extracted, but an archive with such entries is not ours."""
    place = PurePosixPath(entry.filename)
    folder = path.stem
    link = stat.S_ISLNK(entry.external_attr >> 16)
    if place.is_absolute() or ".." in place.parts or "\\" in entry.filename or place.parts[:1] != (folder,) or link:
        raise DataError(f"{path} holds an entry outside of its folder {folder}: {entry.filename!r}")
    if not entry.is_dir() and (len(place.parts) != 4 or place.suffix != ".png"):
        raise DataError(f"{path}: expected {folder}/ALPHABET/CHARACTER/DRAWING.png, found {entry.filename!r}")
    return place


def drawing(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    """(28, 28)"""
    if entry.file_size > LARGEST_ENTRY:
        raise DataError(f"{path}: {entry.filename} takes {entry.file_size} bytes, too many for a drawing")
    try:
        with Image.open(io.BytesIO(archive.read(entry)), formats=["PNG"]) as image:
            if image.size != (PIXELS, PIXELS):
                raise DataError(f"{path}: {entry.filename} is {image.size}, expected {PIXELS} x {PIXELS} pixels")
            small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: {entry.filename} is not a readable PNG: {error}") from error
    return 1 - torch.from_numpy(np.asarray(small, dtype=np.float32)) / 255


def identities(drawings: list[Tensor], turns: int) -> Split:
    """Drawings of characters as rows; a quarter turn makes another identity of a character, up to `turns` of them."""
    turned = [character.rot90(turn, dims=(1, 2)) for character in drawings for turn in range(turns)]
    target = torch.arange(len(turned)).repeat_interleave(DRAWINGS)
    return Split(torch.cat(turned)[:, None].contiguous(), target)  # (rows, 1, 28, 28), (rows,)


def omniglot(root: Path, hold_out: bool) -> Dataset:
    """Trains on 136 characters in four rotations, 544 identities; tests on 106 characters of three other alphabets.

    With `hold_out`, 24 of the 136, drawn once and for all, are kept from training and are the validation split.
    """
    return between(SMALL1, SMALL2, "omniglot", root, hold_out)


def omniglot_swapped(root: Path, hold_out: bool) -> Dataset:
    """The other way round, with the settings that were chosen on the first: 156 characters, 624 identities; tests on 86
    characters of three other alphabets."""
    return replace(between(SMALL2, SMALL1, "omniglot-swapped", root, hold_out), settings_of="omniglot")


def between(train: Half, test: Half, name: str, root: Path, hold_out: bool) -> Dataset:
    seen = list(read_drawings(root / train.name, train.characters).values())
    others = read_drawings(root / test.name, test.characters)
    unseen = [drawings for character, drawings in others.items() if character.split("/")[0] in test.alone]
    if len(unseen) != test.characters_alone:
        raise DataError(
            f"{root / test.name} should hold {test.characters_alone} characters of {', '.join(test.alone)}, found "
            f"{len(unseen)}"
        )
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = order[:VALIDATION_CHARACTERS] if hold_out else []
    kept = [drawings for number, drawings in enumerate(seen) if number not in held_out]
    return Dataset(
        name=name,
        train=identities(kept, turns=4),
        validation=identities([seen[number] for number in held_out], turns=1) if hold_out else None,
        test=identities(unseen, turns=1),
        num_classes=4 * len(kept),
        network=lambda: networks.embedding(128),
        features=128,
        metrics=retrieval,
        hardest=(1, 3, 10, 30, 100),
        epochs=12,
        batch_size=128,
        trials=16,
        tuning_seeds=1,
        learning_rates=(1e-4, 1.0),
        open_set=True,
    )
