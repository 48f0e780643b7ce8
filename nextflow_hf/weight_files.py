"""Weights in files: read one at a time from what was published, written in shards that are whole or absent."""

import argparse
import itertools
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .files import write_whole

# Where the weights stand in a file that `torch.save` wrote, the first that is there.
_SECTIONS = ("ema", "model", "state_dict")
MAX_SHARD_BYTES = 10**9
# What trainers save beside weights.
_HARMLESS = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_INDEX = "model.safetensors.index.json"


class WeightFiles:
    """The weights of a model in a file or folder, by name; a weight is read when it is asked for.

    Args:
        path: A `.safetensors` file, a file that `torch.save` wrote, or a folder with either, whole or in shards with
            an index.

    Raises:
        ValueError: If there are no weights, a file is missing, cut off or no file of weights, or holds anything but
            tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        self._places: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._pickled: dict[Path, dict] = {}
        for file in self._files():
            reader = self._read_safetensors if file.suffix == ".safetensors" else self._read_pickle
            reader(file)
        if not self._places:
            raise ValueError(f"There are no weights in {path}.")

    def identity(self) -> list[str]:
        """Which files these are: another file, or another content of one, is another identity."""
        files = sorted(set(self._places.values()))
        return [f"{own.resolve()} {own.stat().st_size} {own.stat().st_mtime_ns}" for own in files]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight."""
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a weight."""
        return self._dtypes[name]

    def load(self, name: str) -> torch.Tensor:
        """Read a weight."""
        file = self._places[name]
        if file in self._pickled:
            return self._pickled[file][name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise ValueError(f"There is neither a file nor a folder {self.path}.")
        for index in sorted(self.path.glob("*.index.json")):
            weight_map = json.loads(index.read_text()).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index} has no `weight_map`; it is no index of weights.")
            listed = sorted(set(weight_map.values()))
            missing = [name for name in listed if not (self.path / name).is_file()]
            if missing:
                raise ValueError(f"{index.name} names {missing}, which are not in {self.path}: download them too.")
            return [self.path / name for name in listed]
        for pattern in ("*.safetensors", "pytorch_model*.bin", "*.pt", "*.pth"):
            found = sorted(self.path.glob(pattern))
            if found:
                return found
        raise ValueError(f"There is no file of weights in {self.path} (*.safetensors, *.bin, *.pt).")

    def _read_safetensors(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118, it is no mapping
                    part = opened.get_slice(name)
                    self._add(name, file, tuple(part.get_shape()), _safetensors_dtype(part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is cut off, or no safetensors file: {error}. Download it again.") from error

    def _read_pickle(self, file: Path) -> None:
        with open(file, "rb") as opened:
            head = opened.read(64)
        if head.startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`.")
        is_zip = zipfile.is_zipfile(file)
        if not is_zip and head[:1] != b"\x80":
            raise ValueError(f"{file} is cut off, or no file of weights: it begins with {head[:16]!r}.")
        try:
            # Tensors, and what trainers put beside them; nothing that could run. A memory map reads no weight before
            # it is used; older files cannot be mapped.
            with torch.serialization.safe_globals(_HARMLESS):
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
        except UnpicklingError as error:
            refused = re.search(r"GLOBAL (\S+)|global:? (\S+)", str(error))
            if refused is None:
                raise ValueError(
                    f"{file} is cut off, no file of weights, or holds more than tensors; it was not read."
                ) from error
            raise ValueError(
                f"{file} holds {refused[1] or refused[2]}, which could run code when it is read; it was not read."
            ) from error
        # A broken file can raise anything here.
        except Exception as error:
            raise ValueError(f"{file} is cut off, or no file of weights: {error}. Download it again.") from error
        section = next((own for own in _SECTIONS if isinstance(content, dict) and own in content), None)
        tensors = content[section] if section else content
        if not isinstance(tensors, dict) or not all(isinstance(own, torch.Tensor) for own in tensors.values()):
            raise ValueError(f"{file} holds no weights by name, neither at its top nor under {_SECTIONS}.")
        self._pickled[file] = tensors
        for name, tensor in tensors.items():
            self._add(name, file, tuple(tensor.shape), tensor.dtype)

    def _add(self, name: str, file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if name in self._places:
            raise ValueError(f"The weight {name} stands in {self._places[name].name} and in {file.name}.")
        self._places[name], self._shapes[name], self._dtypes[name] = file, shape, dtype


def write_shards(
    folder: Path,
    make: Callable[[Set[str]], Iterator[tuple[str, torch.Tensor]]],
    names: Collection[str],
    max_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights in shards of at most `max_bytes` (a larger weight fills one), and their index.

    Args:
        folder: Where to; it exists. Shards that a killed run left in it are gone on with.
        make: From the names that are written already to names and tensors; those it may leave out.
        names: All names that there must be in the end.
        max_bytes: Most bytes of a shard.

    Raises:
        OSError: If a shard cannot be written.
    """
    places: dict[str, str] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                places.update(dict.fromkeys(opened.keys(), file.name))
        except SafetensorError:
            # Cut off by more than a kill; it is made again.
            file.unlink()
    written = frozenset(places)
    shard: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        number = next(own for own in itertools.count(1) if _shard_name(own) not in places.values())
        file = folder / _shard_name(number)
        unfinished = file.with_name(f"{file.name}.unfinished")
        try:
            save_file(shard, unfinished, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file.name} could not be written: {error}") from error
        with open(unfinished, "rb+") as saved:
            os.fsync(saved.fileno())
        os.replace(unfinished, file)
        places.update(dict.fromkeys(shard, file.name))
        shard.clear()

    for name, tensor in tqdm(make(written), total=len(names) - len(written), desc="convert", unit="weight"):
        if name in written:
            continue
        own = tensor.numel() * tensor.element_size()
        if shard and size + own > max_bytes:
            flush()
            size = 0
        is_view = not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != own
        # A view would be written with all that it is a view of.
        shard[name] = tensor.contiguous().clone() if is_view else tensor
        size += own
        del tensor
        if size >= max_bytes:
            flush()
            size = 0
    if shard:
        flush()
    missing = set(names) - set(places)
    if missing:
        raise RuntimeError(f"No weights were made for {sorted(missing)}.")
    total = sum((folder / name).stat().st_size for name in set(places.values()))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_whole(folder / _INDEX, lambda file: file.write(json.dumps(index, indent=2, sort_keys=True).encode()))


