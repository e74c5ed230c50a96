"""The report's section on where a model comes from: times, inputs, versions and settings of all phases."""

import json
from collections.abc import Mapping

from modernbert_small.reporting.formats import duration
from modernbert_small.reporting.page import Section, Settings, Table, section, table
from modernbert_small.reporting.phases import Record
from modernbert_small.run.records import PHASES

_NOTHING: tuple[object, ...] = (None, "", [], {})  # settings without a value


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
        PHASES[phase]: {name: _shown(value) for name, value in record["settings"].items() if value not in _NOTHING}
        for phase, record in records.items()
    }
    return section(
        _times(records),
        _inputs(records),
        table("Versions", ["Library", "Version"], [[name, ", ".join(found)] for name, found in versions.items()]),
        Settings(settings),
    )


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
