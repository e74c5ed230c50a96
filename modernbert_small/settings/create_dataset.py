"""The settings of phase 1."""

from dataclasses import dataclass, field
from typing import Literal

from modernbert_small.run.shards import LEAST_VALIDATION_ROWS

HELDOUT = "heldout"  # the set that phase 1 makes of the sources' own pairs
REPORTED_SETS = ("msmarco", "hotpotqa")  # what phase 5 reports on by default
# A chunk must hold at least a few characters, each of which may take four byte-level tokens, and two special tokens.
_MIN_SEQ_LENGTH = 16


@dataclass
class CreateDatasetArguments:
    """What the corpus is made of. The defaults are those of recipes/v2.yaml."""

    sources: list[str] = field(
        default_factory=lambda: ["msmarco", "sep", "npr", "finewiki"],
        metadata={
            "help": "msmarco, sep, npr, finewiki, python_docs, or NAME=LOCAL_PATH_OR_HUB_ID, which may name columns: "
            "NAME=PATH:query=COLUMN,positive=COLUMN"
        },
    )
    output_dir: str = field(default="data/corpus", metadata={"help": "folder of the corpus"})
    tokenizer_name_or_path: str = field(
        default="answerdotai/ModernBERT-base",
        metadata={"help": "tokenizer that counts the tokens, hub id or folder: that of phase 2's teacher"},
    )
    max_seq_length: int = field(
        default=1024, metadata={"help": "tokens of a text at most, special tokens included; longer ones are split"}
    )
    max_rows_per_source: int | None = field(
        default=None, metadata={"help": "how many rows to read from each source, in random order; by default all"}
    )
    strict: bool = field(
        default=False, metadata={"help": "refuse rows and files that cannot be used, which are skipped and counted"}
    )
    validation_rows: int = field(
        default=2000, metadata={"help": "texts of the validation split; a tenth if that is half of the corpus"}
    )
    eval_datasets: list[str] = field(
        default_factory=lambda: list(REPORTED_SETS),
        metadata={
            "help": "sets that the model will be reported on, as in phase 5; texts that equal their queries are "
            "dropped; heldout makes a set of the sources' own pairs, which are kept out"
        },
    )
    decontaminate: Literal["queries", "all", "no"] = field(
        default="queries",
        metadata={
            "help": "queries: drop texts that equal a query of eval_datasets, or share 13 words in a row with one; "
            "all: the same for their documents; no: drop none"
        },
    )
    seed: int = field(default=42, metadata={"help": "fixes the order, the validation split and the rows taken"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that the tokenizer's repository brings"})
    overwrite: bool = field(default=False, metadata={"help": "replace a corpus made with other settings"})

    def problems(self) -> list[str]:
        """What is wrong with these settings, before anything is loaded."""
        least = {
            "max_seq_length": _MIN_SEQ_LENGTH,
            "max_rows_per_source": 1,
            "seed": 0,
            "validation_rows": LEAST_VALIDATION_ROWS,
        }
        problems = [
            f"{name}: {value}; use at least {minimum}"
            for name, minimum in least.items()
            if (value := getattr(self, name)) is not None and value < minimum
        ]
        if not self.sources:
            problems.append("sources: none given; name at least one")
        if HELDOUT in self.eval_datasets and self.decontaminate == "no":
            problems.append(f"decontaminate: no, but eval_datasets has {HELDOUT}, which keeps texts out; use queries")
        return problems
