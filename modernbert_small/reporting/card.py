"""The model card of the final model, from what was measured and from the run.json of the phases before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from modernbert_small.evaluation.account import format_account
from modernbert_small.run.artefacts import RUN_FILE, find_records, read_run

# What their publishers say. Of a source that is not here, no licence is known.
LICENCES = {
    "msmarco": "MS MARCO, for non-commercial research only (https://microsoft.github.io/msmarco/)",
    "finewiki": "Wikipedia, CC BY-SA 4.0",
}
# What describes the model; the rest of a phase's settings says how it was run.
_RECIPE = {
    "create_dataset": ("sources", "max_seq_length", "max_rows_per_source"),
    "init_model_mlm": (
        "teacher_name_or_path",
        "init",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    ),
    "pre_train": ("mlm_probability", "tokens_per_batch", "num_train_epochs", "max_steps", "learning_rate"),
    "create_distil_dataset": ("teacher_name_or_path", "embedding_dim", "pca_sample_size"),
    "distil_train": ("max_seq_length", "tokens_per_batch", "num_train_epochs", "max_steps", "learning_rate"),
}

_TEMPLATE = """---
{metadata}
---

# {name}

A small ModernBERT that maps text of up to {max_seq_length} tokens to vectors of {width} dimensions and unit length,
trained to give the vectors of a larger teacher ({teacher}). Compare them by cosine.

## Use

With sentence-transformers 6 and transformers 5.17 or newer:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
queries = model.encode_query(["How does photosynthesis work?"])
documents = model.encode_document(["Plants turn light into chemical energy.", "The stock market fell."])
print(model.similarity(queries, documents))
```

The student's vectors lie in the space of its reduced teacher: embed documents once with the teacher, queries with the
small model.

```python
teacher = SentenceTransformer("{reduced_teacher}")
print(model.similarity(queries, teacher.encode_document(["Plants turn light into chemical energy."])))
```

The first values say most. Shorter vectors, of length one again for an index that compares by dot product:

```python
model = SentenceTransformer("{name}", truncate_dim={half})
documents = model.encode_document(["Plants turn light into chemical energy."], normalize_embeddings=True)
```

A byte for each value, scaled by a sample of your documents' vectors, some thousands; keep it for what comes later:

```python
from sentence_transformers.util import quantize_embeddings

