"""The command line: `nextflow-hf COMMAND`; `nextflow-hf --help` lists the commands."""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from .files import save_picture, write_whole
from .harness.command import add_benchmark_parser, refuse_benchmark_options, run_benchmark
from .harness.formats import BENCHMARKS
from .memory import keep_freed_memory

_SCENES = {"prompts": 100, "images": 4, "captions": 500, "tests": 200}


def main(argv: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on standard error and exit code 2."""
    # Some CPUs announce AMX without running it; an upper bound that is harmless elsewhere.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    keep_freed_memory()
    parser = _parser()
    args, left = parser.parse_known_args(argv)
    if left and not (hasattr(args, "overrides") and all("=" in own and not own.startswith("-") for own in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        # argparse does not go on with a list of arguments that an option has interrupted.
        args.overrides += left
    try:
        args.run(args)
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        print(f"nextflow-hf {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nextflow-hf", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="draw pictures of a prompt")
    generate.add_argument("prompt")
    generate.add_argument("--checkpoint", default="mini", help='"mini" or "mini-words" (bundled), a folder or a Hub id')
    generate.add_argument("--output", type=Path, default=Path("pictures"), help="folder for the PNG files")
    generate.add_argument("--count", type=int, default=1, help="pictures to draw")
    generate.add_argument("--size", type=_size, help="HEIGHTxWIDTH in pixels")
    generate.add_argument("--num-scales", type=int, help="draw only so many scales: a smaller picture")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--negative-prompt", help="what guidance leads away from")
    generate.add_argument("--refiner", help='what paints the result anew: "mini" (bundled), a folder or a Hub id')
    generate.add_argument("--strength", type=float, help="of the refiner: from 0, nothing new, to 1")
    generate.add_argument("--refiner-steps", type=int, help="of the refiner, from noise alone")
    generate.add_argument("--double", action="store_true", help="let the refiner paint it twice as large")
    _add_sampling(generate)
    generate.set_defaults(run=_generate)

    describe = commands.add_parser("describe", help="say what a picture shows")
    describe.add_argument("picture", type=Path)
    describe.add_argument("--question", default="describe the picture")
    describe.add_argument(
        "--think", action="store_true", help="let the model write down first what it sees, if it was trained to"
    )
    describe.add_argument("--in-words", action="store_true", help="answer from the model's own description alone")
    describe.add_argument("--adapter", help="with --in-words: folder or Hub id of an adapter for it (mini has its own)")
    describe.add_argument("--checkpoint", default="mini")
    describe.set_defaults(run=_describe)

    edit = commands.add_parser("edit", help="change a picture by an instruction")
    edit.add_argument("picture", type=Path)
    edit.add_argument("instruction")
    edit.add_argument("--checkpoint", default="mini")
    edit.add_argument("--mask", type=Path, help="picture of the same size, white where something may change")
    edit.add_argument("--size", type=_size, help="HEIGHTxWIDTH: put the picture on a larger canvas and draw the rest")
    edit.add_argument(
        "--think", action="store_true", help="let the model write down first what to draw, if it was trained to"
    )
    edit.add_argument("--in-words", action="store_true", help="describe the picture, change the words, draw it anew")
    edit.add_argument("--adapter", help="with --in-words: folder or Hub id of an adapter for it (mini has its own)")
    edit.add_argument("--drafts", type=int, help="with --in-words: draw so many, keep what fits its words best (8)")
    edit.add_argument("--output", type=Path, default=Path("edited.png"))
    edit.add_argument("--seed", type=int, default=0)
    _add_sampling(edit)
    edit.set_defaults(run=_edit)

    story = commands.add_parser("story", help="tell a story in text and pictures, as Markdown with PNG files")
    story.add_argument("prompt")
    story.add_argument("--checkpoint", default="mini")
    story.add_argument("--output", type=Path, default=Path("story"), help="folder for story.md and its pictures")
    story.add_argument("--size", type=_size, help="HEIGHTxWIDTH in pixels")
    story.add_argument("--gif", action="store_true", help="write the pictures as frames.gif as well")
    story.add_argument("--mp4", action="store_true", help="write the pictures as frames.mp4 as well")
    story.add_argument("--think", action="store_true", help="let the model write down a thought first")
    story.add_argument("--max-images", type=int, default=8)
    story.add_argument("--seed", type=int, default=0)
    story.set_defaults(run=_story)

    chat = commands.add_parser("chat", help="talk with a checkpoint in words and pictures")
    chat.add_argument("--checkpoint", default="mini")
    chat.add_argument("--folder", type=Path, help="keep the conversation there, or go on with the one that is there")
    chat.add_argument("--seed", type=int, default=0)
    chat.set_defaults(run=_chat)

    train = commands.add_parser("train", help="run a training recipe")
    train.add_argument("recipe", help="name of a bundled recipe, or a YAML file")
    train.add_argument("overrides", nargs="*", help="key.sub=value")
    train.add_argument("--threads", type=int, help="CPU threads")
    train.set_defaults(run=_train)

    extract = commands.add_parser("extract", help="turn datasets into shards of codes for training")
    extract.add_argument("recipe", help="a YAML file, or the name of a bundled recipe, of the stage extract")
    extract.add_argument("overrides", nargs="*", help="key.sub=value")
    extract.add_argument("--threads", type=int, help="CPU threads")
    extract.set_defaults(run=_extract)

    evaluate = commands.add_parser("evaluate", help="score a checkpoint")
    evaluate.add_argument("suite", choices=["scenes", "in-words", "words", *BENCHMARKS])
    evaluate.add_argument("--checkpoint", default="mini")
    evaluate.add_argument("--prompts", type=int, help="prompts per category of scenes (100)")
    evaluate.add_argument(
        "--images",
        type=int,
        help="pictures per prompt (scenes: 4, and always 1 at sizes other than the first; a benchmark: its own number)",
    )
    evaluate.add_argument("--captions", type=int, help="scenes to describe (500)")
    evaluate.add_argument(
        "--tests",
        type=int,
        help="scenes: of each further ability (200; masked edits, stories, instructions and films have a quarter); 0 "
        "leaves them out. in-words: of each (200). words: how many (400)",
    )
    evaluate.add_argument("--think", action="store_true", help="scenes: edits and answers after a thought as well")
    evaluate.add_argument("--adapter", help="in-words: folder or Hub id of an adapter for it (mini has its own)")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument(
        "--output", type=Path, help="scenes, in-words, words: JSON file for the scores and all settings; else a folder"
    )
    _add_sampling(evaluate)
    add_benchmark_parser(evaluate, _size)
    evaluate.set_defaults(run=_evaluate)

    _add_convert(commands)

    demo = commands.add_parser("demo", help="draw and describe with the bundled checkpoint")
    demo.add_argument("--output", type=Path, default=Path("demo"))
    demo.set_defaults(run=_demo)
    return parser


def _add_convert(commands) -> None:
    convert = commands.add_parser("convert", help="turn published weights into checkpoints of ours")
    kinds = convert.add_subparsers(dest="kind", required=True)
    tokenizer = kinds.add_parser("tokenflow-tokenizer", help="an image tokenizer of TokenFlow")
    tokenizer.add_argument("--variant", help='"clipb_224", "clipb_256" or "siglip_384"; else what the weights say')
    t2i = kinds.add_parser("tokenflow-t2i", help="TokenFlow's text-to-image model")
    t2i.add_argument(
        "--tokenizer", default="ByteFlow-AI/TokenFlow", help="its image tokenizer: converted, as published, or a Hub id"
    )
    qwen = kinds.add_parser("qwen2.5-vl", help="Qwen2.5-VL's language model as a NextFlow to train")
    qwen.add_argument("--tokenizer", help="the image tokenizer: one of ours or TokenFlow's; a new one by default")
    qwen.add_argument("--semantic-encoder", help="SigLIP2 that a new image tokenizer begins with, a folder or Hub id")
    qwen.add_argument("--seed", type=int, default=0, help="seed of the new weights")
    for kind in (tokenizer, t2i, qwen):
        kind.add_argument("source", help="a local file or folder, or a Hub id")
        kind.add_argument("target", type=Path, help="folder of the checkpoint")
        kind.add_argument("--dry-run", action="store_true", help="check everything and say what would be written")
        kind.set_defaults(run=_convert)


def _size(text: str) -> tuple[int, int]:
    height, separator, width = text.partition("x")
    if not (separator and height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"a size is HEIGHTxWIDTH, got {text!r}")
    return int(height), int(width)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--guidance-scale", type=float)
    for name, kind in (("temperature", float), ("top-k", int), ("top-p", float)):
        parser.add_argument(
            f"--{name}",
            type=partial(_per_scale, kind),
            help="one number, or one per scale with commas between; the last holds for all finer scales",
        )


def _per_scale(kind: type, text: str):
    try:
        numbers = [kind(own) for own in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"numbers with commas between are needed, got {text!r}") from error
    return numbers if len(numbers) > 1 else numbers[0]


def _sampling(args: argparse.Namespace) -> dict:
    names = ("guidance_scale", "temperature", "top_k", "top_p")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _generate(args: argparse.Namespace) -> None:
    from .inference import draw_prompts, load

    if args.count < 1:
        raise ValueError(f"--count must be at least 1, got {args.count}.")
    refining = _refining_settings(args)
    if args.num_scales is not None and args.refiner is not None:
        raise ValueError("Give --num-scales or --refiner, not both: a refiner paints whole pictures.")
    args.output.mkdir(parents=True, exist_ok=True)
    model, processor = load(args.checkpoint)
    given = {"image_size": args.size, "num_scales": args.num_scales}
    sizes = {name: own for name, own in given.items() if own is not None}
    seeds = [args.seed + index for index in range(args.count)]
    if args.refiner is not None:
        sizes["refine"] = _refining(args, model, refining)
    pictures = draw_prompts(
        model,
        processor,
        [args.prompt] * args.count,
        seeds,
        args.count,
        args.negative_prompt,
        **sizes,
        **_sampling(args),
    )
    for seed, picture in zip(seeds, pictures):
        path = args.output / f"{seed:04d}.png"
        save_picture(picture, path)
        print(path)


def _refining_settings(args: argparse.Namespace) -> dict:
    """What the refiner is asked for, refused before anything is loaded."""
    named = {"strength": args.strength, "num_inference_steps": args.refiner_steps}
    settings = {name: own for name, own in named.items() if own is not None}
    if args.double:
        settings["upsampling"] = 2
    if settings and args.refiner is None:
        raise ValueError("--double, --strength and --refiner-steps are the refiner's; name one with --refiner.")
    if args.refiner is not None:
        from .refining import check_refining

        check_refining(settings)
    return settings


def _refining(args: argparse.Namespace, model, settings: dict):
    """What makes refined pictures of what is drawn."""
    from .refining import load_refiner, refine_drawn

    refiner = load_refiner(args.refiner, model)

    def refine(output, seeds):
        return refine_drawn(refiner, output, [args.prompt] * len(seeds), seeds, **settings)

    return refine


def _describe(args: argparse.Namespace) -> None:
    from PIL import Image

    from .inference import answer, assistant, load, think, user

    if args.think and args.in_words:
        raise ValueError("Give --think or --in-words, not both.")
    _check_adapter(args)
    picture = Image.open(args.picture)
    model, processor = load(args.checkpoint)
    conversation = [user(picture, args.question)]
    if args.in_words:
        from .in_words import answer_in_words

        _add_adapter(model, args)
        print(*answer_in_words(model, processor, [conversation]))
        return
    if args.think:
        (thought,) = think(model, processor, [conversation])
        print(thought, end="")
        conversation.append(assistant(thought))
    print(*answer(model, processor, [conversation]))


def _edit(args: argparse.Namespace) -> None:
    from .inference import check_trained_size, edit_picture, load, place_on_canvas
    from .processing.image_processing_base_nextflow import open_picture

    if args.mask is not None and args.size is not None:
        raise ValueError("Give --mask or --size, not both: a larger canvas has its own mask.")
    if args.in_words and (args.think or args.mask is not None or args.size is not None):
        raise ValueError("--in-words draws the whole picture anew: leave out --think, --mask and --size.")
    if args.drafts is not None and (not args.in_words or args.drafts < 1):
        raise ValueError(f"--drafts is a number of 1 and more that goes with --in-words, got {args.drafts}.")
    _check_adapter(args)
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"--output is a PNG file, got {args.output.name!r}.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    picture = open_picture(str(args.picture))
    mask = None if args.mask is None else open_picture(str(args.mask), background="black")
    model, processor = load(args.checkpoint)
    if args.size is not None:
        check_trained_size(model, args.size)
        picture, mask = place_on_canvas(picture, args.size)
    if args.in_words:
        from .in_words import edit_in_words

        _add_adapter(model, args)
        options = _sampling(args) if args.drafts is None else {"drafts": args.drafts, **_sampling(args)}
        edited = edit_in_words(model, processor, picture, args.instruction, args.seed, **options)
    else:
        edited = edit_picture(
            model, processor, picture, args.instruction, mask, args.seed, enable_thinking=args.think, **_sampling(args)
        )
    save_picture(edited, args.output)
    print(args.output)


def _check_adapter(args: argparse.Namespace) -> None:
    if args.adapter is not None and not args.in_words:
        raise ValueError("--adapter goes with --in-words.")


def _add_adapter(model, args: argparse.Namespace) -> None:
    """The adapter for words: the one that is asked for, or that of a bundled checkpoint."""
    from .in_words import adapter_for, add_adapter

    adapter = adapter_for(args.checkpoint, args.adapter)
    if adapter is not None:
        add_adapter(model, adapter)


def _story(args: argparse.Namespace) -> None:
    from .chat import check_story_files, write_story
    from .inference import load, tell, user

    check_story_files(args.output, args.mp4)
    args.output.mkdir(parents=True, exist_ok=True)
    model, processor = load(args.checkpoint)
    size = {} if args.size is None else {"image_size": args.size}
    (parts,) = tell(
        model,
        processor,
        [[user(args.prompt)]],
        [args.seed],
        enable_thinking=args.think,
        max_images=args.max_images,
        **size,
    )
    for path in write_story(args.prompt, parts, args.output, args.gif, args.mp4):
        print(path)


def _chat(args: argparse.Namespace) -> None:
    from .chat import Chat, run_chat
    from .inference import load

    model, processor = load(args.checkpoint)
    run_chat(Chat(model, processor, args.folder, args.seed))


def _train(args: argparse.Namespace) -> None:
    import torch

    from .training.recipe import load_recipe
    from .training.stages import run_recipe

    if args.threads:
        torch.set_num_threads(args.threads)
    run_recipe(load_recipe(args.recipe, args.overrides))


def _extract(args: argparse.Namespace) -> None:
    import torch

    from .training.recipe import load_recipe
    from .training.stages import run_recipe

    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = load_recipe(args.recipe, args.overrides)
    if recipe.stage != "extract":
        raise ValueError(f"Recipe {args.recipe!r} is of the stage {recipe.stage!r}; run it with `nextflow-hf train`.")
    run_recipe(recipe)


def _evaluate(args: argparse.Namespace) -> None:
    taken = {"scenes": _SCENES, "in-words": {"tests": 200}, "words": {"tests": 400}}.get(args.suite, {"images": None})
    given = [f"--{name}" for name in _SCENES if name not in taken and getattr(args, name) is not None]
    given += ["--think"] if args.think and args.suite != "scenes" else []
    if args.adapter is not None and args.suite != "in-words":
        raise ValueError(f"`evaluate {args.suite}` does not take --adapter; `evaluate in-words` does.")
    if given:
        raise ValueError(f"`evaluate {args.suite}` does not take {', '.join(given)}; `evaluate scenes` does.")
    if args.suite in BENCHMARKS:
        run_benchmark(args, _sampling(args))
        return
    from .evaluation import evaluate_in_words, evaluate_scenes, evaluate_words, table

    refuse_benchmark_options(args)
    numbers = [default if getattr(args, name) is None else getattr(args, name) for name, default in taken.items()]
    if args.output is not None:
        if args.output.is_dir():
            raise ValueError(f"--output of `evaluate {args.suite}` is a JSON file, but {args.output} is a folder.")
        args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.suite == "words":
        result = evaluate_words(args.checkpoint, *numbers, args.seed, **_sampling(args))
    elif args.suite == "in-words":
        result = evaluate_in_words(args.checkpoint, *numbers, args.seed, args.adapter, **_sampling(args))
    else:
        result = evaluate_scenes(args.checkpoint, *numbers, args.seed, args.think, **_sampling(args))
    print(table(result), flush=True)
    if args.output is not None:
        write_whole(args.output, lambda file: file.write((json.dumps(result, indent=2) + "\n").encode()))


def _convert(args: argparse.Namespace) -> None:
    from . import convert
    from .weight_files import check_target

    check_target(args.target)
    if args.kind == "tokenflow-tokenizer":
        plan = convert.plan_tokenflow_tokenizer(args.source, args.variant)
    elif args.kind == "tokenflow-t2i":
        plan = convert.plan_tokenflow_t2i(args.source, args.tokenizer)
    else:
        plan = convert.plan_qwen2_5_vl(args.source, args.tokenizer, args.semantic_encoder, args.seed)
    print(plan.describe())
    if not args.dry_run:
        plan.write(args.target)
        print(args.target)


def _demo(args: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(args.output)


if __name__ == "__main__":
    sys.exit(main())
