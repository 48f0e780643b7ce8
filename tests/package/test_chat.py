import json

import imageio
import numpy as np
import pytest
import torch
from PIL import Image

from nextflow_hf.chat import Chat, in_terminal, run_chat, write_story
from nextflow_hf.cli import main
from nextflow_hf.inference import edit_picture, fit_to_trained, load, own_resolution, place_on_canvas
from nextflow_hf.modeling.generation_nextflow import NextFlowInterleavedOutput
from nextflow_hf.processing.processing_nextflow import CHAT_TEMPLATE
from nextflow_hf.scenes import Scene, SceneObject, render

PICTURE = Image.fromarray(render(Scene((SceneObject("circle", "red", "small", (0, 0)),), "white"), (64, 64)))
WIDE = Image.fromarray(render(Scene((SceneObject("circle", "red", "small", (0, 0)),), "white", (3, 5)), (48, 80)))


@pytest.fixture
def checkpoint():
    """The bundled checkpoint, which answers every turn with a word and a picture of the size asked for."""
    model, processor = load("mini")
    processor.chat_template = CHAT_TEMPLATE
    calls = []

    def generate(**kwargs):
        calls.append(kwargs)
        height, width = kwargs.get("image_size") or (64, 64)
        words = processor.tokenizer("red", return_tensors="pt").input_ids[0]
        return NextFlowInterleavedOutput(segments=[[words, torch.full((3, height, width), len(calls) / 10)]], codes=[])

    model.generate = generate
    return model, processor, calls


def test_a_conversation_is_kept_and_goes_on(tmp_path, checkpoint):
    model, processor, calls = checkpoint
    chat = Chat(model, processor, tmp_path / "talk")
    text, picture = chat.say("draw something")
    assert text == "red" and picture.size == (64, 64)
    assert np.array_equal(np.asarray(Image.open(chat.path_of(picture))), np.asarray(picture))
    chat.say(WIDE, "make the circle blue")
    # Pictures are drawn at the size of the last one in the conversation.
    assert calls[1]["image_size"] == (48, 80) and len(calls[1]["image_grids"]) == 2
    again = Chat(model, processor, tmp_path / "talk")
    assert [turn["role"] for turn in again.turns] == ["user", "assistant"] * 2
    kept = again.turns[2]["content"][0]["image"]
    assert np.array_equal(np.asarray(kept), np.asarray(WIDE))
    again.say("once more", enable_thinking=True)
    assert len(calls[2]["image_grids"]) == 3 and calls[2]["seed"] != calls[1]["seed"]
    assert len(json.loads((tmp_path / "talk" / "history.json").read_text())) == 6
    # A thought is kept with the tag that the prompt opened it with.
    assert again.turns[-1]["content"][0] == {"type": "text", "text": "<think>\nred"}
    again.clear()
    assert Chat(model, processor, tmp_path / "talk").turns == []


def test_a_turn_that_fails_leaves_no_trace(tmp_path, checkpoint):
    model, processor, _ = checkpoint
    chat = Chat(model, processor, tmp_path)
    with pytest.raises(ValueError, match="empty"):
        chat.say(" ")
    assert chat.turns == [] and not (tmp_path / "history.json").exists()


def test_a_folder_that_is_no_conversation_is_refused(tmp_path, checkpoint):
    (tmp_path / "history.json").write_text('[{"role": "user"}]')
    with pytest.raises(ValueError, match="no conversation"):
        Chat(*checkpoint[:2], tmp_path)


def test_the_terminal_takes_turns_and_commands(tmp_path, checkpoint, monkeypatch):
    monkeypatch.delenv("KITTY_WINDOW_ID", raising=False)
    monkeypatch.setenv("TERM_PROGRAM", "other")
    model, processor, calls = checkpoint
    PICTURE.save(tmp_path / "own.png")
    lines = iter(
        ["/think", f"/image {tmp_path / 'own.png'}", "what is it?", "/image nowhere.png", "/fly", "", "/new", "hello"]
    )
    shown = []

    def read(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    run_chat(Chat(model, processor, tmp_path / "talk"), read, shown.append)
    assert "thinking is on" in shown and any("no command" in line for line in shown)
    assert any("nowhere.png" in line for line in shown) and any(line.startswith("[picture: ") for line in shown)
    assert len(calls) == 2 and "image_grids" in calls[0] and "image_grids" not in calls[1]
    assert processor.tokenizer.decode(calls[0]["input_ids"][0]).endswith("assistant\n<think>\n")


def test_pictures_stand_in_the_terminal_where_it_can(monkeypatch):
    monkeypatch.setenv("KITTY_WINDOW_ID", "1")
    assert in_terminal(PICTURE, None).startswith("\033_Ga=T,f=100,m=")
    monkeypatch.delenv("KITTY_WINDOW_ID")
    monkeypatch.setenv("TERM_PROGRAM", "WezTerm")
    assert in_terminal(PICTURE, None).startswith("\033]1337;File=inline=1;size=")


def test_a_story_becomes_markdown_and_frames(tmp_path):
    parts = ["it is day.", PICTURE, "it becomes night.", PICTURE.rotate(90), "the end"]
    paths = write_story("a story", parts, tmp_path / "story", gif=True, mp4=True)
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / "story").iterdir())
    assert [path.name for path in paths] == ["story.md", "00.png", "01.png", "frames.gif", "frames.mp4"]
    film = imageio.get_reader(paths[-1])
    assert film.get_meta_data()["duration"] == pytest.approx(2)
    seen = next(iter(film)).astype(int)
    drawn = np.asarray(PICTURE.resize(seen.shape[1::-1], Image.Resampling.NEAREST), int)
    assert np.abs(seen - drawn).mean() < 16
    assert paths[0].read_text() == (
        "# a story\n\nit is day.\n\n![00](00.png)\n\nit becomes night.\n\n![01](01.png)\n\nthe end\n"
    )
    assert not list((tmp_path / "story").glob("*.unfinished"))
    with pytest.raises(ValueError, match="holds a story already"):
        write_story("another", [PICTURE], tmp_path / "story")


