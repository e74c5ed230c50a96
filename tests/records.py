"""The run.json files of a model that went through all five phases, with numbers like a real run's."""

import json

import numpy as np

HASH = "7553ce722a0283ef2b6639905e175ed4"
SYSTEMS = {
    "teacher": 1.0,
    "teacher, projected": 0.993,
    "student": 0.931,
    "student's queries, teacher's documents": 0.962,
    "student, 96 values": 0.899,
    "student, 64 values": 0.846,
    "student, 32 values": 0.702,
    "student, int8": 0.930,
    "student, binary": 0.862,
}
TEACHER = {"SciFact": 0.645, "MED": 0.412, "BoolQ": 0.838}


def _account():
    rows = [
        {
            "system": system,
            "scores": {name: round(score * kept, 4) for name, score in TEACHER.items()},
            "mean": round(kept * sum(TEACHER.values()) / 3, 4),
            "retention": kept,
            "interval": [round(kept - 0.03 * (kept < 1), 4), round(kept + 0.024 * (kept < 1), 4)],
        }
        for system, kept in SYSTEMS.items()
    ]
    widths = {"192": 0.931, "96": 0.899, "64": 0.846, "32": 0.702}
    less = {"float32": 0, "int8": 0.001, "binary": 0.06}
    text = "Vitamin D deficiency is associated with a higher risk of falls among older people who live at home, and "
    hits = [{"text": text + str(i), "score": 0.81 - 0.07 * i, "relevant": i != 1} for i in range(3)]
    return {
        "retrieval": rows,
        "grid": {w: {p: round(kept - cost, 4) for p, cost in less.items()} for w, kept in widths.items()},
        "searches": [
            {"set": name, "query": query, "results": {"teacher": hits, "student": hits[::-1]}}
            for name, query in (
                ("SciFact", "is vitamin D enough against falls"),
                ("MED", "does vitamin D prevent falls"),
            )
        ],
        "queries": dict.fromkeys(TEACHER, 300),
        "pairs": [{"system": system, "scores": {"stsb": 0.85}} for system in ("teacher", "student")],
        "cost": {
            "teacher": {
                "parameters": 22713216,
                "megabytes": 90.9,
                "texts_per_second": 141.2,
                "query_milliseconds": 9.8,
            },
            "student": {
                "parameters": 10164480,
                "megabytes": 40.7,
                "texts_per_second": 388.0,
                "query_milliseconds": 8.1,
            },
        },
    }


def _history(steps, last, extra=lambda share: {}):
    history = []
    for step in range(20, steps + 1, 20):
        share = step / steps
        loss = last * (1 + 2.2 * np.exp(-7 * share)) * (1 + 0.02 * np.sin(step))
        history.append(
            {"loss": loss, "grad_norm": 0.4, "learning_rate": 1e-3 * (1 - share), "epoch": share, "step": step}
        )
        if step % 100 == 0:
            history.append({"eval_loss": 1.04 * loss, "epoch": share, "step": step} | extra(share))
    return [*history, {"train_runtime": 9.1, "train_loss": 2.0, "step": steps}]


