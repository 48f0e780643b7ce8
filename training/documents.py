"""One schema for all that training reads: documents of words and pictures (`docs/data.md`).

A document is a conversation in the form that chat templates and TRL know, `messages` and `images`; text without turns
is a single message without a role. Records of the usual datasets become documents by their *kind*:

| kind | columns (defaults) | document |
|---|---|---|
| text | text | a text, learned as a whole |
| text_to_image | text, image | the text asks, the picture answers |
| image_to_text | image, text, question (optional) | the picture (and a question) asks, the text answers |
| edit | image, instruction, edited | a picture and an instruction ask, the changed picture answers |
| interleaved | content | texts and pictures in turn, learned as a whole |
| messages | messages, images | a conversation; the assistant's turns are learned |

A text may be a list: of wordings of the same thing, one of which is drawn each time that the document is read.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from ..processing.image_processing_base_nextflow import open_picture, to_rgb


@dataclass
class Document:
    """Words and pictures in order.

    Attributes:
        id: Name of the record, for logs.
        messages: Turns with `role` and `content`, a list of {"type": "text", "text": ...} and {"type": "image"}; a turn
            of the assistant whose `weight` is 0 is not learned.
        images: The pictures as 8-bit RGB, in the order of their places.
    """

    id: str
    messages: list[dict]
    images: list[Image.Image] = field(default_factory=list)

    @property
    def learned(self) -> list[bool]:
        """Of each picture, whether it is learned or only looked at."""
        return [is_learned(turn) for turn in self.messages for part in turn["content"] if part["type"] == "image"]


def is_learned(turn: dict) -> bool:
    """Whether there is loss on a turn: on an assistant's of any weight but 0, and on a document without turns."""
    return turn["role"] in (None, "assistant") and turn.get("weight") != 0


class BrokenRecordError(ValueError):
    """A record that cannot become a document; the message says which and why."""


