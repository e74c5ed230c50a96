"""Artefact folders: the outputs of the phases, each complete or not there.

A phase writes into `<output_dir>.partial`, and `Run.finish` gives the folder its final name. So a folder with its final
name is complete. Its run.json records what it was made from, and the size and hash of every file. When the same phase
runs again with the same settings and inputs, there is nothing to do; with others it refuses unless told to overwrite;
an interrupted run goes on; damaged files are made again. One run at a time writes an artefact.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modernbert_small.run.content import content_hash, damaged_outputs, describe_input, describe_outputs
from modernbert_small.run.durable import share_tree, sync_tree
from modernbert_small.run.energy import gpu_joules
from modernbert_small.run.errors import UserError
from modernbert_small.run.places import (
    OutputLock,
    bring_back,
    complete_move,
    output_folder,
    own_entries,
    publish_folder,
    remove_artefact,
    reopen,
    require_apart,
    set_aside,
    training_folder,
    working_folder,
)
from modernbert_small.run.processes import any_process, from_first, rank, wait_for_all, world_size
from modernbert_small.run.records import RUN_FILE, git_state, read_run, temporary_files, versions, write_json

logger = logging.getLogger(__name__)

# Settings that change how a run looks or where it runs, but not what it makes.
_NOT_COMPARED = {"overwrite", "config", "output_dir", "teacher_output_dir", "logging_dir", "report_to", "run_name",
                 "disable_tqdm", "logging_steps", "logging_strategy", "logging_first_step", "dataloader_num_workers",
                 "push_to_hub", "hub_token", "hub_model_id", "hub_private_repo", "hub_revision", "local_rank",
                 "ddp_timeout", "trust_remote_code", "log_level"}  # fmt: skip

_SECONDS_TO_SEE = 15  # a new file in a shared folder


@dataclass
class Run:
    """One run of a phase.

    Attributes:
        output_dir: the artefact's final folder.
        folder: where to write, from `start` on; `output_dir` once `finish` has published it.
        record: what run.json holds.
        resumed: whether an interrupted run goes on, or a damaged artefact is repaired.
        flag: the flag that names output_dir, for errors.
        uses_gpu: whether the energy that the GPUs draw is recorded.
        damaged: files of a finished artefact to make again; the others stay.
        aside: patterns of the names that `finish` moves to a folder beside the final one, since only training needs
            them.
    """

    output_dir: Path
    folder: Path
    record: dict[str, Any]
    resumed: bool
    flag: str = "--output_dir"
    uses_gpu: bool = True
    damaged: Sequence[str] = ()
    aside: Sequence[str] = ()
    _seen: tuple[int | None, int | None] = (None, None)
    _clock: float = field(default_factory=time.monotonic)
    _joules: float | None = None
    _lock: OutputLock | None = None

    def start(self) -> None:
        """Lock the output folder and make the folder to write in.

        That folder is empty, unless an interrupted run goes on in it. Of several processes the first one does all this,
        after all of them have looked at what was there.

        Raises:
            UserError: another run writes this artefact, or has written it since `begin` looked; or the folder for what
                only training needs holds something else.
        """
        wait_for_all()
        if rank() == 0:
            if self.aside and own_entries(training_folder(self.output_dir)):
                _read_own(training_folder(self.output_dir), self.record["phase"], self.flag)
            self._lock = OutputLock(self.output_dir)
            self._lock.take(self.flag)
            if _times(self.output_dir, self.folder) != self._seen:
                self._lock.release()
                raise UserError(_overtaken(self.output_dir, self.flag))
            self._prepare_folder()
            if self.uses_gpu:
                self._joules = gpu_joules()
        wait_for_all()
        if any_process(not self._sees_the_record()):
            raise UserError(
                f"{self.flag} {self.output_dir}: not all {world_size()} processes see what the first one writes there; "
                "name a folder on a file system that all machines share"
            )

    def _sees_the_record(self) -> bool:
        """Whether this process sees the record that the first one has written; a shared folder may take seconds."""
        deadline = time.monotonic() + _SECONDS_TO_SEE
        while time.monotonic() < deadline:
            with suppress(UserError):
                if read_run(self.folder).get("started") == self.record["started"]:
                    return True
            time.sleep(0.1)
        return False

    def note_checkpoint(self, step: int | None) -> None:
        """Record the step of the checkpoint that this session goes on from, None if it goes on from none."""
        if rank() == 0 and "sessions" in self.record:
            self.record["sessions"][-1]["from_step"] = step
            write_json(self.folder / RUN_FILE, self.record)

    def _prepare_folder(self) -> None:
        """The folder to write in, with what is kept of earlier work."""
        if self.damaged:
            logger.info("making again in %s: %s", self.output_dir, ", ".join(self.damaged))
            remove_artefact(self.folder)
            reopen(self.output_dir, self.folder)
            bring_back(self.output_dir, self.folder)
            for name in self.damaged:
                (self.folder / name).unlink(missing_ok=True)
        elif self.resumed:
            logger.info("going on with the interrupted run in %s", self.folder)
        else:
            remove_artefact(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in temporary_files(self.folder):
            path.unlink()
        write_json(self.folder / RUN_FILE, self.record)

    def finish(self, measurements: Mapping[str, Any]) -> dict[str, Any]:
        """Write run.json, and give the folder its final name when all of it is safely on the disk.

        Returns:
            The record.

        Raises:
            ValueError: a measurement is not finite. JSON cannot hold it, and no phase should report it.
        """
        _require_finite(measurements, "")
        self.record.update(measurements)
        self.record["resumed"] = self.resumed
        self.record["wall_seconds"] = round(time.monotonic() - self._clock, 1)
        if self._joules is not None and (joules := gpu_joules()) is not None:
            self.record["gpu_joules"] = round(joules - self._joules, 1)
        if changed := _changed_inputs(self.record["inputs"]):
            logger.warning(
                "inputs have changed since this run began, so it may have read a mix: %s", ", ".join(changed)
            )
            self.record["inputs_changed"] = changed
        self.record["outputs"] = describe_outputs(self.folder)
        write_json(self.folder / RUN_FILE, self.record)
        share_tree(self.folder)
        sync_tree(self.folder)
        publish_folder(self.folder, self.output_dir)
        self.folder = self.output_dir
        set_aside(self.folder, self.aside)
        if self._lock is not None:
            self._lock.release()
        return self.record


def move_leftovers(phase: str, output_dir: str, patterns: Sequence[str]) -> None:
    """Move what only training needed out of a finished folder, where a kill right before its end has left it.

    It stays there if a run still holds the folder, which will move it, or if its place is taken by something else.

    Args:
        phase: that made the artefact.
        output_dir: of the finished artefact.
        patterns: as `Run.aside`.
    """
    flag = "--output_dir"
    final = output_folder(output_dir, flag)
    beside, lock = training_folder(final), OutputLock(final)
    with suppress(UserError):
        if own_entries(beside):
            _read_own(beside, phase, flag)
        lock.take(flag)
        set_aside(final, patterns)
        lock.release()


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
    """Decide what a phase has to do: start, go on with an interrupted run, repair a damaged artefact, or nothing.

    Nothing is written before `Run.start`. Only a folder with this phase's run.json is ever replaced.

    Args:
        phase: the artefact's name in run.json.
        output_dir: the artefact's final folder.
        settings: resolved settings, JSON types.
        inputs: name -> path of each input artefact, or hub id. Paths are recorded with a content hash, and an earlier
            phase's outputs must be those that it wrote.
        overwrite: replace a finished or half-finished artefact of other settings, or make its damaged files again.
        flag: the flag that names output_dir, for errors.
        one_process: the phase cannot run under torchrun with several processes.
        uses_gpu: False leaves the GPUs asleep; else the energy that they draw is recorded.
        resumable: False begins an interrupted run anew.

    Returns:
        The run, or None if the artefact is there already, whole, made with the same settings from the same inputs.

    Raises:
        UserError: the artefact, or a half-finished one, was made with other settings or inputs, or is damaged; the
            folder holds something else, overlaps with an input, or is being written by another run; or an input is
            not as its run.json says.
    """
    if world_size() > 1 and one_process:
        raise UserError(f"{phase} is work for one process, found {world_size()}; start it with python, not torchrun")
    final = output_folder(output_dir, flag)
    require_apart(final, inputs, flag)
    if rank() == 0:
        OutputLock(final).check(flag)
        complete_move(final)
    record = from_first(lambda: _new_record(phase, settings, inputs))  # one process reads all inputs for their hashes
    seen = _times(final, working_folder(final))
    try:
        return _decide(final, record, seen, flag, overwrite=overwrite, uses_gpu=uses_gpu, resumable=resumable)
    except (UserError, OSError):
        if rank() == 0:
            _refuse_if_overtaken(final, seen, flag)  # what was found may be another run's work in progress
        raise


def _new_record(phase: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """What run.json says of a run that begins now."""
    return {
        "phase": phase,
        "settings": json.loads(json.dumps(dict(settings), default=str)),
        "inputs": {name: describe_input(value) for name, value in inputs.items()},
        "versions": versions(),
        **git_state(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def changed_settings(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """The settings that differ from those that an artefact was made with, as 'name: before -> now'.

    Args:
        folder: the artefact's, finished or not.
        settings: of a recipe. Of those that are None, the phase chooses the value, so they count as equal.
    """
    before = read_run(folder).get("settings", {})
    compared = [name for name, value in settings.items() if value is not None and name in before]
    now = {name: json.loads(json.dumps(settings[name], default=str)) for name in compared}
    before = {name: before[name] for name in compared}
    return _differences({"phase": "", "settings": before}, {"phase": "", "settings": now, "inputs": {}})


def _refuse_if_overtaken(final: Path, seen: tuple[int | None, int | None], flag: str) -> None:
    """Refuse if another run writes this artefact, or has written it since `seen` was taken.

    Raises:
        UserError: it does, or has.
    """
    OutputLock(final).check(flag)
    if _times(final, working_folder(final)) != seen:
        raise UserError(_overtaken(final, flag))


def _overtaken(final: Path, flag: str) -> str:
    return f"{flag} {final}: was written by another run meanwhile; try again"


def _decide(
    final: Path,
    record: dict[str, Any],
    seen: tuple[int | None, int | None],
    flag: str,
    *,
    overwrite: bool,
    uses_gpu: bool,
    resumable: bool,
) -> Run | None:
    """What `begin` returns, by what lies in the output folder and in the folder to write in."""
    partial = working_folder(final)
    damaged: list[str] = []
    if _is_finished(final, record, overwrite, flag):
        damaged = damaged_outputs(final)
        if not damaged:
            logger.info("%s is finished, with the same settings and inputs: nothing to do", final)
            return None
        if not overwrite:
            raise UserError(
                f"{flag} {final}: files are missing or changed since they were made ({', '.join(damaged)}); make them "
                "again with --overwrite"
            )
    earlier = _interrupted_run(partial, record, overwrite, flag)
    if damaged:
        return Run(final, partial, record, True, flag, uses_gpu, damaged, (), seen)
    if earlier is not None and resumable:
        record["sessions"] = [*earlier.get("sessions", [_session(earlier)]), _session(record)]
        record["started"] = earlier["started"]
        return Run(final, partial, record, True, flag, uses_gpu, (), (), seen)
    return Run(final, partial, record, False, flag, uses_gpu, (), (), seen)


def _is_finished(final: Path, record: Mapping[str, Any], overwrite: bool, flag: str) -> bool:
    """Whether the artefact is there already.

    Raises:
        UserError: something else is there, or an artefact that may not be overwritten.
    """
    if not own_entries(final):
        return False
    earlier = _read_own(final, record["phase"], flag)
    if not _differences(earlier, record):
        return True
    if overwrite:
        return False
    raise UserError(_refusal(flag, final, earlier, record))


def _session(record: Mapping[str, Any]) -> dict[str, Any]:
    """When and with what a run began or went on; `Run.note_checkpoint` says from which checkpoint."""
    known = {name: record.get(name) for name in ("started", "versions", "git_commit", "git_dirty")}
    return {**known, "from_step": None}


def _changed_inputs(inputs: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The local inputs that are no longer as they were recorded."""
    local = {name: value for name, value in inputs.items() if "path" in value}
    return [
        name
        for name, value in local.items()
        if not Path(value["path"]).exists() or content_hash(Path(value["path"])) != value["hash"]
    ]


