"""A benchmark's run in a folder: pictures, verdicts, scores. The same command goes on where it was stopped."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from math import sqrt
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from .. import BUNDLED, __version__
from ..evaluation import weights_hash
from ..files import save_picture, write_whole
from .drawer import CheckpointDrawer, Drawer, Drawing, seed_of
from .formats import BENCHMARKS, Item, fingerprint, read_items, side_by_side
from .judge import Judge, Verdicts, png
from .questions import QUESTIONS, Question, Templates
from .scores import Scores, read_ocr, score_geneval, score_verdicts, score_words

Reader = Callable[[Image.Image], Sequence[str]]

_NOT_COMPUTED = {
    "geneval": "Run GenEval's own scorer on this folder, then give its results.jsonl as the scorer's output.",
    "dpg": "Run DPG-Bench's own scorer on the folder `images` with the resolution in `picture_sizes`.",
    "cvtg": "Read the words with an OCR program, then give what it read.",
}


def evaluate_benchmark(
    name: str,
    files: Sequence[Path],
    output: Path,
    checkpoint: str = "mini",
    *,
    sources: Path | None = None,
    images: int | None = None,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    batch_size: int = 16,
    device: str | None = None,
    negative_prompt: str | None = None,
    rewritten: Path | None = None,
    judge: Judge | None = None,
    template: Path | None = None,
    workers: int = 4,
    ocr_file: Path | None = None,
    reader: Reader | None = None,
    scorer_output: Path | None = None,
    grids: bool = False,
    make_drawer: Callable[[], Drawer] | None = None,
    **sampling,
) -> dict:
    """Draw a benchmark's pictures, have them judged where it is judged, and write `results.json`.

    Every picture and every verdict is on disk as soon as it exists; the same call goes on after a crash.

    Args:
        name: A key of [`BENCHMARKS`].
        files: The benchmark's own prompt files.
        output: Folder of the run: a new one, or one of the same settings.
        checkpoint: "mini", a folder or a Hub id.
        sources: Folder of the source pictures that the prompt files name.
        images: Pictures per prompt; the benchmark's number by default.
        seed: With a prompt's and a sample's place the seed of a picture.
        size: (height, width) in pixels; by default the checkpoint's own, and for edits that of the source.
        batch_size: Pictures drawn at a time; moves no picture.
        device: Where the model runs; by default on the accelerator, if there is one.
        negative_prompt: What guidance leads away from.
        rewritten: JSON object of rewritten prompts by prompt. They are drawn; judged is by the benchmark's own.
        judge: Who judges; without one, and without earlier verdicts, a judged benchmark has no scores.
        template: The judge's template file of the benchmark; ours by default.
        workers: Requests to the judge at a time.
        ocr_file: What an OCR program read (CVTG-2K).
        reader: Reads the words or lines of a picture, instead of `ocr_file`.
        scorer_output: `results.jsonl` of GenEval's own scorer.
        grids: Whether GenEval's optional `grid.png` are written.
        make_drawer: Makes what draws; the checkpoint by default. Called only if a picture is missing.
        sampling: Goes to `generate`.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: If anything given does not fit, before anything is drawn; or the folder has other settings.
        ConnectionError: If the judge is out of reach.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"There is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}.")
    if batch_size < 1 or workers < 1:
        raise ValueError(f"`batch_size` and `workers` must be at least 1, got {batch_size} and {workers}.")
    if seed < 0:
        raise ValueError(f"`seed` must be at least 0, got {seed}.")
    _check_belonging(name, judge, template, ocr_file, reader, scorer_output, grids)
    if name == "dpg" and size is not None and size[0] != size[1]:
        raise ValueError(f"The scorer of DPG-Bench needs square pictures, not {size[0]}x{size[1]}.")
    items = read_items(name, files, sources, images)
    templates = Templates(QUESTIONS[name], items, template) if judge is not None else None
    prompts = {item.key: item.prompt for item in items} if rewritten is None else _rewrite(items, rewritten)
    if ocr_file is not None:
        read_ocr(ocr_file, items)

    folder = _Folder(output)
    folder.claim(
        {
            "benchmark": name,
            "prompts": len(items),
            "prompts_sha256": _hash([[item.key, item.prompt, item.pictures, item.fields] for item in items]),
            "sources_sha256": _hash([[fingerprint(own) for own in item.sources] for item in items]),
            "rewritten_prompts_sha256": None if rewritten is None else _hash(prompts),
            "checkpoint": checkpoint,
            "weights_sha256": weights_hash(BUNDLED.get(checkpoint, checkpoint)),
            "seed": seed,
            "images_per_prompt": len(items[0].pictures),
            "image_size_asked": None if size is None else list(size),
            "negative_prompt": negative_prompt,
            "sampling_asked": sampling,
            "nextflow_hf": __version__,
        }
    )
    if judge is not None:
        folder.verdicts.claim(_judge_settings(judge, templates))
    _draw_missing(
        items,
        prompts,
        folder,
        seed,
        batch_size,
        make_drawer or (lambda: CheckpointDrawer(checkpoint, size, device, negative_prompt, **sampling)),
    )
    _write_companions(items, output)
    if grids or name == "dpg":
        _write_grids(items, output)
    if judge is not None:
        _judge_missing(name, items, folder, judge, templates, workers)

    scores: Scores = {}
    if name in QUESTIONS and folder.verdicts.judge is not None:
        scores = score_verdicts(name, items, folder.verdicts)
    elif ocr_file is not None:
        scores = score_words(items, read_ocr(ocr_file, items))
    elif reader is not None:
        scores = score_words(items, _read_pictures(items, output, reader))
    elif scorer_output is not None:
        scores = score_geneval(scorer_output, items)
    return _write_results(name, items, folder, scores)


