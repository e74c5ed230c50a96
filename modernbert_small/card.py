"""The model card of the final model, from what was measured."""

from pathlib import Path
from typing import Any

from modernbert_small.evaluate import format_account

_TEMPLATE = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
- distillation
- modernbert
---

# {name}

A small ModernBERT that maps text of up to {max_seq_length} tokens to vectors of {width} dimensions and unit length,
trained to give the vectors of a larger teacher ({teacher}). Compare them by cosine.

## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
queries = model.encode_query(["How does photosynthesis work?"])
documents = model.encode_document(["Plants turn light into chemical energy.", "The stock market fell."])
print(model.similarity(queries, documents))
```

## Quality

Held-out cosine to the teacher's vectors: {similarity:.4f}.

{comparison}

What is kept is nDCG@10 over the teacher's, the mean over the sets, with a 95 % interval from a bootstrap over queries.

## Training

{rows:,} texts labelled by the teacher, {steps:,} steps of about {tokens_per_batch:,} tokens, mean squared error to
the labels, peak learning rate {learning_rate}, {scheduler} schedule.

## Limits

It knows what its corpus and its teacher know. The sets above are small; measure on your own data before you rely
on it.
"""


def write_model_card(folder: Path, args: Any, record: dict[str, Any], width: int) -> None:
    """Write README.md for a model folder.

    Args:
        folder: the model's.
        args: phase 5's settings.
        record: phase 5's measurements.
        width: of the embeddings.
    """
    comparison = format_account(record["account"]) or "No evaluation set was given."
    text = _TEMPLATE.format(
        name=folder.name.removesuffix(".partial"),
        max_seq_length=args.max_seq_length,
        width=width,
        teacher=args.teacher_name_or_path,
        similarity=record["heldout_similarity"],
        comparison=comparison,
        rows=record["rows"]["train"],
        steps=record["steps"],
        tokens_per_batch=args.tokens_per_batch,
        learning_rate=args.learning_rate,
        scheduler=args.lr_scheduler_type,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
