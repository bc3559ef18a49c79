"""What a process is handed to run one trial."""

from dataclasses import dataclass

from iwm_ray.run_directory import RunDirectory
from iwm_ray.sweeping.record import SweepDirectory
from iwm_ray.sweeping.space import Sweep, Trial


@dataclass(frozen=True)
class Job:
    """A trial, what is asked of it, and where its results go."""

    sweep: Sweep
    trial: Trial
    directory: SweepDirectory
    tags: dict[str, str]
    """of its MLflow run; `mlflow.parentRunId` makes it a child of the sweep's"""

    @property
    def run(self) -> RunDirectory:
        return self.directory.run(self.trial.hash)