def _check_belonging(name, judge, template, ocr_file, reader, scorer_output, grids) -> None:
    title = BENCHMARKS[name].title
    if name not in QUESTIONS and (judge is not None or template is not None):
        raise ValueError(f"{title} is not judged; leave the judge and its template out.")
    if template is not None and judge is None:
        raise ValueError("A judge's template was given, but no judge.")
    if name != "cvtg" and (ocr_file is not None or reader is not None):
        raise ValueError(f"{title} is not scored by the words in its pictures; leave out what was read.")
    if ocr_file is not None and reader is not None:
        raise ValueError("Give the file of what was read or a reader, not both.")
    if name != "geneval" and (scorer_output is not None or grids):
        raise ValueError(f"{title} has neither a scorer's output to read nor optional grids; GenEval has.")


def _hash(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _rewrite(items: Sequence[Item], file: Path) -> dict[str, str]:
    """The rewritten prompt of each item, by its name."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"The rewritten prompts {file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a JSON object of rewritten prompts by prompt.")
    missing = [item.prompt for item in items if item.prompt not in content]
    if missing:
        raise ValueError(f"{file} lacks {len(missing)} of {len(items)} prompts, the first of them {missing[0]!r}.")
    prompts = {item.key: content[item.prompt] for item in items}
    for key, prompt in prompts.items():
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{file}: what the prompt {key!r} was rewritten to must be text, got {prompt!r}.")
    return prompts


# ---- the folder ------------------------------------------------------------------------------------------------------


class _Folder:
    """A run's folder. What is ours lies in its `run`; the rest is as the benchmark's scorer expects it.

    Settings reach the disk with the first picture or verdict that they moved: a command that failed before may be
    mended and given again.
    """

    def __init__(self, path: Path):
        self.path = path
        self._own = path / "run"
        self._settings: dict = {}

    def claim(self, asked: dict) -> None:
        """Take a new folder, or go on in one of the same settings.

        Raises:
            ValueError: If it holds something else, or has other settings, by name.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; the output is a folder.")
        asked = json.loads(json.dumps(asked))
        if self._file.is_file():
            self._settings = _load(self._file)
            # Weights say more than where they lie.
            ignored = {"checkpoint"} if asked["weights_sha256"] is not None else set()
            self._refuse_others(self._settings["asked"], asked, ignored)
        else:
            strangers = [own.name for own in self.path.iterdir() if own != self._own] if self.path.exists() else []
            if strangers:
                raise ValueError(
                    f"{self.path} is no benchmark's run, and holds {len(strangers)} other things such as "
                    f"{min(strangers)!r}; give a new folder."
                )
            self._settings = {"asked": asked, "drawn": None}
        self.verdicts = Verdicts(self._own / "verdicts.jsonl")

    def claim_drawer(self, drawn: dict) -> None:
        """See that what draws is what drew the pictures that are here."""
        drawn = json.loads(json.dumps(drawn))
        self._refuse_others(self._settings["drawn"] or drawn, drawn, set())
        self._settings["drawn"] = drawn

    def keep(self) -> None:
        """Write down the settings, before the first picture."""
        if not self._file.is_file():
            self._own.mkdir(parents=True, exist_ok=True)
            self._write(self._file, self._settings)

    @property
    def _file(self) -> Path:
        return self._own / "settings.json"

    @property
    def settings(self) -> dict:
        """All settings, as the results have them."""
        return {**self._settings["asked"], **(self._settings["drawn"] or {}), "judge": self.verdicts.judge}

    def _refuse_others(self, old: Mapping, new: Mapping, ignored: set[str]) -> None:
        names = [own for own in dict.fromkeys([*old, *new]) if own not in ignored and old.get(own) != new.get(own)]
        if names:
            differences = "; ".join(f"{own}: {old.get(own)!r} there, {new.get(own)!r} now" for own in names)
            raise ValueError(
                f"{self.path} holds a run with other settings ({differences}). Use the same or another folder."
            )

    @staticmethod
    def _write(file: Path, content: dict) -> None:
        write_whole(file, lambda own: own.write((json.dumps(content, indent=2) + "\n").encode()))


def _load(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


# ---- pictures --------------------------------------------------------------------------------------------------------


def _write_companions(items: Sequence[Item], output: Path) -> None:
    """Files that scorers want beside the pictures: the benchmark's own line, and the source pictures."""
    for item in items:
        if item.line is not None:
            path = (output / item.pictures[0]).parent.parent / "metadata.jsonl"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                line = item.line.strip().encode() + b"\n"
                write_whole(path, lambda file, line=line: file.write(line))
        for source, name in zip(item.sources, item.source_files):
            path = output / name
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                save_picture(source(), path)


def _draw_missing(
    items: Sequence[Item],
    prompts: Mapping[str, str],
    folder: _Folder,
    seed: int,
    batch_size: int,
    make_drawer: Callable[[], Drawer],
) -> None:
    missing = [
        (item, sample)
        for item in items
        for sample, name in enumerate(item.pictures)
        if not (folder.path / name).is_file()
    ]
    if not missing:
        return
    drawer = make_drawer()
    folder.claim_drawer(drawer.settings())
    for item in items:
        try:
            sources = [source() for source in item.sources]
        except (OSError, ValueError) as error:
            raise ValueError(f"A source picture of {item.key!r} cannot be read: {error}") from error
        try:
            drawer.check(prompts[item.key], sources)
        except ValueError as error:
            raise ValueError(f"The prompt {item.key!r} cannot be drawn: {error}") from error
    with tqdm(total=len(missing), desc="draw") as bar:
        for first in range(0, len(missing), batch_size):
            chosen = missing[first : first + batch_size]
            drawings = [
                Drawing(
                    item.key,
                    prompts[item.key],
                    tuple(source() for source in item.sources),
                    seed_of(seed, item.index, sample),
                )
                for item, sample in chosen
            ]
            pictures = drawer.draw(drawings)
            folder.keep()
            for (item, sample), picture in zip(chosen, pictures, strict=True):
                path = folder.path / item.pictures[sample]
                path.parent.mkdir(parents=True, exist_ok=True)
                save_picture(picture, path)
            bar.update(len(chosen))


def _write_grids(items: Sequence[Item], output: Path) -> None:
    for item in items:
        path = output / item.grid
        if path.is_file():
            continue
        pictures = [Image.open(output / name).convert("RGB") for name in item.pictures]
        if item.grid.startswith("images/") and pictures[0].width != pictures[0].height:
            raise ValueError(
                f"The scorer of DPG-Bench needs square pictures, but {item.pictures[0]} is not; give a square size."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(side_by_side(pictures), path)


def _read_pictures(items: Sequence[Item], output: Path, reader: Reader) -> dict[str, list[str]]:
    read = {}
    for item in tqdm(items, desc="read"):
        with Image.open(output / item.pictures[0]) as picture:
            read[item.key] = list(reader(picture.convert("RGB")))
    return read


# ---- verdicts --------------------------------------------------------------------------------------------------------


def _judge_settings(judge: Judge, templates: Templates) -> dict:
    return {
        "model": judge.model,
        "host": judge.host,
        "template": "fallback" if templates.file is None else templates.file.name,
        "template_sha256": templates.sha256,
        "attempts": judge.attempts,
        "temperature": 0,
    }


def _judge_missing(
    name: str, items: Sequence[Item], folder: _Folder, judge: Judge, templates: Templates, workers: int
) -> None:
    def ask(item: Item, question: Question) -> None:
        sources = [source() for source in item.sources] if question.sees_sources else []
        with Image.open(folder.path / item.pictures[0]) as own:
            shown = [*sources, own.convert("RGB")]
        pictures = [png(_resized(picture, question.area)) for picture in shown]
        text = templates.fill(question, item)
        folder.verdicts.add(judge.ask(item.key, question.name, text, pictures, question.read))

    missing = [
        (item, question)
        for item in items
        for question in QUESTIONS[name]
        if folder.verdicts.get(item.key, question.name) is None
    ]
    if not missing:
        return
    with ThreadPoolExecutor(workers) as pool:
        # The first goes alone: a mistake in the key or the model's name then costs one request, and leaves no trace.
        ask(*missing[0])
        futures = [pool.submit(ask, *own) for own in missing[1:]]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="judge"):
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _resized(picture: Image.Image, area: int | None) -> Image.Image:
    if area is None:
        return picture
    scale = sqrt(area / (picture.width * picture.height))
    return picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))


# ---- results ---------------------------------------------------------------------------------------------------------


def _write_results(name: str, items: Sequence[Item], folder: _Folder, scores: Scores) -> dict:
    sizes: Counter[str] = Counter()
    for item in items:
        for own in item.pictures:
            with Image.open(folder.path / own) as picture:
                sizes[f"{picture.height}x{picture.width}"] += 1
    asked = [folder.verdicts.get(item.key, question.name) for item in items for question in QUESTIONS.get(name, ())]
    reason = None if scores else _NOT_COMPUTED.get(name, "No judge was given, or it gave no marks.")
    result = {
        "benchmark": name,
        "scores": scores,
        "not_computed": reason,
        "unjudged": sum(own is not None and own.marks is None for own in asked),
        "unasked": sum(own is None for own in asked),
        "pictures": sizes.total(),
        "picture_sizes": dict(sizes),
        "settings": {**folder.settings, "date": datetime.now(UTC).strftime("%Y-%m-%d")},
    }
    write_whole(
        folder.path / "results.json",
        lambda file: file.write((json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode()),
    )
    return result
