"""Code extraction offline: a dataset's documents with every picture as codes, in shards (NextFlow sections 2.2 and 4).

Shard i of a dataset holds what has become of its records i * n to (i + 1) * n, so it can be made by any process at any
time: it is made whole, under another name first, or not at all, and a run that was killed makes the missing ones. Two
runs make the same bytes. The manifest is written when every shard is there.

    DIRECTORY/settings.json                  what the shards were made with
    DIRECTORY/NAME/shard-00000.parquet       id, messages (JSON), codes, input_codes, grids
    DIRECTORY/NAME/manifest.json             shards, records, sizes of the pictures that are learned, and the records
                                             left out, with reasons
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..modeling.modeling_nextflow_vq import NextFlowVQModel
from ..modeling.scale_schedule import Grid
from ..processing.image_processing_base_nextflow import buckets_from_schedule
from ..processing.image_processing_pil_nextflow import NextFlowImageProcessorPil
from .documents import BrokenRecordError, Document, DocumentReader, load_reader
from .processes import all_processes
from .recipe import Recipe
from .sequences import CodedImage

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "messages": pa.string(),
        "codes": pa.list_(pa.list_(pa.int32())),
        "input_codes": pa.list_(pa.list_(pa.int32())),
        "grids": pa.list_(pa.list_(pa.list_(pa.int32()))),
    }
)


@dataclass(frozen=True)
class ExtractionSettings:
    """What decides a shard's content, and when to give up.

    Attributes:
        resolution: Side of the square picture in pixels; pictures go to the aspect-ratio buckets of this level.
        top_k: Self-correction: the slots of learned pictures are fed codes drawn from so many nearest ones. 0: none is.
        corruption: Share of each scale's positions that are drawn so (0.6 in the paper).
        shard_size: Records of a shard.
        batch_size: Pictures encoded at a time.
        max_broken: So many records of a dataset may be broken.
        seed: Seed of the drawing.
    """

    resolution: int
    top_k: int = 0
    corruption: float = 0.6
    shard_size: int = 1000
    batch_size: int = 64
    max_broken: int = 100
    seed: int = 0

    def __post_init__(self):
        for name in ("resolution", "shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Extraction needs a positive `{name}`, got {getattr(self, name)}.")
        if self.top_k < 0 or not 0 <= self.corruption <= 1 or self.max_broken < 0:
            raise ValueError(
                "Extraction needs top_k >= 0, corruption in [0, 1] and max_broken >= 0, got "
                f"{self.top_k}, {self.corruption}, {self.max_broken}."
            )


def run_extraction(recipe: Recipe) -> None:
    """The stage "extract": the recipe's `data`, by the tokenizer `init_from.vq`, into `output_dir`.

    `stage_args` are those of `ExtractionSettings`.
    """
    settings = ExtractionSettings(**recipe.stage_args)
    readers = {name: load_reader(spec) for name, spec in recipe.data.items()}
    if not readers:
        raise ValueError('A recipe of the stage "extract" needs `data`: the datasets, by name.')
    extract(readers, NextFlowVQModel.from_pretrained(recipe.init_from["vq"]), recipe.output_dir, settings)


def extract(
    readers: dict[str, DocumentReader], vq_model: NextFlowVQModel, directory: str | Path, settings: ExtractionSettings
) -> dict[str, dict]:
    """Write the shards of all datasets that are not there yet; under `accelerate launch`, by all processes together.

    Args:
        readers: The datasets, by name.
        vq_model: The tokenizer.
        directory: Where the shards go.
        settings: How they are made.

    Returns:
        The manifest of each dataset.

    Raises:
        ValueError: If the tokenizer has no such resolution, the directory holds shards made otherwise or of other data,
            or too many records are broken.
    """
    resolutions = vq_model.config.schedule.resolutions
    if settings.resolution not in resolutions:
        raise ValueError(f"`resolution` is one of the tokenizer's {sorted(resolutions)}, got {settings.resolution}.")
    directory = Path(directory)
    processes = all_processes()
    vq_model = vq_model.eval().to(processes.device)
    made_with = {**asdict(settings), "codebook_fingerprint": vq_model.fingerprint()}
    # More broken records may be allowed later: what is made stays as it is.
    del made_with["max_broken"]
    claim(directory, made_with, {name: reader.origin for name, reader in readers.items()}, processes)
    manifests = {}
    for name, reader in readers.items():
        folder = directory / name
        folder.mkdir(parents=True, exist_ok=True)
        writer = _ShardWriter(name, reader, vq_model, folder, settings)
        writer.run(processes)
        processes.wait_for_everyone()
        # The others have met broken records of their own meanwhile.
        writer.check_broken(_shards_in(folder))
        if processes.is_main_process:
            write_json(folder / "manifest.json", manifest_of(folder, name, made_with["codebook_fingerprint"]))
        processes.wait_for_everyone()
        manifests[name] = json.loads((folder / "manifest.json").read_text())
    return manifests


class _ShardWriter:
    """Writes the shards of one dataset."""

    def __init__(self, name, reader, vq_model, folder, settings):
        self.name, self.reader, self.vq_model, self.folder, self.settings = name, reader, vq_model, folder, settings
        schedule = vq_model.config.schedule
        self.image_processor = NextFlowImageProcessorPil(
            buckets=buckets_from_schedule(schedule),
            resolution=settings.resolution,
            downsample=schedule.downsample,
        )

    def run(self, processes: PartialState) -> None:
        size = self.settings.shard_size
        total = None if self.reader.is_streamed else len(self.reader)
        made = self._made(total)
        self.check_broken(made.values())
        shard = processes.process_index
        bar = tqdm(total=total, desc=f"extract {self.name}", unit="record", disable=not processes.is_main_process)
        while total is None or shard * size < total:
            if shard not in made:
                table = self._make(shard)
                if table is None:
                    break
                write_table(self._path(shard), table)
                made[shard] = _read_shard(self._path(shard))
                if made[shard]["broken"]:
                    self.check_broken(made.values())
            # A process sees its own shards; the others keep pace.
            stop = (shard + processes.num_processes) * size
            bar.update((stop if total is None else min(stop, total)) - bar.n)
            shard += processes.num_processes
        bar.close()

    def check_broken(self, shards: Iterable[dict]) -> None:
        """Raise `ValueError` if the shards leave out more records than may be broken."""
        holding = [own for own in shards if own["broken"]]
        broken = sum(len(own["broken"]) for own in holding)
        if broken > self.settings.max_broken:
            # A shard stays as it was made, with records that were mended since among those left out.
            raise ValueError(
                f"{broken} records of {self.name!r} are broken, more than max_broken={self.settings.max_broken}. The "
                f"last: {holding[-1]['broken'][-1]}. Allow more, or mend them and remove the shards that leave them "
                f"out from {self.folder}: {', '.join(own['file'] for own in holding)}."
            )

    def _made(self, total: int | None) -> dict[int, dict]:
        """The shards that are there and whole, by number; one that was the last before the data grew is not.

        Raises:
            ValueError: If they are of other data: of more records, or of one that says something else.
        """
        size = self.settings.shard_size
        shards = {int(own["file"][len("shard-") : -len(".parquet")]): own for own in _shards_in(self.folder)}
        records = sum(own["records"] for own in shards.values())
        if total is not None and records > total:
            raise ValueError(
                f"{self.folder} holds codes of {records} records, but {self.name!r} has {total}. Name another "
                "directory."
            )
        filled = [number for number, own in shards.items() if own["documents"]]
        if filled:
            self._check_same(min(filled))
        return {
            number: own
            for number, own in shards.items()
            if own["records"] == (size if total is None else min(size, total - number * size))
        }

    def _check_same(self, number: int) -> None:
        """Refuse a shard of other data: its first document is asked for again."""
        (row,) = pq.read_table(self._path(number), columns=["id", "messages"]).slice(0, 1).to_pylist()
        size, found = self.settings.shard_size, None
        for _, document in self.reader.read(number * size, (number + 1) * size):
            if not isinstance(document, BrokenRecordError) and document.id == row["id"]:
                found = _written(document)
                break
        if found != row["messages"]:
            raise ValueError(
                f"{self.folder} holds codes of other data: its record {row['id']} is {row['messages']}, but "
                f"{self.name!r} has {found}. Name another directory."
            )

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.parquet"

    def _make(self, shard: int) -> pa.Table | None:
        """Shard number `shard`; `None` behind the end of a stream."""
        size = self.settings.shard_size
        documents: list[Document] = []
        broken: list[str] = []
        number = 0
        for _, document in self.reader.read(shard * size, (shard + 1) * size):
            number += 1
            if isinstance(document, BrokenRecordError):
                broken.append(str(document))
            else:
                documents.append(document)
        if number == 0:
            return None
        coded = self._encode(documents, shard, broken)
        rows = [
            {
                "id": document.id,
                "messages": _written(document),
                "codes": [own.codes for own in images],
                "input_codes": [own.input_codes for own in images],
                "grids": [own.grids for own in images],
            }
            for document, images in coded
        ]
        schedule = self.vq_model.config.schedule
        sizes = {
            schedule.image_size(image.grids[-1])
            for document, images in coded
            for image, learned in zip(images, document.learned)
            if learned
        }
        metadata = {
            "records": str(number),
            "broken": json.dumps(broken, ensure_ascii=False),
            "image_sizes": json.dumps(sorted(sizes)),
        }
        return pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata(metadata)

    def _encode(
        self, documents: list[Document], shard: int, broken: list[str]
    ) -> list[tuple[Document, list[CodedImage]]]:
        """Every document with the codes of its pictures; those with a picture of no bucket join the broken ones.

        Self-correction is for pictures that are learned; one that is only looked at is fed as it is.
        """
        groups: dict[tuple[tuple[Grid, ...], bool], list[tuple[int, int]]] = {}
        fitting = []
        for number, document in enumerate(documents):
            try:
                grids = [
                    tuple(map(tuple, self.image_processor.bucket_of(image.height, image.width)))
                    for image in document.images
                ]
            except ValueError as error:
                broken.append(f"record {document.id}: {error}")
                continue
            fitting.append(number)
            for place, own in enumerate(zip(grids, document.learned)):
                groups.setdefault(own, []).append((number, place))
        coded: dict[tuple[int, int], CodedImage] = {}
        for (grids, learned), members in groups.items():
            for first in range(0, len(members), self.settings.batch_size):
                chosen = members[first : first + self.settings.batch_size]
                images = [documents[number].images[place] for number, place in chosen]
                pixels = self.image_processor(images, return_tensors="pt")["pixel_values"].to(self.vq_model.device)
                seed = zlib.crc32(f"{self.settings.seed} {self.name} {shard} {grids} {first}".encode())
                encoding = self.vq_model.encode(
                    pixels,
                    grids,
                    top_k=(self.settings.top_k or None) if learned else None,
                    corruption=self.settings.corruption,
                    generator=torch.Generator().manual_seed(seed),
                )
                for own, codes, fed in zip(chosen, encoding.codes.tolist(), encoding.input_codes.tolist()):
                    coded[own] = CodedImage(codes, grids, fed)
        return [
            (documents[number], [coded[number, place] for place in range(len(documents[number].images))])
            for number in fitting
        ]


def _shards_in(folder: Path) -> Iterator[dict]:
    yield from map(_read_shard, sorted(folder.glob("shard-*.parquet")))


def _read_shard(path: Path) -> dict:
    """What a shard says of itself."""
    file = pq.ParquetFile(path)
    metadata = file.schema_arrow.metadata
    return {
        "file": path.name,
        "records": int(metadata[b"records"]),
        "documents": file.metadata.num_rows,
        "broken": json.loads(metadata[b"broken"]),
        "image_sizes": json.loads(metadata[b"image_sizes"]),
    }


def manifest_of(folder: Path, name: str, fingerprint: str) -> dict:
    """What the shards of a folder hold together: of the dataset `name`, by the tokenizer with this fingerprint."""
    shards = list(_shards_in(folder))
    broken = [own for shard in shards for own in shard.pop("broken")]
    sizes = {tuple(size) for shard in shards for size in shard.pop("image_sizes")}
    return {
        "name": name,
        "codebook_fingerprint": fingerprint,
        "records": sum(shard["records"] for shard in shards),
        "documents": sum(shard["documents"] for shard in shards),
        "image_sizes": sorted(sizes),
        "broken": broken,
        "shards": shards,
    }


def _written(document: Document) -> str:
    """A document's words as a shard has them."""
    return json.dumps(document.messages, ensure_ascii=False)


def claim(directory: Path, made_with: dict, origins: dict[str, dict], processes: PartialState) -> None:
    """Note what the shards are made with and from, or refuse a directory whose shards were made otherwise."""
    path = directory / "settings.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    processes.wait_for_everyone()
    known, origins = before.get("data", {}), json.loads(json.dumps(origins))
    pairs = [(name, before.get(name), own) for name, own in made_with.items() if before]
    for name in known.keys() & origins.keys():
        entries = sorted({*known[name], *origins[name]})
        pairs += [(f"{name}: {entry}", known[name].get(entry), origins[name].get(entry)) for entry in entries]
    changes = ", ".join(f"{name} {then} -> {now}" for name, then, now in pairs if then != now)
    if changes:
        raise ValueError(f"{directory} holds codes made with other settings ({changes}). Name another directory.")
    if processes.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, {**made_with, "data": {**known, **origins}})
    processes.wait_for_everyone()


def write_table(path: Path, table: pa.Table) -> None:
    """Write a shard whole, or not at all."""
    _write_whole(path, lambda unfinished: pq.write_table(table, unfinished))


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file whole, or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    _write_whole(path, lambda unfinished: unfinished.write_text(text))


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    write(unfinished)
    with open(unfinished, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
