"""The configuration of a finetuning: one tree of frozen parts, as config.py is for pretraining."""

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from iwm_ray.config import Fraction, Positive, RuntimeConfig, _Part, flat, refuse_credentials
from iwm_ray.errors import UsageError

Tune = Literal["predictor", "encoder", "both"]

_ADDING = ("tune", "seeds", "single_tasks")
RANDOM_ACTION, TARGETS = "random_action", "targets"
"""ways (see TuningConfig.ways) to ask the predictor: nothing is asked where the encoder alone is tuned"""
PLACES = ("path", "test_path", "masks", "test_masks", "classes")
"""of the data: their contents decide, wherever they lie"""
# What is told the predictor alone, and what is of the encoder alone.
_OF_PREDICTOR, _OF_ENCODER = ("action", "target_fraction"), ("layer_decay", "drop_path")


class TuningDataConfig(_Part):
    """What all data of tunings have."""

    max_bad_fraction: Fraction | None = None
    """the share of undecodable images of a set above which the tuning stops (one is always allowed); None: that of
    pretraining"""


class FinetuneDataConfig(TuningDataConfig):
    """Which labelled images are read; several data sets make a multi-task finetuning."""

    path: tuple[str, ...] = ()
    """training sets: PATH, or NAME=PATH where there are several; kinds as in pretraining"""
    test_path: tuple[str, ...] = ()
    """test sets in the same order, under the same names; read once, at the end of every arm"""
    image_column: str = "image"
    """Parquet column with the encoded bytes"""
    label_column: str = "label"
    """Parquet column with integer or string labels"""
    num_train: NonNegativeInt = 0
    """images of each training set, a fixed random choice; 0: all"""
    num_test: NonNegativeInt = 0
    """images of each test set, a fixed random choice; 0: all"""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """share of the training images on which a learning rate of `lr_grid` is chosen"""
    weights: tuple[Positive, ...] = ()
    """share of all steps, of `steps` or `epochs`, that each data set gets, in their order; empty: each has its own"""

    @model_validator(mode="after")
    def _paths_hold_no_credentials(self) -> Self:
        for name in ("path", "test_path"):
            for path in getattr(self, name):
                refuse_credentials(name, path)
        return self


class AugmentConfig(_Part):
    """What is done to training images; all of it but the flip needs images, not cached tokens, at every step."""

    flip_probability: Fraction = 0.0
    """horizontal flip"""
    crop_area: Annotated[float, Field(gt=0, le=1)] = 1.0
    """smallest area of a random resized crop, fraction of the image; 1: no crop"""
    randaugment: Annotated[int, Field(ge=0, le=30)] = 0
    """magnitude of RandAugment's two operations (torchvision, of 31 bins); 0: none"""
    mixup: NonNegativeFloat = 0.0
    """alpha of mixup; 0: none"""
    cutmix: NonNegativeFloat = 0.0
    """alpha of cutmix; 0: none; with both, each batch draws one of them"""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with one another."""
        return bool(self.mixup or self.cutmix)

    @property
    def keeps_tokens(self) -> bool:
        """Whether the tokens of a frozen encoder can be computed once."""
        return self.crop_area == 1 and not (self.randaugment or self.mixes)


class TuningRuntimeConfig(RuntimeConfig):
    """Where and how fast: nothing here changes results beyond floating-point rounding."""

    engine: Literal["ray", "local"] = "local"
    """ray: Ray Data and Ray Train; local: the same loop in this process, without Ray"""
    arms: Literal["turns", "tune"] = "turns"
    """turns: one training after the other; tune: as Ray Tune trials, as many at once as the cluster holds"""
    data_workers: NonNegativeInt = 0
    """engine local: processes that decode and augment images; 0: this process does"""
    cache: str = ""
    """folder of data indices and tokens; empty: that of the run. On several nodes: on shared storage"""
    token_gigabytes: NonNegativeFloat = 4.0
    """disk for the tokens of frozen encoders; what would need more is encoded anew at every step"""


class TuningTrackingConfig(_Part):
    """Where metrics go besides the files."""

    uri: str = ""
    """MLflow server or store; empty: that of the run; `none`: no MLflow"""
    arms: bool = True
    """each training has an MLflow run of its own below the pretraining's; else that one has the figures alone"""


