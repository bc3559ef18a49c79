"""What a sweep leaves on disk. These files are its only record: whoever starts it again reads them, and nothing of Ray's.

SWEEP/sweep.json         question, axes, search, every trial that was ever planned: hash -> point
SWEEP/trials/HASH/       the run directory of a trial
SWEEP/trials/HASH/trial.json   written when all that was asked of it is done
SWEEP/failures/HASH.json       a trial that failed: its point, reason, attempts
SWEEP/report/            table, figures, page
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from iwm_ray.config import Config
from iwm_ray.errors import UsageError
from iwm_ray.evaluation.settings import MeasureConfig
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.run_directory import RunDirectory, write_json
from iwm_ray.sweeping.space import Point, Sweep, Trial

Status = Literal["finished", "stopped", "failed", "begun", "new"]
DONE = "trial.json"
_MEND = "remove it, and the sweep's command writes it again"


@dataclass(frozen=True)
class SweepDirectory:
    """A sweep's folder."""

    path: Path

    @property
    def definition(self) -> Path:
        return self.path / "sweep.json"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def run(self, trial_hash: str) -> RunDirectory:
        """The run directory of a trial."""
        return RunDirectory(self.path / "trials" / trial_hash)

    def runs(self) -> list[Path]:
        """The run directories that are there."""
        return sorted(path.parent for path in (self.path / "trials").glob("*/config.json"))

    def holds_any(self) -> bool:
        """Whether there is a sweep, or a run directory."""
        return self.definition.exists() or bool(self.runs()) or any(self.path.glob("*/config.json"))

    def points(self) -> dict[str, Point]:
        """Hash -> point of all trials that were ever planned; of a search that chooses on its way, of all it may choose."""
        return dict(read_json(self.definition).get("trials", {}))

    def refuse_other(self, sweep: Sweep, trials: Sequence[Trial]) -> None:
        """Checks that there can be a folder, that it is this sweep's, and that trials differ from those of the record in
        their axes alone: else the report would take different trainings for repetitions of one configuration.

        Raises:
            UsageError: it is a file, or another sweep's, or another setting differs.
        """
        RunDirectory(self.path).check_place()
        record = read_json(self.definition)
        if record.get("name", sweep.name) != sweep.name:
            raise UsageError(
                f"--output {self.path}: holds the sweep {record['name']!r}, this is {sweep.name!r}; choose another --output"
            )
        if base := record.get("base"):
            self._refuse_difference(base, sweep.base, sweep.settings)
        known = {frozenset(point.items()): name for name, point in self.points().items()}
        for trial in trials:
            recorded = known.get(frozenset(trial.point.items()), trial.hash)
            if recorded != trial.hash:
                self._refuse_difference(_read(self.run(recorded).config), trial.config, set(), trial.title)

    def _refuse_difference(
        self, recorded: dict[str, Any], config: Config, varied: set[str], title: str = "trials"
    ) -> None:
        """Compares with a configuration as an earlier command wrote it; where there is none, nothing was begun with it."""
        if not recorded:
            return
        try:
            before = Config.model_validate(recorded).flat()  # settings that are younger than the record
        except ValidationError:
            raise UsageError(
                f"--output {self.path}: its trials are of a version with other settings; choose another --output"
            ) from None
        for name, value in config.flat().items():
            is_free = name in varied or name.startswith(("runtime.", "tracking."))
            if before[name] != value and not is_free:
                raise UsageError(
                    f"--output {self.path}: its {title} have {name} {before[name]!r}, these {value!r}; "
                    "choose another --output"
                )

    def plan(self, sweep: Sweep, trials: Sequence[Trial], search: str = "grid") -> None:
        """Adds trials to the record, and how they are chosen; those of an earlier, smaller grid stay."""
        write_json(
            self.definition,
            {
                "name": sweep.name,
                "question": sweep.question,
                "axes": {axis.name: list(axis.values) for axis in sweep.axes},
                "base": sweep.base.model_dump(mode="json"),
                "search": search,
                "trials": self.points() | {trial.hash: trial.point for trial in trials},
            },
        )

    def status(self, sweep: Sweep, trial: Trial, *, keep_stopped: bool = False) -> Status:
        """How far a trial is.

        Args:
            sweep: what is asked of the trial; one that was done by other settings has only begun.
            keep_stopped: whether what a scheduler has stopped counts as stopped, or as begun.
        """
        run = self.run(trial.hash)
        done = _read(run.path / DONE)
        if _filled(done.get("asked")) == asked(sweep.measure, sweep.finetune):
            if done["status"] == "finished" and _read(run.summary).get("status") == "finished":
                return "finished"
            if done["status"] == "stopped" and keep_stopped:
                return "stopped"
        if self._failure(trial.hash).exists():
            return "failed"
        return "begun" if run.config.exists() else "new"

    def is_done(self, trial_hash: str) -> bool:
        """Whether all that was asked of a trial has been done."""
        return _read(self.run(trial_hash).path / DONE).get("status") == "finished"

    def training(self, trial_hash: str) -> str:
        """How a trial's training ended: finished, stopped, failed; empty where it has not."""
        return str(_read(self.run(trial_hash).summary).get("status", ""))

    def seconds(self, trial_hash: str) -> dict[str, float]:
        """Part -> seconds of a finished trial; nothing of one that took several attempts."""
        return dict(_read(self.run(trial_hash).path / DONE).get("seconds", {}))

    def note_done(
        self, sweep: Sweep, trial: Trial, seconds: dict[str, float], status: str = "finished"
    ) -> None:
        """Marks a trial as done by what was asked of it; forgets its failure."""
        work = asked(sweep.measure, sweep.finetune)
        record = {"status": status, "asked": work, "point": trial.point, "seconds": seconds}
        write_json(self.run(trial.hash).path / DONE, record)
        self._failure(trial.hash).unlink(missing_ok=True)

    def note_failure(self, trial: Trial, reason: str) -> None:
        """Names a failed attempt; the trial is not done then, whatever it was before."""
        with suppress(OSError):
            (self.run(trial.hash).path / DONE).unlink()
        file = self._failure(trial.hash)
        file.parent.mkdir(parents=True, exist_ok=True)
        attempts = _read(file).get("attempts", 0) + 1
        write_json(file, {"point": trial.point, "title": trial.title, "reason": reason, "attempts": attempts})

    def failures(self) -> dict[str, dict[str, Any]]:
        """Hash -> title, reason and attempts of the trials that failed last."""
        return {file.stem: _read(file) for file in sorted((self.path / "failures").glob("*.json"))}

    def _failure(self, trial_hash: str) -> Path:
        return self.path / "failures" / f"{trial_hash}.json"


def asked(measure: MeasureConfig, finetune: FinetuneConfig | None) -> dict[str, Any]:
    """What is asked of every trial besides its training, as JSON; not where and how fast, nor what ends it."""
    left_out: dict[str, Any] = {"runtime": True, "tracking": True, "data": {"max_bad_fraction"}}
    return {
        "measure": measure.model_dump(mode="json"),
        "finetune": finetune and finetune.model_dump(mode="json", exclude=left_out),
    }


def _filled(recorded: Any) -> dict[str, Any] | None:
    """`asked` as an earlier version noted it, with the defaults of settings that are younger; None where it can't be
    read."""
    with suppress(ValidationError, KeyError, TypeError):
        tuned = recorded["finetune"]
        return asked(
            MeasureConfig.model_validate(recorded["measure"]), tuned and FinetuneConfig.model_validate(tuned)
        )
    return None


def planned(record: dict[str, Any]) -> dict[str, Point]:
    """Hash -> point of the trials of a sweep.json that are to be run, whether they have begun or not; none where the search
    chooses on its way."""
    return {} if record.get("search") == "optuna" else dict(record.get("trials", {}))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        UsageError: the file holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); {_MEND}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: holds no JSON object; {_MEND}")
    return found


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
    return {}
