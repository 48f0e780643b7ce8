"""Supervised fine-tuning with TRL."""

from transformers import Trainer
from trl import SFTTrainer


class NextFlowSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer` with the model's own loss; give it a [`NextFlowDataCollator`] as `data_collator`.

    TRL's trainer scores text labels by a head of its own, and knows no labels of pictures.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As `Trainer` does: the model is given the labels and makes its loss."""
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