def test_a_film_without_its_library_is_refused_before_anything_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nextflow_hf.chat.find_spec", lambda name: None)
    monkeypatch.setattr("nextflow_hf.inference.load", pytest.fail)
    assert main(["story", "a story", "--output", str(tmp_path / "story"), "--mp4"]) == 2
    assert 'pip install "nextflow-hf[video]"' in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_canvas_has_room_for_more():
    canvas, mask = place_on_canvas(PICTURE, (64, 128))
    assert canvas.size == mask.size == (128, 64)
    assert np.array_equal(np.asarray(canvas)[:, 32:96], np.asarray(PICTURE))
    assert np.asarray(mask)[:, 32:96].max() == 0 and np.asarray(mask)[:, :32].min() == 255
    with pytest.raises(ValueError, match="nothing to add"):
        place_on_canvas(PICTURE, (64, 64))


def test_pictures_come_at_the_nearest_size_that_was_trained():
    model, _ = load("mini")
    assert own_resolution(model, PICTURE) == own_resolution(model, WIDE) == 64
    assert fit_to_trained(model, PICTURE) is PICTURE and fit_to_trained(model, WIDE) is WIDE
    for size, expected in (((100, 90), (64, 64)), ((400, 200), (80, 48)), ((30, 60), (48, 80))):
        assert fit_to_trained(model, PICTURE.resize(size)).size == expected
    model.config.trained_image_sizes = None
    assert fit_to_trained(model, PICTURE.resize((100, 90))).size == (96, 88)


def test_pictures_are_upright_and_transparency_is_white(tmp_path, capsys):
    """As everywhere else in the package."""
    model, processor = load("mini")
    model.config.abilities = None
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 8, 8))
    edited = edit_picture(model, processor, clear, "make it blue", mask)
    assert np.asarray(edited)[32:].min() == 255
    assert main(["edit", str(tmp_path / "x.png"), "a", "--output", "x.jpg"]) == 2
    assert "PNG" in capsys.readouterr().err


def test_masked_editing_keeps_the_rest_of_a_picture():
    model, processor = load("mini")
    model.config.abilities = None
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 32))
    edited = edit_picture(model, processor, PICTURE, "make the circle blue", mask, seed=1)
    before, after = np.asarray(PICTURE, int), np.asarray(edited, int)
    assert edited.size == (64, 64) and np.abs(after - before)[40:].max() == np.abs(after - before)[:, 40:].max() == 0
    with pytest.raises(ValueError, match="The mask has"):
        edit_picture(model, processor, PICTURE, "make the circle blue", mask.resize((32, 32)))
    long = PICTURE.resize((400, 100))
    border = Image.new("L", long.size)
    border.paste(255, (0, 0, 20, 100))
    with pytest.raises(ValueError, match="cropped away"):
        edit_picture(model, processor, long, "make the circle blue", border)


def test_transparency_of_a_mask_is_black_and_pale_greys_are_not_white(tmp_path, capsys):
    model, processor = load("mini")
    plain = Image.new("L", (64, 64))
    plain.paste(255, (0, 0, 32, 32))
    clear = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 32, 32))
    grey = Image.new("L", (64, 64), 100)
    grey.paste(255, (0, 0, 32, 32))
    expected, *others = (
        np.asarray(edit_picture(model, processor, PICTURE, "make the circle blue", mask, seed=1))
        for mask in (plain, clear, grey)
    )
    assert all(np.array_equal(own, expected) for own in others)
    PICTURE.save(tmp_path / "own.png")
    clear.save(tmp_path / "mask.png")
    command = ["edit", str(tmp_path / "own.png"), "make the circle blue", "--seed", "1", "--output"]
    assert main([*command, str(tmp_path / "edited.png"), "--mask", str(tmp_path / "mask.png")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "edited.png")), expected)


def test_the_command_line_refuses_what_does_not_go_together(tmp_path, capsys):
    PICTURE.save(tmp_path / "own.png")
    own = str(tmp_path / "own.png")
    assert main(["edit", own, "make it blue", "--mask", own, "--size", "64x128"]) == 2
    assert "not both" in capsys.readouterr().err
