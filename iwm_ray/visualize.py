"""`python -m iwm_ray.visualize RUN`: draws what a trained world model imagines, as PNGs and one offline page."""

import io
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from iwm_ray import cli
from iwm_ray.build import Held, Setup, build, hold
from iwm_ray.data.index import Index
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluation.mrr import MrrResult, measure_mrr
from iwm_ray.measurement import TRAINED, UNTRAINED, kept_result
from iwm_ray.model.iwm import IWM
from iwm_ray.pictures import parts
from iwm_ray.pictures.maps import measure_maps
from iwm_ray.pictures.page import Picture, Section, build_page, mrr_sentence
from iwm_ray.pictures.slider import measure_slides
from iwm_ray.pictures.style import DPI
from iwm_ray.runtime.tracking import reopened
from iwm_ray.session import draw_views
from iwm_ray.trained import Trained
from iwm_ray.training import metrics_log

PAGE = "index.html"

_NUM_IMAGES = 16
_MOST_COMPONENT_VIEWS = 32  # of the banks by component: ten are measured, and large ones are crowded
_NUM_SLIDES, _NUM_MAPS, _NUM_SHEET_ROWS = 4, 4, 6  # images


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    sys.exit(cli.run_command(_main, sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    start = begin = time.monotonic()
    trained = Trained.open(options.run, options.checkpoint)
    subject = _open(trained, options)
    album = Album(options.output or trained.run.pictures)
    album.check()
    for part in _parts(subject):
        album.add(part)
        print(f"{part.name:16} {time.monotonic() - begin:5.1f} s  {part.title}", flush=True)
        begin = time.monotonic()
    page = build_page(
        f"World model {trained.run.path.name}",
        subject.headline,
        _facts(subject),
        album.sections,
        trained.config.model_dump_json(indent=1),
    )
    album.write(PAGE, page.encode())
    _track(subject, album)
    print(f"{subject.headline}\n{album.folder / PAGE}  ({time.monotonic() - start:.0f} s in all)", flush=True)


def _track(subject: "Subject", album: "Album") -> None:
    """Adds pictures and page to the run's MLflow run."""
    try:
        with reopened(subject.trained.run, subject.setup.config) as tracker:
            for picture in sorted(album.folder.glob("*.png")):
                tracker.log_picture(picture)
            tracker.log_file(album.folder / PAGE, "pictures")
    except UsageError as error:  # the run is still training
        print(f"not tracked: {error}", file=sys.stderr)


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = cli.Parser(prog="python -m iwm_ray.visualize", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "--checkpoint",
        default="newest",
        metavar="C",
        help="newest (default), best, or the step of a kept one",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default RUN/pictures")
    parser.add_argument(
        "--images",
        type=int,
        default=_NUM_IMAGES,
        metavar="N",
        help="images for the MRR (default: %(default)s)",
    )
    parser.add_argument(
        "--views",
        type=int,
        metavar="N",
        help="views in each image's bank; default: the run's monitor.mrr_views",
    )
    parser.add_argument("--data.path", metavar="PATH", help="training images, where the run's own have moved")
    parser.add_argument(
        "--data.test-path", metavar="PATH", help="held-out images; default: none with --data.path"
    )
    parser.add_argument(
        "--runtime.cache", metavar="DIR", help="folder of the data indices; default: the run's"
    )
    parser.add_argument(
        "--tracking.uri", metavar="URI", help="MLflow store; none: no MLflow; default: the run's"
    )
    cli.add_common_options(parser)
    options = parser.parse(arguments)
    for name in ("images", "views"):
        value = getattr(options, name)
        if value is not None and value < 2:
            raise UsageError(f"--{name} {value}: needs 2 or more; leave it out for the default")
    return options


@dataclass(frozen=True)
class Subject:
    """What is drawn."""

    trained: Trained
    setup: Setup
    model: IWM
    held: Held
    num_views: int

    @property
    def has_actions(self) -> bool:
        """Without any jitter all views of an image are equal, and there is nothing to imagine."""
        return self.has_tokens and any(
            component.scale for component in self.setup.policy.target_jitter.fields
        )

    @property
    def has_tokens(self) -> bool:
        """Whether the predictor imagines tokens, not pixels."""
        return self.setup.config.predictor.target == "encoder"

    @cached_property
    def mrr(self) -> MrrResult:
        return self.measure(self.model, self.num_views, by_component=False)

    @property
    def headline(self) -> str:
        if not self.has_tokens:
            return "This run predicts pixels (MAE): it knows no action, and no tokens that could be compared."
        if not self.has_actions:
            return "This run has no colour jitter: there is no action whose result could be imagined."
        return mrr_sentence(self.mrr)

    @cached_property
    def records(self) -> list[dict[str, float]]:
        """What the run wrote into metrics.jsonl."""
        return metrics_log.read(self.trained.run.metrics)

    @property
    def newest(self) -> dict[str, float]:
        """The last finite value of every metric, up to the checkpoint's step."""
        rows = [row for row in self.records if row["step"] <= self.trained.step]
        return {name: value for row in rows for name, value in row.items() if value is not None}

    def measure(self, model: IWM, num_views: int, by_component: bool) -> MrrResult:
        """The MRR of any model on the held images."""
        policy, seed = self.setup.policy, self.setup.config.seed
        return measure_mrr(
            model, self.held.images, policy, seed=seed, num_views=num_views, by_component=by_component
        )


@dataclass(frozen=True)
class Album:
    """A folder of pictures, and the sections of the page that show them."""

    folder: Path
    sections: list[Section] = field(default_factory=list)

    def check(self) -> None:
        """Makes the folder; a place that can't be written is found before anything is measured."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise self._refusal(error) from None

    def add(self, part: parts.Part) -> None:
        """Writes the part's PNGs, numbered where there are several."""
        pictures = []
        for number, (figure, alt) in enumerate(part.figures, start=1):
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=DPI)
            self.write(f"{part.name}{f'-{number}' * (len(part.figures) > 1)}.png", file.getvalue())
            pictures.append(Picture(file.getvalue(), alt))
        self.sections.append(Section(part.name, part.title, part.caption, tuple(pictures)))

    def write(self, name: str, data: bytes) -> None:
        """Writes a whole file of the folder or nothing."""
        partial = self.folder / f".{name}"
        try:
            partial.write_bytes(data)
            partial.replace(self.folder / name)
        except OSError as error:
            raise self._refusal(error) from None

    def _refusal(self, error: OSError) -> UsageError:
        return UsageError(f"--output {self.folder}: {error.strerror}; choose another --output")


def _open(trained: Trained, options: Namespace) -> Subject:
    """Opens the data and the weights.

    Raises:
        UsageError: no data, or none that can be read.
    """
    chosen = vars(options)
    tree = trained.config.model_dump()
    if chosen["data.path"]:
        tree["data"] |= {"path": chosen["data.path"], "test_path": ""}
    if chosen["data.test_path"]:
        tree["data"]["test_path"] = chosen["data.test_path"]
    if chosen["runtime.cache"]:
        tree["runtime"]["cache"] = chosen["runtime.cache"]
    if chosen["tracking.uri"]:
        tree["tracking"]["uri"] = chosen["tracking.uri"]
    # Pictures need two images, not the whole batch that training does.
    tree["optimizer"]["global_batch_size"] = 1
    tree["runtime"] |= {"num_workers": 1, "accumulation_steps": 1}
    setup = build(cli.validate(tree), trained.run)
    held = _hold(setup, setup.test_index or setup.feed.index, options.images, "mrr")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_views = options.views or trained.config.monitor.mrr_views
    return Subject(trained, setup, trained.load().to(device), held, num_views)


def _hold(setup: Setup, index: Index, count: int, purpose: str) -> Held:
    try:
        return hold(setup, index, count, purpose)
    except RunError as error:  # nothing has run yet: other data mends it
        raise UsageError(str(error)) from None


def _parts(subject: Subject) -> Iterator[parts.Part]:
    """Measures and draws one part after the other."""
    setup, model = subject.setup, subject.model
    if subject.has_actions:
        yield from _action_parts(subject)
    if subject.has_tokens:
        maps = measure_maps(model, subject.held.images[:_NUM_MAPS], setup.policy)
        yield parts.maps_part(maps, setup.policy)
    seen = _hold(setup, setup.feed.index, _NUM_SHEET_ROWS, "sheet").samples  # such as can be read
    title = "Views, masks and actions"
    yield parts.views_part(draw_views(setup, np.zeros_like(seen), seen, title), len(seen))
    yield from _record_parts(subject)


def _action_parts(subject: Subject) -> Iterator[parts.Part]:
    setup, model, images = subject.setup, subject.model, subject.held.images
    policy, conditioning = setup.policy, setup.config.predictor.conditioning
    yield parts.retrieval_part(subject.mrr, images, policy, conditioning)
    yield parts.worst_part(subject.mrr, images, policy, conditioning)
    slides = measure_slides(model, images[:_NUM_SLIDES], policy, seed=setup.config.seed)
    yield parts.slider_part(slides, images[:_NUM_SLIDES], policy)
    yield _components_part(subject)
    yield parts.errors_part(slides)


def _components_part(subject: Subject) -> parts.Part:
    """From the run's evaluation where there is one; else measured here, on less."""
    names = [component.name for component in subject.setup.policy.target_jitter.fields]
    kept = kept_result(subject.trained, "mrr")
    if kept and kept.settings["components"] and UNTRAINED in kept.measured:
        measured, settings = kept.measured, kept.settings
        return parts.components_part(
            measured[TRAINED], measured[UNTRAINED], names, settings["views"], settings["images"]
        )
    num_views = min(subject.num_views, _MOST_COMPONENT_VIEWS)
    untrained = subject.trained.untrained().to(next(subject.model.parameters()).device)
    ours, theirs = (
        subject.measure(each, num_views, by_component=True).metrics for each in (subject.model, untrained)
    )
    return parts.components_part(ours, theirs, names, num_views, len(subject.held.images))


def _record_parts(subject: Subject) -> Iterator[parts.Part]:
    """What the run has written down."""
    config, schema = subject.setup.config, subject.setup.policy.schema
    kept = kept_result(subject.trained, "action_r2")
    if kept:
        names = [component.name for component in schema]
        yield parts.action_r2_part(kept.measured[TRAINED], names, kept.measured.get(UNTRAINED))
    yield parts.curves_part(subject.records, f"Training curves of {config.recipe}")


def _facts(subject: Subject) -> Mapping[str, str]:
    """The table at the top of the page."""
    trained, data, newest = subject.trained, subject.setup.config.data, subject.newest
    source = f"{data.test_path} (test images)" if data.test_path else f"{data.path} (training images)"
    facts = {
        "recipe": trained.config.recipe,
        "conditioning": trained.config.predictor.conditioning,
        "step": f"{trained.step:,}",
        "checkpoint": f"{trained.path} (weights {trained.hash[:12]})",
        "images": f"{len(subject.held.images)} of {source}",
    }
    if subject.has_actions:
        facts["bank"] = f"{subject.num_views} views of each image"
    if "mrr/mrr" in newest:
        measured_anew = "mrr/num_views" in newest  # by an evaluation since the end of training
        views = int(newest.get("mrr/num_views", trained.config.monitor.mrr_views))
        facts["MRR of the evaluation" if measured_anew else "MRR at the end of training"] = (
            f"{newest['mrr/mrr']:.3f} (chance {newest['mrr/chance']:.3f}; {views} views of each image)"
        )
    return facts


if __name__ == "__main__":
    main()
