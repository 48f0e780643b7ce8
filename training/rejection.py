"""The rejection sampling stage: a decoder's own pictures that rewards pass, as documents to train with.

Trained with among other tasks, they keep a decoder drawing as it draws, which a dataset's pictures do not: after
reinforcement learning these teach it back to what it was (rejection sampling fine-tuning, RAFT, arXiv 2304.06767).
"""

import json
from pathlib import Path

import pyarrow as pa
from PIL import Image
from tqdm.auto import tqdm

from ..evaluation import weights_hash
from ..inference import Conversation, check_trained_size, load, prepare
from .data import load_source
from .extraction import SCHEMA, claim, manifest_of, write_json, write_table
from .processes import all_processes
from .recipe import Recipe
from .train_grpo import load_named

REJECTION_DEFAULTS = {
    "rewards": [],
    "threshold": 1.0,
    "image_sizes": [[64, 64]],
    "batch_size": 64,
    "shard_size": 512,
    "seed": 0,
}


def run_rejection(recipe: Recipe) -> None:
    """Draw a picture for every prompt, and write those whose reward reaches a threshold.

    `init_from`: `decoder`, a whole checkpoint. `source`: a class of rows with `id` and `prompt`, a conversation without
    pictures. `stage_args`: `rewards` as in the stage "grpo", of which the sum by weight counts; `threshold` (1.0);
    `image_sizes` ([height, width] each, [64, 64] alone where none is named) that take turns; `batch_size` (64),
    `shard_size` (512 prompts) and `seed` (0). What is written is what the stage "extract" writes; a run that was killed
    makes the missing shards.

    Raises:
        ValueError: If there is no reward, a prompt has pictures, the decoder does not draw a size, or shards are there
            that were made otherwise.
    """
    stage, folder = {**REJECTION_DEFAULTS, **recipe.stage_args}, Path(recipe.output_dir)
    processes = all_processes()
    rewards = [(load_named(own["function"], own.get("args")), own.get("weight", 1.0)) for own in stage["rewards"]]
    if not rewards:
        raise ValueError("`stage_args.rewards` names no reward.")
    rows = load_source(recipe.source)
    prompts = [_conversation(rows[index]) for index in range(len(rows))]
    model, processor = load(recipe.init_from["decoder"], processes.device)
    for size in stage["image_sizes"]:
        check_trained_size(model, size)
    made_with = {
        **{name: own for name, own in stage.items() if name != "batch_size"},
        "weights_sha256": weights_hash(recipe.init_from["decoder"]),
    }
    claim(folder, made_with, {"source": recipe.source}, processes)

    size = stage["shard_size"]
    shards = [range(first, min(first + size, len(prompts))) for first in range(0, len(prompts), size)]
    mine = list(enumerate(shards))[processes.process_index :: processes.num_processes]
    for number, chosen in tqdm(mine, desc="draw", unit="shard", disable=not processes.is_main_process):
        path = folder / f"shard-{number:05d}.parquet"
        if not path.is_file():
            write_table(path, _drawn(model, processor, rows, prompts, chosen, rewards, stage))
    processes.wait_for_everyone()
    if processes.is_main_process:
        write_json(folder / "manifest.json", manifest_of(folder, folder.name, model.vq_model.fingerprint()))
    processes.wait_for_everyone()


def _conversation(row: dict) -> Conversation:
    prompt = row["prompt"]
    if row.get("images") or any(not isinstance(turn["content"], str) for turn in prompt):
        raise ValueError(f'The prompt {row["id"]} has pictures; the stage "rejection" draws from words alone.')
    return prompt


def _drawn(model, processor, rows, prompts, chosen: range, rewards, stage: dict) -> pa.Table:
    """A shard: the prompts numbered `chosen` whose pictures pass."""
    documents: list[dict] = []
    sizes, batch = stage["image_sizes"], stage["batch_size"]
    for size_number, size in enumerate(sizes):
        own = [index for index in chosen if index % len(sizes) == size_number]
        for first in range(0, len(own), batch):
            indices = own[first : first + batch]
            inputs = prepare(processor, [prompts[index] for index in indices]).to(model.device)
            seeds = [stage["seed"] + index for index in indices]
            output = model.generate(**inputs, generation_mode="image", image_size=tuple(size), seed=seeds)
            pictures = processor.post_process_multimodal_output(output, generation_mode="image")
            scores = _scores(rewards, [rows[index] for index in indices], pictures)
            documents += [
                _document(rows[index], codes.tolist(), grids)
                for index, score, codes, grids in zip(indices, scores, output.codes, output.grids)
                if score >= stage["threshold"]
            ]
    metadata = {"records": str(len(chosen)), "broken": "[]", "image_sizes": json.dumps(sizes)}
    return pa.Table.from_pylist(documents, SCHEMA).replace_schema_metadata(metadata)


def _scores(rewards: list, rows: list[dict], pictures: list[Image.Image]) -> list[float]:
    """The weighted sum of each picture's rewards; one that says nothing of it counts nothing."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    totals = [0.0] * len(rows)
    for reward, weight in rewards:
        found = reward(prompts=[row["prompt"] for row in rows], drawn=pictures, **columns)
        totals = [total + weight * (own or 0.0) for total, own in zip(totals, found)]
    return totals


def _document(row: dict, codes: list[int], grids) -> dict:
    asked = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in row["prompt"]]
    messages = [*asked, {"role": "assistant", "content": [{"type": "image"}]}]
    return {
        "id": str(row["id"]),
        "messages": json.dumps(messages, ensure_ascii=False),
        "codes": [codes],
        "input_codes": [codes],
        "grids": [[list(grid) for grid in grids]],
    }
