"""Adapters: what has been tuned, in small files that name the encoder they belong to.

A folder with adapter.safetensors (predictor, task tokens, heads; the encoder too where it was tuned) and
adapter.json. Many adapters fit one encoder, which is stored once, in its run.
"""

import json
import os
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from iwm_ray.config import _Part
from iwm_ray.data.decode import DecodeLimits
from iwm_ray.errors import RunError, UsageError
from iwm_ray.evaluation.features import measuring, model_device
from iwm_ray.finetuning.images import AnyImage, channels_first, check_images, rgb_pixels
from iwm_ray.finetuning.model import (
    Asking,
    PredictorShape,
    Tuned,
    make_head,
    module_name,
    weights_hash,
)
from iwm_ray.finetuning.settings import FinetuneConfig
from iwm_ray.model.encoder import Encoder
from iwm_ray.run_directory import write_json
from iwm_ray.trained import Trained
from iwm_ray.views.resize import clean_view

FORMAT = 1
_TENSORS, FACTS = "adapter.safetensors", "adapter.json"


class Origin(_Part):
    """Which encoder an adapter or a segmenter belongs to, and where that is."""

    format: int = FORMAT
    encoder_hash: str
    """`weights_hash` of the encoder as the run has it"""
    run: str
    """its run directory, seen from the adapter's folder"""
    checkpoint: str
    """name of the checkpoint's folder"""

    def trained(self, folder: Path, run: Path | None) -> Trained:
        """The checkpoint, or the run's newest where that is gone.

        Args:
            folder: of the adapter.
            run: the run directory, where it has moved.
        """
        run = run or Path(os.path.normpath(folder.absolute() / self.run))
        checkpoint = run / "checkpoints" / self.checkpoint
        return Trained.open(checkpoint if checkpoint.is_dir() else run)


class Facts(Origin):
    """What stands in adapter.json."""

    encoder: Literal["target", "context"]
    has_encoder: bool
    """whether the encoder was tuned, and is stored here"""
    predictor: PredictorShape | None
    head: Literal["attentive", "linear"]
    action: Literal["null", "random"]
    target_fraction: Annotated[float, Field(gt=0, le=1)]
    tasks: dict[str, tuple[str, ...]]
    """names of the classes of each"""
    has_task_tokens: bool


AnyFacts = TypeVar("AnyFacts", bound=BaseModel)


@dataclass(frozen=True)
class Classifier:
    """A task's classes for images."""

    trained: Trained = field(repr=False)
    """where its encoder comes from"""
    tuned: Tuned = field(repr=False)
    task: str
    class_names: tuple[str, ...]
    asking: Asking = field(repr=False)

    @property
    def image_size(self) -> int:
        """Side of the images, pixels."""
        return self.tuned.encoder.grid[0] * self.tuned.encoder.patch_size

    def fit(self, image: AnyImage) -> Tensor:
        """An image of any size -> `[3 s s]` uint8, of which `predict` takes a stack: the middle square, resized.

        Raises:
            UsageError: no such file, or no RGB image.
        """
        limits = DecodeLimits.from_config(self.trained.config.data)
        return channels_first(clean_view(rgb_pixels(image, limits), self.image_size))

    def predict(self, images: Tensor) -> Tensor:
        """`[b 3 s s]` uint8 RGB of the encoder's size -> `[b c]` float32 probabilities, on the model's device.

        Raises:
            UsageError: other sizes or types of images.
        """
        check_images(images, self.image_size)
        device = model_device(self.tuned)
        with measuring(self.tuned):
            alike = np.zeros(len(images), np.int64)  # one draw for all, whatever the others in the batch
            query = self.asking.query(alike, 0, 0, device)
            return self.tuned(images.to(device), self.task, query).float().softmax(1)


