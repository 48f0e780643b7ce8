"""From records of any usual dataset to coded documents."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from dots import Dots
from PIL import Image
from small_models import small_model

from nextflow_hf.training.coded_documents import CodedDocuments, MixedSequences, shuffled
from nextflow_hf.training.documents import BrokenRecordError, DocumentReader, load_reader
from nextflow_hf.training.extraction import ExtractionSettings, extract
from nextflow_hf.training.pictures import DatasetPictures


def picture(index=0, size=(32, 32)):
    return Image.fromarray(Dots().image(index)).resize(size[::-1])


def png(index=0, size=(32, 32)):
    file = io.BytesIO()
    picture(index, size).save(file, format="PNG")
    return file.getvalue()


def captions(number=10, broken=()):
    return [
        {
            "id": f"dot-{i}",
            "text": f"dot {i}",
            "image": b"no picture" if i in broken else png(i % 8, (32, 32 if i % 3 else 64)),
        }
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def vq_model():
    return small_model().vq_model


SETTINGS = ExtractionSettings(resolution=32, shard_size=4, batch_size=3)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "record", "roles", "pictures"),
    [
        ("text", {"text": "a"}, [None], 0),
        ("text_to_image", {"text": ["a", "b"], "image": png()}, ["user", "assistant"], 1),
        ("image_to_text", {"image": {"bytes": png()}, "text": "a"}, ["user", "assistant"], 1),
        (
            "edit",
            {"image": picture(), "instruction": "a", "edited": np.zeros((8, 8, 3), np.uint8)},
            ["user", "assistant"],
            2,
        ),
        ("interleaved", {"content": [{"text": "a", "image": None}, {"text": None, "image": png()}]}, [None], 1),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "a"}]},
                    {"role": "assistant", "content": "b"},
                ],
                "images": [png()],
            },
            ["user", "assistant"],
            1,
        ),
    ],
)
def test_every_kind_of_record_becomes_a_document(kind, record, roles, pictures):
    ((_, document),) = DocumentReader([record], kind).read(0, 5)
    assert [turn["role"] for turn in document.messages] == roles and len(document.images) == pictures
    assert all(image.mode == "RGB" for image in document.images)


def test_turns_of_no_weight_are_only_looked_at():
    turn = {"role": "assistant", "content": [{"type": "image"}]}
    messages = [{"role": "user", "content": "a"}, {**turn, "weight": 0}, {"role": "user", "content": "b"}, turn]
    records = [{"messages": messages, "images": [png(), png()]}]
    ((_, document),) = DocumentReader(records, "messages").read(0, 1)
    assert document.learned == [False, True]
    assert list(DocumentReader(records, "messages").texts(5)) == ["user\na", "user\nb"]


@pytest.mark.parametrize(
    ("kind", "record", "reason"),
    [
        ("text", {"text": " "}, "empty or no text"),
        ("text", {}, "empty or no text"),
        ("text_to_image", {"text": "a", "image": None}, "missing"),
        ("text_to_image", {"text": "a", "image": b"GIF89a, but broken"}, "record r7"),
        ("text_to_image", {"text": "half a character: \ud83d", "image": b""}, "surrogates"),
        ("text_to_image", {"text": "a", "image": png()[:60]}, "record r7"),
        ("messages", {"messages": [], "images": []}, "no messages"),
        ("messages", {"messages": [{"role": "user", "content": "a"}], "images": [png()]}, "places for 0 pictures"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "video"}]}], "images": []}, "'video'"),
        ("interleaved", {"content": None}, "record r7"),
        ("interleaved", {"content": ["a", "b"]}, "record r7"),
        ("messages", {"messages": [{"role": "gpt", "content": "a"}], "images": []}, "'gpt'"),
        ("messages", {"messages": [{"role": "user", "content": "a", "weight": "0"}], "images": []}, "weight"),
        ("text", {"text": ["a", "an <|image_pad|> here"]}, "<|image_pad|>"),
    ],
)
def test_broken_records_say_which_and_why(kind, record, reason):
    ((_, found),) = DocumentReader([{"id": "r7", **record}], kind).read(0, 1)
    assert isinstance(found, BrokenRecordError) and reason in str(found) and "r7" in str(found)


def write_parquet(folder):
    datasets.Dataset.from_list(captions(5)).cast_column("image", datasets.Image()).to_parquet(folder / "a.parquet")
    return {"path": "parquet", "data_files": str(folder / "a.parquet")}


def write_imagefolder(folder):
    lines = []
    for own in captions(5):
        (folder / f"{own['id']}.png").write_bytes(own["image"])
        lines.append(json.dumps({"file_name": f"{own['id']}.png", "text": own["text"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"path": "imagefolder", "data_dir": str(folder)}


def write_jsonl(folder):
    lines = []
    for own in captions(5):
        (folder / f"{own['id']}.png").write_bytes(own["image"])
        lines.append(json.dumps({**own, "image": f"{own['id']}.png"}))
    (folder / "a.jsonl").write_text("\n".join(lines))
    return {"path": "json", "data_files": str(folder / "a.jsonl"), "folder": str(folder)}


def write_webdataset(folder):
    import tarfile

    with tarfile.open(folder / "a.tar", "w") as tar:
        for own in captions(5):
            for name, data in ((f"{own['id']}.png", own["image"]), (f"{own['id']}.txt", own["text"].encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return {
        "path": "webdataset",
        "data_files": str(folder / "a.tar"),
        "columns": {"image": "png", "text": "txt", "id": "__key__"},
    }


class Stream:
    column_names = ["text"]
    read = 0

    def __init__(self, number, first=0):
        self.number, self.first = number, first

    def skip(self, number):
        return Stream(self.number, self.first + number)

    def __iter__(self):
        for number in range(self.first, self.number):
            Stream.read += 1
            yield {"text": f"text {number}"}


def test_a_stream_is_read_once_whatever_the_shards():
    Stream.read = 0
    reader = DocumentReader(Stream(95), "text")
    shards = [[index for index, _ in reader.read(first, first + 10)] for first in range(0, 120, 20)]
    assert shards == [[*range(first, min(first + 10, 95))] for first in range(0, 120, 20)]
    assert Stream.read == 95
    ((index, document),) = reader.read(30, 31)
    assert index == 30 and document.messages[0]["content"][0]["text"] == "text 30"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", [write_parquet, write_imagefolder, write_jsonl, write_webdataset])
def test_the_usual_datasets_give_the_same_documents(tmp_path, monkeypatch, write, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    reader = load_reader({"kind": "text_to_image", "streaming": streaming, **write(tmp_path / "data")})
    documents = [document for _, document in reader.read(1, 100)]
    expected = [document for _, document in DocumentReader(captions(5), "text_to_image").read(1, 100)]
    for own, other in zip(documents, expected, strict=True):
        assert own.messages == other.messages
        assert np.array_equal(np.asarray(own.images[0]), np.asarray(other.images[0]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "poem", "class": "dots:Dots"}, "`kind` is one of"),
        ({"kind": "text", "columns": {"picture": "x"}, "class": "dots:Dots"}, "have the columns"),
        ({"kind": "text"}, "needs `class"),
        ({"kind": "text", "path": "json", "speed": 3}, "needs `class"),
        ({"kind": "text", "class": "dots:Dots", "path": "json"}, "stand in `args`"),
        ({"kind": "text", "path": "json", "data_files": "/nowhere/a.json"}, "cannot be loaded"),
    ],
)
def test_datasets_that_cannot_be_read_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        load_reader(spec)


def test_an_optional_column_that_is_named_must_be_there():
    records = datasets.Dataset.from_list([{"id": "a", "image": png(), "text": "dot 1"}])
    assert len(list(DocumentReader(records, "image_to_text").read(0, 1))) == 1
    for name in ("question", "id"):
        with pytest.raises(ValueError, match="need the columns .*'ask'"):
            DocumentReader(records, "image_to_text", {name: "ask"})


# ---- extraction ------------------------------------------------------------------------------------------------------


def test_codes_are_the_tokenizers_in_the_buckets_of_the_pictures(tmp_path, vq_model):
    manifests = extract({"dots": DocumentReader(captions(), "text_to_image")}, vq_model, tmp_path, SETTINGS)
    assert manifests["dots"]["documents"] == 10 and len(manifests["dots"]["shards"]) == 3
    documents = CodedDocuments(tmp_path / "dots", vq_model.fingerprint())
    assert len(documents) == 10
    seen = set()
    for index in range(10):
        name, messages, (image,) = documents[index]
        assert name == f"dot-{index}"
        assert messages[0]["content"] == [{"type": "text", "text": f"dot {index}"}]
        seen.add(image.grids)
        assert len(image.codes) == sum(h * w for h, w in image.grids) and image.codes == image.input_codes
    assert len(seen) == 2


def test_self_correction_feeds_other_codes_than_it_learns(tmp_path, vq_model):
    settings = ExtractionSettings(resolution=32, shard_size=4, top_k=5, corruption=0.6)
    extract({"dots": DocumentReader(captions(), "text_to_image")}, vq_model, tmp_path, settings)
    documents = CodedDocuments(tmp_path / "dots")
    differing = np.mean(
        [np.mean(np.array(i.codes) != np.array(i.input_codes)) for d in range(10) for i in documents[d][2]]
    )
    assert 0.3 < differing < 0.6


def test_pictures_that_are_only_looked_at_are_fed_as_they_are(tmp_path, vq_model):
    settings = ExtractionSettings(resolution=32, shard_size=4, top_k=5, corruption=0.6)
    edits = [{"image": png(i), "instruction": "next", "edited": png(i + 1)} for i in range(4)]
    extract({"dots": DocumentReader(edits, "edit")}, vq_model, tmp_path, settings)
    pairs = [CodedDocuments(tmp_path / "dots")[number][2] for number in range(4)]
    assert all(looked_at.input_codes == looked_at.codes for looked_at, _ in pairs)
    assert any(learned.input_codes != learned.codes for _, learned in pairs)
    assert CodedDocuments(tmp_path / "dots").manifest["image_sizes"] == [[32, 32]]


def test_broken_records_are_left_out_and_named(tmp_path, vq_model):
    reader = DocumentReader(
        [*captions(10, broken=(2, 7)), {"id": "strip", "text": "a", "image": png(0, (8, 400))}], "text_to_image"
    )
    (manifest,) = extract({"dots": reader}, vq_model, tmp_path, SETTINGS).values()
    assert manifest["records"] == 11 and manifest["documents"] == 8 == len(CodedDocuments(tmp_path / "dots"))
    assert [own.split(":")[0] for own in manifest["broken"]] == ["record dot-2", "record dot-7", "record strip"]
    strict = ExtractionSettings(resolution=32, shard_size=4, max_broken=1)
    with pytest.raises(ValueError, match="more than max_broken=1"):
        extract({"dots": reader}, vq_model, tmp_path / "strict", strict)
    # More may be broken, after all: what is made stays.
    first = tmp_path / "strict" / "dots" / "shard-00000.parquet"
    made = first.stat().st_mtime_ns
    lenient = ExtractionSettings(resolution=32, shard_size=4, max_broken=3)
    assert extract({"dots": reader}, vq_model, tmp_path / "strict", lenient)["dots"]["documents"] == 8
    assert first.stat().st_mtime_ns == made


def test_records_that_were_mended_are_made_once_their_shards_are_removed(tmp_path, vq_model):
    strict = ExtractionSettings(resolution=32, shard_size=4, max_broken=1)
    # Given again, the command does not end with what was made.
    for _ in range(2):
        with pytest.raises(ValueError, match=r"mend them .*: shard-00000\.parquet, shard-00001\.parquet\."):
            extract({"dots": DocumentReader(captions(broken=(2, 7)), "text_to_image")}, vq_model, tmp_path, strict)
    for own in (tmp_path / "dots").glob("shard-*"):
        own.unlink()
    manifest = extract({"dots": DocumentReader(captions(), "text_to_image")}, vq_model, tmp_path, strict)["dots"]
    assert manifest["documents"] == 10 and not manifest["broken"]


def test_other_data_is_refused_though_the_first_shard_is_empty(tmp_path, vq_model):
    broken = range(4)
    extract({"dots": DocumentReader(captions(broken=broken), "text_to_image")}, vq_model, tmp_path, SETTINGS)
    other = [{**own, "text": f"another {own['text']}"} for own in captions(broken=broken)]
    with pytest.raises(ValueError, match="codes of other data.*another dot 4"):
        extract({"dots": DocumentReader(other, "text_to_image")}, vq_model, tmp_path, SETTINGS)


def test_a_directory_of_other_data_is_refused_and_one_of_fewer_goes_on(tmp_path, vq_model):
    def documents(records, kind="text_to_image", **more):
        reader = DocumentReader(records, kind)
        reader.origin.update(more)
        manifest = extract({"dots": reader}, vq_model, tmp_path, SETTINGS)["dots"]
        return [CodedDocuments(tmp_path / "dots")[index][0] for index in range(manifest["documents"])]

    assert len(documents(captions(6), seed=1)) == 6
    other = [{**own, "text": f"another {own['text']}"} for own in captions(6)]
    for records, more, message in (
        (captions(3), {"seed": 1}, "6 records, but 'dots' has 3"),
        (other, {"seed": 1}, "codes of other data.*another dot 0"),
        (captions(6), {"seed": 2}, "dots: seed 1 -> 2"),
        (captions(6), {"seed": 1, "kind": "image_to_text"}, "dots: kind text_to_image -> image_to_text"),
    ):
        with pytest.raises(ValueError, match=message):
            documents(records, **more)
    assert documents(captions(10), seed=1) == [f"dot-{index}" for index in range(10)]


def test_a_stream_that_grew_loses_nothing(tmp_path, vq_model):
    for number in (6, 11):
        manifest = extract({"t": DocumentReader(Stream(number), "text")}, vq_model, tmp_path, SETTINGS)["t"]
        assert manifest["documents"] == number
    ids = [CodedDocuments(tmp_path / "t")[index][0] for index in range(11)]
    assert ids == [str(index) for index in range(11)]


def test_a_resolution_that_the_tokenizer_has_not_is_no_broken_record(tmp_path, vq_model):
    settings = ExtractionSettings(resolution=256, shard_size=4)
    with pytest.raises(ValueError, match="`resolution` is one of"):
        extract({"dots": DocumentReader(captions(), "text_to_image")}, vq_model, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_a_directory_of_other_settings_is_refused(tmp_path, vq_model):
    reader = DocumentReader(captions(), "text_to_image")
    extract({"dots": reader}, vq_model, tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="top_k 0 -> 3"):
        extract(
            {"dots": reader}, vq_model, tmp_path, ExtractionSettings(resolution=32, shard_size=4, batch_size=3, top_k=3)
        )
    with pytest.raises(ValueError, match="codebook_fingerprint"):
        extract({"dots": reader}, small_model(seed=3).vq_model, tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="codes of the tokenizer"):
        CodedDocuments(tmp_path / "dots", "another")
    (tmp_path / "dots" / "shard-00001.parquet").unlink()
    with pytest.raises(ValueError, match="not there"):
        CodedDocuments(tmp_path / "dots")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        CodedDocuments(tmp_path)


SCRIPT = """
import sys, torch
sys.path[:0] = {path!r}
torch.set_num_threads(1)
from nextflow_hf.training.processes import all_processes
assert all_processes().num_processes == {processes}
from small_models import small_model
from test_extraction import *
extract({{"dots": DocumentReader(captions(60), "text_to_image")}}, small_model().vq_model, sys.argv[1], SETTINGS)
"""


def run_extraction(folder, kill_after=None, processes=1):
    here = Path(__file__).parent
    script = folder.parent / "extract_dots.py"
    script.write_text(SCRIPT.format(path=[str(here), str(here.parent)], processes=processes))
    launch = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    )
    process = subprocess.Popen(
        [sys.executable, *launch, str(script), str(folder)], start_new_session=True, stderr=subprocess.PIPE
    )
    if kill_after is None:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
        return
    # After so many shards, at some point of making the next one.
    deadline = time.monotonic() + 120
    while len(list(folder.glob("dots/shard-*.parquet"))) < kill_after and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_killed_extraction_goes_on_without_loss_or_repetition(tmp_path):
    run_extraction(tmp_path / "whole")
    for shards in (0, 3, 8):
        run_extraction(tmp_path / "killed", kill_after=shards)
    run_extraction(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_two_processes_write_what_one_writes(tmp_path):
    run_extraction(tmp_path / "one")
    run_extraction(tmp_path / "two", processes=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# ---- pictures alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["nextflow-mini"])
def test_pictures_are_cut_to_their_aspect_ratio_and_broken_ones_replaced(tmp_path, preset, caplog):
    records = datasets.Dataset.from_list(captions(6, broken=(2,))).cast_column("image", datasets.Image(decode=False))
    records.to_parquet(tmp_path / "a.parquet")
    spec = {"kind": "text_to_image", "path": "parquet", "data_files": str(tmp_path / "a.parquet")}
    pictures = DatasetPictures(spec, resolution=64, preset=preset)
    rng = np.random.default_rng(0)
    assert len(pictures) == 6 and {pictures.image(index).shape for index in range(6)} == {(64, 64, 3), (48, 96, 3)}
    assert pictures.image(1).dtype == np.uint8 and pictures.prompt(1, rng) == "dot 1"
    assert pictures.prompt(2, rng) == "dot 3" and "record dot-2" in caplog.text
    assert pictures.question(4, rng)[1] == "dot 4"
    with pytest.raises(ValueError, match="max_broken=0"):
        DatasetPictures(spec, resolution=64, preset=preset, max_broken=0).image(2)
    with pytest.raises(ValueError, match="not be streamed"):
        DatasetPictures({**spec, "streaming": True}, resolution=64, preset=preset)


def test_a_picture_s_caption_is_the_answer_and_not_the_question(tmp_path):
    records = [{"image": png(i), "question": "what is it?", "text": f"dot {i}"} for i in range(2)]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
    spec = {"kind": "image_to_text", "path": "parquet", "data_files": str(tmp_path / "a.parquet")}
    pictures = DatasetPictures(spec, resolution=64, preset="nextflow-mini")
    assert pictures.prompt(1, np.random.default_rng(0)) == "dot 1"


def test_records_without_a_picture_or_words_are_broken(caplog):
    pictures = DatasetPictures({"kind": "interleaved", "class": "test_extraction:Pages"}, 64, "nextflow-mini")
    assert pictures.image(0).shape == (64, 64, 3)
    assert pictures.prompt(0, np.random.default_rng(0)) == "dot 2"
    assert "record 0" in caplog.text and "record 1" in caplog.text


class Pages(list):
    """Words alone, a picture alone, and both."""

    def __init__(self):
        super().__init__({"content": own} for own in ([{"text": "dot 0"}], [IMAGE], [IMAGE, {"text": "dot 2"}]))


IMAGE = {"image": png()}


# ---- mixing ----------------------------------------------------------------------------------------------------------


def test_an_answer_that_is_not_learned_keeps_its_prompt(tmp_path, vq_model, builder):
    turns = [{"role": "user", "content": "draw"}, {"role": "assistant", "content": [{"type": "image"}], "weight": 0}]
    records = [{"messages": turns, "images": [picture(index)]} for index in range(4)]
    extract({"dots": DocumentReader(records, "messages")}, vq_model, tmp_path, SETTINGS)
    mixed = MixedSequences([CodedDocuments(tmp_path / "dots")], [1], builder, length=20, prompt_dropout=1.0)
    for index in range(20):
        assert {*mixed[index]["labels"], *mixed[index]["image_labels"][0]} == {-100}


def test_datasets_are_mixed_by_weight_in_an_order_of_their_own(tmp_path, vq_model, builder):
    texts = DocumentReader([{"text": ["draw dot 1", "dot 1"]}] * 7, "text")
    extract({"dots": DocumentReader(captions(), "text_to_image"), "texts": texts}, vq_model, tmp_path, SETTINGS)
    sources = [CodedDocuments(tmp_path / name) for name in ("dots", "texts")]
    mixed = MixedSequences(sources, [3, 1], builder, length=400, prompt_dropout=0.25)
    again = MixedSequences(sources, [3, 1], builder, length=400, prompt_dropout=0.25)
    items = [mixed[index] for index in range(400)]
    assert [again[index] for index in reversed(range(400))][::-1] == items
    drawn = [item for item in items if item["grids"]]
    assert 0.68 < len(drawn) / 400 < 0.82
    bare = [item for item in drawn if item["input_ids"][0] == builder.config.boi_token_id]
    assert 0.15 < len(bare) / len(drawn) < 0.35
    assert len({len(item["input_ids"]) for item in items if not item["grids"]}) == 2
    assert {item["id"] for item in drawn} == {f"dot-{i}" for i in range(10)}
    places = [mixed.place_of(index) for index in range(400)]
    passes = [[document for number, document in places if number == 0][first : first + 10] for first in (0, 10, 20)]
    assert all(sorted(own) == list(range(10)) for own in passes) and passes[0] != passes[1] != passes[2]
    with pytest.raises(ValueError, match="positive weight"):
        MixedSequences(sources, [1], builder, length=4)
    with pytest.raises(ValueError, match="differ by more"):
        MixedSequences(sources, [1e6, 1], builder, length=4)


def test_the_order_of_billions_of_items_is_drawn_where_it_is_read(tmp_path, vq_model, builder):
    extract({"dots": DocumentReader(captions(), "text_to_image")}, vq_model, tmp_path, SETTINGS)
    dots = CodedDocuments(tmp_path / "dots")
    mixed = MixedSequences([dots, dots], [2.5, 1], builder, length=4_000_000_000)
    around = range(3 * 65_536 - 60, 3 * 65_536 + 60)
    ranks = [[document for number, document in map(mixed.place_of, around) if number == own] for own in (0, 1)]
    # Passes go on across blocks: among the documents of one dataset, none comes again before ten others have.
    for own in ranks:
        whole = max(range(10), key=lambda start: len(set(own[start : start + 10])))
        assert sorted(own[whole : whole + 10]) == list(range(10)) == sorted(own[whole + 10 : whole + 20])
    assert 70 < len(ranks[0]) < 100
    assert mixed[3_999_999_999]["id"].startswith("dot-")


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000])
def test_shuffled_is_a_permutation(size):
    orders = [[shuffled(index, size, key) for index in range(size)] for key in ("a", "b")]
    assert all(sorted(own) == list(range(size)) for own in orders)
    if size >= 10:
        assert orders[0] != orders[1] != list(range(size))
