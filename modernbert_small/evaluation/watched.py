"""nDCG@10 of a model while it trains, on packed rows."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import send_to_device
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import PreTrainedTokenizerBase

from modernbert_small.algebra import unit_vectors
from modernbert_small.evaluation.account import gains_of
from modernbert_small.evaluation.embedder import Vectors
from modernbert_small.evaluation.metrics import ndcg_at_10, similarities
from modernbert_small.evaluation.sets import RetrievalSet
from modernbert_small.packed.batches import PackedSampler, packed_features
from modernbert_small.packed.tokens import TokenStore, text_tokenizer

_TEXTS_AT_ONCE = 1024  # an encoding holds some 100 bytes a token, of which 4 are kept


class PackedEvaluator(BaseEvaluator):
    """Measures nDCG@10 of a model with packed attention, again and again on the same sets.

    The texts of all sets are tokenised once. They are embedded in batches of rows of similar length, without padding,
    with as many tokens as a training batch. docs/LOG.md says what an evaluation costs.

    Args:
        sets: N texts in all.
        tokenizer: the model's, a fast one.
        max_seq_length: in tokens; longer texts are cut.
        tokens_per_batch: at least `max_seq_length`.
    """

    def __init__(
        self,
        sets: Sequence[RetrievalSet],
        tokenizer: PreTrainedTokenizerBase,
        max_seq_length: int,
        tokens_per_batch: int,
    ) -> None:
        super().__init__()
        self.sets, self.tokens_per_batch = sets, tokens_per_batch
        texts = [text for one in sets for part in (one.queries, one.corpus) for text in part.values()]
        encoder = text_tokenizer(tokenizer, max_seq_length)
        blocks = (
            encoder.encode_batch_fast(texts[first : first + _TEXTS_AT_ONCE])
            for first in range(0, len(texts), _TEXTS_AT_ONCE)
        )
        rows = [np.array(row.ids, np.uint32) for block in blocks for row in block]
        lengths = np.array([len(row) for row in rows])
        self._order = np.argsort(-lengths, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(lengths[self._order])])
        self._store = TokenStore(np.concatenate([rows[index] for index in self._order]), offsets, 0)

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """The mean nDCG@10 of each set, under the name that sentence-transformers' evaluators give it.

        Args:
            model: on packed attention. It computes in the precision of the surrounding autocast, scores in float32.
            output_path: not used, as the others; the Trainer passes them.
            epoch: not used.
            steps: not used.
        """
        vectors, metrics = self._embed(model), {}
        for one in self.sets:
            queries, documents, vectors = np.split(vectors, np.cumsum([len(one.queries), len(one.corpus)]))
            scores = ndcg_at_10(similarities(queries, documents), gains_of(one))
            metrics[f"{one.name}_cosine_ndcg@10"] = float(scores.mean())
        return metrics

    @torch.no_grad()
    def _embed(self, model: SentenceTransformer) -> Vectors:
        """Vectors (N, D), unit length, of the queries of the first set, its documents, the next set's queries, ..."""
        model.eval()
        parts = []
        for batch in PackedSampler(self._store.lengths, self.tokens_per_batch, seed=0, shuffle=False):
            features = send_to_device(packed_features(*self._store.gather(batch.rows)), model.device)
            parts.append(model(features)["sentence_embedding"].float())
        found = torch.cat(parts).cpu().numpy()
        vectors = np.empty_like(found)
        vectors[self._order] = found
        return unit_vectors(vectors)