def save(
    folder: Path,
    tuned: Tuned,
    trained: Trained,
    config: FinetuneConfig,
    class_names: dict[str, tuple[str, ...]],
    encoder_hash: str,
) -> None:
    """Writes an adapter; its JSON comes last, so that a folder with it is whole.

    Args:
        folder: is made.
        tuned: the network.
        trained: the run and checkpoint of its encoder.
        config: the finetuning.
        class_names: of each task.
        encoder_hash: `weights_hash` of the encoder as the run has it, before any tuning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tuned.own_state().items()}
    partial = folder / f".{_TENSORS}.{os.getpid()}"
    save_file(tensors, partial)
    partial.replace(folder / _TENSORS)
    facts = Facts(
        encoder_hash=encoder_hash,
        encoder=config.encoder,
        has_encoder=not tuned.is_frozen,
        run=os.path.relpath(trained.run.path, folder),
        checkpoint=trained.path.name,
        predictor=PredictorShape.of(trained) if tuned.predictor is not None else None,
        head=config.head,
        action=config.action,
        target_fraction=config.target_fraction,
        tasks=class_names,
        has_task_tokens=bool(tuned.task_tokens),
    )
    write_json(folder / FACTS, facts.model_dump(mode="json"))


def exists(folder: Path) -> bool:
    """Whether a whole adapter lies there."""
    return (folder / FACTS).exists()


def attach(folder: Path, encoder: Encoder) -> Tuned:
    """The tuned network on its encoder, which other adapters may share; an adapter that has tuned it makes a copy.

    Raises:
        UsageError: no adapter there, or one of another encoder.
        RunError: its files are damaged.
    """
    facts = _read_facts(folder)
    found = weights_hash(encoder)
    if found != facts.encoder_hash:
        raise UsageError(
            f"adapter {folder}: belongs to the encoder {facts.encoder_hash}, this one is {found}; give the run of "
            "its encoder"
        )
    try:
        tensors = load_file(folder / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise RunError(f"adapter {folder}: {_TENSORS} cannot be read ({error}); finetune again") from None
    predictor = None
    if facts.predictor is not None:
        predictor = facts.predictor.make(encoder)
    heads = {name: make_head(facts.head, encoder, len(names)) for name, names in facts.tasks.items()}
    with_tokens = facts.tasks if facts.has_task_tokens else ()
    tokens = {name: nn.Parameter(tensors[f"task_tokens.{module_name(name)}"]) for name in with_tokens}
    is_frozen = not facts.has_encoder
    own = encoder if is_frozen else deepcopy(encoder)
    tuned = Tuned(own, predictor, heads, tokens, is_frozen)
    expected = set(tuned.own_state())
    try:
        tuned.load_state_dict(tuned.state_dict() | tensors)
    except RuntimeError as error:  # names or shapes
        raise RunError(f"adapter {folder}: does not fit ({' '.join(str(error).split())})") from None
    if expected - set(tensors):
        raise RunError(f"adapter {folder}: {min(expected - set(tensors))} is missing; finetune again")
    return tuned.to(model_device(encoder)).eval()


def load(folder: Path, task: str = "", run: Path | None = None) -> Classifier:
    """See `iwm_ray.load`."""
    facts = _read_facts(folder)
    if not task and len(facts.tasks) > 1:
        first = next(iter(facts.tasks))
        raise UsageError(
            f"the adapter {folder} has several tasks ({', '.join(facts.tasks)}); give --task {first}, in Python "
            f"task={first!r}"
        )
    if task and task not in facts.tasks:
        raise UsageError(
            f"task {task!r}: the adapter {folder} has {', '.join(facts.tasks)}; choose one of them"
        )
    task = task or next(iter(facts.tasks))
    trained = facts.trained(folder, run)
    model = trained.load()
    encoder = model.target_encoder if facts.encoder == "target" else model.encoder
    asking = Asking(
        trained.policy,
        encoder.grid[0] * encoder.grid[1],
        facts.action == "random",
        facts.target_fraction,
    )
    return Classifier(trained, attach(folder, encoder), task, facts.tasks[task], asking)


def _read_facts(folder: Path) -> Facts:
    return read_facts(Facts, folder, FACTS, "adapter", "finetune again")


def read_facts(kind: type[AnyFacts], folder: Path, name: str, what: str, mend: str) -> AnyFacts:
    """What the JSON file of an adapter or a segmenter says.

    Args:
        kind: of what it says.
        folder: of the adapter.
        name: of the file.
        what: the adapter is, in words.
        mend: how the user can.

    Raises:
        UsageError: no such file, or one of another format.
        RunError: it is damaged.
    """
    try:
        tree = json.loads((folder / name).read_text())
        version = tree.get("format")
    except OSError:
        raise UsageError(
            f"{what} {folder}: no {name} there; give a folder RUN/finetune/NAME/adapters/ARM"
        ) from None
    except (ValueError, AttributeError) as error:
        raise RunError(f"{what} {folder}: {name} is damaged ({error}); {mend}") from None
    if version != FORMAT:
        raise UsageError(f"{what} {folder}: format {version}, this version reads {FORMAT}; update iwm_ray")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RunError(f"{what} {folder}: {name} is damaged ({place}: {first['msg']}); {mend}") from None
