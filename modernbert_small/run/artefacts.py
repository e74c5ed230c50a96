"""Artefact folders: the outputs of the phases, each complete or not there.

A phase writes into `<output_dir>.partial`, and `Run.finish` gives the folder its final name. So a folder with its final
name is complete. Its run.json records what it was made from. When the same phase runs again with the same settings and
inputs, there is nothing to do; with others it refuses unless told to overwrite; an interrupted run goes on.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modernbert_small.run.content import describe_input
from modernbert_small.run.energy import gpu_joules
from modernbert_small.run.errors import UserError
from modernbert_small.run.processes import rank, wait_for_all, world_size
from modernbert_small.run.records import RUN_FILE, git_state, read_run, versions, write_json

logger = logging.getLogger(__name__)

# Settings that change how a run looks or where it runs, but not what it makes.
_NOT_COMPARED = {"overwrite", "config", "output_dir", "teacher_output_dir", "logging_dir", "report_to", "run_name",
                 "disable_tqdm", "logging_steps", "logging_strategy", "logging_first_step", "dataloader_num_workers",
                 "push_to_hub", "hub_token", "hub_model_id", "hub_private_repo", "hub_revision", "local_rank",
                 "ddp_timeout", "trust_remote_code", "log_level"}  # fmt: skip


@dataclass
class Run:
    """One run of a phase.

    Attributes:
        folder: where to write, from `start` on; `output_dir` once `finish` has renamed it.
        record: what run.json holds.
    """

    output_dir: Path
    folder: Path
    record: dict[str, Any]
    resumed: bool
    uses_gpu: bool = True
    _clock: float = field(default_factory=time.monotonic)
    _joules: float | None = None

    def start(self) -> None:
        """Make the folder to write in. It is empty, unless it holds this very run, interrupted.

        Of several processes the first one does it, after all of them have looked at what was there.
        """
        wait_for_all()
        if rank() == 0:
            if self.resumed:
                logger.info("going on with the interrupted run in %s", self.folder)
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / RUN_FILE, self.record)
            if self.uses_gpu:
                self._joules = gpu_joules()
        wait_for_all()

    def finish(self, measurements: Mapping[str, Any]) -> dict[str, Any]:
        """Write run.json and give the folder its final name; returns the record.

        Raises:
            ValueError: a measurement is not finite. JSON cannot hold it, and no phase should report it.
        """
        _require_finite(measurements, "")
        self.record.update(measurements)
        self.record["resumed"] = self.resumed
        self.record["wall_seconds"] = round(time.monotonic() - self._clock, 1)
        if self._joules is not None and (joules := gpu_joules()) is not None:
            self.record["gpu_joules"] = round(joules - self._joules, 1)
        write_json(self.folder / RUN_FILE, self.record)
        replaced = self.output_dir.with_name(self.output_dir.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.output_dir.exists():
            self.output_dir.rename(replaced)
        self.folder.rename(self.output_dir)
        shutil.rmtree(replaced, ignore_errors=True)
        self.folder = self.output_dir
        return self.record


def begin(
    phase: str,
    output_dir: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    overwrite: bool = False,
    flag: str = "--output_dir",
    *,
    one_process: bool = False,
    uses_gpu: bool = True,
    resumable: bool = True,
) -> Run | None:
    """Decide what a phase has to do: start, go on with an interrupted run, or nothing.

    Nothing is written before `Run.start`.

    Args:
        phase: the artefact's name in run.json.
        output_dir: the artefact's final folder.
        settings: resolved settings, JSON types.
        inputs: name -> path of each input artefact, or hub id. Paths are recorded with a content hash, and an earlier
            phase's shards must be those that it wrote.
        overwrite: replace a finished or half-finished artefact of other settings.
        flag: the flag that names output_dir, for errors.
        one_process: the phase cannot run under torchrun with several processes.
        uses_gpu: False leaves the GPUs asleep; else the energy that they draw is recorded.
        resumable: False begins an interrupted run anew.

    Returns:
        The run, or None if the artefact is there already, made with the same settings from the same inputs.

    Raises:
        UserError: the artefact, or a half-finished one, was made with other settings or inputs; the folder holds
            something else; or an input's shards are not those that its run.json names.
    """
    if world_size() > 1 and one_process:
        raise UserError(f"{phase} is work for one process, found {world_size()}; start it with python, not torchrun")
    final = Path(output_dir)
    if not final.name:
        raise UserError(f"{flag} {output_dir}: expected a folder with a name of its own, such as data/corpus")
    if final.is_file():
        raise UserError(f"{flag} {final}: is a file, expected a folder")
    record = {
        "phase": phase,
        "settings": json.loads(json.dumps(dict(settings), default=str)),
        "inputs": {name: describe_input(value) for name, value in inputs.items()},
        "versions": versions(),
        **git_state(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if _is_finished(final, record, overwrite, flag):
        logger.info("%s is finished, with the same settings and inputs: nothing to do", final)
        return None
    partial = final.with_name(final.name + ".partial")
    started = _interrupted_run(partial, record, overwrite, flag) if resumable else None
    if started is not None:
        record["started"] = started
    return Run(final, partial, record, started is not None, uses_gpu)


def _is_finished(final: Path, record: Mapping[str, Any], overwrite: bool, flag: str) -> bool:
    """Whether the artefact is there already.

    Raises:
        UserError: something else is there, and may not be overwritten.
    """
    if not final.exists() or not any(final.iterdir()):
        return False
    earlier = _read_earlier(final, overwrite)
    if earlier is not None and not _differences(earlier, record):
        return True
    if overwrite:
        return False
    if earlier is None:
        raise UserError(f"{flag} {final}: holds files that no run made; name another folder or pass --overwrite")
    raise UserError(_refusal(flag, final, earlier, record))


def _interrupted_run(partial: Path, record: Mapping[str, Any], overwrite: bool, flag: str) -> str | None:
    """When the interrupted run began that can go on, None if there is none.

    Raises:
        UserError: a run of other settings or inputs was interrupted, and may not be overwritten.
    """
    if not (partial / RUN_FILE).exists() or all(path.name in (RUN_FILE, "runs") for path in partial.iterdir()):
        return None  # nothing was saved yet
    earlier = _read_earlier(partial, overwrite)
    if earlier is not None and not _differences(earlier, record):
        return earlier["started"]
    if not overwrite:
        raise UserError(_refusal(flag, partial, earlier or {}, record))
    return None


def _read_earlier(folder: Path, overwrite: bool) -> dict[str, Any] | None:
    """A folder's record, or None if there is none. One that cannot be read counts as none if it may be overwritten."""
    if not (folder / RUN_FILE).exists():
        return None
    try:
        return read_run(folder)
    except UserError:
        if overwrite:
            return None
        raise


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings and inputs that differ between two records, as 'name: before -> now'."""
    if before.get("phase") != now["phase"]:
        return [f"phase: {before.get('phase')} -> {now['phase']}"]
    changes = []
    for part in ("settings", "inputs"):
        old, new = before.get(part, {}), now[part]
        for name in sorted(set(old) | set(new)):
            if name not in _NOT_COMPARED and _comparable(old.get(name)) != _comparable(new.get(name)):
                changes.append(f"{name}: {_shown(old.get(name))} -> {_shown(new.get(name))}")
    return changes


def _comparable(value: object) -> object:
    """What of a setting or input counts: of an input its content, of a path its normal form without a last slash."""
    if isinstance(value, Mapping) and "hash" in value:
        return value["hash"]
    return os.path.normpath(value) if isinstance(value, str) else value


def _shown(value: object) -> object:
    """A setting as it is, an input as it was named with the beginning of its hash."""
    if isinstance(value, Mapping) and "path" in value:
        return f"{value['path']} ({value['hash'][:8]})"
    return value


def _refusal(flag: str, folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changes = _differences(before, now)
    shown = "; ".join(changes[:4]) + (f"; and {len(changes) - 4} more" if len(changes) > 4 else "")
    return f"{folder} was made with other settings or inputs ({shown}); name another {flag} or pass --overwrite"


def _require_finite(value: object, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"measurement {where.lstrip('.')} is {value}, expected a finite number")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _require_finite(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_finite(item, f"{where}[{index}]")
