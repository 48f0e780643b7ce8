"""How TokenFlow's text-to-image model is drawn with here, against its reference's way of working, in one process.

The model has random weights in float32: the published one's vocabulary, 256-pixel schedule and inputs around a smaller
decoder (at least 50 million parameters), guidance, top-k 600 and top-p 0.6. Pixels are not decoded: both ways would do
the same. In every round these run one after the other:

* **here**: `generate`, which encodes the prompts once, keeps keys and values, and multiplies the code rows of the head
  at the slots of one scale;
* **the reference's way**: for every scale the embeddings of prompt and all scales so far are made anew, the whole
  sequence is run without a cache, the whole head is multiplied at every position in float32, text is masked out, and
  the whole vocabulary is sorted for top-p.

Reported: the ratio of counted FLOPs (torch's `FlopCounterMode`, two per multiply-add), the median over the rounds of
the ratio of wall times, and what each way adds to the peak of resident memory, each in a process of its own.

Reproduce on an idle machine: `python benchmarks/tokenflow.py`. Writes `benchmarks/results/tokenflow.json`, prints a
table.
"""

import argparse
import multiprocessing
import resource
import statistics
from pathlib import Path

import torch
from common import RESULTS, count_flops, record, seconds, table, write_json

from nextflow_hf.modeling.configuration_tokenflow import TokenFlowConfig
from nextflow_hf.modeling.generation_nextflow import ramp
from nextflow_hf.modeling.modeling_tokenflow import TokenFlowForImageGeneration

GUIDANCE, TOP_K, TOP_P = 7.5, 600, 0.6
WAYS = ("here", "reference")


