"""Sentence-transformers' trainer on packed batches of texts and labels."""

from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from modernbert_small.distil.labels import DistillationDataset
from modernbert_small.packed.trainer import PackedTrainer


class DistillationTrainer(PackedTrainer, SentenceTransformerTrainer):
    """SentenceTransformerTrainer on packed batches, in which every text has the same weight.

    Batches hold equally many tokens, but not equally many rows. Each batch's loss is weighted by its number of rows,
    so that a short text counts as much as a long one.

    The loss is the mean squared error times the labels' width. That is the squared distance to the label,
    2 - 2 cos for unit vectors. Its gradients are of the size for which the usual `max_grad_norm` and Adam's epsilon
    are chosen.
    """

    def preprocess_dataset(
        self, dataset: DistillationDataset | None = None, dataset_name: str | None = None
    ) -> DistillationDataset | None:
        """Leave a dataset as it is: its batches are packed already."""
        return dataset

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: the script writes the card at the end, from the measurements."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The squared distance to the labels, a scalar, times the batch's weight.

        Args:
            model: the student.
            inputs: a batch of DistillationDataset; loses its `weight`.
            return_outputs: whether to return the model's outputs too.
            num_items_in_batch: passed on.
        """
        weight = inputs.pop("weight") * inputs["label"].shape[1]
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (result[0] * weight, result[1]) if return_outputs else result * weight

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate, and add `eval_similarity`: the mean cosine to the labels, 1 - squared distance / 2."""
        # The Trainer computes only the loss under autocast; the evaluators encode in the same precision.
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss = output.metrics.get(f"{metric_key_prefix}_loss")
        if loss is not None:
            output.metrics[f"{metric_key_prefix}_similarity"] = 1 - loss / 2
        return output
