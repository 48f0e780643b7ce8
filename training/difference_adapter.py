"""The adapter stage: what a decoder learned with whole weights, as an adapter (LoRA) of what it began as."""

import logging
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from ..modeling.modeling_nextflow import NextFlowForConditionalGeneration
from .recipe import Recipe
from .stage_trainer import save_whole

logger = logging.getLogger(__name__)


@torch.no_grad()
def make_adapter(recipe: Recipe) -> None:
    """Write the adapter that turns one decoder into another, as nearly as its rank allows.

    Of every layer that the adapter has, the change of the weight is cut to the rank by singular value decomposition,
    which leaves the least squared difference (Eckart-Young). What an adapter would have to learn for long, whole
    weights learn in fewer steps (`docs/training.md`).

    `init_from`: `decoder`, what the adapter is for, and `trained`, what it came to. `stage_args`: `lora` (arguments of
    `peft.LoraConfig`). The result is in `adapter`, with the generation settings of `trained`.

    Raises:
        ValueError: If the two are of different shapes, or the adapter has no layer of them, others than linear ones, or
            more than two factors for each.
    """
    beyond = {"use_dora", "modules_to_save", "trainable_token_indices", "bias"} & set(recipe.stage_args["lora"])
    if beyond:
        raise ValueError(f"A change of weights is cut to two factors a layer; leave {sorted(beyond)} of `lora` out.")
    # A half precision would round small changes away before they are looked at.
    base, trained = (
        NextFlowForConditionalGeneration.from_pretrained(recipe.init_from[role], dtype=torch.float32)
        for role in ("decoder", "trained")
    )
    weights = trained.state_dict()
    shapes = [{name: own.shape for name, own in part.items()} for part in (base.state_dict(), weights)]
    if shapes[0] != shapes[1]:
        differing = sorted(
            name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
        )
        raise ValueError(
            f"{recipe.init_from['decoder']!r} and {recipe.init_from['trained']!r} are of different shapes (such as "
            f"{differing[0]}); an adapter can only hold what one learned that began as the other."
        )
    lost = {name for name, own in base.state_dict().items() if not torch.equal(own, weights[name])}
    adapted = get_peft_model(base, LoraConfig(**recipe.stage_args["lora"]))
    changed, left = 0.0, 0.0
    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            if not isinstance(layer.base_layer, torch.nn.Linear):
                raise ValueError(f"`lora.target_modules` has {name!r}, which is no linear layer; leave it out.")
            change = weights[f"{name}.weight"] - layer.base_layer.weight
            left += float((change - _put(change, layer)).square().sum())
            changed += float(change.square().sum())
            lost.discard(f"{name}.weight")
    if lost:
        logger.warning("%d changed tensors are no layers of the adapter and are left as they were: %s", len(lost), lost)
    logger.info(
        "rank %s leaves out %.4f of the squared change", recipe.stage_args["lora"].get("r"), left / (changed or 1)
    )
    save_whole(Path(recipe.output_dir) / "adapter", partial(_save, adapted, trained))


def _put(change: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    """Let a layer's adapter be the nearest to a change of its weight `(out, in)`, and return what that is."""
    (name,) = layer.lora_A
    rank = layer.r[name]
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    root = values[:rank].sqrt()
    # A small layer has fewer ranks than the adapter.
    layer.lora_A[name].weight.zero_()[: len(root)] = root[:, None] * right[:rank]
    layer.lora_B[name].weight.zero_()[:, : len(root)] = left[:, :rank] * root / layer.scaling[name]
    return layer.get_delta_weight(name)


def _save(adapted: PeftModel, trained: NextFlowForConditionalGeneration, folder: Path) -> None:
    adapted.save_pretrained(folder)
    trained.generation_config.save_pretrained(folder)
