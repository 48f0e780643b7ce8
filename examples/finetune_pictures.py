"""Fine-tune a NextFlow checkpoint on a folder of your own captioned pictures, all weights or LoRA.

The folder is what `datasets` calls an imagefolder: pictures, and a `metadata.jsonl` with lines such as
{"file_name": "0001.png", "text": "a red circle on a white background"}.

    python examples/finetune_pictures.py --pictures my_pictures --output my_model
    python examples/finetune_pictures.py --pictures my_pictures --output my_model --lora 16

A run that was killed goes on by the same command. The result is a checkpoint like the one it started from:

    nextflow-hf generate "a red circle" --checkpoint my_model/final --output circle
"""

import argparse
from pathlib import Path

from nextflow_hf import MINI
from nextflow_hf.inference import draw_prompts, load
from nextflow_hf.training.recipe import Recipe
from nextflow_hf.training.stage_trainer import save_whole
from nextflow_hf.training.stages import run_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="folder with pictures and metadata.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run and its result")
    parser.add_argument("--checkpoint", default=MINI, help="what to start from (the bundled checkpoint)")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank instead of all weights")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, help="default: 2e-4, with LoRA 2e-3")
    parser.add_argument("--captions", action="store_true", help="learn to describe the pictures as well")
    parser.add_argument("--prompt", action="append", default=[], help="draw this in the end; may be repeated")
    args = parser.parse_args()

    # 1. Every picture becomes codes, once.
    model, processor = load(args.checkpoint)
    start = args.output / "start"
    if not (start / "made_from.txt").is_file():
        save_whole(start, lambda folder: save_start(args.checkpoint, model, processor, folder))
    if (begun := (start / "made_from.txt").read_text()) != args.checkpoint:
        parser.error(f"{args.output} holds a run that began from {begun}; name another --output")
    resolution = processor.image_processor.resolution
    kinds = {"draw": "text_to_image", **({"describe": "image_to_text"} if args.captions else {})}
    extraction = Recipe(
        stage="extract",
        output_dir=str(args.output / "codes"),
        init_from={"vq": str(start / "vq")},
        data={
            name: {"kind": kind, "path": "imagefolder", "data_dir": str(args.pictures)} for name, kind in kinds.items()
        },
        stage_args={"resolution": resolution},
    )
    run_recipe(extraction)

    # 2. Train on them.
    how = {"lora": {"r": args.lora, "lora_alpha": args.lora, "target_modules": LORA_TARGETS}} if args.lora else {}
    sampling = {
        name.removeprefix("image_"): value
        for name, value in model.generation_config.to_diff_dict().items()
        if name.startswith("image_")
    }
    run_recipe(
        Recipe(
            stage="decoder",
            output_dir=str(args.output),
            init_from={"tokenizer": str(start), "vq": str(start / "vq"), "decoder": str(start)},
            data={name: {"codes": str(args.output / "codes" / name)} for name in kinds},
            stage_args={
                "sequences": args.steps * args.batch_size,
                "image_size": [resolution, resolution],
                "abilities": model.config.abilities,
                "sampling": sampling,
                "ema_decay": 0.99,
                **how,
            },
            trainer={
                "max_steps": args.steps,
                "per_device_train_batch_size": args.batch_size,
                "learning_rate": args.learning_rate or (2e-3 if args.lora else 2e-4),
                "lr_scheduler_type": "cosine",
                "max_grad_norm": 1.0,
                "logging_steps": 10,
                "save_steps": 100,
            },
        )
    )

    # 3. Draw.
    if args.prompt:
        model, processor = load(str(args.output / "final"))
        for number, picture in enumerate(draw_prompts(model, processor, args.prompt, list(range(len(args.prompt))))):
            picture.save(args.output / f"drawn-{number}.png")
            print(args.output / f"drawn-{number}.png", args.prompt[number])


def save_start(name: str, model, processor, folder: Path) -> None:
    """What training begins from: the checkpoint, and its image tokenizer by itself."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.vq_model.save_pretrained(folder / "vq")
    (folder / "made_from.txt").write_text(name)


# The decoder's layers and the connector; not the image tokenizer.
LORA_TARGETS = r".*language_model\.layers\..*_proj|.*connector\.linear_[12]"

if __name__ == "__main__":
    main()
