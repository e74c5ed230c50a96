"""The sections of a recipe: for each script where it is, what its settings are, and what other settings it takes."""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from modernbert_small.settings.create_dataset import CreateDatasetArguments
from modernbert_small.settings.create_distil_dataset import DistilDatasetArguments
from modernbert_small.settings.distil_train import DistilTrainSettings
from modernbert_small.settings.init_model_mlm import InitModelArguments
from modernbert_small.settings.pre_train import PreTrainSettings
from modernbert_small.settings.training import TrainingSettings


class Section(NamedTuple):
    """A script: its path below `run.script.ROOT`, and the class of the settings that this project declares."""

    script: str
    settings: type[Any]


SECTIONS = {
    "create_dataset": Section("mlm/create_dataset.py", CreateDatasetArguments),
    "init_model_mlm": Section("mlm/init_model_mlm.py", InitModelArguments),
    "pre_train": Section("mlm/pre_train.py", PreTrainSettings),
    "create_distil_dataset": Section("create_distil_dataset.py", DistilDatasetArguments),
    "distil_train": Section("distil_train.py", DistilTrainSettings),
}

# What a phase writes, and where later phases read it: (section, setting), each.
CHAINS = {
    ("create_dataset", "output_dir"): [
        ("init_model_mlm", "train_file"),
        ("pre_train", "train_file"),
        ("create_distil_dataset", "train_file"),
    ],
    ("init_model_mlm", "output_dir"): [("pre_train", "model_name_or_path")],
    ("pre_train", "output_dir"): [("distil_train", "model_name_or_path")],
    ("create_distil_dataset", "output_dir"): [("distil_train", "train_file")],
    ("create_distil_dataset", "teacher_output_dir"): [("distil_train", "teacher_name_or_path")],
}


def settings_class(section: str, keys: Collection[str]) -> type[Any]:
    """A class that has all of these settings, if there is one; it is for a parser, and not to be instantiated.

    transformers and sentence-transformers are imported only if a setting is one that they declare: that takes seconds.
    """
    for dataclass_type in _classes(section):
        names = {field.name for field in dataclasses.fields(dataclass_type)}
        if names.issuperset(keys):
            break
    return dataclass_type


def _classes(section: str) -> Iterator[type[Any]]:
    """The section's own settings, then those with the ones that its script inherits."""
    own = SECTIONS[section].settings
    yield own
    if issubclass(own, TrainingSettings):
        from transformers import TrainingArguments

        yield dataclasses.make_dataclass(own.__name__, [], bases=(own, TrainingArguments))
    if own is DistilTrainSettings:
        from sentence_transformers import SentenceTransformerTrainingArguments

        yield dataclasses.make_dataclass(own.__name__, [], bases=(own, SentenceTransformerTrainingArguments))
