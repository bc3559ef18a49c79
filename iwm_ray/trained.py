"""A trained world model, found by its run directory or by one of its checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from iwm_ray.config import Config
from iwm_ray.errors import RunError, UsageError
from iwm_ray.model.iwm import IWM, build_model
from iwm_ray.run_directory import RunDirectory, read_config
from iwm_ray.training import checkpoint
from iwm_ray.training.checkpoint import Found
from iwm_ray.training.manifest import MANIFEST, MODEL, folder_name
from iwm_ray.views.policy import ViewPolicy

_ALLOWED = "newest, best, or the step of a kept checkpoint"


@dataclass(frozen=True)
class Trained:
    """One checkpoint of a run, verified; small, so that it can travel to other processes, which load the weights."""

    run: RunDirectory
    config: Config
    policy: ViewPolicy
    path: Path
    """folder of the checkpoint"""
    step: int
    hash: str
    """SHA-256 of the weights' file, hexadecimal: names whatever is computed with them"""

    @classmethod
    def open(cls, path: Path, which: str = "newest") -> "Trained":
        """Finds a checkpoint.

        Args:
            path: a run directory, or the folder of one checkpoint in it.
            which: in a run directory: `newest`, `best` (by the monitors' kNN, or rank without labels), or a step.

        Raises:
            UsageError: no run, no such checkpoint, or one of a newer version.
            RunError: it is damaged.
        """
        path = path.expanduser().absolute()
        if (path / MANIFEST).exists():
            run, found = RunDirectory(path.parent.parent), checkpoint.open_checkpoint(path)
        else:
            run = RunDirectory(path)
            read_config(path)  # says what is wrong with a folder that is no run
            found = _find(run, which)
        config = found.config
        sums = {str(file.name): file.sha256 for file in found.manifest.files}
        return cls(run, config, ViewPolicy.from_config(config.views), found.path, found.step, sums[MODEL])

    def load(self) -> IWM:
        """The model with the checkpoint's weights, on the CPU.

        Raises:
            RunError: the checkpoint is there no more, or damaged.
        """
        if not self.path.is_dir():
            raise RunError(
                f"checkpoint {self.path}: replaced by a newer one while it was in use, since the run still trains; run the "
                "same command again, or give --checkpoint best"
            )
        model = self.untrained()
        checkpoint.load_model(checkpoint.open_checkpoint(self.path), model)
        return model

    def untrained(self) -> IWM:
        """The same model with the weights it started from: what every figure of the trained one is compared with."""
        return build_model(self.config, self.policy.action_dim)


def _find(run: RunDirectory, which: str) -> Found:
    if which == "newest":
        found = checkpoint.newest_valid(run.checkpoints)
        if found is None:
            raise UsageError(
                f"RUN {run.path}: no checkpoint there yet; train it with the command of its config.json"
            )
        return found
    if which == "best":
        return checkpoint.best_valid(run.checkpoints)
    if not which.isdecimal():
        raise UsageError(f"--checkpoint {which!r}: give {_ALLOWED}")
    folder = run.checkpoints / folder_name(int(which))
    if not folder.is_dir():
        kept = sorted(int(path.name.removeprefix("step_")) for path in run.checkpoints.glob("step_*"))
        raise UsageError(
            f"--checkpoint {which}: kept are the steps {kept or 'none'}; give one of them, newest or best"
        )
    return checkpoint.open_checkpoint(folder)
