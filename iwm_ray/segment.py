"""`python -m iwm_ray.segment RUN --data.path IMAGES --data.masks MASKS ...`: tunes a trained model for classes of pixels.

The predictor with its control, the encoder, or both; mIoU with intervals and pictures. The same command again runs what
is not finished, from the step that was saved last.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iwm_ray import cli
from iwm_ray.run_directory import RunDirectory, write_json
from iwm_ray.segmentation.settings import SegmentConfig

if TYPE_CHECKING:
    from iwm_ray.driver import Stop
    from iwm_ray.segmentation.experiment import Segmentation


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    sys.exit(cli.run_command(_main, sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    options = _parser().parse(arguments)
    config = cli.tuning_config(options, SegmentConfig)
    from iwm_ray.driver import Stop
    from iwm_ray.segmentation.experiment import Segmentation
    from iwm_ray.trained import Trained
    from iwm_ray.tuning_driver import CachedTokens, preflight

    trained = Trained.open(options.run, options.checkpoint)
    segmentation = Segmentation.open(trained, config, options.output, CachedTokens(trained, config))
    segmentation.refuse_unused()
    resources = preflight(segmentation)
    if options.dry_run:
        print("\n".join([*plan_lines(segmentation), f"  resources  {resources}"]))
        return
    segment(segmentation, Stop(RunDirectory(segmentation.folder)), options.debug)


def _parser() -> cli.Parser:
    description = (
        "Tune a trained world model for the classes of pixels, from folders of images and of masks. Whole images are "
        "resized to squares of --image-size, and judged there."
    )
    return cli.tuning_parser("segment", description, SegmentConfig, "segment-<data>-<hash>")


def segment(segmentation: "Segmentation", stop: "Stop | None" = None, debug: bool = False) -> None:
    """Runs all arms that are not finished, writes summary and pictures, and prints the tables."""
    from iwm_ray import tuning_driver
    from iwm_ray.segmentation import summary

    folder = segmentation.folder
    with RunDirectory(folder).lock():
        segmentation.start()
        tuning_driver.run(segmentation, stop, debug)
        names, ways, counts = (
            segmentation.train.classes.names,
            segmentation.config.ways,
            segmentation.counts(),
        )
        found = summary.summarise(counts, names, segmentation.task, ways)
        found |= {"status": "finished", "step": segmentation.trained.step}
        found["efficiency"] = summary.efficiency(segmentation.costs(), counts, found["metrics"], ways)
        found["undecodable"] = segmentation.num_undecodable()
        write_json(folder / "summary.json", found)
        pictures = (_draw(segmentation), _draw_efficiency(segmentation, found["efficiency"]))
        files = ("config.json", "summary.json", *(picture.name for picture in pictures))
        tuning_driver.track(segmentation, found["metrics"], files)
    print("\n".join([*summary.lines(found), *segmentation.undecodable_lines()]))
    print(f"summary      {folder / 'summary.json'}")
    for picture in pictures:
        print(f"picture      {picture}")
    for path in sorted((folder / "adapters").glob("*/")):
        print(f"segmenter    {path}")


def plan_lines(segmentation: "Segmentation") -> list[str]:
    """What `--dry-run` prints."""
    config, arms = segmentation.config, segmentation.planned()
    finished = sum(map(segmentation.is_finished, arms))
    return [
        f"plan of {segmentation.folder}",
        f"  model      {segmentation.trained.path}, {config.encoder} encoder",
        f"  data       {len(segmentation.train):,} training and {len(segmentation.test):,} test images of "
        f"{segmentation.train.size} pixels, {len(segmentation.train.classes.names)} classes",
        f"  arms       {len(arms)}, {finished} of them finished; {config.steps:,} steps each",
    ]


def _draw(segmentation: "Segmentation") -> Path:
    """The first test images as the trained networks of the first seed see them."""
    import numpy as np

    from iwm_ray.pictures.segmentation import segmentation_sheet

    places = segmentation.pictured_places
    images, truth, readable = segmentation.test.read(places, np.zeros_like(places), 0)
    words = {
        "pretrained": "\npretrained predictor",
        "random": "\nrandom predictor",
        "none": "\nno predictor",
    }
    predicted = {
        f"{family.tune}:{words[family.start]}": np.load(segmentation.pictured(family))
        for family in segmentation.counts()
        if segmentation.pictured(family).exists()
    }
    title = f"{segmentation.task}: what was tuned, and what it makes of test images"
    pixels, names = images[readable].permute(0, 2, 3, 1).numpy(), segmentation.train.classes.names
    figure = segmentation_sheet(pixels, truth[readable].long().numpy(), predicted, names, title)
    figure.savefig(segmentation.folder / "predictions.png")
    return segmentation.folder / "predictions.png"


def _draw_efficiency(segmentation: "Segmentation", rows: list[dict[str, Any]]) -> Path:
    from iwm_ray.pictures.efficiency import accuracy_against_cost

    title = f"Segmentation by {segmentation.trained.config.recipe}, step {segmentation.trained.step}"
    path = segmentation.folder / "efficiency.png"
    accuracy_against_cost(rows, title, "miou", "mIoU").savefig(path)
    return path


if __name__ == "__main__":
    main()
