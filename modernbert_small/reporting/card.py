"""The cards of the final model and of the reduced teacher, from the phases' measurements and records (`run.json`)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modernbert_small.evaluation.overlap import overlap_words
from modernbert_small.evaluation.systems import MIXED, STUDENT
from modernbert_small.evaluation.tables import format_account
from modernbert_small.reporting.formats import count
from modernbert_small.reporting.paths import public_record, public_text, without_paths
from modernbert_small.reporting.render import render
from modernbert_small.reporting.verdict import cosines_note, mixed_is_better
from modernbert_small.run.records import RUN_FILE, find_records, read_run
from modernbert_small.run.tables import counted, markdown_table

# As their publishers state them. For a source that is not listed here, no licence is known.
LICENCES = {
    "msmarco": "MS MARCO, for non-commercial research only (https://microsoft.github.io/msmarco/)",
    "finewiki": "Wikipedia, CC BY-SA 4.0",
}
MODEL_LICENCES = {
    "answerdotai/ModernBERT-base": "apache-2.0",
    "Alibaba-NLP/gte-modernbert-base": "apache-2.0",
}
_ENGLISH = ("msmarco", "sep", "npr", "finewiki")  # sources of the hub
# A query, a document that answers it, and another one, for the card of a model without searches of its own.
_EXAMPLE = ("How does photosynthesis work?", "Plants turn light into chemical energy.", "The stock market fell.")
# The settings that describe the model; the other settings of a phase say how it was run.
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


class DistilSettings(Protocol):
    """What the card says of phase 5's settings."""

    model_name: str | None
    model_name_or_path: str
    teacher_name_or_path: str
    train_file: str
    max_seq_length: int
    tokens_per_batch: int
    num_train_epochs: float
    max_steps: int
    learning_rate: float


def metadata(
    name: str,
    account: dict[str, Any],
    records: dict[str, dict[str, Any]],
    corpora: Sequence[dict[str, Any]],
) -> ModelCardData:
    """The card's front matter, which the hub and sentence-transformers read.

    Args:
        name: the model's name.
        account: what `evaluation.account.account` returned; the student's rows become results.
        records: by phase, see `run.records.find_records`; their teachers' hub ids become base models.
        corpora: see `read_corpora`; their sources' hub ids become datasets, and the language
            is known if all of them are sources of the default recipe.
    """
    inputs = [record.get("inputs", {}) for record in records.values()]
    base_models = {one["teacher"]["hub_id"] for one in inputs if "hub_id" in one.get("teacher", {})}
    sources = {row["source"]: corpus["inputs"].get(row["source"], {}) for corpus in corpora for row in _sources(corpus)}
    datasets = list(dict.fromkeys(source["hub_id"] for source in sources.values() if "hub_id" in source))
    is_english = bool(sources) and all(name in _ENGLISH and "hub_id" in source for name, source in sources.items())
    return ModelCardData(
        model_name=name,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "sentence-similarity", "distillation", "modernbert"],
        language="en" if is_english else None,
        base_model=sorted(base_models) or None,
        datasets=datasets or None,
        eval_results=_results(account) or None,
    )


