"""`python -m iwm_ray.visualize RUN`: draws what a trained world model imagines, as PNGs and one offline page."""

import io
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from iwm_ray import cli
from iwm_ray.build import Held, Setup, build, hold
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluation.mrr import MrrResult, measure_mrr
from iwm_ray.model.iwm import IWM
from iwm_ray.pictures.bars import ErrorRow, action_r2_bars, error_curves, mrr_bars
from iwm_ray.pictures.curves import training_curves
from iwm_ray.pictures.maps import TINY_GRID, TokenMaps, measure_maps, token_maps
from iwm_ray.pictures.page import Picture, Section, build_page, mrr_sentence
from iwm_ray.pictures.retrieval import retrieval_gallery
from iwm_ray.pictures.slider import Slide, measure_slides, slider_sheet
from iwm_ray.pictures.style import DPI
from iwm_ray.session import draw_views
from iwm_ray.trained import Trained
from iwm_ray.training import metrics_log

PAGE = "index.html"

_NUM_IMAGES = 16
_MOST_COMPONENT_VIEWS = 64  # of the banks by component: ten of them are measured, and large ones are crowded
_NUM_SLIDES, _NUM_SLIDER_SHEETS = 4, 2  # images in the curves, images whose views are drawn
_NUM_ROWS = 6  # of the sheets of training samples and of worst cases
_NUM_MAPS = 4


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    sys.exit(cli.run_command(_main, sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    begin = time.monotonic()
    trained = Trained.open(options.run, options.checkpoint)
    subject = _open(trained, options)
    album = Album(options.output or trained.run.pictures)
    album.prepare()
    for draw in _DRAWINGS:
        draw(subject, album)
    page = album.folder / PAGE
    album.write(PAGE, _page(subject, album.sections).encode())
    print(f"{subject.headline}\n{page}  {time.monotonic() - begin:.0f} s in all", flush=True)


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
        help="held images for the MRR (default: %(default)s)",
    )
    parser.add_argument(
        "--views",
        type=int,
        metavar="N",
        help="views in each image's bank; default: the run's monitor.mrr_views",
    )
    parser.add_argument("--data.path", metavar="PATH", help="training images, where the run's own have moved")
    parser.add_argument(
        "--data.test-path", metavar="PATH", help="held-out images; default with --data.path: none"
    )
    parser.add_argument(
        "--runtime.cache", metavar="DIR", help="folder of the data indices; default: the run's"
    )
    cli.add_common_options(parser)
    options = parser.parse(arguments)
    for name in ("images", "views"):
        if getattr(options, name) is not None and getattr(options, name) < 2:
            raise UsageError(
                f"--{name} {getattr(options, name)}: needs 2 or more; leave it out for the default"
            )
    return options


@dataclass(frozen=True)
class Subject:
    """What is drawn, and measurements that several pictures share; each is made once, when first wanted."""

    trained: Trained
    setup: Setup
    model: IWM
    held: Held
    num_views: int

    @property
    def has_actions(self) -> bool:
        """Without any jitter all views of an image are equal, and there is nothing to imagine."""
        return any(field.scale for field in self.setup.policy.target_jitter.fields)

    @property
    def components(self) -> list[str]:
        """Names of the components of the jitter."""
        return [field.name for field in self.setup.policy.target_jitter.fields]

    @property
    def headline(self) -> str:
        if not self.has_actions:
            return "This run has no colour jitter: there is no action whose result could be imagined."
        return mrr_sentence(self.mrr)

    @cached_property
    def mrr(self) -> MrrResult:
        return self.measure(self.model, self.num_views, by_component=False)

    @cached_property
    def slides(self) -> list[Slide]:
        images = self.held.images[:_NUM_SLIDES]
        return measure_slides(self.model, images, self.setup.policy, seed=self.setup.config.seed)

    def measure(self, model: IWM, num_views: int, by_component: bool) -> MrrResult:
        """The MRR of any model on the held images."""
        seed = self.setup.config.seed
        return measure_mrr(
            model,
            self.held.images,
            self.setup.policy,
            seed=seed,
            num_views=num_views,
            by_component=by_component,
        )


@dataclass(frozen=True)
class Album:
    """A folder of pictures, and the sections of the page that show them."""

    folder: Path
    sections: list[Section] = field(default_factory=list)

    def prepare(self) -> None:
        """Makes the folder; a place that can't be written is found before anything is measured."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refusal(error) from None
        self.write(PAGE, b"")

    def add(
        self, name: str, title: str, draw: Callable[[], tuple[Sequence[tuple[Figure, str]], str]]
    ) -> None:
        """Draws a section, says how long that took, and writes its PNGs.

        Args:
            name: anchor of the section and name of its files; several are numbered.
            title: of the section.
            draw: returns figures with their alternative texts, and the caption.
        """
        begin = time.monotonic()
        figures, caption = draw()
        pictures = []
        for number, (figure, alt) in enumerate(figures, start=1):
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=DPI)
            self.write(f"{name}.png" if len(figures) == 1 else f"{name}-{number}.png", file.getvalue())
            pictures.append(Picture(file.getvalue(), alt))
        self.sections.append(Section(name, title, caption, tuple(pictures)))
        print(f"{name:16} {time.monotonic() - begin:5.1f} s  {title}", flush=True)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file of the folder."""
        try:
            (self.folder / name).write_bytes(data)
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
    # A picture needs two images, not the whole batch that training does.
    tree["optimizer"]["global_batch_size"] = 1
    tree["runtime"] |= {"num_workers": 1, "accumulation_steps": 1}
    setup = build(cli.validate(tree), trained.run)
    held = _hold(setup, options.images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_views = options.views or trained.config.monitor.mrr_views
    return Subject(trained, setup, trained.load().to(device), held, num_views)


def _hold(setup: Setup, count: int) -> Held:
    try:
        return hold(setup, setup.test_index or setup.feed.index, count, "mrr")
    except RunError as error:  # here nothing has run yet: other data mends it
        raise UsageError(str(error)) from None


def _draw_retrieval(subject: Subject, album: Album) -> None:
    if not subject.has_actions:
        return
    policy, conditioning = subject.setup.policy, subject.setup.config.predictor.conditioning

    def draw() -> tuple[list[tuple[Figure, str]], str]:
        metrics = subject.mrr.metrics
        figure = retrieval_gallery(subject.mrr, subject.held.images, policy, conditioning)
        alt = (
            f"Rows of images with an action each: the true view was ranked first in {metrics['mrr/h1']:.0%} of all cases "
            f"and among the first ten in {metrics['mrr/h10']:.0%}."
        )
        caption = (
            "From the clean image and the action in words the model imagines a view; shown is the view of the bank that "
            "lies next to what it imagined. Look for: “imagined” looks like “true view”, while the two columns to its "
            "right, where the action was left out or taken from another view, do not. The last rows are among the worst."
        )
        return [(figure, alt)], caption

    def draw_worst() -> tuple[list[tuple[Figure, str]], str]:
        figure = retrieval_gallery(subject.mrr, subject.held.images, policy, conditioning, 0, _NUM_ROWS)
        worst = np.sort(subject.mrr.ranks.max(1))[::-1][:_NUM_ROWS]
        alt = f"The views with the worst ranks: {', '.join(f'{rank:g}' for rank in worst)} of {subject.num_views}."
        caption = (
            "The same for the images with the worst ranks, one view each. Look for what they have in common: views that "
            "lost most of the picture (very dark, very pale) are hard to tell apart for any model."
        )
        return [(figure, alt)], caption

    album.add("retrieval", "What the model imagines", draw)
    album.add("retrieval-worst", "Where it fails", draw_worst)


def _draw_slider(subject: Subject, album: Album) -> None:
    if not subject.has_actions:
        return

    def draw() -> tuple[list[tuple[Figure, str]], str]:
        words = ", ".join(f"{slide.field.name} {slide.agreements.mean():.2f}" for slide in subject.slides)
        images = subject.held.images[:_NUM_SLIDES]
        figures = [
            (
                slider_sheet(subject.slides, images, subject.setup.policy, number),
                f"Image {number + 1}: true views over retrieved ones for a sweep of each component. Agreement: {words}.",
            )
            for number in range(min(_NUM_SLIDER_SHEETS, len(images)))
        ]
        caption = (
            "One component of the action moves over its range while the others stay put (numbers: deviation from the "
            "unchanged image; hue in turns of the colour circle). Look for: the lower line changes as the upper one does, "
            "and the curve follows the dashed diagonal. A model that ignores the action shows the same view all along, a "
            f"flat curve and agreement 0. Agreement here: {words}."
        )
        return figures, caption

    album.add("slider", "One component at a time", draw)


def _draw_components(subject: Subject, album: Album) -> None:
    if not subject.has_actions:
        return
    num_views = min(subject.num_views, _MOST_COMPONENT_VIEWS)

    def draw() -> tuple[list[tuple[Figure, str]], str]:
        untrained = subject.trained.untrained().to(next(subject.model.parameters()).device)
        ours, theirs = (
            subject.measure(model, num_views, by_component=True).metrics
            for model in (subject.model, untrained)
        )
        figure = mrr_bars(ours, subject.components, theirs)
        named = [name for name in subject.components if f"mrr/{name}" in ours]
        words = ", ".join(f"{name} {ours[f'mrr/{name}']:.3f}" for name in named)
        alt = f"Bars of MRR, chance {ours['mrr/chance']:.3f}: all together {ours['mrr/mrr']:.3f}, {words}."
        caption = (
            f"Banks of {num_views} views that differ in one component only. Look for: blue bars that reach beyond the "
            "dashed line of chance and beyond the grey bars of the same network before training. Views of such a bank "
            "differ little, so the bars are lower than with all components together; compare them with each other."
        )
        return [(figure, alt)], caption

    album.add("components", "Which part of the action is known", draw)


def _draw_errors(subject: Subject, album: Album) -> None:
    if not subject.has_actions:
        return

    def draw() -> tuple[list[tuple[Figure, str]], str]:
        rows = error_rows(subject.slides)
        error, null_error = (
            float(np.mean(column)) for column in zip(*(row[2:] for row in rows), strict=True)
        )
        alt = f"Curves of the error over the strength; on average {error:.3f} with the action, {null_error:.3f} without."
        caption = (
            "Squared distance of imagined and true tokens, as a share of the tokens' squared length; line: mean of "
            f"{len(subject.slides[0].errors)} images, band: their range. Look for: the blue line stays low and flat while "
            "the orange one, which does not know the action, rises to both sides. Where both lie together, the action "
            "changes nothing in the prediction, or nothing in the tokens."
        )
        return [(figure, alt) for figure in [error_curves(rows)]], caption

    album.add("errors", "Prediction error by strength", draw)


def error_rows(slides: Sequence[Slide]) -> list[ErrorRow]:
    """The table that `error_curves` draws: a row for each component, image and position of the slider."""
    return [
        ErrorRow(slide.field.name, float(strength), float(error), float(null_error))
        for slide in slides
        for errors, null_errors in zip(slide.errors, slide.null_errors, strict=True)
        for strength, error, null_error in zip(slide.asked, errors, null_errors, strict=True)
    ]


def _draw_maps(subject: Subject, album: Album) -> None:
    def draw() -> tuple[list[tuple[Figure, str]], str]:
        maps = measure_maps(subject.model, subject.held.images[:_NUM_MAPS], subject.setup.policy)
        rows, columns = subject.model.encoder.grid
        alt = (
            f"Token colours on a grid of {rows} x {columns} patches beside each view; mean cosine of imagined and "
            f"encoder's tokens {maps.cosines.mean():.2f}."
        )
        return [(token_maps(maps, subject.setup.policy), alt)], _maps_caption(maps, rows, columns)

    album.add("maps", "Maps of tokens", draw)


def _maps_caption(maps: TokenMaps, rows: int, columns: int) -> str:
    caption = (
        "Each patch is coloured by the first three principal components of its token, with one set of colours for all "
        "maps of an image. Look for: imagined tokens in the colours of the true view's tokens, which change from the "
        "clean image to the transformed views. Imagined maps are smoother where the model is unsure. The three components "
        f"hold {maps.explained.mean():.0%} of the variance; the rest is not seen here."
    )
    if min(rows, columns) < TINY_GRID:
        caption += f" With {rows} x {columns} patches the maps are too coarse for outlines of things."
    return caption


def _draw_views(subject: Subject, album: Album) -> None:
    def draw() -> tuple[list[tuple[Figure, str]], str]:
        setup = subject.setup
        try:
            seen = hold(setup, setup.feed.index, _NUM_ROWS, "sheet").samples  # readable ones
        except RunError as error:
            raise UsageError(str(error)) from None
        figure = draw_views(setup, np.zeros_like(seen), seen, "Views, masks and actions")
        alt = f"Shared crop, source view, context, targets and action of {len(seen)} training images."
        caption = (
            "What a training step sees. The predictor gets the tokens of the context and the action, and predicts the "
            "tokens inside the orange line of the target view."
        )
        return [(figure, alt)], caption

    album.add("views", "Views, masks and actions", draw)


def _draw_records(subject: Subject, album: Album) -> None:
    """What the run recorded."""
    rows = metrics_log.read(subject.trained.run.metrics)
    newest = _newest(rows, subject.trained.step)

    def draw_r2() -> tuple[list[tuple[Figure, str]], str]:
        names = [field.name for field in subject.setup.policy.schema]
        words = ", ".join(
            f"{name} {newest[f'action_r2/{name}']:.2f}" for name in names if f"action_r2/{name}" in newest
        )
        caption = "How well a linear map reads the action off the features of two views: 1 is perfect, 0 is no better than always guessing the mean."
        return [(action_r2_bars(newest, names), f"Bars of R²: {words}.")], caption

    def draw_curves() -> tuple[list[tuple[Figure, str]], str]:
        figure = training_curves(rows, f"Training curves of {subject.setup.config.recipe}")
        alt = f"Small panels of what was measured while training, up to step {max((row['step'] for row in rows), default=0)}."
        caption = (
            "Look for: the loss falls and levels off; RankMe and spread do not sink towards their floor (collapse); the "
            "action gap rises from zero if the model uses the action."
        )
        return [(figure, alt)], caption

    if any(name.startswith("action_r2/") for name in newest):
        album.add("action-r2", "The action in the features", draw_r2)
    album.add("curves", "Training curves", draw_curves)


_DRAWINGS = (
    _draw_retrieval,
    _draw_slider,
    _draw_components,
    _draw_errors,
    _draw_maps,
    _draw_views,
    _draw_records,
)


def _newest(rows: Sequence[Mapping[str, float]], step: int) -> dict[str, float]:
    """The last finite value of every metric up to a step."""
    newest: dict[str, float] = {}
    for row in rows:
        if row["step"] <= step:
            newest |= {name: value for name, value in row.items() if value is not None}
    return newest


def _page(subject: Subject, sections: Sequence[Section]) -> str:
    trained, setup, data = subject.trained, subject.setup, subject.setup.config.data
    newest = _newest(metrics_log.read(trained.run.metrics), trained.step)
    facts = {
        "recipe": trained.config.recipe,
        "conditioning": trained.config.predictor.conditioning,
        "step": f"{trained.step:,}",
        "checkpoint": f"{trained.path} (weights {trained.hash[:12]})",
        "images": f"{len(subject.held.images)} of {data.test_path or data.path}, never seen in training"
        if data.test_path
        else f"{len(subject.held.images)} of {data.path}, which training has seen",
    }
    if subject.has_actions:
        facts["bank"] = f"{subject.num_views} views of each image"
    if "mrr/mrr" in newest:
        facts["MRR at the end of training"] = (
            f"{newest['mrr/mrr']:.3f} (chance {newest['mrr/chance']:.3f}; {trained.config.monitor.mrr_images} images, "
            f"{trained.config.monitor.mrr_views} views)"
        )
    config = trained.config.model_dump_json(indent=1)
    return build_page(f"World model {trained.run.path.name}", subject.headline, facts, sections, config)


if __name__ == "__main__":
    main()
