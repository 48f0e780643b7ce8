"""Drawing a part of a picture anew: what a masked edit keeps, scale by scale and pixel by pixel.

A cell of a scale that lies wholly outside the mask keeps the picture's own code while nothing coarser has changed
there; where something has, it takes the code nearest to what is then missing, so that the sum over scales comes back
to the picture's. Pixels further from the mask than one cell of the finest scale are the picture's own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .modeling_nextflow_vq import NextFlowVQModel, upsample
from .scale_schedule import Grid


class KeptPicture:
    """A picture of which a part is drawn anew.

    Args:
        vq_model: The tokenizer.
        codes: `(num_codes,)` codes of the picture.
        grids: Its scales.
        mask: bool `(height, width)`, true where it is drawn anew.
        pixels: `(3, height, width)` in [-1, 1], kept outside the mask; by default the codes' own picture.
    """

    def __init__(
        self,
        vq_model: NextFlowVQModel,
        codes: torch.LongTensor,
        grids: Sequence[Grid],
        mask: torch.Tensor,
        pixels: torch.Tensor | None = None,
    ):
        self.vq_model, self.grids = vq_model, tuple(grids)
        self.codes = [own[0] for own in vq_model.split_codes(codes[None], grids)]
        self.target = vq_model.sum_features(codes[None], grids)
        self.pixels = vq_model.decode(codes[None], grids)[0].float() if pixels is None else pixels.float()
        cells = mask[None].float()
        self.keeps = [F.adaptive_max_pool2d(cells, grid)[0] == 0 for grid in self.grids]
        self.own_sum = self.drawn_sum = torch.zeros_like(self.target)
        self.alpha = soft_edge(mask, round(mask.shape[0] / grids[-1][0]))

    def constrain(self, drawn: torch.LongTensor, scale: int) -> torch.LongTensor:
        """The codes `(h * w,)` of a scale, of which those that the picture keeps are put in place.

        Called once for every scale, coarse to fine.
        """
        grid = self.grids[scale]
        is_same = self._pool((self.own_sum - self.drawn_sum).abs(), grid).amax(dim=0) == 0
        missing = self.vq_model.nearest_codes(self.target - self.drawn_sum, grid)[0]
        kept = torch.where(is_same, self.codes[scale], missing)
        codes = torch.where(self.keeps[scale], kept, drawn.view(grid))
        self.own_sum = self.own_sum + self._features(self.codes[scale])
        self.drawn_sum = self.drawn_sum + self._features(codes)
        return codes.flatten()

    def compose(self, image: torch.Tensor) -> torch.Tensor:
        """The drawn pixels `(3, height, width)` inside the mask, the picture's outside, and a soft edge between."""
        alpha = self.alpha.to(image)
        return alpha * image + (1 - alpha) * self.pixels.to(image)

    def _features(self, codes: torch.LongTensor) -> torch.Tensor:
        return upsample(self.vq_model.codebook.lookup(codes[None]).permute(0, 3, 1, 2), self.grids[-1])

    def _pool(self, features: torch.Tensor, grid: Grid) -> torch.Tensor:
        return F.adaptive_max_pool2d(features[0], grid)


def soft_edge(mask: torch.Tensor, width: int) -> torch.Tensor:
    """float32 `(height, width)`: 1 inside the mask, 0 from `width` pixels outside it on, linear between.

    Distances count along rows and columns (the larger of both).
    """
    alpha = mask.float()[None]
    total = alpha.clone()
    for _ in range(width - 1):
        alpha = F.max_pool2d(alpha, 3, stride=1, padding=1)
        total += alpha
    return torch.where(mask, 1.0, total[0] / max(width, 1))


def check_mask(mask: torch.Tensor | Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """One bool mask `(height, width)` for each picture.

    Args:
        mask: `(height, width)` for all, or one such for each picture, stacked or in a list; what is not 0 is drawn
            anew. Tensors or arrays.
        sizes: (height, width) in pixels of each picture.

    Raises:
        ValueError: If there is not a mask for each picture, a mask has another size, or nothing is to be drawn.
    """
    given = list(mask) if isinstance(mask, (list, tuple)) or getattr(mask, "ndim", 0) == 3 else [mask] * len(sizes)
    if any(getattr(own, "ndim", 0) != 2 for own in given) or len(given) != len(sizes):
        found = [tuple(getattr(own, "shape", ())) or type(own).__name__ for own in given]
        raise ValueError(
            f"`mask` must be a tensor (height, width), or one such for each of the {len(sizes)} prompts, got {found}."
        )
    masks = [torch.as_tensor(own) for own in given]
    for own, size in zip(masks, sizes):
        if tuple(own.shape) != tuple(size):
            raise ValueError(
                f"The picture to edit has {size[0]}x{size[1]} pixels (height x width) as the model sees it, but the "
                f"mask has {own.shape[0]}x{own.shape[1]}."
            )
        if not bool((own != 0).any()):
            raise ValueError("The mask is empty: nothing would be drawn. Mark what is to be drawn with 1.")
    return [own != 0 for own in masks]
