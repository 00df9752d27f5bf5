"""A folder of images, one folder a class, into one tensor."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError
from poise.tasks.memory import check_memory

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
# What these names may hold. Pillow would open anything that it knows by its first bytes: a PostScript file named .png starts Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# 50 million pixels: beyond every camera's usual file, far below what a bomb unpacks to.
MOST_PIXELS = 50_000_000


@dataclass(frozen=True)
class ImageFolder:
    """Images of one size with their classes.

    Attributes:
        images: uint8 `[rows, channels, height, width]`.
        target: int64 `[rows]`.
        classes: folder names, sorted.
        content: sha256 over names and bytes.
    """

    images: Tensor
    target: Tensor
    classes: tuple[str, ...]
    content: str


def read_image_folder(path: str | os.PathLike[str]) -> ImageFolder:
    """Read `path/CLASS/IMAGE` into one tensor.

    Args:
        path: a folder with one folder a class; hidden files are passed over. Images stay grey where all are grey;
            otherwise all become RGB.
    Raises:
        InputError: fewer than two classes, an empty class, a file that is not an image, a broken image, images of mixed
            sizes, more than 50 million pixels in one image.

        >>> folder = read_image_folder("cats_and_dogs")  # doctest: +SKIP
    """
    path = Path(path)
    files = _files(path)
    grey = all(_mode(file) in ("1", "L") for file, _ in files)
    images = _decode([file for file, _ in files], grey)
    digest = hashlib.sha256()
    for file, _ in files:
        digest.update(f"{file.relative_to(path).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    classes = tuple(sorted({name for _, name in files}))
    number = {name: place for place, name in enumerate(classes)}
    return ImageFolder(images, torch.tensor([number[name] for _, name in files]), classes, digest.hexdigest())


def read_images(path: str | os.PathLike[str], *, grey: bool) -> Tensor:
    """Read every image under a folder, in the order of their paths, whatever folders they stand in.

    Args:
        path: a folder.
        grey: whether images become grey or RGB.
    Returns:
        uint8 `[rows, channels, height, width]`.
    Raises:
        InputError: as `read_image_folder`, and where there is no image.
    """
    files = sorted(file for file in Path(path).rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"There are no images under {path}; expected {', '.join(sorted(SUFFIXES))}.")
    return _decode(files, grey)


def _decode(files: list[Path], grey: bool) -> Tensor:
    width, height = _open(files[0]).size
    channels = 1 if grey else 3
    # Bytes now, float32 later: five bytes a value.
    check_memory(
        len(files) * channels * height * width * 5, f"Reading {len(files)} images of {width} x {height} pixels"
    )
    images = np.empty((len(files), channels, height, width), dtype=np.uint8)
    for row, file in enumerate(files):
        image = _open(file)
        if image.size != (width, height):
            raise InputError(
                f"The images have mixed sizes: {files[0].name} is {width} x {height}, {file.name} is "
                f"{image.size[0]} x {image.size[1]} pixels. Resize them to one size first."
            )
        pixels = np.asarray(image.convert("L" if grey else "RGB"))
        images[row] = pixels[None] if grey else pixels.transpose(2, 0, 1)
    return torch.from_numpy(images)


def _files(path: Path) -> list[tuple[Path, str]]:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(folders) < 2:
        raise InputError(
            f"{path} has {len(folders)} folders inside; a folder of images needs one folder a class and at least two classes."
        )
    files: list[tuple[Path, str]] = []
    for folder in folders:
        inside = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        if not inside:
            raise InputError(f"The class folder {folder} is empty. Remove it or put its images in.")
        for entry in inside:
            if entry.is_dir() or entry.suffix.lower() not in SUFFIXES:
                raise InputError(f"{entry} is not an image; expected {', '.join(sorted(SUFFIXES))}. Move it elsewhere.")
            files.append((entry, folder.name))
    return files


def _open(file: Path) -> Any:
    """Decode one image; a bomb or a broken file is an InputError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Pillow only warns of a bomb up to twice its own limit; ours is checked from the header, before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if image.size[0] * image.size[1] > MOST_PIXELS:
                    raise InputError(
                        f"{file} announces {image.size[0]} x {image.size[1]} pixels; Poise decodes at most {MOST_PIXELS:,} in one image."
                    )
                image.load()
                return image.copy()
    except InputError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{file} is a broken image: {str(error).splitlines()[0]}. Replace or remove it.") from error


def _mode(file: Path) -> str:
    """The colour mode of an image from its header alone."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                return str(image.mode)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{file} is a broken image: {str(error).splitlines()[0]}. Replace or remove it.") from error
