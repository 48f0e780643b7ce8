import json
import platform
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import nextflow_hf
from nextflow_hf.cli import main
from nextflow_hf.demo import contact_sheet
from nextflow_hf.evaluation import evaluate_words
from nextflow_hf.files import write_whole
from nextflow_hf.inference import load

SMALL_RUN = ["--prompts", "2", "--images", "1", "--captions", "4", "--tests", "2"]


def test_generate_writes_the_same_pictures_for_a_seed(tmp_path, capsys):
    for folder in ("one", "other"):
        assert (
            main(["generate", "a red circle", "--count", "2", "--seed", "5", "--output", str(tmp_path / folder)]) == 0
        )
    paths = capsys.readouterr().out.split()
    assert len(paths) == 4 and all(path.endswith(("0005.png", "0006.png")) for path in paths)
    for name in ("0005.png", "0006.png"):
        one, other = (np.asarray(Image.open(tmp_path / folder / name)) for folder in ("one", "other"))
        assert np.array_equal(one, other)


def test_a_picture_is_the_same_alone_and_among_others(tmp_path):
    main(["generate", "a red circle", "--count", "2", "--seed", "5", "--output", str(tmp_path / "two")])
    main(["generate", "a red circle", "--count", "1", "--seed", "6", "--output", str(tmp_path / "one")])
    two, one = (np.asarray(Image.open(tmp_path / folder / "0006.png"), int) for folder in ("two", "one"))
    assert np.abs(two - one).max() <= 1


def test_first_scales_are_a_smaller_picture(tmp_path, capsys):
    drawn = ["generate", "a red circle left of a blue square", "--output", str(tmp_path), "--num-scales"]
    assert main([*drawn, "5"]) == 0
    reading = nextflow_hf.scenes.Referee((4, 4)).look(Image.open(tmp_path / "0000.png"))
    assert Image.open(tmp_path / "0000.png").size == (48, 48)
    assert [(own.color, own.shape) for own in reading.objects] == [("red", "circle"), ("blue", "square")]
    capsys.readouterr()
    for more, message in ((["4"], "shows the first 5"), (["5", "--refiner", "mini"], "paints whole pictures")):
        assert main([*drawn, *more]) == 2
        assert message in capsys.readouterr().err


def test_describe(tmp_path, capsys):
    nextflow_hf.scenes  # noqa: B018  (a sub-package is reachable by name)
    source = nextflow_hf.scenes.SceneSource((64, 64), 1, seed=2)
    Image.fromarray(source.image(0)).save(tmp_path / "scene.png")
    assert main(["describe", str(tmp_path / "scene.png")]) == 0
    assert len(capsys.readouterr().out.split()) > 2
    assert main(["describe", str(tmp_path / "scene.png"), "--question", "how many objects are there?", "--think"]) == 0
    assert "\n</think>\n" in capsys.readouterr().out
    asked = ["describe", str(tmp_path / "scene.png"), "--question", "what color is the background?", "--in-words"]
    assert main(asked) == 0
    assert capsys.readouterr().out.strip() == source.scene(0).background
    assert main([*asked, "--think"]) == 2
    assert "not both" in capsys.readouterr().err


def test_an_edit_may_be_thought_through(tmp_path, capsys):
    source = nextflow_hf.scenes.SceneSource((64, 64), 1, seed=2)
    Image.fromarray(source.image(0)).save(tmp_path / "scene.png")
    edit = ["edit", str(tmp_path / "scene.png"), "make the background black"]
    ways = {"at-once": [], "thought": ["--think"], "words": ["--in-words"], "drafts": ["--in-words", "--drafts", "2"]}
    for name, more in ways.items():
        assert main([*edit, *more, "--output", str(tmp_path / f"{name}.png")]) == 0
        assert Image.open(tmp_path / f"{name}.png").size == (64, 64)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--in-words", "--think"], "draws the whole picture anew"),
        (["--in-words", "--size", "48x80"], "draws the whole picture anew"),
        (["--drafts", "2"], "goes with --in-words"),
        (["--adapter", "look"], "goes with --in-words"),
        (["--in-words", "--drafts", "0"], "1 and more"),
    ],
)
def test_edits_that_do_not_go_together_are_refused_before_anything_is_read(more, message, capsys):
    assert main(["edit", "missing.png", "make the circle blue", *more]) == 2
    assert message in capsys.readouterr().err