def _sources(corpus: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    """A corpus's entries by source and kind."""
    return corpus.get("by_source", ())


def _results(account: dict[str, Any]) -> list[EvalResult]:
    """The student's scores, one result for each set."""
    kinds = {
        "retrieval": ("Information Retrieval", "cosine_ndcg@10", "Cosine Ndcg@10"),
        "pairs": ("Semantic Similarity", "spearman_cosine", "Spearman Cosine"),
    }
    results = []
    for kind, (task, metric, metric_name) in kinds.items():
        for scores in (row["scores"] for row in account[kind] if row["system"] == "student"):
            task_type = task.lower().replace(" ", "-")
            results += [
                EvalResult(task_type, dataset, dataset, metric, score, task, metric_name=metric_name)
                for dataset, score in scores.items()
            ]
    return results


def recipe(args: DistilSettings, records: dict[str, dict[str, Any]]) -> str:
    """The settings that describe the model, as YAML in the form of a recipe file.

    Args:
        args: phase 5's settings.
        records: of the phases before, see `run.records.find_records`.
    """
    settings = {record["phase"]: record["settings"] for record in records.values()}
    settings["distil_train"] = {key: getattr(args, key) for key in _RECIPE["distil_train"]}
    sections = {
        phase: {key: settings[phase][key] for key in keys if settings[phase].get(key) not in (None, -1)}
        for phase, keys in _RECIPE.items()
        if phase in settings
    }
    return yaml.safe_dump(sections, sort_keys=False, width=1000).strip()


def read_corpora(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of the corpora that the student was trained on.

    These are the corpus of its labels, and the corpus of its pre-training if that is another one.
    """
    read = [
        records[phase]["inputs"].get("corpus", {})
        for phase in ("create_distil_dataset", "pre_train")
        if phase in records
    ]
    folders = dict.fromkeys(Path(corpus["path"]).resolve() for corpus in read if "path" in corpus)
    return [read_run(folder) for folder in folders if (folder / RUN_FILE).exists()]


def data_table(corpora: Sequence[dict[str, Any]]) -> str:
    """A table of the corpora's sources, with the number of texts and the licence of each.

    Args:
        corpora: see `read_corpora`.
    """
    rows = [["source", "from", "texts", "licence"]]
    for corpus in corpora:
        for source in dict.fromkeys(row["source"] for row in _sources(corpus)):
            texts = sum(row["rows"] for row in corpus["by_source"] if row["source"] == source)
            hub_id = corpus["inputs"].get(source, {}).get("hub_id")
            licence = LICENCES.get(source, "not known") if hub_id else "its owner's"
            rows.append([source, hub_id or "local files", f"{texts:,}", licence])
    if len(rows) == 1:
        return "The corpus's record was not found when this card was written."
    return markdown_table(rows, text_columns=(0, 1, 3))


def models_table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of the models that the student was made from, with their licences as far as they are known.

    Args:
        records: by phase, see `run.records.find_records`.
    """
    roles = {"init_model_mlm": "first weights", "create_distil_dataset": "teacher"}
    rows = [["model", "for", "licence"]]
    for phase, role in roles.items():
        if model := records.get(phase, {}).get("inputs", {}).get("teacher"):
            name = model.get("hub_id") or public_text(model["path"])
            rows.append([name, role, model_licence(model) or "not known"])
    return markdown_table(rows, text_columns=(0, 1, 2)) if len(rows) > 1 else ""


def model_licence(model: Mapping[str, str]) -> str | None:
    """A model's licence: of the hub's as its publisher states it, of a local one as its README.md says, if it does.

    Args:
        model: as a record describes it: a `hub_id`, or a `path`.
    """
    if "hub_id" in model:
        return MODEL_LICENCES.get(model["hub_id"])
    readme = Path(model["path"], "README.md")
    try:
        return ModelCard.load(readme).data.license if readme.is_file() else None
    except (ValueError, OSError, yaml.YAMLError):  # a README that is no model card
        return None


def example(account: Mapping[str, Any]) -> dict[str, str]:
    """A query, a document that answers it and another one as Python strings, from the searches that were measured."""
    for search in account.get("searches", ()):
        found = search["results"][STUDENT]
        right, wrong = ([one["text"] for one in found if one["relevant"] is relevant] for relevant in (True, False))
        if right and wrong:
            texts = (search["query"], right[0], wrong[0])
            break
    else:
        texts = _EXAMPLE
    return dict(zip(("query", "right", "wrong"), (json.dumps(text, ensure_ascii=False) for text in texts), strict=True))


def contamination(corpora: Sequence[dict[str, Any]], overlap: dict[str, int]) -> str:
    """Sentences on the evaluation sets that were kept out of all corpora, and on those whose queries are in them.

    Args:
        corpora: see `read_corpora`.
        overlap: by set, the number of training texts that equal a query, see `evaluation.overlap`.
    """
    kept_out = [set(corpus.get("evaluation_sets_kept_out", ())) for corpus in corpora]
    names = sorted(set.intersection(*kept_out)) if kept_out else []
    if names:
        dropped = sum(counts.get("contaminated", 0) for corpus in corpora for counts in corpus["dropped"].values())
        note = (
            f"Texts that equal a query of {', '.join(names)}, or share 13 words in a row with one, were kept out of "
            f"the corpus: {counted(dropped, 'text')}."
        )
    else:
        note = "No evaluation set was kept out of the corpus."
    if not overlap:
        return note
    met = [overlap_words(name, number) for name, number in overlap.items()]
    return f"{note} {'; '.join(met)}, so these scores are higher than on texts that the model has not seen."


def write_model_card(folder: Path, args: DistilSettings, record: dict[str, Any], width: int) -> None:
    """Write README.md for a model folder. It shows no private path.

    Args:
        folder: the model's folder.
        args: phase 5's settings.
        record: phase 5's measurements.
        width: dimensions of the embeddings.
    """
    name = args.model_name or folder.name.removesuffix(".partial")
    account = record["account"]
    kept = {row["system"]: f"{100 * row['retention']:.1f} %" for row in account["retrieval"]}
    found = find_records([args.train_file, args.model_name_or_path, args.teacher_name_or_path])
    corpora = read_corpora(found)
    records = {phase: public_record(one) for phase, one in found.items()}
    labels = records.get("create_distil_dataset", {}).get("settings", {})
    text = render(
        "card.md.jinja",
        metadata=metadata(name, account, records, corpora).to_yaml(),
        name=name,
        max_seq_length=args.max_seq_length,
        width=width,
        half=width // 2,
        teacher=labels.get("teacher_name_or_path") or public_text(args.teacher_name_or_path),
        reduced_teacher=public_text(args.teacher_name_or_path),
        example=example(account),
        mixed=(kept[MIXED], kept[STUDENT]) if mixed_is_better(account) else None,
        cosines=cosines_note(account),
        similarity=f"{record['heldout_similarity']:.4f}",
        comparison=without_paths(format_account(account, markdown_table)) or "No evaluation set was given.",
        rows=count(record["rows"]["train"]),
        steps=count(record["steps"]),
        recipe=recipe(args, records),
        models=models_table(found),
        data=data_table(corpora),
        contamination=contamination(corpora, record["reported_texts_in_training"]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_teacher_card(
    folder: Path, teacher: Mapping[str, str], projection: Mapping[str, Any] | None, width: int
) -> None:
    """Write README.md for the folder of a reduced teacher. It shows no private path.

    Args:
        folder: the reduced teacher's folder.
        teacher: the teacher that was reduced, as a record describes it: a `hub_id`, or a `path`.
        projection: the projection's report, see `label.teacher.reduce_teacher`; None if the teacher was as wide before.
        width: dimensions of the embeddings.
    """
    hub_id = teacher.get("hub_id")
    name = folder.name.removesuffix(".partial")
    data = ModelCardData(
        model_name=name,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "sentence-similarity"],
        base_model=hub_id,
        license=model_licence(teacher),
    )
    values: dict[str, object] = {"projection": projection is not None}
    if projection is not None:
        values |= {
            "sample_texts": count(projection["sample_texts"]),
            "heldout_texts": count(projection["heldout_texts"]),
            "energy": f"{100 * projection['explained_energy']:.1f}",
            "correlation": f"{projection['quality'][width]['cosine_correlation']:.3f}",
        }
    text = render(
        "teacher_card.md.jinja",
        metadata=data.to_yaml(),
        name=name,
        teacher=hub_id or public_text(teacher["path"]),
        width=width,
        **values,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
