"""The 7B preset without its weights: parameters, FLOPs of drawing, key-value cache, and the paper's FLOPs ratio.

Everything is computed on the meta device, so it needs neither the weights nor an accelerator and gives the same
numbers on every machine.

What is measured:

* parameters of each part of `NextFlowConfig.from_preset("nextflow-7b")`;
* FLOPs (two per multiply-add) of drawing one square picture, by torch's `FlopCounterMode` over the model's own forward
  passes: one over the text prompt with `<boi>`, which predicts the 1x1 scale, then one per scale over that scale's
  slots with the cache, plus connector, code scores and pixel decoder. With guidance every pass of the decoder has two
  rows. Attention counts all pairs of query and key in a pass. Not counted, as everywhere: element-wise work, norms,
  bicubic resizing, sampling;
* bytes of the key-value cache after the last scale, from the shapes and type of the cache's tensors (bfloat16);
* NextFlow appendix A.2: FLOPs of an 18-step MMDiT over those of 18-scale drawing behind a 100-token prompt, by the
  paper's formula per layer, 12 s_q h^2 + 4 s_q s_kv h, with s_q and s_kv from `ScaleSchedule`. The printed 5.96 holds
  at h = 2048. The formula counts a multiply-add of the weights once and one of attention twice; counting both twice
  (24 s_q h^2) at width h gives what it gives at 2h: 6.38 at h = 2048.

Reproduce: `python benchmarks/shape_7b.py`. Writes `benchmarks/results/shape_7b.json`, prints a markdown table.
"""

import argparse
from pathlib import Path

import torch
from common import RESULTS, record, table, write_json
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from nextflow_hf.modeling.configuration_nextflow import NextFlowConfig
from nextflow_hf.modeling.modeling_nextflow import NextFlowForConditionalGeneration
from nextflow_hf.modeling.scale_schedule import ScaleSchedule

PROMPT_LENGTH = 100
# NextFlow appendix A.2 as printed: coefficients of h^2 and h per layer, and the ratio.
PAPER_DRAWING = (122_208, 256_215_912)
PAPER_MMDIT = (884_736, 1_207_959_552)
PAPER_RATIO, PAPER_WIDTH = 5.96, 2048
MMDIT_STEPS = 18