def write_records(folder):
    """The records of a model as a real run leaves them, and the final model's folder."""
    spectrum = 0.06 * np.arange(1, 193) ** -0.9
    by_source = [
        ("wiki", "document", 20310, 4801220),
        ("msmarco", "document", 4335, 538488),
        ("msmarco", "query", 2497, 26567),
    ]
    nDCG = {f"eval_{name}_cosine_ndcg@10": score for name, score in TEACHER.items()}
    training = {
        "steps": 600,
        "train_tokens_per_second": 8123,
        "mfu": None,
        "peak_memory_bytes": 2.1e9,
        "truncated_rows": 12,
        "reported_texts_in_training": {},
    }
    distil_inputs = {"model": "checkpoints/mlm", "teacher": "checkpoints/teacher", "labels": "data/distil"}
    records = {
        "data/corpus": ("create_dataset", {"wiki": "texts.jsonl", "tokenizer_name_or_path": "minilm"}, {
            "rows": {"train": 26142, "validation": 1000},
            "tokens": 5366275,
            "by_source": [dict(zip(("source", "kind", "rows", "tokens"), entry, strict=True)) for entry in by_source],
            "read": {name: {"rows": 2500, "texts": 7500} for name in ("wiki", "msmarco")},
            "dropped": {name: {"empty": 1, "too_short": 0, "duplicate": 980} for name in ("wiki", "msmarco")},
            "split": {name: {"split_texts": 301, "chunks": 613} for name in ("wiki", "msmarco")},
            "skipped_files": {},
        }),
        "checkpoints/init": ("init_model_mlm", {"teacher": "bert", "corpus": "data/corpus"}, {
            "transferred": ["embeddings", "norm"],
            "spectrum": spectrum.tolist(),
            "heldout_mlm_loss": {"teacher": 1.71, "student": 9.93, "random student": 10.42},
            "layers": {
                "teacher_layers": [0, 2, 4, 6, 8, 11],
                "explained_variance": [0.91, 0.86, 0.81, 0.77, 0.74, 0.76],
                "cka": [0.97, 0.82, 0.71, 0.62, 0.55, 0.48],
            },
            "parameters": 10356282,
        }),
        "checkpoints/mlm": ("pre_train", {"model": "checkpoints/init", "corpus": "data/corpus"}, {
            **training, "history": _history(600, 2.4), "heldout_mlm_loss": 2.52,
        }),
        "checkpoints/teacher": ("create_distil_dataset", {"teacher": "minilm", "corpus": "data/corpus"}, {
            "projection": {
                "sample_texts": 26142, "explained_energy": 0.9022, "heldout_texts": 1000, "spectrum": spectrum.tolist(),
                "quality": {
                    "192": {"cosine_correlation": 0.9947, "neighbour_recall": 0.9082},
                    "128": {"cosine_correlation": 0.9806, "neighbour_recall": 0.8276},
                    "64": {"cosine_correlation": 0.9383, "neighbour_recall": 0.6956},
                    "32": {"cosine_correlation": 0.8769, "neighbour_recall": 0.555},
                },
            },
        }),
        "data/distil": ("create_distil_dataset", {"teacher": "minilm", "corpus": "data/corpus"}, {
            "counts": {"train": {"rows": 26142, "tokens": 5211874}}, "tokens_per_second": 5210, "padding_share": 0.031,
            "ceiling": {"retrieval": _account()["retrieval"][:2]},
        }),
        "checkpoints/model": ("distil_train", distil_inputs, {
            **training,
            "history": _history(600, 1e-3, lambda share: {"eval_similarity": 0.9 - 0.3 * np.exp(-5 * share)}
                                | {name: score * (1 - 0.5 * np.exp(-5 * share)) for name, score in nDCG.items()}),
            "alignment_similarity": {"before": 0.0152, "after": 0.4151}, "heldout_similarity": 0.8971,
            "account": _account(),
        }),
    }  # fmt: skip
    for path, (phase, inputs, measured) in records.items():
        (folder / path).mkdir(parents=True)
        record = {
            "phase": phase,
            "settings": {"teacher_name_or_path": "minilm", "num_hidden_layers": 12, "hidden_size": 192, "init": "guide",
                         "learning_rate": 1e-3, "bf16": None},
            "inputs": {name: {"path": made, "hash": HASH} for name, made in inputs.items()},
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "git_commit": "160497e684b8dd8956ef554a75ae99527167ad68",
            "started": "2026-11-24T08:06:46+0000",
            "wall_seconds": 574.2,
            "gpu_joules": 1.26e6,
        }  # fmt: skip
        (folder / path / "run.json").write_text(json.dumps(record | measured))
    return "checkpoints/model"
