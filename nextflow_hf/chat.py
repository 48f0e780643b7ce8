"""A conversation in words and pictures that is kept in a folder: `nextflow-hf chat`, and stories written to files."""

import base64
import hashlib
import io
import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from .files import save_picture, write_whole
from .inference import assistant, fit_to_trained, own_resolution, tell, user
from .modeling.modeling_nextflow import NextFlowForConditionalGeneration
from .processing.image_processing_base_nextflow import open_picture, to_rgb
from .processing.processing_nextflow import NextFlowProcessor

Part = str | Image.Image
_HISTORY = "history.json"
_SEEDS_PER_TURN = 1000


class Chat:
    """A conversation with a checkpoint.

    Args:
        model: A model with the ability "interleaved".
        processor: Its processor.
        folder: Where the conversation is kept; one that is there goes on. `None` keeps it in memory alone.
        seed: Seed of what is drawn; every turn has its own from it.

    Raises:
        ValueError: If the folder holds something that is no conversation.
    """

    def __init__(
        self,
        model: NextFlowForConditionalGeneration,
        processor: NextFlowProcessor,
        folder: Path | None = None,
        seed: int = 0,
    ):
        self.model, self.processor, self.folder, self.seed = model, processor, folder, seed
        self.turns: list[dict] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / _HISTORY).is_file():
                self.turns = _read(folder)

    def say(self, *parts: Part, enable_thinking: bool = False, **generation) -> list[Part]:
        """Take a turn, and return the answer's texts and pictures in order. A turn that fails leaves no trace.

        Args:
            parts: Texts and pictures of the turn; a picture is brought to the nearest size that the model was trained
                for.
            enable_thinking: Whether the model first writes down a thought.
            generation: Goes to `generate`. Pictures are drawn at the size of the last one in the conversation.
        """
        parts = [own if isinstance(own, str) else fit_to_trained(self.model, to_rgb(own)) for own in parts]
        turns = [*self.turns, user(*parts)]
        pictures = _pictures_of(turns)
        resolution = None
        if pictures:
            resolution = own_resolution(self.model, pictures[-1])
            generation.setdefault("image_size", pictures[-1].size[::-1])
        # Every turn has seeds of its own, as many as it may draw pictures.
        seed = self.seed + _SEEDS_PER_TURN * len(turns)
        (answer,) = tell(self.model, self.processor, [turns], [seed], enable_thinking, resolution, **generation)
        answer = [part for part in answer if not isinstance(part, str) or part.strip()]
        if not answer:
            raise ValueError("The model ended its turn without an answer; say it in other words.")
        turns.append(assistant(*answer))
        self._write(turns)
        self.turns = turns
        return answer

    def clear(self) -> None:
        """Begin anew, in the folder as well."""
        self._write([])
        self.turns = []

    def path_of(self, picture: Image.Image) -> Path | None:
        """Where a picture of the conversation is kept."""
        return None if self.folder is None else self.folder / _name_of(picture)

    def _write(self, turns: list[dict]) -> None:
        """Pictures first, then the history that names them, so that a crash leaves the last whole conversation."""
        if self.folder is None:
            return
        saved = []
        for turn in turns:
            content = []
            for item in turn["content"]:
                if item["type"] == "image":
                    path = self.folder / _name_of(item["image"])
                    if not path.is_file():
                        save_picture(item["image"], path)
                    item = {"type": "image", "image": path.name}
                content.append(item)
            saved.append({"role": turn["role"], "content": content})
        text = json.dumps(saved, indent=1) + "\n"
        write_whole(self.folder / _HISTORY, lambda file: file.write(text.encode()))


def _name_of(picture: Image.Image) -> str:
    """A file name that only this picture has."""
    digest = hashlib.sha256(repr(picture.size).encode() + picture.convert("RGB").tobytes())
    return f"{digest.hexdigest()[:16]}.png"


def _pictures_of(turns: list[dict]) -> list[Image.Image]:
    return [item["image"] for turn in turns for item in turn["content"] if item["type"] == "image"]


def _read(folder: Path) -> list[dict]:
    try:
        turns = json.loads((folder / _HISTORY).read_text())
        for turn in turns:
            for item in turn["content"]:
                if item["type"] == "image":
                    item["image"] = Image.open(folder / item["image"]).convert("RGB")
        return turns
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _HISTORY} is no conversation that can go on: {error}") from error


