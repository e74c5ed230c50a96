"""The report's section on where a model comes from: times, inputs, versions and settings of all phases."""

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from sentence_transformers import SentenceTransformerTrainingArguments

from modernbert_small.reporting.formats import duration
from modernbert_small.reporting.page import Section, Settings, Table, section, table
from modernbert_small.reporting.phases import Record
from modernbert_small.run.records import PHASES
from modernbert_small.settings.sections import SECTIONS

# What the Trainer and the launcher fill in by themselves.
_FILLED_IN = (
    "accelerator_config",
    "dataloader_pin_memory",
    "ddp_broadcast_buffers",
    "ddp_find_unused_parameters",
    "disable_tqdm",
    "do_eval",
    "greater_is_better",
    "hub_token",
    "logging_nan_inf_filter",
    "prediction_loss_only",
    "processes",
)


def provenance(records: Mapping[str, Record]) -> Section:
    """Tables of times, inputs and versions, and the settings.

    Args:
        records: by phase, as `run.records.find_records` gives them.
    """
    versions: dict[str, dict[str, None]] = {}
    for record in records.values():
        for library, version in record.get("versions", {}).items():
            versions.setdefault(library, {})[version] = None
    settings = {
        PHASES[phase]: {name: _shown(value) for name, value in changed_settings(phase, record["settings"]).items()}
        for phase, record in records.items()
    }
    return section(
        _times(records),
        _inputs(records),
        table("Versions", ["Library", "Version"], [[name, ", ".join(found)] for name, found in versions.items()]),
        Settings(settings),
    )


def changed_settings(phase: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a phase that differ from its script's defaults, in their order.

    Args:
        phase: its name in run.json.
        settings: as run.json holds them.
    """
    defaults = _defaults("create_distil_dataset" if phase == "reduced_teacher" else phase)
    return {
        name: value
        for name, value in settings.items()
        if name not in _FILLED_IN and _comparable(value) != defaults.get(name)
    }


@cache
def _defaults(section: str) -> dict[str, object]:
    """The defaults of a script: the Trainer's, and above them its own."""
    defaults: dict[str, object] = {}
    for of_class in (SentenceTransformerTrainingArguments, SECTIONS[section].settings):
        for field in dataclasses.fields(of_class):
            if field.default is not dataclasses.MISSING:
                defaults[field.name] = _comparable(field.default)
            elif field.default_factory is not dataclasses.MISSING:
                defaults[field.name] = _comparable(field.default_factory())
    return defaults


def _comparable(value: object) -> object:
    """A setting as records, recipes and classes have it alike; all that is not set is None."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value  # a recipe may name one in place of a list
    try:
        return float(value) or None  # type: ignore[arg-type]  # YAML reads 5e-4 as a text
    except (TypeError, ValueError):
        return value or None


def _shown(value: object) -> str:
    """A setting's value as in a recipe: true, not True."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _times(records: Mapping[str, Record]) -> Table | None:
    """When each phase started, from which commit, and the time and energy that it took."""
    rows = []
    for phase, record in records.items():
        started = record.get("started", "")[:16].replace("T", " ")
        rows.append([PHASES[phase], record["folder"], started, (record.get("git_commit") or "")[:10], _spent(record)])
    # The labels' time includes that of the reduced teacher, which is fitted while they are made.
    counted = [
        record
        for phase, record in records.items()
        if phase != "reduced_teacher" or "create_distil_dataset" not in records
    ]
    total = {
        name: sum(record.get(name, 0) for record in counted)
        for name in ("wall_seconds", "gpu_joules")
        if any(name in record for record in counted)
    }
    rows.append(["All", "", "", "", _spent(total)])
    return table("Phases", ["Phase", "Folder", "Started", "Commit", "Time"], rows, code=(1, 3))


def _inputs(records: Mapping[str, Record]) -> Table | None:
    """What each phase read, with hashes."""
    rows = [
        [PHASES[phase], name.split()[0], found.get("path") or found.get("hub_id", ""), found.get("hash", "")]
        for phase, record in records.items()
        for name, found in record["inputs"].items()
    ]
    caption = "Inputs, with the xxh3-128 hash of their content"
    return table(caption, ["Phase", "Input", "Path or hub id", "Hash"], rows, code=(2, 3))


def _spent(record: Record) -> str:
    """Wall-clock time, and energy where it is known; for a run that was resumed, those of its last process."""
    watt_hours = record.get("gpu_joules", 0) / 3600
    energy = f", {watt_hours:,.{0 if watt_hours >= 10 else 2}f} Wh drawn by GPUs" if watt_hours else ""
    return duration(record.get("wall_seconds")) + energy + (" since it was resumed" if record.get("resumed") else "")