def _shard_name(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def check_target(target: Path) -> None:
    """Raise `ValueError` if there is something at `target` already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; name another folder, or remove it.")


@contextmanager
def whole_folder(target: Path, plan: str, needed_bytes: int):
    """A folder to fill under a temporary name, which becomes `target` when it is whole.

    A folder that a killed run of the same plan left is gone on with; one of another plan is emptied. After an error
    nothing remains.

    Args:
        target: The folder to be; it must not exist, or be empty.
        plan: What identifies the work, to the letter.
        needed_bytes: Space that it will take.

    Raises:
        ValueError: If the target has content, or the temporary folder has that is no conversion's.
        OSError: If there is not enough space, or the folder cannot be written.
    """
    check_target(target)
    # Behind a link, so that the folder takes its place and not the link's.
    target = target.resolve()
    unfinished = target.with_name(f"{target.name}.unfinished")
    note = unfinished / "plan.txt"
    if unfinished.exists() and any(unfinished.iterdir()):
        if not note.is_file():
            raise ValueError(f"{unfinished} is in the way, and no conversion left it; move it elsewhere.")
        if note.read_text() != plan:
            shutil.rmtree(unfinished)
    target.parent.mkdir(parents=True, exist_ok=True)
    present = sum(own.stat().st_size for own in unfinished.glob("*")) if unfinished.exists() else 0
    free = shutil.disk_usage(unfinished.parent).free
    if free + present < needed_bytes:
        raise OSError(
            f"{target} will take {needed_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {unfinished.parent}."
        )
    unfinished.mkdir(exist_ok=True)
    write_whole(note, lambda file: file.write(plan.encode()))
    try:
        yield unfinished
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if target.exists():
        target.rmdir()
    os.replace(unfinished, target)
    (target / note.name).unlink()


def _safetensors_dtype(name: str) -> torch.dtype:
    known = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    if name not in known:
        raise ValueError(f"Weights of the type {name} are not known here; {sorted(known)} are.")
    return known[name]