class DocumentReader:
    """Documents of one dataset, by number.

    Args:
        records: The records: anything with `__len__` and `__getitem__`, such as a `datasets.Dataset`, or a streamed
            `datasets.IterableDataset`.
        kind: How a record becomes a document; see the module.
        columns: Names of the columns where they are not the defaults.
        folder: Where relative paths of pictures start.

    Attributes:
        origin: What the documents are made from, as far as it is known: kind, columns, and a recipe's whole entry.

    Raises:
        ValueError: If there is no such kind, it has no such column, or the records lack one that it needs or that
            `columns` names.
    """

    def __init__(self, records, kind: str, columns: dict[str, str] | None = None, folder: str | Path = "."):
        if kind not in KINDS:
            raise ValueError(f"A dataset's `kind` is one of {sorted(KINDS)}, got {kind!r}.")
        self.to_messages, defaults = KINDS[kind]
        unknown = set(columns or ()) - {*defaults, "id"}
        if unknown:
            raise ValueError(f"Datasets of kind {kind!r} have the columns {list(defaults)}, not {sorted(unknown)}.")
        self.records, self.kind = records, kind
        self.columns = {**{name: name for name in (*defaults, "id")}, **(columns or {})}
        self.folder = Path(folder)
        self.origin: dict = {"kind": kind, "columns": self.columns}
        # How far a stream was read, and what is left of it.
        self._stream: tuple[int, Iterator[dict]] | None = None
        # A stream may not know its columns.
        found = getattr(records, "column_names", None) or list(self.columns.values())
        # One that is named is meant, and none of the optional ones.
        needed = [own for name, own in self.columns.items() if name not in _OPTIONAL or name in (columns or ())]
        missing = [own for own in needed if own not in found]
        if missing:
            raise ValueError(
                f"Datasets of kind {kind!r} need the columns {missing}, but this one has {found}. Add them, or name "
                "others in `columns`."
            )

    def __len__(self) -> int:
        return len(self.records)

    @property
    def is_streamed(self) -> bool:
        """Whether records can only be read in order, and their number is not known."""
        return not hasattr(self.records, "__len__")

    def read(self, start: int, stop: int) -> Iterator[tuple[int, "Document | BrokenRecordError"]]:
        """Documents `start` to `stop` (or to the end) with their numbers; broken ones as the error that they are."""
        if self.is_streamed:
            numbered = self._read_stream(start, stop)
        else:
            numbered = ((index, self.records[index]) for index in range(start, min(stop, len(self.records))))
        for index, record in numbered:
            yield index, self._document(index, record)

    def _read_stream(self, start: int, stop: int) -> Iterator[tuple[int, dict]]:
        """Goes on where the last reading ended: a stream that began anew each time would be read in quadratic time."""
        if self._stream is None or start < self._stream[0]:
            self._stream = start, iter(self.records.skip(start))
        position, records = self._stream
        for index, record in enumerate(islice(records, stop - position), position):
            self._stream = index + 1, records
            if index >= start:
                yield index, record

    def texts(self, stop: int) -> Iterator[str]:
        """Each turn's text with its role, of the first `stop` records, broken ones left out."""
        for _, document in self.read(0, stop):
            for turn in () if isinstance(document, BrokenRecordError) else document.messages:
                for part in turn["content"]:
                    if part["type"] == "text":
                        wordings = part["text"] if isinstance(part["text"], list) else [part["text"]]
                        yield from (f"{turn['role']}\n{text}" if turn["role"] else text for text in wordings)

    def _document(self, index: int, record: dict) -> "Document | BrokenRecordError":
        own = {name: record.get(column) for name, column in self.columns.items()}
        name = str(index if own["id"] is None else own["id"])
        try:
            messages, pictures = self.to_messages(own)
            _check(messages, len(pictures))
            return Document(name, messages, [self._open(picture) for picture in pictures])
        except Exception as error:
            # Whatever a record's own bytes make a decoder, a network or a parser say, it is that record that is broken.
            return BrokenRecordError(f"record {name}: {type(error).__name__}: {error}")

    def _open(self, picture: Any) -> Image.Image:
        if isinstance(picture, dict):
            picture = picture["bytes"] if picture.get("bytes") else picture.get("path")
        if picture is None:
            raise ValueError("a picture is missing")
        if isinstance(picture, bytes):
            with Image.open(BytesIO(picture)) as image:
                return to_rgb(image)
        if isinstance(picture, str):
            local = self.folder / picture
            return open_picture(str(local) if local.is_file() else picture)
        return to_rgb(picture)


def load_reader(spec: dict) -> DocumentReader:
    """The reader of a recipe's dataset.

    Args:
        spec: `kind` and `columns`; and either `class`, "module:name" of a sequence of records with its arguments in
            `args`, or what `datasets.load_dataset` takes: `path`, `name`, `data_files`, `data_dir`, `split`,
            `revision`, `streaming`. `folder` is where relative picture paths start.

    Raises:
        ValueError: If the dataset cannot be loaded, or an entry is unknown.
    """
    reader = _reader_of(dict(spec))
    reader.origin = {**spec, **reader.origin}
    return reader


def _reader_of(spec: dict) -> DocumentReader:
    from .data import import_class

    kind, columns = spec.pop("kind", None), spec.pop("columns", None)
    folder = spec.pop("folder", spec.get("data_dir") or ".")
    if "class" in spec:
        path, args = spec.pop("class"), spec.pop("args", {})
        if spec:
            raise ValueError(f"A dataset of a class has no entries {sorted(spec)}; its arguments stand in `args`.")
        return DocumentReader(import_class(path)(**args), kind, columns, folder)
    known = {"path", "name", "data_files", "data_dir", "split", "revision", "streaming"}
    if not spec.get("path") or set(spec) - known:
        raise ValueError(
            f'A dataset needs `class: "module:name"`, or `path` and what else `datasets.load_dataset` takes '
            f"({sorted(known)}), got {sorted(spec)}."
        )
    return DocumentReader(_load_dataset(spec), kind, columns, folder)


def _load_dataset(spec: dict):
    import datasets

    try:
        dataset = datasets.load_dataset(**{"split": "train", **spec})
    except (FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"The dataset {spec['path']!r} cannot be loaded: {error}") from error
    # Pictures are opened one by one, so that a broken one costs one record.
    return dataset.decode(False) if spec.get("streaming") else _undecoded(dataset)