def count_parameters(model: NextFlowForConditionalGeneration) -> dict[str, int]:
    """Parameters of each part, without counting any twice."""
    decoder, tokenizer = model.model.language_model, model.vq_model
    parts = {
        "decoder layers": decoder.layers,
        "decoder final norm": decoder.norm,
        "token and code embeddings": decoder.embed_tokens,
        "head": model.lm_head,
        "connector": model.model.connector,
        "scale embedding": model.model.scale_embedding,
        "tokenizer: semantic encoder": tokenizer.semantic_encoder,
        "tokenizer: pixel encoder": tokenizer.pixel_encoder,
        "tokenizer: codebook": tokenizer.codebook,
        "tokenizer: semantic decoder": tokenizer.semantic_decoder,
        "tokenizer: pixel decoder": tokenizer.pixel_decoder,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    total = sum(p.numel() for p in model.parameters())
    counts["tokenizer: projections"] = total - sum(counts.values())
    return {**counts, "total": total}


def draw_on_meta(model: NextFlowForConditionalGeneration, size: int, rows: int, prompt_length: int) -> dict:
    """Count one drawing of `size` x `size` pixels with `rows` rows (two with guidance) in every decoder pass."""
    config, inner = model.config, model.model
    grids = config.schedule.grids_for_size(size, size)
    cache = DynamicCache(config=config.text_config)
    flops: dict[str, int] = {}
    per_pass: list[int] = []

    def counted(part, function, *args, **kwargs):
        with FlopCounterMode(display=False) as counter:
            result = function(*args, **kwargs)
        flops[part] = flops.get(part, 0) + counter.get_total_flops()
        if part == "decoder":
            per_pass.append(counter.get_total_flops())
        return result

    ids = torch.zeros(rows, prompt_length + 1, dtype=torch.long)
    embeds = counted("connector", inner.language_model.embed_tokens, ids)
    num_scales = torch.full((rows,), len(grids))
    past = 0
    for scale, (height, width) in enumerate(grids):
        if scale > 0:
            features = torch.empty(rows, height * width, config.vq_config.code_dim)
            embeds = counted("connector", inner.embed_block, features, scale, num_scales)
        length = embeds.shape[1]
        # A finished mask of the right shape: its contents, which the meta device cannot hold, change no count.
        mask = torch.empty(rows, 1, length, past + length, dtype=torch.bool)
        hidden = counted(
            "decoder",
            inner,
            inputs_embeds=embeds,
            position_ids=torch.empty(3, rows, length),
            attention_mask={"full_attention": mask},
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        past += length
        counted("code scores", model._code_scores, hidden[:, -1:] if scale == 0 else hidden)
    # One picture, whatever the guidance.
    summed = torch.empty(1, config.vq_config.code_dim, *grids[-1])
    counted("pixel decoder", model.vq_model.decode_features, summed)
    by_hand = decoder_flops_by_hand(model, [prompt_length + 1, *(h * w for h, w in grids[1:])])
    assert flops["decoder"] == rows * by_hand, (flops["decoder"], rows * by_hand)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return {
        "size": size,
        "rows": rows,
        "scales": len(grids),
        "codes": sum(h * w for h, w in grids),
        "passes": len(per_pass),
        "flops": {**flops, "total": sum(flops.values())},
        "decoder_flops_per_pass": per_pass,
        "cached_positions": int(cache.get_seq_length()),
        "cache_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }


def decoder_flops_by_hand(model: NextFlowForConditionalGeneration, lengths: list[int]) -> int:
    """What the counter must give for one row whose passes have these lengths: 2 per weight and slot, 4 h per pair."""
    text_config = model.config.text_config
    weights = sum(p.numel() for p in model.model.language_model.layers.parameters() if p.ndim == 2)
    pairs = sum(length * sum(lengths[: index + 1]) for index, length in enumerate(lengths))
    return 2 * weights * sum(lengths) + 4 * text_config.num_hidden_layers * text_config.hidden_size * pairs


def paper_coefficients(schedule: ScaleSchedule, prompt_length: int) -> dict[str, tuple[int, int]]:
    """Coefficients of h^2 and h in 12 s_q h^2 + 4 s_q s_kv h, summed over the passes, for drawing and for the MMDiT."""
    sizes = [height * width for height, width in schedule.grids(schedule.grids_for_size(1024, 1024)[-1])]
    queries, pairs, keys = 0, 0, 0
    for length in (prompt_length, *sizes):
        keys += length
        queries += length
        pairs += length * keys
    tokens = sizes[-1]
    return {
        "drawing": (12 * queries, 4 * pairs),
        "mmdit": (12 * MMDIT_STEPS * tokens, 4 * MMDIT_STEPS * tokens**2),
    }


def paper_ratio(coefficients: dict[str, tuple[int, int]], width: int) -> float:
    """FLOPs of the MMDiT over those of drawing at width h."""
    drawing, mmdit = (a * width**2 + b * width for a, b in (coefficients["drawing"], coefficients["mmdit"]))
    return mmdit / drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="sides of the square pictures")
    parser.add_argument("--prompt-length", type=int, default=PROMPT_LENGTH, help="text tokens before <boi>")
    parser.add_argument("--output", type=Path, default=RESULTS / "shape_7b.json", help="where the JSON goes")
    args = parser.parse_args()

    config = NextFlowConfig.from_preset("nextflow-7b")
    with torch.device("meta"), torch.no_grad():
        model = NextFlowForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
        parameters = count_parameters(model)
        drawings = [draw_on_meta(model, size, rows, args.prompt_length) for size in args.sizes for rows in (1, 2)]

    coefficients = paper_coefficients(config.schedule, PROMPT_LENGTH)
    assert coefficients == {"drawing": PAPER_DRAWING, "mmdit": PAPER_MMDIT}, coefficients
    ratios = {width: round(paper_ratio(coefficients, width), 4) for width in (PAPER_WIDTH, 4096)}
    assert round(ratios[PAPER_WIDTH], 2) == PAPER_RATIO, ratios

    write_json(
        args.output,
        {
            "what": "nextflow-7b on the meta device: parameters, FLOPs of drawing, key-value cache; NextFlow A.2",
            **record(),
            "prompt_length": args.prompt_length,
            "parameters": parameters,
            "drawings": drawings,
            "paper_a2": {
                "formula": "12 s_q h^2 + 4 s_q s_kv h per layer",
                "prompt_length": PROMPT_LENGTH,
                "coefficients": coefficients,
                "ratio_by_width": ratios,
            },
        },
    )

    print(table(["part", "parameters"], [[name, f"{count:,}"] for name, count in parameters.items()]))
    print()
    header = [
        "picture",
        "guidance",
        "passes",
        "decoder",
        "connector",
        "code scores",
        "pixel decoder",
        "TFLOP",
        "cache MiB",
    ]
    rows = []
    for drawing in drawings:
        flops = drawing["flops"]
        parts = [
            f"{flops[part] / 1e12:.2f}" for part in ("decoder", "connector", "code scores", "pixel decoder", "total")
        ]
        side, guided = drawing["size"], "yes" if drawing["rows"] == 2 else "no"
        rows.append([f"{side} px", guided, drawing["passes"], *parts, f"{drawing['cache_bytes'] / 2**20:.0f}"])
    print(table(header, rows))
    print()
    print(
        table(
            ["MMDiT / NextFlow, by the formula of A.2", "ratio"], [[f"h = {w}", f"{r:.2f}"] for w, r in ratios.items()]
        )
    )


if __name__ == "__main__":
    main()