def test_settings_of_a_recipe_may_stand_behind_options(monkeypatch):
    found = []
    monkeypatch.setattr("nextflow_hf.training.stages.run_recipe", found.append)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    assert main(["train", "mini-grpo", "trainer.seed=1", "--threads", "1", "trainer.max_steps=7"]) == 0
    assert found[0].trainer["max_steps"] == 7 and found[0].trainer["seed"] == 1
    with pytest.raises(SystemExit):
        main(["train", "mini-grpo", "--thread-count", "1"])
    with pytest.raises(SystemExit):
        main(["describe", "picture.png", "a=b"])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere it does nothing")
def test_freed_memory_is_taken_again_and_not_asked_for():
    script = """
import resource, torch
from nextflow_hf.memory import keep_freed_memory
counts = []
for keep in (lambda: None, keep_freed_memory):
    keep()
    torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*counts)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    without, kept = map(int, ran.stdout.split())
    assert kept < without / 2


def test_evaluate_writes_scores_and_every_setting(tmp_path, capsys):
    path = tmp_path / "scores" / "mini.json"
    assert main(["evaluate", "scenes", *SMALL_RUN, "--top-k", "7", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["settings"]["sampling"]["top_k"] == 7 and result["settings"]["weights_sha256"]
    # Not all have as many tests and pictures as was asked for.
    assert result["settings"]["images_per_prompt_at_other_sizes"] == 1
    assert result["settings"]["tests_of"] == dict.fromkeys(("masked edits", "stories", "instructions", "films"), 1)
    assert set(result["drawing"]) == {"overall", *nextflow_hf.scenes.CATEGORIES}
    assert all(0 <= own["low"] <= own["score"] <= own["high"] <= 1 for own in result["drawing"].values())
    assert set(result["drawing_at_other_sizes"]) == {"48x80", "80x48", "48x48, the first 5 scales"}
    assert set(result["tokenizer"]["readable_first_scales"]) == {"5"}
    shown = capsys.readouterr().out
    assert "| drawing: overall |" in shown and "| drawing at 48x48, the first 5 scales: overall |" in shown


def test_evaluate_refuses_before_anything_is_drawn_and_may_leave_captions_out(tmp_path, capsys, monkeypatch):
    assert main(["evaluate", "scenes", "--prompts", "1", "--images", "1", "--captions", "0", "--tests", "0"]) == 0
    shown = capsys.readouterr().out
    assert "| drawing: overall |" in shown and "captions" not in shown
    monkeypatch.setattr("nextflow_hf.evaluation.score_drawing", pytest.fail)
    assert main(["evaluate", "scenes", "--output", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    model, processor = load("mini")
    model.config.abilities = ["image", "caption"]
    monkeypatch.setattr("nextflow_hf.evaluation.load", lambda checkpoint: (model, processor))
    assert main(["evaluate", "scenes", "--think"]) == 2
    assert "does not think" in capsys.readouterr().err
    assert main(["evaluate", "in-words", "--checkpoint", "a-reader"]) == 2
    assert "does not work in words" in capsys.readouterr().err


def test_words_are_evaluated_as_the_checkpoint_samples_or_as_asked(tmp_path, capsys):
    path = tmp_path / "words.json"
    assert main(["evaluate", "words", "--checkpoint", "mini-words", "--tests", "6", "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    ways = ("words drawn", "words drawn, asked in other ways", "words drawn, asked in untaught ways")
    assert set(result["words"]) == {*ways, *(f"{way}: letters" for way in ways)}
    assert result["words"]["words drawn: letters"]["score"] > 0.5
    assert result["settings"]["tests"] == 6 and result["settings"]["sampling"]["temperature"] != 0.3
    assert "| words drawn: letters |" in capsys.readouterr().out
    plain = evaluate_words("mini-words", 2, temperature=0.3)
    assert plain["settings"]["sampling"]["temperature"] == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--captions", "5"], "does not take --captions"),
        (["--think"], "does not take --think"),
        (["--adapter", "look"], "does not take --adapter"),
        (["--judge-model", "m"], "benchmarks do"),
        (["--tests", "0"], "At least one word"),
        (["--output", "{tmp}"], "is a folder"),
    ],
)
def test_words_refuse_what_they_do_not_take(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nextflow_hf.evaluation.load", pytest.fail)
    assert main(["evaluate", "words", *(own.format(tmp=tmp_path) for own in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_words_are_not_asked_of_a_checkpoint_that_never_drew_their_size(capsys, monkeypatch):
    model, processor = load("mini")
    model.config.trained_image_sizes = [[64, 64]]
    monkeypatch.setattr("nextflow_hf.evaluation.load", lambda checkpoint: (model, processor))
    assert main(["evaluate", "words"]) == 2
    assert "48x80" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "", "--output", "{tmp}"], "empty"),
        (["generate", "a star", "--count", "0", "--output", "{tmp}"], "--count"),
        (["generate", "a star", "--guidance-scale", "-1", "--output", "{tmp}"], "guidance_scale"),
        (["generate", "a star", "--size", "60x64", "--output", "{tmp}"], "multiple of 8"),
        (["generate", "a star", "--size", "128x128", "--output", "{tmp}"], "trained to draw"),
        (["generate", "a <|im_end|> star", "--output", "{tmp}"], "special token"),
        (["generate", "a star", "--checkpoint", "{tmp}/none", "--output", "{tmp}"], "none"),
        (["describe", "{tmp}/none.png"], "none.png"),
        (["train", "no-such-recipe"], "no recipe"),
        (["train", "mini-pretrain-64", "max_steps"], "key=value"),
    ],
)
def test_a_mistake_is_one_line_and_no_files(arguments, message, tmp_path, capsys):
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.parametrize("arguments", [["generate", "a star", "--size", "big"], ["dance"], ["evaluate", "beauty"]])
def test_unknown_arguments_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2 and "usage" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "describe", "train", "evaluate", "demo"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0 and command in capsys.readouterr().out


def test_demo_shows_where_its_pictures_are(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "contact_sheet.png") in out and str(tmp_path / "sharpening.gif") in out
    assert Image.open(tmp_path / "sharpening.gif").n_frames > 1
    assert Image.open(tmp_path / "contact_sheet.png").width > 8 * 64
    assert Image.open(tmp_path / "edits.png").width > 8 * 64
    assert Image.open(tmp_path / "larger.png").size == (4 * 128, 2 * 128)
    assert "<think>" in (tmp_path / "riddle" / "story.md").read_text() and (tmp_path / "story" / "00.png").is_file()


def test_a_file_is_whole_or_absent(tmp_path):
    def fail(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_whole(tmp_path / "file", fail)
    assert not list(tmp_path.iterdir())


def test_a_contact_sheet_shows_every_picture():
    sheet = contact_sheet(
        ["one", "two"], [[Image.new("RGB", (8, 8), "red")] * 3, [Image.new("RGB", (8, 8), "blue")] * 3]
    )
    colors = {color: count for count, color in sheet.getcolors(10**6)}
    assert colors[(255, 0, 0)] == colors[(0, 0, 255)] == 3 * 128 * 128


@pytest.mark.parametrize("name", nextflow_hf.BUNDLED)
def test_a_bundled_checkpoint_is_small_and_complete(name):
    from pathlib import Path

    files = {path.name: path.stat().st_size for path in Path(nextflow_hf.BUNDLED[name]).iterdir()}
    assert sum(files.values()) <= 40e6
    assert {"model.safetensors", "README.md", "evaluation.json", "training_log.json"} <= files.keys()
    assert not any(own.endswith((".bin", ".pt", ".pkl")) for own in files)