def _undecoded(dataset):
    for name, feature in dataset.features.items():
        undecoded = _undecoded_feature(feature)
        if undecoded != feature:
            dataset = dataset.cast_column(name, undecoded)
    return dataset


def _undecoded_feature(feature):
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded_feature(own) for name, own in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_undecoded_feature(feature.feature))
    return feature


_ROLES = (None, "system", "user", "assistant", "tool")
_SPECIAL_TOKEN = re.compile(r"<\|\w+\|>")


def _check(messages: list[dict], pictures: int) -> None:
    if not messages:
        raise ValueError("there are no messages")
    places = 0
    for turn in messages:
        if turn["role"] not in _ROLES:
            raise ValueError(f"a role is one of {_ROLES}, got {turn['role']!r}")
        if not isinstance(turn.get("weight") or 0, (int, float)):
            raise ValueError(f"a turn's weight is a number, got {turn['weight']!r}")
        if turn["role"] is None and len(messages) > 1:
            raise ValueError("a document without turns is a single message")
        if not turn["content"]:
            raise ValueError("a turn is empty")
        for part in turn["content"]:
            if part["type"] == "image":
                places += 1
            elif part["type"] != "text":
                raise ValueError(f"a part is text or an image, got {part['type']!r}")
            elif not _is_text(part["text"]):
                raise ValueError("a text is empty or no text")
            elif found := _SPECIAL_TOKEN.search(str(part["text"])):
                raise ValueError(f"a text holds the special token {found[0]!r}, which would be read as one")
    if places != pictures:
        raise ValueError(f"there are places for {places} pictures, but {pictures} pictures")


def _is_text(text: Any) -> bool:
    wordings = text if isinstance(text, list) else [text]
    # Half a character cannot be encoded, which raises.
    return bool(wordings) and all(isinstance(own, str) and own.strip() and own.encode() for own in wordings)


def _text(text: Any) -> dict:
    return {"type": "text", "text": text}


_IMAGE = {"type": "image"}


def _of_text(own: dict) -> tuple[list[dict], list]:
    return [{"role": None, "content": [_text(own["text"])]}], []


def _of_text_to_image(own: dict) -> tuple[list[dict], list]:
    asked, answered = [_text(own["text"])], [_IMAGE]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}], [own["image"]]


def _of_image_to_text(own: dict) -> tuple[list[dict], list]:
    question = [] if own["question"] is None else [_text(own["question"])]
    asked, answered = [_IMAGE, *question], [_text(own["text"])]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}], [own["image"]]


def _of_edit(own: dict) -> tuple[list[dict], list]:
    asked, answered = [_IMAGE, _text(own["instruction"])], [_IMAGE]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages, [own["image"], own["edited"]]


def _of_interleaved(own: dict) -> tuple[list[dict], list]:
    content, pictures = [], []
    for part in own["content"]:
        # Tables give every part both columns, one of them empty.
        if part.get("image") is not None:
            content.append(_IMAGE)
            pictures.append(part["image"])
        else:
            content.append(_text(part["text"]))
    return [{"role": None, "content": content}], pictures


def _of_messages(own: dict) -> tuple[list[dict], list]:
    messages = []
    for turn in own["messages"]:
        content = turn["content"]
        parts = [_text(content)] if isinstance(content, str) else content
        parts = [
            _IMAGE if part["type"] == "image" else {"type": part["type"], "text": part.get("text")} for part in parts
        ]
        weight = {} if turn.get("weight") is None else {"weight": turn["weight"]}
        messages.append({"role": turn["role"], "content": parts, **weight})
    return messages, list(own["images"] or ())


_OPTIONAL = ("id", "question", "images")
# Kind -> how a record's columns become messages and pictures, and the columns' default names.
KINDS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "text": (_of_text, ("text",)),
    "text_to_image": (_of_text_to_image, ("text", "image")),
    "image_to_text": (_of_image_to_text, ("image", "text", "question")),
    "edit": (_of_edit, ("image", "instruction", "edited")),
    "interleaved": (_of_interleaved, ("content",)),
    "messages": (_of_messages, ("messages", "images")),
}
