"""The configuration of a run: one tree of frozen, typed parts.

Every field has a unit or range in its description; `--help` prints them. Recipes (recipes.py) return a complete tree, the
command line (cli.py) overrides single values, `RUN/config.json` is the record. What cannot change results beyond
floating-point rounding stands in `runtime` and `tracking`, which are left out of the configuration's hash.
"""

import hashlib
import json
import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Range = tuple[float, float]
Conditioning = Literal["none", "sequence", "feature", "adaln"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def _check_range(name: str, value: Range, low: float, high: float) -> None:
    if not low <= value[0] <= value[1] <= high:
        raise ValueError(f"{name} {value[0]:g} {value[1]:g}: needs {low:g} <= first <= second <= {high:g}")


def refuse_credentials(name: str, path: str) -> None:
    """Raises ValueError for a path whose URI holds a password: the configuration is recorded."""
    if re.search(r"\b\w+://[^/@]*:[^/@]*@", path):
        raise ValueError(
            f"{name}: holds credentials, and the configuration is recorded; give them by environment"
        )


class DataConfig(_Part):
    """Which images are read."""

    path: str = ""
    """class-folder tree, Parquet file(s) or WebDataset shards, local or a URI (s3://, gs://, abfs://); `photos_tiny`
    names the photographs that scikit-image and scikit-learn install"""
    test_path: str = ""
    """held-out images of the same kind, for kNN and MRR; empty: a part of `path` is read for the monitors"""
    image_column: str = "image"
    """Parquet column with the encoded bytes (a struct with a field `bytes`, as Hugging Face writes it, is read too)"""
    label_column: str = "label"
    """Parquet column with integer or string labels; a missing one means unlabelled data"""
    max_bad_fraction: Fraction = 0.001
    """the share of undecodable samples above which the run stops (one bad sample is always allowed)"""
    max_pixels: PositiveInt = 50_000_000
    """images that declare more pixels are quarantined before they are decoded"""
    min_side: PositiveInt = 8
    """images with a shorter side, in pixels, are quarantined"""
    background: tuple[int, int, int] = (255, 255, 255)
    """colour behind transparent pixels, 0-255"""

    @model_validator(mode="after")
    def _paths_hold_no_credentials(self) -> Self:
        for name in ("path", "test_path"):
            refuse_credentials(name, getattr(self, name))
        return self

    @model_validator(mode="after")
    def _test_images_lie_apart(self) -> Self:
        if self.path and PurePath(self.path) in PurePath(self.test_path).parents:
            raise ValueError(
                f"test_path {self.test_path}: lies in path {self.path}, so that its images would be learned from; give "
                "the folder of the training images alone as path"
            )
        return self

    @model_validator(mode="after")
    def _background_is_a_colour(self) -> Self:
        if any(not 0 <= channel <= 255 for channel in self.background):
            raise ValueError(f"background {self.background}: needs three numbers from 0 to 255")
        return self


class ViewsConfig(_Part):
    """How the source and the target view are made from an image (IWM, section 3; METHOD: steps 1-4)."""

    image_size: PositiveInt = 224
    """side of both views, pixels"""
    crop_scale: Range = (0.3, 1.0)
    """area of the shared crop, fractions of the image"""
    crop_ratio: Range = (0.75, 4 / 3)
    """aspect (width / height) of the shared crop"""
    flip_probability: Fraction = 0.5
    """probability of the shared horizontal flip"""
    jitter_probability: Fraction = 0.8
    """probability of the colour jitter, drawn for each view alone"""
    brightness: Fraction = 0.4
    """brightness factor is drawn from 1 - b to 1 + b"""
    contrast: Fraction = 0.4
    """contrast factor is drawn from 1 - c to 1 + c"""
    saturation: Fraction = 0.2
    """saturation factor is drawn from 1 - s to 1 + s"""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """hue shift is drawn from -h to h, in turns"""
    jitter_order: Literal["random", "fixed"] = "random"
    """order of the four jitter operations: drawn per image and view, or brightness, contrast, saturation, hue"""
    grayscale_probability: Fraction = 0.2
    """source view only"""
    blur_probability: Fraction = 0.2
    """source view only"""
    blur_radius: Range = (0.1, 2.0)
    """sigma of the Gaussian blur, pixels of the view"""
    solarize_probability: Fraction = 0.2
    """source view only"""
    solarize_threshold: Annotated[int, Field(ge=0, le=255)] = 128
    """values at or above it are inverted"""
    source_base: Literal["crop", "target"] = "crop"
    """what the source view is made from: the shared crop, or the target view (the paper's text allows both)"""
    where: Literal["host", "device"] = "host"
    """host: the data tasks make and ship two uint8 views; device: they ship one crop and its parameters"""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        _check_range("crop_scale", self.crop_scale, 1e-4, 1)
        _check_range("crop_ratio", self.crop_ratio, 0.01, 100)
        _check_range("blur_radius", self.blur_radius, 0.01, 64)
        return self


class MasksConfig(_Part):
    """Which patches are predicted: the union of several rectangles (IWM, section 3), or any (MAE)."""

    style: Literal["blocks", "random"] = "blocks"
    """blocks: the union of rectangles; random: every set of patches is equally likely, and no block_* setting counts"""
    num_blocks: PositiveInt = 4
    """rectangles whose union is predicted"""
    block_scale: Range = (0.15, 0.2)
    """area of one rectangle, fractions of the patch grid"""
    block_aspect: Range = (0.75, 1.5)
    """aspect (height / width) of one rectangle"""
    num_target_tokens: NonNegativeInt = 0
    """patches predicted in every image; 0: the mean size of the union, rounded, or with `random` three quarters of all"""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> Self:
        _check_range("block_scale", self.block_scale, 1e-4, 1)
        _check_range("block_aspect", self.block_aspect, 0.01, 100)
        return self


class EncoderConfig(_Part):
    """The context encoder; the target encoder is its moving average."""

    name: str = "vit_base_patch16_224"
    """any Vision Transformer of timm"""
    patch_size: PositiveInt = 16
    """side of a patch, pixels; it must divide views.image_size"""
    width: NonNegativeInt = 0
    """token width; 0: as the name says"""
    depth: NonNegativeInt = 0
    """number of blocks; 0: as the name says"""
    num_heads: NonNegativeInt = 0
    """attention heads; 0: as the name says"""


class PredictorConfig(_Part):
    """The world model (IWM, section 3.2) and its loss."""

    depth: PositiveInt = 18
    """number of blocks"""
    width: PositiveInt = 384
    """token width"""
    num_heads: NonNegativeInt = 0
    """attention heads; 0: one for 64 channels, at least 4 where the width allows it"""
    conditioning: Conditioning = "feature"
    """how the action enters"""
    target: Literal["encoder", "pixels"] = "encoder"
    """what is predicted: tokens of the target encoder (IWM), or the pixels of the patches (MAE: the predictor is its
    decoder)"""
    normalize_targets: bool = True
    """layer-normalise what is predicted, without affine: each token, or the pixels of each patch"""
    loss: Literal["squared_l2", "smooth_l1"] = "squared_l2"
    """squared_l2 (IWM) or smooth_l1 (I-JEPA's code)"""


class OptimizerConfig(_Part):
    """AdamW and what surrounds it."""

    global_batch_size: PositiveInt = 2048
    """images a step, over all workers"""
    lr: NonNegativeFloat = 0.0
    """peak learning rate; 0: 1e-3 for 2048 images a step, in proportion to the batch"""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """moving averages of gradient and squared gradient"""
    weight_decay: NonNegativeFloat = 0.04
    """at the start; none on biases and other one-dimensional parameters"""
    weight_decay_end: NonNegativeFloat = 0.4
    """at the end, reached by a cosine"""
    clip_grad_norm: NonNegativeFloat = 0.0
    """gradients of a larger norm are scaled down to it; 0: never"""

    @property
    def peak_lr(self) -> float:
        return self.lr or 1e-3 * self.global_batch_size / 2048


class ScheduleConfig(_Part):
    """How long, and how rates move over the run. All schedules are functions of the step."""

    epochs: Positive = 300
    """passes over the data; used where steps is 0"""
    steps: NonNegativeInt = 0
    """optimizer steps of the run; 0: from epochs"""
    warmup_fraction: Fraction = 40 / 300
    """share of the run in which the learning rate rises"""
    lr_start_factor: Fraction = 0.2
    """first learning rate, as a share of the peak"""
    lr_end: NonNegativeFloat = 1e-6
    """last learning rate of the cosine"""
    momentum_start: Fraction = 0.996
    """EMA coefficient of the target encoder at the start"""
    momentum_end: Fraction = 1.0
    """EMA coefficient at the end, reached linearly"""
    stretch: Annotated[float, Field(ge=1)] = 1.25
    """schedules are laid out over stretch x the run, so that it stops before they end (V-JEPA)"""


class MonitorConfig(_Part):
    """What is measured while training and at its end."""

    report_every_steps: PositiveInt = 10
    """steps between two lines of train/ metrics"""
    every_steps: NonNegativeInt = 0
    """steps between two readings of the monitors; 0: ten readings a run"""
    num_images: PositiveInt = 512
    """images read for RankMe, spread, cosine and action gap, and queries of the kNN"""
    num_neighbors: PositiveInt = 20
    """k of the kNN, at most the size of its bank"""
    num_bank_images: PositiveInt = 2048
    """labelled training images that the kNN searches"""
    mrr_images: PositiveInt = 64
    """images of the closing MRR"""
    mrr_views: Annotated[int, Field(ge=2)] = 256
    """views in each image's bank"""


class RuntimeConfig(_Part):
    """Where and how fast: nothing here changes results beyond floating-point rounding."""

    engine: Literal["ray", "local"] = "ray"
    """ray: Ray Data and Ray Train; local: the same loop in this process, without Ray"""

    num_workers: PositiveInt = 1
    """train workers (DDP)"""
    use_gpu: bool = False
    """one GPU for each train worker"""
    cpus_per_worker: Positive = 1
    """CPUs that Ray reserves for each train worker"""
    threads_per_worker: NonNegativeInt = 0
    """torch threads of a CPU train worker; 0: the machine's CPUs, less data_cpus, shared among the workers"""
    data_cpus: Positive = 1
    """CPUs that must stay free for the data tasks"""
    data_workers: NonNegativeInt = 0
    """engine local: processes that make the views; 0: half the machine's CPUs"""
    data_label: str = ""
    """`key=value`: data tasks run only on Ray nodes with this label"""
    accumulation_steps: PositiveInt = 1
    """parts into which each worker's batch is cut to save memory"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on GPUs, fp32 on CPUs"""
    compile: bool = False
    """torch.compile of the forward and backward pass"""
    checkpoint_every_steps: NonNegativeInt = 0
    """steps between two checkpoints; 0: ten a run, but no more than 1000 steps apart"""
    max_failures: NonNegativeInt = 3
    """restarts of the worker group before the run fails"""
    wait_resources: NonNegativeFloat = 0
    """seconds to wait for an autoscaling cluster to offer what is asked"""
    cache: str = "~/.cache/iwm_ray"
    """folder of the data indices and of images packed from Parquet; on several nodes: on shared storage"""


class TrackingConfig(_Part):
    """Where metrics and actions are written."""

    uri: str = ""
    """MLflow server or store; empty: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db; `none`: no MLflow"""
    experiment: str = "iwm_ray"
    """MLflow experiment"""
    action_log_fraction: Fraction = 1.0
    """share of the blocks of samples whose actions are logged"""


class Config(_Part):
    """The whole run."""

    recipe: str
    """name of the recipe that the tree started from"""
    seed: NonNegativeInt = 0
    """key of every random draw"""
    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    masks: MasksConfig = MasksConfig()
    encoder: EncoderConfig = EncoderConfig()
    predictor: PredictorConfig = PredictorConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    monitor: MonitorConfig = MonitorConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _patches_fill_the_image(self) -> Self:
        size, patch = self.views.image_size, self.encoder.patch_size
        if size % patch:
            fitting = sorted((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - patch))[
                :2
            ]
            near = ", ".join(str(d) for d in sorted(fitting))
            raise ValueError(
                f"encoder.patch_size {patch} does not divide views.image_size {size}; nearest that do: {near}"
            )
        return self

    @model_validator(mode="after")
    def _workers_share_the_batch(self) -> Self:
        size, workers = self.optimizer.global_batch_size, self.runtime.num_workers
        parts = workers * self.runtime.accumulation_steps
        if size % parts:
            valid = [
                w for w in range(1, min(size, 64) + 1) if size % (w * self.runtime.accumulation_steps) == 0
            ]
            raise ValueError(
                f"optimizer.global_batch_size {size} is not divisible by runtime.num_workers {workers} x "
                f"runtime.accumulation_steps {self.runtime.accumulation_steps}; valid worker counts: {valid or 'none'}"
            )
        return self

    @model_validator(mode="after")
    def _predictor_heads_divide_its_width(self) -> Self:
        if self.predictor.width % self.predictor_heads:
            raise ValueError(
                f"predictor.width {self.predictor.width} is not divisible by predictor.num_heads {self.predictor_heads}"
            )
        return self

    @model_validator(mode="after")
    def _pixels_take_no_action(self) -> Self:
        if self.predictor.target == "encoder":
            return self
        if self.predictor.conditioning != "none":
            raise ValueError(
                f"predictor.conditioning {self.predictor.conditioning} with predictor.target pixels: MAE has no action; "
                "use none"
            )
        for name in ("jitter", "grayscale", "blur", "solarize"):
            value = getattr(self.views, f"{name}_probability")
            if value:
                raise ValueError(
                    f"views.{name}_probability {value:g} with predictor.target pixels: MAE completes the view that it "
                    "sees; use 0"
                )
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        side = self.views.image_size // self.encoder.patch_size
        return side, side

    @property
    def worker_batch_size(self) -> int:
        """Images that one train worker sees in a step."""
        return self.optimizer.global_batch_size // self.runtime.num_workers

    @property
    def predictor_heads(self) -> int:
        """64 channels a head (IWM's 384 gives 6), never fewer than 4 heads where the width allows it."""
        width = self.predictor.width
        return self.predictor.num_heads or max(width // 64, 4 if width % 4 == 0 else 1)

    def steps_per_epoch(self, num_samples: int) -> int:
        """Whole global batches in one pass; the rest is left out, another rest in each epoch."""
        return num_samples // self.optimizer.global_batch_size

    def total_steps(self, num_samples: int) -> int:
        """Optimizer steps of the whole run."""
        return self.schedule.steps or max(1, round(self.schedule.epochs * self.steps_per_epoch(num_samples)))

    def hash(self) -> str:
        """Twelve hexadecimal digits that name what is computed (not where: runtime and tracking are left out)."""
        tree = self.model_dump(mode="json", exclude={"runtime", "tracking"})
        for (section, name), default in _YOUNGER.items():
            if tree[section][name] == default:
                del tree[section][name]
        return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=6).hexdigest()

    def flat(self) -> dict[str, Any]:
        """Dotted name -> value, as MLflow params and error messages use them."""
        return flat(self.model_dump(mode="json"))


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of a tree of values."""
    return dict(_flatten("", tree))


# Settings that are younger than the first recorded runs: with these values, what those runs did, they leave the hash alone.
_YOUNGER = {("masks", "style"): "blocks", ("predictor", "target"): "encoder"}


def _flatten(prefix: str, tree: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        rows += (
            _flatten(f"{prefix}{name}.", value) if isinstance(value, dict) else [(f"{prefix}{name}", value)]
        )
    return rows