def run_chat(chat: Chat, read=input, show=print) -> None:
    """Talk in a terminal until `/quit` or the end of input.

    `/image PATH` adds a picture to the next turn, `/think` switches thinking, `/new` begins anew.
    """
    show("Say something. /image PATH adds a picture, /think switches thinking, /new begins anew, /quit ends.")
    waiting: list[Part] = []
    thinks = False
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/new":
                chat.clear()
                waiting = []
            elif command == "/think":
                thinks = not thinks
                show(f"thinking is {'on' if thinks else 'off'}")
            elif command == "/image":
                waiting.append(open_picture(os.path.expanduser(argument)))
            elif line.startswith("/"):
                show(f"There is no command {command!r}.")
            elif line:
                for part in chat.say(*waiting, line, enable_thinking=thinks):
                    show(part if isinstance(part, str) else in_terminal(part, chat.path_of(part)))
                waiting = []
        except (ValueError, OSError) as error:
            show(f"error: {error}")


def in_terminal(picture: Image.Image, path: Path | None) -> str:
    """What shows a picture in this terminal: itself where it can (kitty, iTerm2, WezTerm), else its file.

    A picture that is not kept (`path` is `None`) goes to a new file in the folder of temporary files.
    """
    encoded = io.BytesIO()
    picture.resize((picture.width * 4, picture.height * 4), Image.Resampling.NEAREST).save(encoded, format="PNG")
    data = base64.b64encode(encoded.getvalue()).decode()
    if os.environ.get("KITTY_WINDOW_ID"):
        chunks = [data[start : start + 4096] for start in range(0, len(data), 4096)]
        head = ["a=T,f=100,"] + [""] * (len(chunks) - 1)
        return "".join(
            f"\033_G{first}m={int(number < len(chunks) - 1)};{chunk}\033\\"
            for number, (first, chunk) in enumerate(zip(head, chunks))
        )
    if os.environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return f"\033]1337;File=inline=1;size={len(encoded.getvalue())}:{data}\a"
    if path is None:
        path = Path(tempfile.mkdtemp(prefix="nextflow-hf-")) / _name_of(picture)
        save_picture(picture, path)
    return f"[picture: {path}]"


def check_story_files(folder: Path, mp4: bool = False) -> None:
    """Raise before anything is drawn what [`write_story`] would raise after.

    Raises:
        ValueError: If the folder holds another story, whose pictures would be mixed with this one's.
        ImportError: If a film is asked for where nothing can write one.
    """
    if (folder / "story.md").exists():
        raise ValueError(f"{folder} holds a story already. Name another folder, or remove it.")
    if mp4 and not all(map(find_spec, ("imageio", "imageio_ffmpeg"))):
        raise ImportError('MP4 files need imageio and ffmpeg: pip install "nextflow-hf[video]".')


def write_story(prompt: str, parts: list[Part], folder: Path, gif: bool = False, mp4: bool = False) -> list[Path]:
    """Write texts and pictures as `story.md` with PNG files.

    Args:
        prompt: What the story answers: the title.
        parts: Its texts and pictures.
        folder: Where they go.
        gif: Whether the pictures are written as `frames.gif` as well, a second each.
        mp4: The same as `frames.mp4`.

    Returns:
        The files.

    Raises:
        ValueError: If the folder holds another story, whose pictures would be mixed with this one's.
        ImportError: If a film is asked for where nothing can write one.
    """
    check_story_files(folder, mp4)
    folder.mkdir(parents=True, exist_ok=True)
    lines, files, pictures = [f"# {prompt}", ""], [], []
    for part in parts:
        if isinstance(part, str):
            lines += [part.strip(), ""]
            continue
        path = folder / f"{len(pictures):02d}.png"
        save_picture(part, path)
        lines += [f"![{path.stem}]({path.name})", ""]
        pictures.append(part)
        files.append(path)
    frames = [own.resize((own.width * 4, own.height * 4), Image.Resampling.NEAREST) for own in pictures]
    if gif and frames:
        files.append(folder / "frames.gif")
        write_whole(
            files[-1],
            lambda file: frames[0].save(
                file, format="GIF", save_all=True, append_images=frames[1:], duration=1000, loop=0
            ),
        )
    if mp4 and frames:
        from diffusers.utils import export_to_video

        # The encoder tells a format by its ending.
        unfinished = folder / "unfinished.mp4"
        export_to_video(frames, str(unfinished), fps=1)
        files.append(unfinished.replace(folder / "frames.mp4"))
    story = folder / "story.md"
    write_whole(story, lambda file: file.write("\n".join(lines).encode()))
    return [story, *files]
