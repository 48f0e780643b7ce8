"""Benchmarks' own files: what is read, and where each picture lies so that the benchmark's own scorer finds it."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps

Source = partial[Image.Image]

PRISM_TRACKS = ("imagination", "entity", "text_rendering", "style", "affection", "composition", "long_text")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_GRID = 4


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark.

    Attributes:
        key: Its name in our records; no two items of a benchmark share one.
        index: Its place in the benchmark; seeds depend on it.
        prompt: What to draw or to change, as the benchmark has it.
        pictures: Where its pictures go, relative to the run's folder, one per sample.
        group: What its score counts towards: a category, a kind of edit, a track.
        fields: What a judge's template may ask for.
        sources: Opens each picture that is given with the prompt.
        source_files: Where copies of those go, for scorers that want them.
        line: The benchmark's own line, for scorers that want it.
        grid: Where all its pictures go side by side, two in a row.
    """

    key: str
    index: int
    prompt: str
    pictures: tuple[str, ...]
    group: str
    fields: dict[str, str] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    source_files: tuple[str, ...] = ()
    line: str | None = None
    grid: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark's files are read.

    Attributes:
        title: Its name in print.
        read: `(files, pictures' folder, samples) -> items`.
        brings: What the user must bring as `--prompts-file`.
        images: Pictures per prompt.
        images_are_free: Whether another number of pictures still fits its scorer.
        needs_sources: Whether its prompts come with pictures.
        task: Its task as model cards name it.
    """

    title: str
    read: Callable[[Sequence[Path], Path | None, int], list[Item]]
    brings: str
    images: int = 1
    images_are_free: bool = False
    needs_sources: bool = False
    task: str = "text-to-image"


def read_items(name: str, files: Sequence[Path], sources: Path | None = None, images: int | None = None) -> list[Item]:
    """All prompts of a benchmark.

    Args:
        name: A key of [`BENCHMARKS`].
        files: The benchmark's files, or one folder of them.
        sources: Folder of the pictures that its prompts name.
        images: Pictures per prompt; the benchmark's own number by default.

    Raises:
        ValueError: If a file is missing or is not as the benchmark has it, a picture is missing, two prompts share a
            name, or the number of pictures does not fit the scorer.
    """
    benchmark = BENCHMARKS[name]
    images = benchmark.images if images is None else images
    if images < 1:
        raise ValueError(f"{benchmark.title} needs at least one picture a prompt, got {images}.")
    if images != benchmark.images and not benchmark.images_are_free:
        raise ValueError(f"The scorer of {benchmark.title} takes {benchmark.images} picture(s) a prompt, not {images}.")
    if sources is not None and not benchmark.needs_sources:
        raise ValueError(f"{benchmark.title} has no source pictures; leave `sources` out.")
    if sources is not None and not sources.is_dir():
        raise ValueError(f"There is no folder of source pictures at {sources}.")
    for file in files:
        if not file.exists():
            raise ValueError(f"There is nothing at {file}. {benchmark.title} needs {benchmark.brings}.")
    items = benchmark.read(files, sources, images)
    if not items:
        raise ValueError(f"There are no prompts in {_names(files)}. {benchmark.title} needs {benchmark.brings}.")
    keys: set[str] = set()
    for item in items:
        if item.key in keys:
            raise ValueError(
                f"Two prompts of {benchmark.title} are named {item.key!r}; every name must be one prompt's."
            )
        keys.add(item.key)
        if not item.prompt.strip():
            raise ValueError(f"The prompt {item.key!r} of {benchmark.title} is empty.")
    return items


# ---- each benchmark --------------------------------------------------------------------------------------------------


def _read_geneval(files: Sequence[Path], sources: Path | None, images: int) -> list[Item]:
    (file,) = _only(files, "one `evaluation_metadata.jsonl`")
    items = []
    for number, line in _lines(file):
        record = _object(line, file, number)
        folder = f"{len(items):05d}"
        items.append(
            Item(
                folder,
                len(items),
                _text(record, "prompt", file, number),
                tuple(f"{folder}/samples/{sample:04d}.png" for sample in range(images)),
                _text(record, "tag", file, number),
                line=line,
                grid=f"{folder}/grid.png",
            )
        )
    return items


def _read_dpg(files: Sequence[Path], sources: Path | None, images: int) -> list[Item]:
    (folder,) = _only(files, "the folder of `*.txt` prompts")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; DPG-Bench needs the folder of `*.txt` prompts.")
    items = []
    for file in sorted(folder.glob("*.txt")):
        # Its scorer takes a picture's name up to the first dot for the prompt's.
        name = _file_name(file.stem, file)
        if "." in name:
            raise ValueError(
                f"The scorer of DPG-Bench cannot tell {file.name} by its name: it reads up to the first dot."
            )
        items.append(
            Item(
                name,
                len(items),
                _read_text(file).strip(),
                # Its scorer opens all that lies in the folder of grids, so single pictures lie elsewhere.
                tuple(f"run/samples/{name}/{sample}.png" for sample in range(images)),
                "all",
                grid=f"images/{name}.png",
            )
        )
    return items


def _read_wise(files: Sequence[Path], sources: Path | None, images: int) -> list[Item]:
    items = []
    for file in _files(files, "*.json"):
        for number, record in enumerate(_list(file)):
            identity = _whole(record, "prompt_id", file, number)
            prompt = _text(record, "Prompt", file, number)
            subcategory = _text(record, "Subcategory", file, number)
            items.append(
                Item(
                    str(identity),
                    len(items),
                    prompt,
                    (f"{identity}.png",),
                    wise_category(identity, subcategory),
                    {"prompt": prompt, "explanation": _text(record, "Explanation", file, number)},
                )
            )
    return items


def wise_category(identity: int, subcategory: str) -> str:
    """Which of the six categories a prompt of WISE counts towards.

    Raises:
        ValueError: If the number is outside 1..1000, which the benchmark's rule does not know.
    """
    if not 1 <= identity <= 1000:
        raise ValueError(f"WISE numbers its prompts 1 to 1000, got `prompt_id` {identity}.")
    if identity <= 400:
        return "cultural"
    if identity <= 700:
        return "time" if subcategory.lower() in ("longitudinal time", "horizontal time") else "space"
    return ("biology", "physics", "chemistry")[(identity - 701) // 100]


def _read_prism(files: Sequence[Path], sources: Path | None, images: int) -> list[Item]:
    items = []
    for file in _files(files, "*.jsonl"):
        if file.stem not in PRISM_TRACKS:
            raise ValueError(
                f"{file.name} is no track of PRISM-Bench; they are {', '.join(PRISM_TRACKS)} (.jsonl each)."
            )
        for place, (number, line) in enumerate(_lines(file)):
            prompt = _text(_object(line, file, number), "prompt", file, number)
            items.append(
                Item(
                    f"{file.stem}/{place}",
                    len(items),
                    prompt,
                    (f"{file.stem}/{place}.png",),
                    file.stem,
                    {"prompt": prompt},
                )
            )
    return items


def _read_imgedit(files: Sequence[Path], sources: Path | None, images: int) -> list[Item]:
    (file,) = _only(files, "one `basic_edit.json`")
    records = _json(file)
    if not isinstance(records, dict):
        raise ValueError(f"{file} must hold one JSON object of edits by key, as ImgEdit's `basic_edit.json` does.")
    items = []
    for key, record in records.items():
        prompt = _text(record, "prompt", file, key)
        items.append(
            Item(
                key,
                len(items),
                prompt,
                (f"{_file_name(key, file)}.png",),
                _text(record, "edit_type", file, key),
                {"prompt": prompt},
                (_picture(_text(record, "id", file, key), sources, file),),
            )
        )
    return items


def _read_gedit(files: Sequence[Path], sources: Path | None, images: int) -> list[Item]:
    items = []
    for file in files:
        for number, record in enumerate(_records(file)):
            key = _file_name(_text(record, "key", file, number), file)
            task = _file_name(_text(record, "task_type", file, number), file)
            language = _file_name(_text(record, "instruction_language", file, number), file)
            prompt = _text(record, "instruction", file, number)
            # The scorer looks at the picture before it was resized.
            column = "input_image_raw" if record.get("input_image_raw") is not None else "input_image"
            items.append(
                Item(
                    f"{task}/{language}/{key}",
                    len(items),
                    prompt,
                    (f"fullset/{task}/{language}/{key}.png",),
                    f"{language}/{task}",
                    {"prompt": prompt},
                    _pictures(record, column, sources, file, number),
                    (f"fullset/{task}/{language}/{key}_SRCIMG.png",),
                )
            )
    return items


def _read_omnicontext(files: Sequence[Path], sources: Path | None, images: int) -> list[Item]:
    items = []
    for file in files:
        for number, record in enumerate(_records(file)):
            key = _file_name(_text(record, "key", file, number), file)
            task = _file_name(_text(record, "task_type", file, number), file)
            prompt = _text(record, "instruction", file, number)
            items.append(
                Item(
                    f"{task}/{key}",
                    len(items),
                    prompt,
                    (f"fullset/{task}/{key}.png",),
                    task,
                    {"prompt": prompt},
                    _pictures(record, "input_images", sources, file, number),
                )
            )
    return items


def _read_cvtg(files: Sequence[Path], sources: Path | None, images: int) -> list[Item]:
    # The benchmark's folder has, beside each file, one without the places of the words.
    (root,) = files if len(files) == 1 and files[0].is_dir() else (None,)
    if root is not None:
        files = sorted(file for file in root.glob("*/*.json") if file.stem.isdigit())
    items = []
    for file in files:
        content = _json(file)
        records = content.get("data_list") if isinstance(content, dict) else None
        if not isinstance(records, list):
            raise ValueError(f"{file} has no `data_list`; CVTG-2K has one in `CVTG/2.json` and its neighbours.")
        # A cache's files are links to files of other names.
        subset = file.absolute().parent.name
        for number, record in enumerate(records):
            index = _whole(record, "index", file, number)
            prompt = _text(record, "prompt", file, number)
            if not words_of(prompt):
                raise ValueError(f"{file}, entry {number}: the prompt has no words in single quotes to be written.")
            name = f"{subset}/{file.stem}/{index}"
            items.append(Item(name, len(items), prompt, (f"{name}.png",), f"{subset}/{file.stem}"))
    return items


def words_of(prompt: str) -> list[str]:
    """The words that a prompt of CVTG-2K wants written: all that stands in single quotes, in lower case."""
    return [word for quoted in re.findall(r"'(.*?)'", prompt) for word in quoted.lower().split()]


BENCHMARKS = {
    "geneval": Benchmark("GenEval", _read_geneval, "`evaluation_metadata.jsonl`", _GRID, images_are_free=True),
    "dpg": Benchmark("DPG-Bench", _read_dpg, "the folder of `*.txt` prompts", _GRID),
    "wise": Benchmark("WISE", _read_wise, "its JSON lists of prompts (several files, or their folder)"),
    "prism": Benchmark("PRISM-Bench", _read_prism, "a file `TRACK.jsonl` per track (several files, or their folder)"),
    "imgedit": Benchmark(
        "ImgEdit", _read_imgedit, "`basic_edit.json`, and `--sources`", needs_sources=True, task="image-to-image"
    ),
    "gedit": Benchmark(
        "GEdit-Bench", _read_gedit, "its parquet files, or JSON lines", needs_sources=True, task="image-to-image"
    ),
    "omnicontext": Benchmark(
        "OmniContext", _read_omnicontext, "its parquet files, or JSON lines", needs_sources=True, task="image-to-image"
    ),
    "cvtg": Benchmark("CVTG-2K", _read_cvtg, "its folder of `CVTG/2.json` and so on, or those files"),
}
"""Every benchmark by its name on the command line."""


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size, two in a row, in reading order.

    Raises:
        ValueError: If their sizes differ.
    """
    sizes = {picture.size for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(f"Pictures of one size are needed side by side, got {sorted(sizes)} (width, height).")
    width, height = sizes.pop()
    sheet = Image.new("RGB", (width * min(2, len(pictures)), height * -(-len(pictures) // 2)))
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % 2 * width, place // 2 * height))
    return sheet


# ---- reading ---------------------------------------------------------------------------------------------------------


def _only(files: Sequence[Path], wanted: str) -> Sequence[Path]:
    if len(files) != 1:
        raise ValueError(f"This benchmark needs {wanted}, got {len(files)} paths: {_names(files)}.")
    return files


def _files(files: Sequence[Path], pattern: str) -> list[Path]:
    """The files themselves, or those of one folder."""
    if len(files) == 1 and files[0].is_dir():
        return sorted(files[0].glob(pattern))
    return list(files)


def _names(files: Iterable[Path]) -> str:
    return ", ".join(map(str, files))


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text: {error}") from error


def _json(file: Path):
    try:
        return json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error


def _list(file: Path) -> list:
    records = _json(file)
    if not isinstance(records, list):
        raise ValueError(f"{file} must hold a JSON list of prompts, got {type(records).__name__}.")
    return records


def _lines(file: Path) -> list[tuple[int, str]]:
    """(line number from 1, line) of all that is not blank."""
    return [(number, line) for number, line in enumerate(_read_text(file).split("\n"), 1) if line.strip()]


def _object(line: str, file: Path, number: int) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {number} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file}, line {number} must be a JSON object, got {type(record).__name__}.")
    return record


def _records(file: Path) -> Iterable[dict]:
    """Rows of parquet (with `datasets`), of JSON lines or of a JSON list."""
    if file.suffix == ".parquet":
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(f"Reading {file} needs `pip install datasets`.") from error
        return load_dataset("parquet", data_files=str(file), split="train")
    if file.suffix == ".json":
        return _list(file)
    return [_object(line, file, number) for number, line in _lines(file)]


def _field(record, name: str, file: Path, where):
    if not isinstance(record, dict) or record.get(name) is None:
        raise ValueError(f"{file}, entry {where} has no {name!r}.")
    return record[name]


def _text(record, name: str, file: Path, where) -> str:
    value = _field(record, name, file, where)
    if not isinstance(value, str):
        raise ValueError(f"{file}, entry {where}: {name!r} must be text, got {value!r}.")
    return value


def _whole(record, name: str, file: Path, where) -> int:
    value = _field(record, name, file, where)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{file}, entry {where}: {name!r} must be a whole number, got {value!r}.")
    return value


def _file_name(name: str, file: Path) -> str:
    """A name that stays within its folder: it comes from a file that we did not write."""
    if not name or name in (".", "..") or re.search(r"[/\\:\0]", name):
        raise ValueError(f"{file}: {name!r} cannot name a picture's file; it must be one name without slashes.")
    return name


def _pictures(record: dict, column: str, sources: Path | None, file: Path, where) -> tuple[Source, ...]:
    """The pictures of a row: themselves, or names of files in `sources`."""
    value = _field(record, column, file, where)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{file}, entry {where}: {column!r} names no picture.")
    return tuple(
        partial(_upright, own) if isinstance(own, Image.Image) else _picture(own, sources, file) for own in values
    )


def _picture(name, sources: Path | None, file: Path) -> Source:
    if not isinstance(name, str):
        raise ValueError(f"{file}: a source picture must be named by its file, got {name!r}.")
    if sources is None:
        raise ValueError(f"{file} names the picture {name!r}; say in which folder it lies (`--sources FOLDER`).")
    path = sources / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{file}: the picture {name!r} would lie outside {sources}.")
    if not path.is_file():
        found = [path.with_name(path.name + ending) for ending in _PICTURES]
        found = [own for own in found if own.is_file()]
        if not found:
            raise ValueError(f"{file} names the picture {name!r}, which is not in {sources}.")
        path = found[0]
    try:
        with Image.open(path):
            pass
    except OSError as error:
        raise ValueError(f"The source picture {path} cannot be read: {error}") from error
    return partial(_open, path)


def fingerprint(source: Source) -> str:
    """Of what a source picture is: its file's bytes, or its pixels."""
    (own,) = source.args
    return hashlib.sha256(own.read_bytes() if isinstance(own, Path) else own.tobytes()).hexdigest()[:16]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return _upright(picture)


def _upright(picture: Image.Image) -> Image.Image:
    # The benchmarks' own scripts turn photographs upright as well.
    return ImageOps.exif_transpose(picture).convert("RGB")
