"""`python -m iwm_ray.segment RUN --data.path IMAGES --data.masks MASKS ...`: tunes a trained model for classes of pixels.

The predictor with its control, the encoder, or both; mIoU with intervals and pictures. The same command again runs what
is not finished. Runs in this process.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iwm_ray import cli
from iwm_ray.finetune import track
from iwm_ray.run_directory import RunDirectory, write_json
from iwm_ray.segmentation.settings import SegmentConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from iwm_ray.finetuning.arms import Arm
    from iwm_ray.finetuning.model import Tuned
    from iwm_ray.segmentation.experiment import Segmentation

_SECONDS_BETWEEN_LINES = 10.0
_NUM_PICTURED = 6


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    sys.exit(cli.run_command(_main, sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    options = _parser().parse(arguments)
    config = cli.tuning_config(options, SegmentConfig)
    from iwm_ray.segmentation.experiment import Segmentation
    from iwm_ray.trained import Trained

    segmentation = Segmentation.open(Trained.open(options.run, options.checkpoint), config, options.output)
    if options.dry_run:
        print("\n".join(plan_lines(segmentation)))
        return
    segment(segmentation)


def _parser() -> cli.Parser:
    description = (
        "Tune a trained world model for the classes of pixels, from folders of images and of masks. Whole images are "
        "resized to squares of --image-size, and judged there."
    )
    return cli.tuning_parser("segment", description, SegmentConfig, "segment-<data>-<hash>")


def segment(segmentation: "Segmentation") -> None:
    """Runs all arms that are not finished, writes summary and pictures, and prints the tables."""
    from iwm_ray.segmentation import summary

    folder, pictured = segmentation.folder, _Pictured(segmentation)
    with RunDirectory(folder).lock():
        segmentation.run(_Progress(segmentation).say, pictured.keep)
        found: dict[str, Any] = summary.summarise(
            segmentation.counts(), segmentation.train.classes.names, segmentation.task
        )
        found |= {"status": "finished", "step": segmentation.trained.step, "arms": segmentation.costs()}
        write_json(folder / "summary.json", found)
        picture = pictured.draw()
        track(segmentation.trained, folder, found["metrics"], ("summary.json", picture.name))
    print("\n".join(summary.lines(found)))
    print(f"summary      {folder / 'summary.json'}")
    print(f"picture      {picture}")
    for path in sorted((folder / "adapters").glob("*/")):
        print(f"segmenter    {path}")


def plan_lines(segmentation: "Segmentation") -> list[str]:
    """What `--dry-run` prints."""
    config, arms = segmentation.config, segmentation.arms
    finished = sum(map(segmentation.is_finished, arms))
    return [
        f"plan of {segmentation.folder}",
        f"  model      {segmentation.trained.path}, {config.encoder} encoder",
        f"  data       {len(segmentation.train):,} training and {len(segmentation.test):,} test images of "
        f"{segmentation.train.size} pixels, {len(segmentation.train.classes.names)} classes",
        f"  arms       {len(arms)}, {finished} of them finished; {config.steps:,} steps each",
        f"  device     {segmentation.device}",
    ]


class _Pictured:
    """The first test images as the trained networks of the first seed see them; predictions are kept for the picture."""

    def __init__(self, segmentation: "Segmentation") -> None:
        self._segmentation = segmentation
        self._folder = segmentation.folder / "pictured"

    def keep(self, arm: "Arm", tuned: "Tuned") -> None:
        """Keeps what a network makes of these images."""
        import numpy as np

        from iwm_ray.config import RuntimeConfig
        from iwm_ray.segmentation.network import predict

        segmentation = self._segmentation
        precision = RuntimeConfig(precision=segmentation.config.runtime.precision)
        action_dim = segmentation.trained.policy.action_dim
        predicted = predict(tuned, segmentation.test, self._places(), action_dim, precision)[2]
        self._folder.mkdir(exist_ok=True)
        np.save(self._folder / f"{arm.tune}-{arm.start}.npy", predicted.numpy())

    def draw(self) -> Path:
        """The picture of all networks together."""
        import numpy as np

        from iwm_ray.pictures.segmentation import segmentation_sheet

        segmentation = self._segmentation
        places = self._places()
        images, truth, _ = segmentation.test.read(places, np.zeros_like(places), 0)
        words = {
            "pretrained": "\npretrained predictor",
            "random": "\nrandom predictor",
            "none": "\nno predictor",
        }
        predicted = {
            f"{family.tune}:{words[family.start]}": np.load(
                self._folder / f"{family.tune}-{family.start}.npy"
            )
            for family in segmentation.families
        }
        names = segmentation.train.classes.names
        title = f"{segmentation.task}: what was tuned, and what it makes of test images"
        figure = segmentation_sheet(
            images.permute(0, 2, 3, 1).numpy(), truth.numpy(), predicted, names, title
        )
        figure.savefig(segmentation.folder / "predictions.png")
        return segmentation.folder / "predictions.png"

    def _places(self) -> "NDArray[np.int64]":
        import numpy as np

        return np.arange(min(_NUM_PICTURED, len(self._segmentation.test)))


class _Progress:
    """Shows which arm runs, how far it is, and how long the rest will take."""

    def __init__(self, segmentation: "Segmentation") -> None:
        arms = segmentation.arms
        self._left = [arm for arm in arms if not segmentation.is_finished(arm)]
        self._begin = self._shown = time.monotonic()

    def say(self, arm: "Arm", step: int, num_steps: int, loss: float) -> None:
        now = time.monotonic()
        if now - self._shown < _SECONDS_BETWEEN_LINES and step < num_steps:
            return
        self._shown = now
        done = self._left.index(arm) * num_steps + step
        left = (now - self._begin) * (len(self._left) * num_steps - done) / done
        print(
            f"{self._left.index(arm) + 1}/{len(self._left)} {arm.name} · step {step}/{num_steps} · loss {loss:.4f} · "
            f"{left:.0f} s left",
            flush=True,
        )


if __name__ == "__main__":
    main()