small = quantize_embeddings(documents, precision="int8", calibration_embeddings=sample)
```

## Quality

Held-out cosine to the teacher's vectors: {similarity:.4f}.

{comparison}

What is kept is nDCG@10 over the teacher's, the mean over the sets, with a 95 % interval from a bootstrap over queries.

## Training

{rows:,} texts labelled by the teacher, {steps:,} steps, mean squared error to the labels. The recipe, as far as it
describes the model:

```yaml
{recipe}
```

## Data

{data}

{contamination}

## Limits

It knows what its corpus and its teacher know, their language and their bias among it; texts beyond {max_seq_length}
tokens are cut. The sets above are small: measure on your own data before you rely on it. What the licences of the data
and of the models that it was made from allow, it allows too, and no more.
"""


def metadata(
    name: str, account: dict[str, Any], records: dict[str, dict[str, Any]], corpora: Sequence[dict[str, Any]]
) -> ModelCardData:
    """The front matter: what the hub and sentence-transformers read.

    Args:
        name: of the model.
        account: of `evaluate`; the student's rows become results.
        records: of `report.find_records`; their teachers' hub ids become base models.
        corpora: of `read_corpora`; their sources' hub ids become datasets.
    """
    inputs = [record.get("inputs", {}) for record in records.values()]
    base_models = {one["teacher"]["hub_id"] for one in inputs if "hub_id" in one.get("teacher", {})}
    sources = [corpus["inputs"].get(row["source"], {}) for corpus in corpora for row in corpus.get("by_source", ())]
    datasets = list(dict.fromkeys(source["hub_id"] for source in sources if "hub_id" in source))
    kinds = {
        "retrieval": ("Information Retrieval", "cosine_ndcg@10", "Cosine Ndcg@10"),
        "pairs": ("Semantic Similarity", "spearman_cosine", "Spearman Cosine"),
    }
    results = [
        EvalResult(task.lower().replace(" ", "-"), dataset, dataset, metric, score, task, metric_name=metric_name)
        for kind, (task, metric, metric_name) in kinds.items()
        for row in account[kind]
        if row["system"] == "student"
        for dataset, score in row["scores"].items()
    ]
    return ModelCardData(
        model_name=name,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "sentence-similarity", "distillation", "modernbert"],
        base_model=sorted(base_models) or None,
        datasets=datasets or None,
        eval_results=results or None,
    )


def recipe(args: Any, records: dict[str, dict[str, Any]]) -> str:
    """What describes the model, section by section as in a recipe file."""
    settings = {record["phase"]: record["settings"] for record in records.values()}
    settings["distil_train"] = {key: getattr(args, key) for key in _RECIPE["distil_train"]}
    sections = {
        phase: {key: settings[phase][key] for key in keys if settings[phase].get(key) not in (None, -1)}
        for phase, keys in _RECIPE.items()
        if phase in settings
    }
    return yaml.safe_dump(sections, sort_keys=False, width=1000).strip()


def read_corpora(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of the corpora that the student read: of its labels, and of its pre-training if that is another."""
    read = [records[phase]["inputs"].get("corpus", {}) for phase in ("labels", "pre_train") if phase in records]
    folders = dict.fromkeys(corpus["path"] for corpus in read if "path" in corpus)
    return [read_run(folder) for folder in folders if Path(folder, RUN_FILE).exists()]


def data_table(corpora: Sequence[dict[str, Any]]) -> str:
    """The corpora's sources, how much of each, and their licences."""
    lines = ["| source | from | texts | licence |", "| --- | --- | ---: | --- |"]
    for corpus in corpora:
        for source in dict.fromkeys(row["source"] for row in corpus.get("by_source", ())):
            texts = sum(row["rows"] for row in corpus["by_source"] if row["source"] == source)
            origin = corpus["inputs"].get(source, {}).get("hub_id", "local files")
            licence = LICENCES.get(source, "not known") if origin != "local files" else "its owner's"
            lines.append(f"| {source} | {origin} | {texts:,} | {licence} |")
    return "\n".join(lines) if len(lines) > 2 else "The corpus's record was not found when this card was written."


def contamination(corpora: Sequence[dict[str, Any]], overlap: dict[str, int]) -> str:
    """Which evaluation sets were kept out of all corpora, and which of them were met in training all the same.

    Args:
        corpora: of `read_corpora`.
        overlap: of `evaluation.overlap`.
    """
    kept_out = [set(corpus.get("evaluation_sets_kept_out", ())) for corpus in corpora]
    names = sorted(set.intersection(*kept_out)) if kept_out else []
    if names:
        dropped = sum(counts.get("contaminated", 0) for corpus in corpora for counts in corpus["dropped"].values())
        note = (
            f"Texts that equal a query of {', '.join(names)}, or share 13 words in a row with one, were kept out of "
            f"the corpus: {dropped:,} texts."
        )
    else:
        note = "No evaluation set was kept out of the corpus."
    met = [f"{count:,} training texts equal a query of {name}" for name, count in overlap.items()]
    return note + (f" {'; '.join(met)}: these scores say more than is true." if met else "")


def write_model_card(folder: Path, args: Any, record: dict[str, Any], width: int) -> None:
    """Write README.md for a model folder.

    Args:
        folder: the model's.
        args: phase 5's settings.
        record: phase 5's measurements.
        width: of the embeddings.
    """
    name = folder.name.removesuffix(".partial")
    records = find_records([args.train_file, args.model_name_or_path, args.teacher_name_or_path])
    corpora = read_corpora(records)
    labels = records.get("labels", {}).get("settings", {})
    text = _TEMPLATE.format(
        metadata=metadata(name, record["account"], records, corpora).to_yaml(),
        name=name,
        max_seq_length=args.max_seq_length,
        width=width,
        half=width // 2,
        teacher=labels.get("teacher_name_or_path", args.teacher_name_or_path),
        reduced_teacher=args.teacher_name_or_path,
        similarity=record["heldout_similarity"],
        comparison=format_account(record["account"]) or "No evaluation set was given.",
        rows=record["rows"]["train"],
        steps=record["steps"],
        recipe=recipe(args, records),
        data=data_table(corpora),
        contamination=contamination(corpora, record["reported_texts_in_training"]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