class Drawing:
    """Both ways to draw pictures of random prompts."""

    def __init__(self, hidden: int, layers: int, batch: int, passes: int):
        config = TokenFlowConfig()
        text_config = {
            **config.text_config.to_dict(),
            "hidden_size": hidden,
            "intermediate_size": hidden * 11 // 4,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 64,
            "head_dim": 64,
            "layer_types": None,
        }
        # Pixels are not decoded, so the tokenizer's CNN may be small.
        small = {**config.vq_config.to_dict(), "decoder_channels": [32] * 5, "encoder_channels": [32] * 5}
        torch.manual_seed(0)
        self.model = TokenFlowForImageGeneration(TokenFlowConfig(vq_config=small, text_config=text_config)).eval()
        self.model._decode_pictures = lambda codes, grids: codes
        self.prompts = torch.randint(3, 32000, (batch, 40), generator=torch.Generator().manual_seed(1))
        self.resampling = [{"top_k": 1}] * (passes - 1)
        self.grids = config.schedule.grids((16, 16))

    def here(self) -> list[torch.Tensor]:
        return self.model.generate(
            self.prompts, guidance_scale=GUIDANCE, top_k=TOP_K, top_p=TOP_P, resampling=self.resampling, seed=0
        ).codes

    @torch.no_grad()
    def reference(self) -> list[torch.Tensor]:
        model, config = self.model, self.model.config
        prompts = model._end_prompts(self.prompts, torch.ones_like(self.prompts))
        pair = [prompts, model._unconditional(*prompts, None, None)]
        ids, mask = (torch.cat([own[index] for own in pair]) for index in (0, 1))
        batch, scales = len(self.prompts), []
        for scale in range(len(self.grids)):
            for turn in range(1 + (len(self.resampling) if scale else 0)):
                embeds, blocks = model.model.embed_sequences(ids)
                for finer in range(1, scale + 1):
                    features = model.vq_model.scale_inputs(scales[:finer], self.grids, "accumulated")
                    if finer == scale and turn:
                        features = features + model.vq_model.codebook.lookup(scales[scale]).flatten(1, 2)
                    block = model.model.embed_block(features.repeat(2, 1, 1), finer, None)
                    embeds = torch.cat([embeds, block], dim=1)
                    blocks = torch.cat([blocks, torch.full(block.shape[:2], finer)], dim=1)
                seen = torch.cat([mask, torch.ones_like(blocks[:, mask.shape[1] :])], dim=1)
                hidden = model.model(inputs_embeds=embeds, attention_mask=seen, block_sequence_ids=blocks)
                scores = model.lm_head(hidden.last_hidden_state).float()
                slots = self.grids[scale][0] * self.grids[scale][1]
                strength = ramp(GUIDANCE, scale, len(self.grids))
                scores = (1 + strength) * scores[:batch, -slots:] - strength * scores[batch:, -slots:]
                scores[..., : config.code_start_id] = -torch.inf
                codes = self._sample(scores, TOP_P if turn == 0 else 0.0) - config.code_start_id
                scales[scale:] = [codes.view(batch, *self.grids[scale])]
        return list(torch.cat([own.flatten(1) for own in scales], dim=1))

    @staticmethod
    def _sample(scores: torch.Tensor, top_p: float) -> torch.Tensor:
        if top_p == 0:
            return scores.argmax(dim=-1)
        least = scores.topk(TOP_K, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
        ordered, places = scores.sort(dim=-1)
        leave = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        leave[..., -1] = False
        scores = scores.masked_fill(leave.scatter(-1, places, leave), -torch.inf)
        return torch.multinomial(scores.softmax(dim=-1).flatten(0, -2), 1).view(scores.shape[:-1])


def added_memory(way: str, shape: tuple, threads: int | None, results) -> None:
    """MiB by which one drawing raises the peak of a process that has the model."""
    if threads:
        torch.set_num_threads(threads)
    drawing = Drawing(*shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    getattr(drawing, way)()
    results.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def measure_memory(shape: tuple, threads: int | None) -> dict[str, float]:
    """Before this process grows: what it starts would count its peak as their own."""
    context = multiprocessing.get_context("spawn")
    memory = {}
    for way in WAYS:
        results = context.Queue()
        process = context.Process(target=added_memory, args=(way, shape, threads, results))
        process.start()
        memory[way] = results.get()
        process.join()
    return memory


def measure(shape: tuple, rounds: int) -> dict:
    drawing = Drawing(*shape)
    flops = {way: count_flops(getattr(drawing, way)) for way in WAYS}
    times = [{way: seconds(getattr(drawing, way)) for way in WAYS} for _ in range(rounds)]
    text = drawing.model.model.language_model
    return {
        "million_parameters": sum(own.numel() for own in drawing.model.model.language_model.parameters()) / 1e6
        + drawing.model.lm_head.weight.numel() / 1e6,
        "million_parameters_in_layers": sum(own.numel() for own in text.layers.parameters()) / 1e6,
        "flops": flops,
        "flops_ratio": flops["reference"] / flops["here"],
        "seconds": times,
        "wall_ratio": statistics.median(own["reference"] / own["here"] for own in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, default=RESULTS / "tokenflow.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = {"settings": {**vars(args), "output": str(args.output.name)}, **record(args.threads)}
    shapes = {str(passes): (args.hidden, args.layers, args.pictures, passes) for passes in (1, 2)}
    memory = {passes: measure_memory(shape, args.threads) for passes, shape in shapes.items()}
    results["passes"] = {
        passes: {**measure(shape, args.rounds), "added_mib": memory[passes]} for passes, shape in shapes.items()
    }
    write_json(args.output, results)
    header = ["passes a scale", "FLOPs ratio", "wall ratio", "memory added, here", "memory added, the reference's way"]
    rows = [
        [
            passes,
            f"{own['flops_ratio']:.1f}",
            f"{own['wall_ratio']:.1f}",
            f"{own['added_mib']['here']:.0f} MiB",
            f"{own['added_mib']['reference']:.0f} MiB",
        ]
        for passes, own in results["passes"].items()
    ]
    print(table(header, rows))


if __name__ == "__main__":
    main()
