"""Codes of a source's pictures, made once and kept in one file."""

import os
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..modeling.modeling_nextflow_vq import NextFlowVQModel
from ..modeling.scale_schedule import Grid
from .data import PairSource, to_pixels


def extract_codes(
    source: PairSource, vq_model: NextFlowVQModel, path: Path, batch_size: int = 256
) -> tuple[np.ndarray, tuple[Grid, ...]]:
    """Encode every picture of a source of one picture size, or read the file if it is there.

    Args:
        source: Pictures of one size.
        vq_model: The tokenizer.
        path: safetensors file; written under another name first, so that it is whole or absent.
        batch_size: Pictures encoded at a time.

    Returns:
        int32 codes `(pictures, num_codes)` and the scales.

    Raises:
        ValueError: If the file belongs to another tokenizer, another number of pictures, or other pictures.
    """
    path = Path(path)
    fingerprint = vq_model.fingerprint()
    if path.is_file():
        with safe_open(path, framework="np") as file:
            metadata, codes, grids = file.metadata(), file.get_tensor("codes"), file.get_tensor("grids")
        if metadata["fingerprint"] != fingerprint or len(codes) != len(source):
            raise ValueError(
                f"{path} holds codes of {len(codes)} pictures by the tokenizer {metadata['fingerprint']}, but "
                f"{len(source)} pictures by {fingerprint} are asked for. Remove it, or name another file."
            )
        first = vq_model.encode(torch.from_numpy(to_pixels(source.image(0)[None]))).codes[0].numpy()
        # One picture's codes may differ in a few from those of a batch.
        if len(first) != codes.shape[1] or (first == codes[0]).mean() < 0.5:
            raise ValueError(f"{path} holds codes of other pictures. Remove it, or name another file.")
        return codes, tuple((int(h), int(w)) for h, w in grids)
    codes = []
    for first in tqdm(range(0, len(source), batch_size), desc="extract codes"):
        images = np.stack([source.image(i) for i in range(first, min(first + batch_size, len(source)))])
        encoding = vq_model.encode(torch.from_numpy(to_pixels(images)))
        codes.append(encoding.codes.to(torch.int32))
    codes = torch.cat(codes)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file({"codes": codes, "grids": torch.tensor(encoding.grids)}, unfinished, {"fingerprint": fingerprint})
    os.replace(unfinished, path)
    return codes.numpy(), encoding.grids