class TuningConfig(_Part):
    """What every tuning has: ways and repetitions, each of them once, and rates."""

    tune: tuple[Tune, ...] = ("predictor",)
    """what is trained besides the head; several are run one after the other and compared"""
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    """each is one repetition: head, random predictor and order of the data"""
    encoder: Literal["target", "context"] = "target"
    """which encoder reads the images: the paper's teacher or student"""
    batch_size: PositiveInt = 128
    """images a step, over all workers; fewer where the training set has fewer"""
    lr: Positive = 1e-3
    """peak learning rate of what starts at random: heads, task tokens, the control's predictor"""
    lr_grid: tuple[Positive, ...] = ()
    """peak learning rates of which a held-out part of the training set chooses, for each network alone (pretrained,
    random ...), with seed 0; empty: `lr`"""
    pretrained_lr_factor: Positive = 0.1
    """what is pretrained learns at this share of the rate (IWM: 1/10)"""
    warmup_fraction: Fraction = 0.1
    """share of the steps in which the learning rate rises; then it falls to 0 as a cosine"""
    weight_decay: NonNegativeFloat = 0.05
    """of AdamW; none on biases and other one-dimensional parameters"""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """factor of the learning rate from each encoder block to the one below it"""
    clip_grad_norm: NonNegativeFloat = 1.0
    """gradients of a larger norm are scaled down to it; 0: never"""
    data: TuningDataConfig = TuningDataConfig()
    runtime: TuningRuntimeConfig = TuningRuntimeConfig()
    tracking: TuningTrackingConfig = TuningTrackingConfig()

    @model_validator(mode="after")
    def _lists_hold_something_once(self) -> Self:
        for name in ("tune", "seeds", "lr_grid"):
            values = getattr(self, name)
            if (not values and name != "lr_grid") or len(set(values)) < len(values):
                raise ValueError(
                    f"{name} {' '.join(map(str, values)) or '(empty)'}: give each value once, at least one"
                )
        return self

    def flat(self) -> dict[str, Any]:
        """Dotted name -> value, as MLflow params use them."""
        return flat(self.model_dump(mode="json"))

    @property
    def default_lr(self) -> float:
        """The rate where nothing is to be chosen."""
        return self.lr_grid[0] if self.lr_grid else self.lr

    @property
    def chooses_rate(self) -> bool:
        """Whether held-out images choose among rates."""
        return len(self.lr_grid) > 1

    @property
    def ways(self) -> tuple[str, ...]:
        """Words in the names of figures: what is not done in the paper's usual way."""
        return ()

    def refuse_unused(self) -> None:
        """Raises UsageError for a setting of a part that is not tuned: whoever gives it would believe in its effect.

        No validator: what earlier versions have written down must stay readable.
        """
        usual = type(self)()
        parts = ((_OF_PREDICTOR, ("encoder",), "predictor"), (_OF_ENCODER, ("predictor",), "encoder"))
        for names, alone, part in parts:
            for name in names:
                if self.tune == alone and getattr(self, name, None) != getattr(usual, name, None):
                    raise UsageError(
                        f"--{name.replace('_', '-')} {getattr(self, name)}: changes nothing with --tune {alone[0]}; leave "
                        f"it out, or tune {part} or both"
                    )

    def deciding(self) -> dict[str, Any]:
        """What all arms of one folder share, as JSON: not where and how fast, nor what only adds arms to it."""
        tree = self.model_dump(mode="json", exclude={"runtime", "tracking", *_ADDING})
        del tree["data"]["max_bad_fraction"]
        return tree | {"lr": self.default_lr, "lr_grid": list(self.lr_grid) if self.chooses_rate else []}

    def hash(self, *parts: str) -> str:
        """Twelve hexadecimal digits of what decides an arm's result besides its own name.

        Args:
            parts: what else decides it: weights and the contents of the data, wherever those lie.
        """
        tree = self.deciding()
        tree["data"] = {name: value for name, value in tree["data"].items() if name not in PLACES}
        text = json.dumps([tree, *parts], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


class FinetuneConfig(TuningConfig):
    """A finetuning of one trained model."""

    head: Literal["attentive", "linear"] = "attentive"
    """from tokens to classes"""
    action: Literal["null", "random"] = "null"
    """what the predictor is told: the zero action, or one of pretraining, drawn for every image"""
    target_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of the positions that the predictor predicts; below 1: a random subset for every image"""
    epochs: Positive = 20
    """passes over each training set"""
    steps: NonNegativeInt = 0
    """optimizer steps for each data set (`data.weights` share out the sum of all of them); 0: from epochs"""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """stochastic depth of the encoder's last block, where the encoder is trained; it falls linearly to 0 at the first"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of a label that is spread over all classes"""
    single_tasks: bool = True
    """with several data sets: tune for each of them alone too, with the same number of its batches"""
    data: FinetuneDataConfig = FinetuneDataConfig()
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _weights_fit_the_data(self) -> Self:
        given, wanted = len(self.data.weights), len(self.data.path)
        if given and given != wanted:
            raise ValueError(
                f"data.weights: {given} given for {wanted} data sets; give one for each of data.path"
            )
        return self

    @property
    def ways(self) -> tuple[str, ...]:
        ways = ["linear_head"] * (self.head == "linear") + ["context_encoder"] * (self.encoder == "context")
        ways += [RANDOM_ACTION] * (self.action == "random")
        return tuple(ways + [f"{TARGETS}{self.target_fraction:g}"] * (self.target_fraction < 1))
