"""The benchmarks on the command line: `nextflow-hf evaluate BENCHMARK`."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from .formats import BENCHMARKS

_OPTIONS = {
    "prompts_file": "--prompts-file",
    "sources": "--sources",
    "size": "--size",
    "batch_size": "--batch-size",
    "device": "--device",
    "negative_prompt": "--negative-prompt",
    "rewritten_prompts": "--rewritten-prompts",
    "judge_url": "--judge-url",
    "judge_model": "--judge-model",
    "judge_template": "--judge-template",
    "judge_key_variable": "--judge-key-variable",
    "judge_attempts": "--judge-attempts",
    "judge_workers": "--judge-workers",
    "ocr_file": "--ocr-file",
    "scorer_output": "--scorer-output",
    "grids": "--grids",
}


def add_benchmark_parser(parser: argparse.ArgumentParser, size: Callable) -> None:
    """Add the options of benchmarks to `evaluate`'s parser.

    Args:
        parser: The parser.
        size: Turns HEIGHTxWIDTH into a pair.
    """
    group = parser.add_argument_group("benchmarks", "what only benchmarks take; see docs/evaluation.md")
    group.add_argument(
        "--prompts-file", type=Path, nargs="+", help="the benchmark's own file or files, or their folder"
    )
    group.add_argument("--sources", type=Path, help="folder of the source pictures that the prompt files name")
    group.add_argument("--size", type=size, help="HEIGHTxWIDTH in pixels")
    group.add_argument("--batch-size", type=int, help="pictures drawn at a time (16); moves no picture")
    group.add_argument("--device", help="where the model runs (the accelerator, if there is one)")
    group.add_argument("--negative-prompt", help="what guidance leads away from")
    group.add_argument("--rewritten-prompts", type=Path, help="JSON object: prompt -> what is drawn instead")
    group.add_argument("--judge-url", help="OpenAI-compatible endpoint, such as https://host/v1")
    group.add_argument("--judge-model", help="name of the judge there")
    group.add_argument("--judge-template", type=Path, help="the benchmark's own template or templates for the judge")
    group.add_argument("--judge-key-variable", help="environment variable that holds the key (OPENAI_API_KEY)")
    group.add_argument("--judge-attempts", type=int, help="answers asked for until one can be read (3)")
    group.add_argument("--judge-workers", type=int, help="requests at a time (4)")
    group.add_argument("--ocr-file", type=Path, help="JSON object of what was read in each picture (cvtg)")
    group.add_argument("--scorer-output", type=Path, help="results.jsonl of the benchmark's own scorer (geneval)")
    group.add_argument("--grids", action="store_true", default=None, help="write the optional grid.png (geneval)")


def refuse_benchmark_options(args: argparse.Namespace) -> None:
    """Raise `ValueError` for options that only benchmarks take, by name."""
    given = [flag for name, flag in _OPTIONS.items() if getattr(args, name) is not None]
    if given:
        raise ValueError(f"`evaluate {args.suite}` does not take {', '.join(given)}; benchmarks do.")


def run_benchmark(args: argparse.Namespace, sampling: dict) -> None:
    """Run a benchmark and print its scores.

    Raises:
        ValueError: If an option is missing or does not fit.
    """
    if args.prompts_file is None:
        raise ValueError(f"`evaluate {args.suite}` needs --prompts-file: {BENCHMARKS[args.suite].brings}.")
    if args.output is None:
        raise ValueError(f"`evaluate {args.suite}` needs --output: the folder for its pictures and results.")
    from .run import evaluate_benchmark

    result = evaluate_benchmark(
        args.suite,
        args.prompts_file,
        args.output,
        args.checkpoint,
        sources=args.sources,
        images=args.images,
        seed=args.seed,
        size=args.size,
        negative_prompt=args.negative_prompt,
        rewritten=args.rewritten_prompts,
        judge=_judge(args),
        template=args.judge_template,
        ocr_file=args.ocr_file,
        scorer_output=args.scorer_output,
        grids=bool(args.grids),
        **{
            name: value
            for name, value in (
                ("batch_size", args.batch_size),
                ("device", args.device),
                ("workers", args.judge_workers),
            )
            if value is not None
        },
        **sampling,
    )
    for name, own in result["scores"].items():
        print(f"{name}: {own['score']:.4f} ({own['low']:.4f} to {own['high']:.4f})")
    if result["not_computed"]:
        print(result["not_computed"])
    if result["unjudged"] or result["unasked"]:
        print(f"unjudged: {result['unjudged']}, not asked: {result['unasked']}")
    print(args.output / "results.json")


def _judge(args: argparse.Namespace):
    given = [_OPTIONS[name] for name in _OPTIONS if name.startswith("judge_") and getattr(args, name) is not None]
    if args.judge_url is None and args.judge_model is None:
        if given:
            raise ValueError(f"{', '.join(given)} need(s) a judge: --judge-url and --judge-model.")
        return None
    if args.judge_url is None or args.judge_model is None:
        raise ValueError("A judge needs both --judge-url and --judge-model.")
    from .judge import Judge

    variable = args.judge_key_variable or "OPENAI_API_KEY"
    if args.judge_key_variable is not None and not os.environ.get(variable):
        raise ValueError(f"The environment variable {variable}, which should hold the judge's key, is not set.")
    attempts = {} if args.judge_attempts is None else {"attempts": args.judge_attempts}
    return Judge(args.judge_url, args.judge_model, os.environ.get(variable) or None, **attempts)
