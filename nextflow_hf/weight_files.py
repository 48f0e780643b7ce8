"""Weights in files: read one at a time from what was published, written in shards that are whole or absent."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .files import write_whole

# Where the weights stand in a file that `torch.save` wrote, the first that is there.
_SECTIONS = ("ema", "model", "state_dict")
MAX_SHARD_BYTES = 2 * 10**9
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
            listed = sorted(set(json.loads(index.read_text())["weight_map"].values()))
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
        try:
            # A memory map reads no weight before it is used; older files cannot be mapped.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except UnpicklingError as error:
            raise ValueError(
                f"{file} holds more than tensors, which could run code when it is read; it was not read. {error}"
            ) from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
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
        with safe_open(file, framework="pt") as opened:
            places.update(dict.fromkeys(opened.keys(), file.name))
    written = frozenset(places)
    shard: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        file = folder / f"model-{len(set(places.values())) + 1:05d}.safetensors"
        unfinished = file.with_name(f"{file.name}.unfinished")
        try:
            save_file(shard, unfinished, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file.name} could not be written: {error}") from error
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
    if shard:
        flush()
    missing = set(names) - set(places)
    if missing:
        raise RuntimeError(f"No weights were made for {sorted(missing)}.")
    _name_shards(folder, places)


def _name_shards(folder: Path, places: dict[str, str]) -> None:
    """Give shards the names that transformers looks for, and write the index."""
    shards = sorted(set(places.values()))
    if len(shards) == 1:
        os.replace(folder / shards[0], folder / "model.safetensors")
        return
    final = {name: name.replace(".safetensors", f"-of-{len(shards):05d}.safetensors") for name in shards}
    total = sum((folder / name).stat().st_size for name in shards)
    index = {"metadata": {"total_size": total}, "weight_map": {name: final[own] for name, own in places.items()}}
    for name, own in final.items():
        os.replace(folder / name, folder / own)
    write_whole(folder / _INDEX, lambda file: file.write(json.dumps(index, indent=2, sort_keys=True).encode()))


def check_target(target: Path) -> None:
    """Raise `ValueError` if there is something at `target` already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; name another folder, or remove it.")


@contextmanager
def whole_folder(target: Path, plan: str, needed_bytes: int):
    """A folder to fill under a temporary name, which becomes `target` when it is whole.

    A folder that a killed run of the same plan left is gone on with. After an error nothing remains.

    Args:
        target: The folder to be; it must not exist, or be empty.
        plan: What identifies the work, to the letter.
        needed_bytes: Space that it will take.

    Raises:
        ValueError: If the target has content.
        OSError: If there is not enough space, or the folder cannot be written.
    """
    check_target(target)
    unfinished = target.with_name(f"{target.name}.unfinished")
    note = unfinished / "plan.txt"
    if unfinished.exists() and not (note.is_file() and note.read_text() == plan):
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
    note.unlink()
    if target.exists():
        target.rmdir()
    os.replace(unfinished, target)


def _safetensors_dtype(name: str) -> torch.dtype:
    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }.get(name, torch.float32)
