"""Files that are whole or absent."""

import os
from pathlib import Path

from PIL import Image


def write_whole(path: Path, write) -> None:
    """Let `write` fill a binary file under a temporary name, then rename it: the file is whole or absent."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_picture(picture: Image.Image, path: Path) -> None:
    """A PNG file."""
    write_whole(path, lambda file: picture.save(file, format="PNG"))
