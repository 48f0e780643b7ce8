import abc
import base64
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextflow_hf.cli import main
from nextflow_hf.harness import run as run_module
from nextflow_hf.harness.drawer import CheckpointDrawer, Drawing, seed_of
from nextflow_hf.harness.formats import BENCHMARKS, read_items, side_by_side, words_of
from nextflow_hf.harness.judge import Judge, Verdict, Verdicts
from nextflow_hf.harness.questions import QUESTIONS, Templates, read_lines, read_score
from nextflow_hf.harness.reward import EndpointReward
from nextflow_hf.harness.run import evaluate_benchmark
from nextflow_hf.harness.scores import WISE_WEIGHTS, eval_results, score_verdicts

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
]


class FakeDrawer:
    """A square of a colour that depends on the prompt, the sources and the seed alone."""

    drawn: Counter = Counter()

    def __init__(self, shape=(8, 8), sampling=None):
        self.shape, self.sampling = shape, sampling or {}

    def settings(self):
        return {"sampling": self.sampling, "dtype": "float32"}

    def check(self, prompt, sources):
        if "<|im_end|>" in prompt:
            raise ValueError("a special token")

    def draw(self, drawings):
        pictures = []
        for own in drawings:
            sources = [np.asarray(source).mean() for source in own.sources]
            rng = np.random.default_rng([own.seed, *own.prompt.encode(), *map(int, sources)])
            self.drawn[own.key] += 1
            pictures.append(Image.new("RGB", self.shape[::-1], tuple(rng.integers(256, size=3).tolist())))
        return pictures


@pytest.fixture(autouse=True)
def drawn():
    FakeDrawer.drawn = Counter()
    return FakeDrawer.drawn


class StubJudge:
    """An endpoint whose `reply(text, number of this text's request)` is an answer, or (status, headers, body)."""

    def __init__(self, reply):
        self.requests, self.headers, self.pictures = Counter(), [], []
        stub, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                (message,) = body["messages"]
                text, *pictures = message["content"]
                with lock:
                    stub.requests[text["text"]] += 1
                    stub.headers.append((self.path, dict(self.headers), body["model"]))
                    stub.pictures.append([own["image_url"]["url"] for own in pictures])
                    answer = reply(text["text"], stub.requests[text["text"]])
                if isinstance(answer, str):
                    said = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
                    answer = (200, {}, json.dumps(said))
                status, headers, content = answer
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self._server.shutdown()
        self._server.server_close()


def judge_at(stub, **settings):
    return Judge(stub.url, "stub", **{"sleep": lambda seconds: None, **settings})


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def geneval_file(tmp_path):
    return write(tmp_path / "evaluation_metadata.jsonl", "\n".join(map(json.dumps, GENEVAL)) + "\n")


def wise_file(tmp_path, identities=(1, 401, 568, 701, 801, 901)):
    records = [
        {
            "prompt_id": identity,
            "Prompt": f"riddle {identity}",
            "Explanation": f"meaning {identity}",
            "Category": "some",
            "Subcategory": "Longitudinal time" if 400 < identity < 568 else "other",
        }
        for identity in identities
    ]
    return write(tmp_path / "wise.json", records)


def wise_answer(text, number):
    identity = int(re.search(r"riddle (\d+)", text)[1])
    return f"**Consistency**: {identity % 3}\nRealism: 2\nAesthetic Quality: 1"


def run(name, files, output, **settings):
    return evaluate_benchmark(name, files, output, **{"make_drawer": FakeDrawer, "workers": 1, **settings})


def content_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


# ---- layouts ---------------------------------------------------------------------------------------------------------


def walk_geneval(folder):
    """(metadata, sample pictures) of each prompt, found as the benchmark's README lays them out."""
    for own in sorted(folder.iterdir()):
        if own.is_dir() and own.name.isdigit():
            with open(own / "metadata.jsonl") as file:
                metadata = json.load(file)
            samples = sorted(path for path in (own / "samples").iterdir() if re.fullmatch(r"\d+\.png", path.name))
            yield own.name, metadata, samples


def test_geneval_layout(tmp_path):
    result = run("geneval", [geneval_file(tmp_path)], tmp_path / "out", grids=True)
    found = list(walk_geneval(tmp_path / "out"))
    assert [name for name, _, _ in found] == ["00000", "00001"]
    assert [metadata for _, metadata, _ in found] == GENEVAL
    for _, _, samples in found:
        assert [path.name for path in samples] == ["0000.png", "0001.png", "0002.png", "0003.png"]
        assert len({Image.open(path).getpixel((0, 0)) for path in samples}) == 4
    assert Image.open(tmp_path / "out/00000/grid.png").size == (16, 16)
    assert result["scores"] == {} and "scorer" in result["not_computed"] and result["pictures"] == 8


def test_geneval_scores_from_its_own_scorer(tmp_path):
    file = geneval_file(tmp_path)
    run("geneval", [file], tmp_path / "out")
    rows = [
        {"filename": f"elsewhere/{folder}/samples/{sample:04d}.png", "tag": "x", "correct": right}
        for folder, rights in (("00000", (True, True, True, False)), ("00001", (False, True, False, False)))
        for sample, right in enumerate(rights)
    ]
    scored = write(tmp_path / "results.jsonl", "\n".join(map(json.dumps, rows)))
    scores = run("geneval", [file], tmp_path / "out", scorer_output=scored)["scores"]
    assert {name: own["score"] for name, own in scores.items()} == {
        "single_object": 0.75,
        "counting": 0.25,
        "overall": 0.5,
    }
    write(scored, "\n".join(map(json.dumps, rows[:-1])))
    with pytest.raises(ValueError, match="other pictures"):
        run("geneval", [file], tmp_path / "out", scorer_output=scored)


