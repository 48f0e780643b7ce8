"""Training speed of the 7B's layers on one accelerator: tokens per second and model FLOPs utilisation (MFU).

As many of the 7B's 28 layers as fit, with its full embeddings and head, in bfloat16 with fused AdamW, train on packed
documents like NextFlow's (section 3.3): captions, pictures of 256, 512 and 1024 px to draw, and stories, by the paper's
schedule. The layers are compiled, as by a recipe's `torch_compile`; there is no autocast. Model FLOPs are counted from
what each document really attends to (`SequenceCost`), three times the forward pass; what is computed behind masks, or
anew, does not count. MFU is over the card's peak of dense bfloat16 products.

    python benchmarks/training_7b.py

writes `benchmarks/results/training_7b.json`.
"""

import argparse
import time
from pathlib import Path

import torch
from common import RESULTS, record, table, write_json
from packing import draw_sequences

from nextflow_hf.modeling.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration
from nextflow_hf.training.compilation import compile_layers
from nextflow_hf.training.packing import Bin, PackedSequences, SequenceCost, collate_packed

# Dense bfloat16 products of one card, in 10^12 operations a second, from its data sheet.
PEAKS = {"H100": 989.4, "H200": 989.4, "A100": 312.0}
# Share of each kind of document, at each stage of training.
MIXES = {
    "256": {"text": 0.5, 256: 0.4, "story": 0.1},
    "512": {"text": 0.5, 256: 0.1, 512: 0.3, "story": 0.1},
    "1024": {"text": 0.4, 256: 0.1, 512: 0.1, 1024: 0.4},
}


def build(layers: int, device: str) -> NextFlowForConditionalGeneration:
    """The 7B in bfloat16 with random weights and so many of its layers, to be trained."""
    torch.manual_seed(0)
    config = NextFlowConfig.from_preset("nextflow-7b", scale_loss_alpha=0.9)
    config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = config.text_config.layer_types[:layers]
    with torch.device(device):
        return NextFlowForConditionalGeneration._from_config(config, dtype=torch.bfloat16).train()


def pack(config: NextFlowConfig, mix: str, tokens: int, number: int) -> list[Bin]:
    """The first bins of a mix's documents."""
    documents = draw_sequences(config, 300, 0, MIXES[mix], tokens=(0, 150_000))
    return [own for _, own in zip(range(number), PackedSequences(documents, tokens, window=300))]


def batch_of(own: Bin, device: str) -> dict[str, torch.Tensor]:
    """A bin as what the model takes."""
    return {key: each.to(device) for key, each in collate_packed([own]).items() if torch.is_tensor(each)}


def measure(model, optimizer, batches: list[dict], repeats: int) -> float:
    """Seconds of a training step over each of the batches in turn: the mean of all but the first round."""
    elapsed = []
    for turn in range(repeats + 1):
        for batch in batches:
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            if turn:
                elapsed.append(time.perf_counter() - start)
    return sum(elapsed) / len(elapsed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="of the 7B's 28")
    parser.add_argument("--tokens", type=int, default=16384, help="of a packed row")
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--attention", nargs="+", default=["block_varlen", "sdpa"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--checkpointing", action="store_true", help="activations are computed again")
    parser.add_argument("--peak", type=float, help="10^12 operations a second, where the card is not known here")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "training_7b.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This measures an accelerator, and there is none here.")
    card = torch.cuda.get_device_name()
    peak = args.peak or next((own for name, own in PEAKS.items() if name in card), None)
    if peak is None:
        raise SystemExit(f"The peak of {card} is not known here: give it as --peak.")

    # As training does (`leave_out_cudnn_attention`).
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = build(args.layers, "cuda")
    config = model.config
    if args.compile:
        compile_layers(model)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [own for own in model.parameters() if own.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    cost = SequenceCost(config)

    rows, results = [], []
    for name in args.mixes:
        bins = pack(config, name, args.tokens, args.batches)
        batches = [batch_of(own, "cuda") for own in bins]
        tokens = sum(len(item["input_ids"]) for own in bins for item in own.items) / len(bins)
        flops = 3 * sum(cost(item) for own in bins for item in own.items) / len(bins)
        for attention in args.attention:
            model.model.language_model.set_attn_implementation(attention)
            torch.cuda.reset_peak_memory_stats()
            try:
                took = measure(model, optimizer, batches, args.repeats)
            except torch.OutOfMemoryError:
                print(f"{name} {attention}: out of memory", flush=True)
                optimizer.zero_grad()
                continue
            results.append(
                {
                    "mix": name,
                    "attention": attention,
                    "tokens_per_second": round(tokens / took),
                    "mfu": round(flops / took / peak / 1e12, 4),
                    "seconds_per_step": round(took, 4),
                    "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
                }
            )
            own = results[-1]
            rows.append([f"{name} px", attention, own["tokens_per_second"], f"{own['mfu']:.1%}"])
            print(own, flush=True)
    write_json(
        args.output,
        {
            "what": "training of the 7B's layers on one card: tokens per second, model FLOPs utilisation",
            **record(),
            "card": card,
            "peak_tflops": peak,
            "layers": args.layers,
            "parameters": sum(own.numel() for own in trained),
            "checkpointing": args.checkpointing,
            "compile": args.compile,
            "results": results,
        },
    )
    print(table(["mix", "attention", "tokens/s", "MFU"], rows))


if __name__ == "__main__":
    main()