def _interrupted_run(partial: Path, record: Mapping[str, Any], overwrite: bool, flag: str) -> dict[str, Any] | None:
    """The record of the interrupted run that can go on, None if there is none.

    Raises:
        UserError: the folder to write in holds somebody's files, or a run of other settings or inputs was interrupted
            and may not be overwritten.
    """
    if not own_entries(partial):
        return None
    earlier = _read_own(partial, record["phase"], flag)
    if all(path.name in (RUN_FILE, "runs") for path in partial.iterdir()):
        return None  # nothing was saved yet
    if not _differences(earlier, record):
        return earlier
    if not overwrite:
        raise UserError(_refusal(flag, partial, earlier, record))
    return None


def _read_own(folder: Path, phase: str, flag: str) -> dict[str, Any]:
    """The record of a folder that holds something, which must be an artefact of this phase.

    Raises:
        UserError: it is not, so that it is never replaced.
    """
    if not (folder / RUN_FILE).exists():
        raise UserError(f"{flag}: {folder} holds files that no run made; move them away or name another folder")
    try:
        record = read_run(folder)
    except UserError as error:
        raise UserError(f"{error}; nothing was touched: move {folder} away or name another folder") from error
    if record.get("phase") != phase:
        raise UserError(
            f"{flag}: {folder} was made by {record.get('phase')}, not by {phase}, and is not replaced; name another "
            "folder"
        )
    return record


def _times(final: Path, partial: Path) -> tuple[int | None, int | None]:
    """When the records of a finished and of an unfinished artefact were written, None for those that are not there."""
    return _time(final / RUN_FILE), _time(partial / RUN_FILE)


def _time(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None


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