def test_dpg_layout(tmp_path):
    for name in ("12", "whisper"):
        write(tmp_path / "prompts" / f"{name}.txt", f"a picture of {name}\n")
    run("dpg", [tmp_path / "prompts"], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/images").iterdir()) == ["12.png", "whisper.png"]
    sheet = Image.open(tmp_path / "out/images/12.png")
    samples = [Image.open(tmp_path / f"out/run/samples/12/{sample}.png").getpixel((0, 0)) for sample in range(4)]
    assert sheet.size == (16, 16) and [sheet.getpixel(own) for own in ((0, 0), (8, 0), (0, 8), (8, 8))] == samples
    with pytest.raises(ValueError, match="square"):
        run("dpg", [tmp_path / "prompts"], tmp_path / "wide", make_drawer=lambda: FakeDrawer((8, 16)))


def test_pictures_side_by_side_have_one_size():
    with pytest.raises(ValueError, match="one size"):
        side_by_side([Image.new("RGB", (4, 4)), Image.new("RGB", (8, 4))])


def edit_files(tmp_path, kind):
    for name, color in (("animal/1.jpg", "red"), ("2.png", "blue")):
        path = tmp_path / "sources" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 6), color).save(path)
    if kind == "imgedit":
        edits = {
            "1082": {"id": "animal/1.jpg", "prompt": "make it dark", "edit_type": "adjust"},
            "673": {"id": "2.png", "prompt": "as a woodcut", "edit_type": "style"},
        }
        return write(tmp_path / "basic_edit.json", edits)
    if kind == "gedit":
        rows = [
            {
                "key": key,
                "task_type": task,
                "instruction": "change it",
                "instruction_language": "en",
                "input_image": source,
            }
            for key, task, source in (("a1", "color_alter", "animal/1.jpg"), ("b2", "subject-add", "2"))
        ]
    else:
        rows = [
            {
                "key": key,
                "task_type": task,
                "instruction": f"them {key}",
                "input_images": ["animal/1.jpg", "2.png"],
            }
            for key, task in (("k1", "single_object"), ("k2", "scene_character"))
        ]
    return write(tmp_path / f"{kind}.jsonl", "\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize(
    ("kind", "pictures"),
    [
        ("imgedit", ["1082.png", "673.png"]),
        (
            "gedit",
            [
                "fullset/color_alter/en/a1.png",
                "fullset/color_alter/en/a1_SRCIMG.png",
                "fullset/subject-add/en/b2.png",
                "fullset/subject-add/en/b2_SRCIMG.png",
            ],
        ),
        ("omnicontext", ["fullset/scene_character/k2.png", "fullset/single_object/k1.png"]),
    ],
)
def test_layouts_of_edits(kind, pictures, tmp_path):
    file = edit_files(tmp_path, kind)
    run(kind, [file], tmp_path / "out", sources=tmp_path / "sources")
    assert [name for name in content_of(tmp_path / "out") if name.endswith(".png")] == pictures


def test_gedit_reads_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    picture = Image.new("RGB", (10, 6), "red")
    row = {
        "key": "a1",
        "task_type": "color_alter",
        "instruction": "change it",
        "instruction_language": "en",
        "input_image": Image.new("RGB", (4, 4)),
        "input_image_raw": picture,
    }
    datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / "gedit.parquet"))
    (item,) = read_items("gedit", [tmp_path / "gedit.parquet"])
    assert item.sources[0]().size == (10, 6)


