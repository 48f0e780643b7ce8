"""What reinforcement learning of pictures takes in memory, with all weights and with LoRA, measured.

A random decoder in the bundled checkpoint's world, wide enough that weights count more than what passes through them
(94 million parameters in its layers), takes two updates of GRPO on eight pictures of 64 px in float32, each way in a
process of its own. Reported is the peak of resident memory, less that of a process that has imported everything and
has no model yet.

Reproduce: `python benchmarks/rl_memory.py`. Writes `benchmarks/results/rl_memory.json`, prints a table.
"""

import argparse
import multiprocessing
import resource
import tempfile
from pathlib import Path

import torch
from common import RESULTS, record, table, write_json

from nextflow_hf import MINI
from nextflow_hf.modeling.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration

WAYS = ("all weights", "LoRA")


def save_model(folder: Path, hidden: int, layers: int) -> float:
    """A random checkpoint with the bundled one's processor; millions of parameters in its layers."""
    from transformers import AutoProcessor

    config = NextFlowConfig.from_pretrained(MINI)
    shape = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
    }
    text_config = {**config.text_config.to_dict(), **shape, "layer_types": None}
    config = NextFlowConfig(**{**config.to_dict(), "text_config": text_config, "codebook_fingerprint": None})
    torch.manual_seed(0)
    model = NextFlowForConditionalGeneration(config)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(MINI).save_pretrained(folder)
    return sum(own.numel() for own in model.model.language_model.layers.parameters()) / 1e6


def brightness(prompts, drawn, **columns) -> list[float]:
    """A reward that pictures differ in."""
    return [picture.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for picture in drawn]


def update(way: str, folder: str, threads: int | None, results) -> None:
    """MiB that two updates add to the peak of a process that has imported all it needs."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    from nextflow_hf.training.grpo import NextFlowGRPOConfig, NextFlowGRPOTrainer

    if threads:
        torch.set_num_threads(threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lora = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "linear_1", "linear_2"])
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    trainer = NextFlowGRPOTrainer(
        model,
        brightness,
        args=NextFlowGRPOConfig(
            output_dir=f"{folder}/{way}",
            max_steps=2,
            num_generations=8,
            per_device_train_batch_size=8,
            prefix_scales=4,
            gradient_checkpointing=True,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        processing_class=AutoProcessor.from_pretrained(folder),
        train_dataset=Dataset.from_list([{"prompt": own} for own in ("a red circle", "two blue stars")]),
        peft_config=lora if way == "LoRA" else None,
    )
    trainer.train()
    results.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    context, memory = multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: what is started here would count this one's peak as its own.
        with context.Pool(1) as pool:
            parameters = pool.apply(save_model, (Path(folder), args.hidden, args.layers))
        for way in WAYS:
            results = context.Queue()
            process = context.Process(target=update, args=(way, folder, args.threads, results))
            process.start()
            memory[way] = results.get()
            process.join()
    share = memory["LoRA"] / memory["all weights"]
    content = {**record(args.threads), "million_parameters_in_layers": parameters, "added_mib": memory, "share": share}
    write_json(RESULTS / "rl_memory.json", content)
    print(table(["", "memory"], [[way, f"{own:.0f} MiB"] for way, own in memory.items()]))
    print(f"LoRA takes {share:.0%}.")


if __name__ == "__main__":
    main()