def test_prism_and_cvtg_layouts(tmp_path):
    for track in ("entity", "style"):
        write(tmp_path / "captions" / f"{track}.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n')
    items = read_items("prism", [tmp_path / "captions"])
    assert [item.pictures[0] for item in items] == ["entity/0.png", "entity/1.png", "style/0.png", "style/1.png"]
    for subset in ("CVTG", "CVTG-Style"):
        write(tmp_path / subset / "2.json", {"data_list": [{"index": 7, "prompt": "a sign 'Open Now' and 'ok'"}]})
        write(tmp_path / subset / "2_combined.json", {"7": "a sign"})
    items = read_items("cvtg", [tmp_path])
    assert [item.pictures[0] for item in items] == ["CVTG/2/7.png", "CVTG-Style/2/7.png"]


# ---- seeds, rewriting, settings --------------------------------------------------------------------------------------


def test_a_picture_depends_on_its_own_seed_alone(tmp_path):
    file = geneval_file(tmp_path)
    for batch, images in ((1, 4), (3, 4), (8, 2)):
        run("geneval", [file], tmp_path / f"{batch}", batch_size=batch, images=images, seed=3)
    assert content_of(tmp_path / "1/00001/samples") == content_of(tmp_path / "3/00001/samples")
    assert content_of(tmp_path / "8/00001/samples").items() <= content_of(tmp_path / "1/00001/samples").items()
    seeds = {seed_of(seed, prompt, sample) for seed in range(5) for prompt in range(100) for sample in range(4)}
    assert len(seeds) == 2000


def test_rewritten_prompts_are_drawn_and_recorded(tmp_path):
    file = geneval_file(tmp_path)
    rewritten = write(tmp_path / "r.json", {own["prompt"]: f"{own['prompt']}, in sharp focus" for own in GENEVAL})
    plain = run("geneval", [file], tmp_path / "plain")
    other = run("geneval", [file], tmp_path / "other", rewritten=rewritten)
    assert plain["settings"]["rewritten_prompts_sha256"] is None and other["settings"]["rewritten_prompts_sha256"]
    one, two = (tmp_path / f"{name}/00000/samples/0000.png" for name in ("plain", "other"))
    assert one.read_bytes() != two.read_bytes()
    assert [metadata for _, metadata, _ in walk_geneval(tmp_path / "other")] == GENEVAL
    write(rewritten, {GENEVAL[0]["prompt"]: "short"})
    with pytest.raises(ValueError, match="lacks 1 of 2 prompts"):
        run("geneval", [file], tmp_path / "third", rewritten=rewritten)
    assert not (tmp_path / "third").exists()


def test_a_folder_of_other_settings_is_refused_by_name(tmp_path):
    file = geneval_file(tmp_path)
    run("geneval", [file], tmp_path / "out", seed=1)
    before = content_of(tmp_path / "out")
    with pytest.raises(ValueError, match="seed: 1 there, 2 now"):
        run("geneval", [file], tmp_path / "out", seed=2)
    with pytest.raises(ValueError, match="sampling_asked"):
        run("geneval", [file], tmp_path / "out", seed=1, top_k=5)
    with pytest.raises(ValueError, match="benchmark: 'geneval' there, 'wise' now"):
        run("wise", [wise_file(tmp_path)], tmp_path / "out", seed=1)
    assert content_of(tmp_path / "out") == before
    (tmp_path / "out/00000/samples/0000.png").unlink()
    with pytest.raises(ValueError, match="sampling"):
        run("geneval", [file], tmp_path / "out", seed=1, make_drawer=lambda: FakeDrawer(sampling={"top_k": 9}))
    write(tmp_path / "full/thing.txt", "mine")
    with pytest.raises(ValueError, match=r"thing\.txt"):
        run("geneval", [file], tmp_path / "full")


def test_another_judge_in_the_same_folder_is_refused(tmp_path):
    file = wise_file(tmp_path, (1,))
    with StubJudge(wise_answer) as stub:
        run("wise", [file], tmp_path / "out", judge=judge_at(stub))
        with pytest.raises(ValueError, match=r"model: 'stub' there, 'other' now.*remove"):
            run("wise", [file], tmp_path / "out", judge=Judge(stub.url, "other"))
        template = write(tmp_path / "t.txt", "Judge <prompt>")
        with pytest.raises(ValueError, match="template"):
            run("wise", [file], tmp_path / "out", judge=judge_at(stub), template=template)
    assert run("wise", [file], tmp_path / "out")["scores"]


# ---- stopped and resumed ---------------------------------------------------------------------------------------------


class Stopped(BaseException):
    pass


def stop_after(monkeypatch, steps):
    """Stop at the step numbered `steps` of a run: before a file, after it, before a draw, after a verdict."""
    left = [steps]

    def count():
        left[0] -= 1
        if left[0] < 0:
            raise Stopped

    def around(function):
        def wrapped(*args, **kwargs):
            count()
            result = function(*args, **kwargs)
            count()
            return result

        return wrapped

    def add(self, verdict, original=Verdicts.add):
        original(self, verdict)
        count()

    monkeypatch.setattr(run_module, "save_picture", around(run_module.save_picture))
    monkeypatch.setattr(run_module, "write_whole", around(run_module.write_whole))
    monkeypatch.setattr(FakeDrawer, "draw", around(FakeDrawer.draw))
    monkeypatch.setattr(Verdicts, "add", add)


def test_a_run_stopped_at_any_point_goes_on(tmp_path, drawn):
    file = wise_file(tmp_path, (1, 901))
    with StubJudge(wise_answer) as stub:
        run("wise", [file], tmp_path / "whole", judge=judge_at(stub), batch_size=1)
        whole = content_of(tmp_path / "whole")
        for steps in range(100):
            stub.requests.clear()
            drawn.clear()
            output = tmp_path / f"{steps}"
            with pytest.MonkeyPatch.context() as monkeypatch:
                stop_after(monkeypatch, steps)
                try:
                    run("wise", [file], output, judge=judge_at(stub), batch_size=1)
                    break
                except Stopped:
                    pass
            # A picture that was drawn but had not reached the disk is drawn again; nothing else is.
            kept = {path.stem for path in output.glob("*.png")}
            once = Counter(drawn)
            run("wise", [file], output, judge=judge_at(stub), batch_size=1)
            assert all(drawn[key] == once[key] == 1 for key in kept)
            assert set(stub.requests.values()) == {1} and len(stub.requests) == 2
            assert content_of(output) == whole
        assert steps > 10


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_harness import FakeDrawer, run
from nextflow_hf.harness.judge import Judge

class SlowDrawer(FakeDrawer):
    def draw(self, drawings):
        time.sleep(0.02)
        return super().draw(drawings)

print("go", flush=True)
run("wise", [Path({file!r})], Path({output!r}), judge=Judge({url!r}, "stub"), make_drawer=SlowDrawer, batch_size=1,
    workers=2)
"""


def test_a_killed_run_goes_on(tmp_path):
    file = wise_file(tmp_path, range(1, 21))
    output = tmp_path / "out"

    def slow_answer(text, number):
        time.sleep(0.02)
        return wise_answer(text, number)

    with StubJudge(slow_answer) as stub:
        script = KILLED.format(tests=str(Path(__file__).parent), file=str(file), output=str(output), url=stub.url)
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        deadline = time.time() + 60
        while stub.requests.total() < 8 and time.time() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        verdicts = output / "run/verdicts.jsonl"
        kept = verdicts.read_bytes().count(b"\n")
        pictures = content_of(output)
        assert 1 < kept < 21
        # A crash may also leave half a line.
        with open(verdicts, "ab") as own:
            own.write(b'{"key": "20", "quest')
        result = run("wise", [file], output, judge=judge_at(stub), make_drawer=FakeDrawer)
        # What was in flight is asked again; at most one request per worker.
        assert stub.requests.total() <= 20 + 2 and len(stub.requests) == 20
    assert result["pictures"] == 20 and result["unjudged"] == result["unasked"] == 0
    assert verdicts.read_bytes().count(b"\n") == 1 + 20
    after = content_of(output)
    assert all(after[name] == own for name, own in pictures.items() if name.endswith(".png"))
    assert not list(output.rglob("*.unfinished"))


def test_a_line_that_is_no_verdict_is_an_error(tmp_path):
    for content, number in (('{"key": 1}\n', 1), ('{"judge": {}}\n{"key": 1}\n', 2)):
        with pytest.raises(ValueError, match=f"line {number}"):
            Verdicts(write(tmp_path / "verdicts.jsonl", content))


# ---- the judge -------------------------------------------------------------------------------------------------------


def test_wise_is_judged_and_weighted(tmp_path):
    file = wise_file(tmp_path)
    with StubJudge(wise_answer) as stub:
        result = run("wise", [file], tmp_path / "out", judge=judge_at(stub, key="secret"))
        assert all(path == "/v1/chat/completions" and model == "stub" for path, _, model in stub.headers)
        assert {headers["Authorization"] for _, headers, _ in stub.headers} == {"Bearer secret"}
        (address,) = stub.pictures[0]
        picture = Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))))
    assert picture.getpixel((0, 0)) == Image.open(tmp_path / "out/1.png").getpixel((0, 0))
    wiscores = {
        category: (0.7 * (identity % 3) + 0.2 * 2 + 0.1 * 1) / 2
        for category, identity in zip(WISE_WEIGHTS, (1, 401, 568, 701, 801, 901))
    }
    for category, wanted in wiscores.items():
        assert result["scores"][category]["score"] == pytest.approx(wanted, abs=1e-4)
    overall = sum(WISE_WEIGHTS[own] * wanted for own, wanted in wiscores.items())
    assert result["scores"]["overall"]["score"] == pytest.approx(overall, abs=1e-4)
    assert not any(b"secret" in own for own in content_of(tmp_path / "out").values())
    assert result["settings"]["judge"]["model"] == "stub" and result["settings"]["judge"]["template"] == "fallback"


def test_the_overall_score_of_wise_needs_every_category(tmp_path):
    with StubJudge(wise_answer) as stub:
        result = run("wise", [wise_file(tmp_path, (1, 2))], tmp_path / "out", judge=judge_at(stub))
    assert set(result["scores"]) == {"cultural"}


def test_malformed_answers_are_asked_again_and_never_scored(tmp_path):
    def reply(text, number):
        if "riddle 1." in text.replace("\n", "."):
            return "Consistency: 5\nRealism: 2\nAesthetic Quality: 1"
        return "I like it." if number < 3 else wise_answer(text, number)

    with StubJudge(reply) as stub:
        result = run("wise", [wise_file(tmp_path, (1, 2))], tmp_path / "out", judge=judge_at(stub))
        assert sorted(stub.requests.values()) == [3, 3]
        assert run("wise", [wise_file(tmp_path, (1, 2))], tmp_path / "out", judge=judge_at(stub))["unjudged"] == 1
        assert stub.requests.total() == 6
    assert result["unjudged"] == 1 and result["scores"]["cultural"]["score"] == 0.95
    verdict = Verdicts(tmp_path / "out/run/verdicts.jsonl").get("1", "wiscore")
    assert verdict.marks is None and "between 0 and 2" in verdict.reason


def test_a_busy_endpoint_is_waited_for(tmp_path):
    waits = []

    def reply(text, number):
        return {1: (429, {"Retry-After": "7"}, "slow down"), 2: (503, {}, "")}.get(number, wise_answer(text, number))

    with StubJudge(reply) as stub:
        verdict = judge_at(stub, sleep=waits.append).ask("1", "q", "riddle 1", [], lambda answer: [1.0])
    assert verdict.marks == [1.0] and waits == [7.0, 2.0]


@pytest.mark.parametrize("body", ["<html>welcome</html>", '{"error": {"code": 429, "message": "slow down"}}'])
def test_an_answer_that_is_none_is_no_verdict(body, tmp_path):
    file = wise_file(tmp_path, (1, 2))
    no_chat = pytest.raises(ConnectionError, match="no chat completion")
    with StubJudge(lambda text, number: (200, {}, body)) as stub, no_chat:
        run("wise", [file], tmp_path / "out", judge=judge_at(stub, tries=2))
    with StubJudge(wise_answer) as stub:
        assert run("wise", [file], tmp_path / "out", judge=judge_at(stub))["unjudged"] == 0


def test_an_answer_cut_within_a_character_is_kept(tmp_path):
    verdicts = Verdicts(tmp_path / "verdicts.jsonl")
    verdicts.claim({"model": "m"})
    verdicts.add(Verdict("1", "q", None, "nice \ud83d"))
    assert Verdicts(tmp_path / "verdicts.jsonl").get("1", "q").answer == "nice \ud83d"


def test_a_key_is_cleaned_and_never_shown():
    Judge("http://judge/v1", "m", key="sk-secret\r\n")
    with pytest.raises(ValueError, match="not shown") as refused:
        Judge("http://judge/v1", "m", key="sk-\nsecret")
    assert "secret" not in str(refused.value)


def test_an_endpoint_that_stays_away_loses_nothing(tmp_path):
    file = wise_file(tmp_path, (1, 2, 3))
    away = [False]

    def reply(text, number):
        return (500, {}, "down") if away[0] and "riddle 3" in text else wise_answer(text, number)

    with StubJudge(reply) as stub:
        away[0] = True
        with pytest.raises(ConnectionError, match="same command"):
            run("wise", [file], tmp_path / "out", judge=judge_at(stub, tries=2))
        away[0] = False
        result = run("wise", [file], tmp_path / "out", judge=judge_at(stub))
        assert sorted(stub.requests.values()) == [1, 1, 3]
    assert result["unjudged"] == result["unasked"] == 0


@pytest.mark.parametrize("status", [301, 400, 401, 404])
def test_a_refusal_of_the_setup_stops_at_once(status, tmp_path):
    with StubJudge(lambda text, number: (status, {"Location": "http://127.0.0.1:1/"}, "no such model")) as stub:
        with pytest.raises(ValueError, match=rf"HTTP {status}.*"):
            run("wise", [wise_file(tmp_path)], tmp_path / "out", judge=judge_at(stub))
        assert stub.requests.total() <= 2
        assert not (tmp_path / "out/run/verdicts.jsonl").exists()
    # The mistake can be mended in the same folder.
    with StubJudge(wise_answer) as stub:
        judge = Judge(stub.url, "right")
        assert (
            run("wise", [wise_file(tmp_path)], tmp_path / "out", judge=judge)["settings"]["judge"]["model"] == "right"
        )


def test_a_refusal_of_one_request_is_unjudged(tmp_path):
    def reply(text, number):
        return (400, {}, "content policy") if "riddle 1" in text else "yes" if "word" in text else wise_answer(text, 1)

    with StubJudge(reply) as stub:
        result = run("wise", [wise_file(tmp_path, (1, 2))], tmp_path / "out", judge=judge_at(stub))
    assert result["unjudged"] == 1 and set(result["scores"]) == {"cultural"}


@pytest.mark.parametrize("url", ["judge.example/v1", "ftp://judge", "https://me:secret@judge/v1", "https://j/v1?key=s"])
def test_addresses_that_are_refused(url):
    with pytest.raises(ValueError, match="address"):
        Judge(url, "model")


@pytest.mark.parametrize(
    ("read", "answer", "marks"),
    [
        (read_lines(3, 1, 5), "Brief reasoning: fine\nA: 1\nB & C: 5\nD: 3\n", [1, 5, 3]),
        (read_lines(3, 1, 5), "A: 1\nB: 5\n", None),
        (read_lines(3, 1, 5), "A: 0\nB: 5\nC: 1", None),
        (read_lines(("One", "Two"), 0, 2), "**Two:** 1\r\n**one**: 2", [2, 1]),
        (read_lines(("One", "Two"), 0, 2), "One: 1\nTwo: 1\nTwo: 2", None),
        (read_lines(("One", "Two"), 0, 2), "One: 1.5\nTwo: 1", None),
        (read_score(2, 0, 10), '```json\n{"score": [3, 7.5], "reasoning": "x"}\n```', [3, 7.5]),
        (read_score(2, 0, 10), '{"score": 3}', None),
        (read_score(1, 0, 10), '{"score": 3}', [3]),
        (read_score(1, 0, 10), '{"score": "3"}', None),
        (read_score(1, 0, 10), '{"score": true}', None),
        (read_score(1, 0, 10), '{"score": NaN}', None),
        (read_score(1, 0, 10), '{"score": 11}', None),
        (read_score(1, 0, 10), '{"score": 3} or {"score": 4}', None),
        (read_score(1, 0, 10), '{"score": 3', None),
        (read_score(1, 0, 10), "3", None),
    ],
)
def test_answers_are_read_strictly(read, answer, marks):
    if marks is None:
        with pytest.raises(ValueError):
            read(answer)
    else:
        assert read(answer) == marks


def test_templates_of_the_benchmark(tmp_path):
    edit_files(tmp_path, "imgedit")
    items = read_items("imgedit", [tmp_path / "basic_edit.json"], tmp_path / "sources")
    file = write(tmp_path / "prompts.json", {"adjust": "Adjust: <edit_prompt>", "style": "Style: <edit_prompt>"})
    (question,) = QUESTIONS["imgedit"]
    assert Templates([question], items, file).fill(question, items[1]) == "Style: as a woodcut"
    assert Templates([question], items).sha256 != Templates([question], items, file).sha256
    with pytest.raises(ValueError, match="lacks \\['style'\\]"):
        Templates([question], items, write(tmp_path / "p.json", {"adjust": "<edit_prompt>"}))
    with pytest.raises(ValueError, match="no place for the prompt"):
        Templates([question], items, write(tmp_path / "p.json", {"adjust": "<edit_prompt>", "style": "now"}))
    with pytest.raises(ValueError, match="one template"):
        Templates([question], items, write(tmp_path / "p.txt", "<edit_prompt>"))


def test_what_a_prompt_says_is_no_place(tmp_path):
    records = json.loads(wise_file(tmp_path, (1,)).read_text())
    records[0]["Prompt"] = "draw <explanation>"
    items = read_items("wise", [write(tmp_path / "wise.json", records)])
    (question,) = QUESTIONS["wise"]
    text = Templates([question], items, write(tmp_path / "t.txt", "<prompt> | <explanation>")).fill(question, items[0])
    assert text == "draw <explanation> | meaning 1"


def test_scores_of_edits(tmp_path):
    marks = {"SC": [9.0, 4.0], "PQ": [9.0, 9.0]}
    items = read_items("gedit", [edit_files(tmp_path, "gedit")], tmp_path / "sources")
    verdicts = Verdicts(tmp_path / "v.jsonl")
    for item in items:
        for question, own in marks.items():
            verdicts.add(Verdict(item.key, question, own, ""))
    scores = score_verdicts("gedit", items, verdicts)
    assert scores["en/color_alter: SC"]["score"] == 4 and scores["en/color_alter: PQ"]["score"] == 9
    assert scores["en, mean of edits: O"]["score"] == scores["en, mean of tasks: O"]["score"] == 6
    items = read_items("omnicontext", [edit_files(tmp_path, "omnicontext")], tmp_path / "sources")
    for item, (following, consistency) in zip(items, ((4.0, 9.0), (1.0, 1.0))):
        verdicts.add(Verdict(item.key, "PF", [following], ""))
        verdicts.add(Verdict(item.key, "SC", [consistency], ""))
    scores = score_verdicts("omnicontext", items, verdicts)
    assert scores["single_object: overall"]["score"] == 6 and scores["mean of tasks: overall"]["score"] == 3.5


def test_judging_edits_shows_the_sources_first(tmp_path):
    def reply(text, number):
        return '{"score": [8, 9]}'

    file = edit_files(tmp_path, "gedit")
    with StubJudge(reply) as stub:
        result = run("gedit", [file], tmp_path / "out", sources=tmp_path / "sources", judge=judge_at(stub))
        assert Counter(map(len, stub.pictures)) == {2: 2, 1: 2}
        (shown, *_) = next(own for own in stub.pictures if len(own) == 2)
    # The benchmark brings pictures to 512 x 512 pixels in area.
    width, height = Image.open(io.BytesIO(base64.b64decode(shown.split(",")[1]))).size
    assert abs(width * height - 512 * 512) < 2000 and abs(width / height - 10 / 6) < 0.01
    assert result["scores"]["en, mean of edits: O"]["score"] == 8


# ---- words -----------------------------------------------------------------------------------------------------------


def test_words_are_scored(tmp_path):
    entries = [{"index": 0, "prompt": "a sign 'Open Now'"}, {"index": 1, "prompt": "'no no' on a wall"}]
    file = write(tmp_path / "CVTG/2.json", {"data_list": entries})
    assert words_of(entries[0]["prompt"]) == ["open", "now"]
    read = write(tmp_path / "ocr.json", {"CVTG/2/0.png": ["OPEN", "mow"], "CVTG/2/1.png": ["no"]})
    result = run("cvtg", [file], tmp_path / "out", ocr_file=read)
    assert result["scores"]["all: word accuracy"]["score"] == 0.5
    assert result["scores"]["CVTG/2: NED"]["score"] == pytest.approx((1 + 2 / 3 + 1 + 1) / 4, abs=1e-4)
    by_reader = run("cvtg", [file], tmp_path / "out", reader=lambda picture: ["open now"])
    assert by_reader["scores"]["all: word accuracy"]["score"] == 0.5
    with pytest.raises(ValueError, match="lacks 1 picture"):
        run("cvtg", [file], tmp_path / "out", ocr_file=write(tmp_path / "o.json", {"CVTG/2/0.png": []}))


# ---- results, refusals, the command ----------------------------------------------------------------------------------


def test_results_go_into_a_model_card(tmp_path):
    with StubJudge(wise_answer) as stub:
        run("wise", [wise_file(tmp_path)], tmp_path / "out", judge=judge_at(stub))
    entries = eval_results(tmp_path / "out/results.json")
    assert {own.metric_type for own in entries} == {*WISE_WEIGHTS, "overall"}
    assert entries[0].dataset_name == "WISE" and entries[0].metric_args["seed"] == 0
    from huggingface_hub import ModelCardData

    assert "model-index" in ModelCardData(model_name="x", eval_results=entries).to_dict()
    run("geneval", [geneval_file(tmp_path)], tmp_path / "geneval")
    with pytest.raises(ValueError, match="no scores"):
        eval_results(tmp_path / "geneval/results.json")


def test_a_command_that_failed_before_drawing_may_be_mended(tmp_path):
    def fail():
        raise ValueError("no such checkpoint")

    file = geneval_file(tmp_path)
    with pytest.raises(ValueError, match="no such checkpoint"):
        run("geneval", [file], tmp_path / "out", make_drawer=fail, seed=1)
    assert run("geneval", [file], tmp_path / "out", seed=2)["pictures"] == 8


def test_a_prompt_that_cannot_be_drawn_is_refused_before_drawing(tmp_path, drawn):
    file = write(
        tmp_path / "m.jsonl", "\n".join(json.dumps({**GENEVAL[0], "prompt": own}) for own in ("a", "<|im_end|>"))
    )
    with pytest.raises(ValueError, match="00001"):
        run("geneval", [file], tmp_path / "out")
    assert not drawn


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("geneval", "", "no prompts"),
        ("geneval", "{", "line 1 is no JSON"),
        ("geneval", '{"tag": "x"}', "no 'prompt'"),
        ("geneval", '{"tag": "x", "prompt": " "}', "empty"),
        ("wise", "{}", "JSON list"),
        ("wise", '[{"prompt_id": 1001, "Prompt": "a", "Subcategory": "b", "Explanation": "c"}]', "1 to 1000"),
        ("wise", '[{"prompt_id": true, "Prompt": "a", "Subcategory": "b", "Explanation": "c"}]', "whole number"),
        ("prism", '{"prompt": "a"}', "no track"),
        ("imgedit", "[]", "one JSON object"),
        ("imgedit", '{"../1": {"id": "x", "prompt": "a", "edit_type": "b"}}', "without slashes"),
        ("imgedit", '{"1": {"id": "x.png", "prompt": "a", "edit_type": "b"}}', "--sources"),
        ("cvtg", '{"data_list": [{"index": 0, "prompt": "no words"}]}', "single quotes"),
        ("cvtg", "{}", "data_list"),
    ],
)
def test_files_that_are_refused(name, content, message, tmp_path):
    ending = {"geneval": "jsonl", "prism": "jsonl"}.get(name, "json")
    with pytest.raises(ValueError, match=message):
        run(name, [write(tmp_path / f"file.{ending}", content)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_source_pictures_are_checked_first(tmp_path):
    file = edit_files(tmp_path, "imgedit")
    (tmp_path / "sources/2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read"):
        read_items("imgedit", [file], tmp_path / "sources")
    (tmp_path / "sources/2.png").unlink()
    with pytest.raises(ValueError, match="is not in"):
        read_items("imgedit", [file], tmp_path / "sources")
    outside = write(tmp_path / "o.json", {"1": {"id": "../basic_edit.json", "prompt": "a", "edit_type": "b"}})
    with pytest.raises(ValueError, match="outside"):
        read_items("imgedit", [outside], tmp_path / "sources")


def test_other_source_pictures_are_other_settings(tmp_path):
    file = edit_files(tmp_path, "imgedit")
    run("imgedit", [file], tmp_path / "out", sources=tmp_path / "sources")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "sources/2.png")
    with pytest.raises(ValueError, match="sources_sha256"):
        run("imgedit", [file], tmp_path / "out", sources=tmp_path / "sources")


def test_a_cache_of_links_is_read_by_the_names_of_the_links(tmp_path):
    files = tmp_path / "blobs"
    files.mkdir()
    records = {"data_list": [{"index": 0, "prompt": "a sign 'open'"}]}
    for name in ("CVTG", "CVTG-Style"):
        write(files / name, records)
        (tmp_path / "snapshot" / name).mkdir(parents=True)
        (tmp_path / "snapshot" / name / "2.json").symlink_to(files / name)
    items = read_items("cvtg", [tmp_path / "snapshot"])
    assert [item.key for item in items] == ["CVTG/2/0", "CVTG-Style/2/0"]


def test_two_prompts_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="named '1'"):
        read_items("wise", [wise_file(tmp_path, (1, 1))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["geneval"], "--prompts-file"),
        (["geneval", "--prompts-file", "{tmp}/none.jsonl"], "--output"),
        (["geneval", "--prompts-file", "{tmp}/none.jsonl", "--output", "{tmp}/out"], "none.jsonl"),
        (["geneval", "--prompts", "3"], "--prompts"),
        (["scenes", "--judge-model", "m"], "--judge-model"),
        (["scenes", "--prompts-file", "f"], "--prompts-file"),
        (["geneval", *["--prompts-file", "{file}", "--output", "{tmp}/out"], "--images", "0"], "at least one"),
        (["geneval", *["--prompts-file", "{file}", "--output", "{tmp}/out"], "--sources", "{tmp}"], "no source"),
        (["geneval", *["--prompts-file", "{file}", "--output", "{tmp}/out"], "--judge-url", "http://x"], "both"),
        (
            ["geneval", *["--prompts-file", "{file}", "--output", "{tmp}/out"]]
            + ["--judge-url", "http://x", "--judge-model", "m"],
            "not judged",
        ),
        (["geneval", *["--prompts-file", "{file}", "--output", "{tmp}/out"], "--judge-attempts", "2"], "a judge"),
        (["geneval", *["--prompts-file", "{file}", "--output", "{tmp}/out"], "--ocr-file", "x"], "not scored by"),
        (["geneval", *["--prompts-file", "{file}", "--output", "{tmp}/out"], "--batch-size", "0"], "batch_size"),
        (
            ["wise", *["--prompts-file", "{file}", "--output", "{tmp}/out"]]
            + ["--judge-url", "http://x", "--judge-model", "m", "--judge-key-variable", "NO_SUCH_KEY"],
            "NO_SUCH_KEY",
        ),
        (["wise", *["--prompts-file", "{file}", "--output", "{tmp}/out"], "--images", "4"], "takes 1 picture"),
    ],
)
def test_commands_that_are_refused(arguments, message, tmp_path, capsys):
    file = geneval_file(tmp_path)
    assert main(["evaluate", *(own.format(tmp=tmp_path, file=file) for own in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_benchmark_is_a_suite(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in BENCHMARKS) and "--judge-url" in out


def test_edits_have_the_shape_of_their_source(tmp_path):
    drawer = CheckpointDrawer("mini")
    wide, square = Image.new("RGB", (90, 50), "white"), Image.new("RGB", (64, 64), "black")
    drawings = [Drawing("a", "add a star", (square,), 3), Drawing("b", "add a star", (wide,), 4)]
    both = drawer.draw(drawings)
    assert [own.size for own in both] == [(64, 64), (80, 48)]
    (alone,) = drawer.draw(drawings[1:])
    assert np.abs(np.asarray(alone, int) - np.asarray(both[1], int)).max() <= 1
    several = Drawing("c", "both of them", (square, wide), 5)
    assert drawer.draw([several])[0].size == (64, 64)
    # Beside one of several pictures, too.
    assert [own.size for own in drawer.draw([drawings[1], several])] == [(80, 48), (64, 64)]


def test_a_source_of_no_shape_that_the_model_knows_is_refused_by_name_before_anything_is_drawn(tmp_path):
    file = edit_files(tmp_path, "imgedit")
    Image.new("RGB", (400, 8), "blue").save(tmp_path / "sources/2.png")
    with pytest.raises(ValueError, match="prompt '673' cannot be drawn: A picture of 8x400"):
        evaluate_benchmark("imgedit", [file], tmp_path / "out", "mini", sources=tmp_path / "sources")
    assert not list(tmp_path.glob("out/**/*.png"))


def test_geneval_with_the_bundled_checkpoint(tmp_path, capsys):
    prompts = ("a red circle", "a blue star at the top")
    lines = [json.dumps({"tag": "single_object", "include": [], "prompt": own}) for own in prompts]
    file = write(tmp_path / "evaluation_metadata.jsonl", "\n".join(lines) + "\n")
    arguments = ["evaluate", "geneval", "--prompts-file", str(file), "--images", "2", "--seed", "4", "--top-k", "5"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out/results.json") in capsys.readouterr().out
    assert [len(samples) for _, _, samples in walk_geneval(tmp_path / "out")] == [2, 2]
    result = json.loads((tmp_path / "out/results.json").read_text())
    settings = result["settings"]
    assert settings["weights_sha256"] and settings["sampling"]["top_k"] == 5 and settings["dtype"] == "float32"
    assert result["picture_sizes"] == {"64x64": 4} and settings["torch"] and settings["transformers"]
    # The same command goes on with what is missing, whatever the batch: the same picture to a level.
    lost = tmp_path / "out/00001/samples/0001.png"
    before = np.asarray(Image.open(lost), int)
    lost.unlink()
    assert main([*arguments, "--output", str(tmp_path / "out"), "--batch-size", "1"]) == 0
    assert np.abs(np.asarray(Image.open(lost), int) - before).max() <= 1


# ---- understanding libraries -----------------------------------------------------------------------------------------


def fake_library(monkeypatch, **modules):
    """Modules of a library that is not installed, as small as the adapter needs."""
    for name, content in modules.items():
        parts = name.split("__")
        for end in range(1, len(parts) + 1):
            full = ".".join(parts[:end])
            if full not in sys.modules:
                monkeypatch.setitem(sys.modules, full, types.ModuleType(full))
        vars(sys.modules[".".join(parts)]).update(content)


def scene():
    from nextflow_hf.scenes import SceneSource

    return Image.fromarray(SceneSource((64, 64), 1, seed=2).image(0))


def test_lmms_eval_adapter(monkeypatch):
    class Base(abc.ABC):
        """The abstract methods and attributes of the library's base class."""

        is_simple = True

        def __init__(self):
            self.task_dict = {}

        @abc.abstractmethod
        def loglikelihood(self, requests): ...

        @abc.abstractmethod
        def generate_until(self, requests): ...

        @abc.abstractmethod
        def generate_until_multi_round(self, requests): ...

    registry = {}

    def register_model(*names):
        return lambda cls: [registry.update({name: cls}) for name in names] and cls

    fake_library(
        monkeypatch, lmms_eval__api__model={"lmms": Base}, lmms_eval__api__registry={"register_model": register_model}
    )
    monkeypatch.delitem(sys.modules, "nextflow_hf.harness.for_lmms_eval", raising=False)
    importlib.import_module("nextflow_hf.harness.for_lmms_eval")
    model = registry["nextflow"](pretrained="mini", batch_size="2", max_batch_size=None)
    assert model.is_simple is False
    model.task_dict = {"task": {"test": [scene()] * 3}}

    def to_messages(document):
        text = {"type": "text", "text": "describe the picture"}
        return [{"role": "user", "content": [{"type": "image", "url": document}, text]}]

    def request(index, settings, *before):
        return types.SimpleNamespace(args=(*before, to_messages, settings, index, "task", "test"))

    long, short = {"max_new_tokens": 40, "until": []}, {"max_new_tokens": 40, "until": [" "]}
    answers = model.generate_until([request(0, long), request(1, short, "text"), request(2, {"max_new_tokens": 2})])
    assert len(answers[0].split()) > 2 and answers[1] == answers[0].split()[0] and len(answers[2]) < len(answers[0])
    with pytest.raises(ValueError, match="do_sample"):
        model.generate_until([request(0, {"do_sample": True, "temperature": 1.0})])
    # Multiple choice: its own answer is likelier than another, and is its likeliest.
    choices = [answers[0], "a large green star", lambda document: answers[0]]
    scored = model.loglikelihood(
        [
            types.SimpleNamespace(args=("describe the picture", choice, lambda document: [document], 0, "task", "test"))
            for choice in choices
        ]
    )
    assert [is_likeliest for _, is_likeliest in scored] == [True, False, True]
    assert scored[0][0] == pytest.approx(scored[2][0], abs=1e-3) and 0 > scored[0][0] > scored[1][0]
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.generate_until_multi_round([])


def test_vlmevalkit_adapter(monkeypatch, tmp_path):
    class Base:
        """The part of the library's base class that calls a model."""

        def generate(self, message, dataset=None):
            return self.generate_inner(message, dataset)

    supported = {}
    fake_library(monkeypatch, vlmeval__config={"supported_VLM": supported}, vlmeval__vlm__base={"BaseModel": Base})
    monkeypatch.delitem(sys.modules, "nextflow_hf.harness.for_vlmevalkit", raising=False)
    adapter = importlib.import_module("nextflow_hf.harness.for_vlmevalkit")
    adapter.register_checkpoint("mine", "mini", max_new_tokens=3)
    scene().save(tmp_path / "scene.png")
    message = [
        {"type": "image", "value": str(tmp_path / "scene.png")},
        {"type": "text", "value": "describe the picture"},
    ]
    answer, short = (supported[name]().generate(message, dataset="MMBench") for name in ("nextflow-mini", "mine"))
    assert len(answer.split()) > 2 and len(short) < len(answer)


@pytest.mark.parametrize("adapter", ["for_lmms_eval", "for_vlmevalkit"])
def test_an_adapter_needs_its_library(adapter, monkeypatch):
    monkeypatch.delitem(sys.modules, f"nextflow_hf.harness.{adapter}", raising=False)
    with pytest.raises(ImportError):
        importlib.import_module(f"nextflow_hf.harness.{adapter}")


def test_a_judges_marks_are_a_reward():
    def reply(text, number):
        assert "MARK: NUMBER" in text
        return {"a star": "MARK: 5", "a cross": "**MARK**: 2"}.get(text.split("Request: ")[1].split("\n")[0], "no idea")

    with StubJudge(reply) as stub:
        reward = EndpointReward(stub.url, "stub", sleep=lambda seconds: None)
        picture = Image.new("RGB", (8, 8))
        prompts = ["a star", [{"role": "user", "content": "a cross"}], "a riddle", "nothing"]
        first, second, third, fourth = reward(prompts, [picture, picture, picture, None])
        assert (first, second, fourth) == (1.0, 0.25, 0.0) and np.isnan(third)
    with pytest.raises(ValueError, match="<request>"):
        EndpointReward("http://localhost", "stub", question="How good is it?")
