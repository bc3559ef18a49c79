"""The configuration of an evaluation: where, on which images, how much of what."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from iwm_ray.config import DataConfig, RuntimeConfig, TrackingConfig, _Part

TaskName = Literal["mrr", "action_r2", "error", "rank", "knn", "linear", "attentive", "lowshot", "marginal"]
WORLD_MODEL: tuple[TaskName, ...] = ("mrr", "action_r2", "error")
"""tasks that need a predictor"""
REPRESENTATION: tuple[TaskName, ...] = ("rank", "knn", "linear", "attentive", "lowshot")
"""tasks that any encoder can do"""
PROBES: tuple[TaskName, ...] = ("knn", "linear", "attentive", "lowshot", "marginal")
"""tasks that need labels"""
TASKS = WORLD_MODEL + REPRESENTATION
"""what is measured where nobody chooses"""
_PROBED = ("train_images", "test_images", "layers")
DECIDES: dict[TaskName, tuple[str, ...]] = {
    "mrr": ("images", "views", "targets", "components", "inverse"),
    "action_r2": ("images",),
    "error": ("images",),
    "rank": ("test_images", "layers"),
    "knn": (*_PROBED, "num_neighbors"),
    "linear": _PROBED,
    "attentive": _PROBED,
    "lowshot": (*_PROBED, "low_shot", "repeats"),
    "marginal": ("train_images", "test_images"),
}
"""settings on which a task's figures depend"""


class MeasureConfig(_Part):
    """What is measured, and on how many images."""

    tasks: tuple[TaskName, ...] = TASKS
    """mrr: does the predictor know what an action does? action_r2: can the action be read off the tokens? (and LiDAR,
    from the same views); error: of the prediction, by component and strength; rank: RankMe; knn, linear, attentive:
    classes from frozen features; lowshot: linear, with the labels of few images; and, where asked, marginal:
    linear, on the mean of what the predictor expects under 16 actions"""
    encoders: tuple[str, ...] = ()
    """more encoders for the tasks that need no predictor: `context`, or timm's names (with a tag, timm's weights are
    downloaded), or NAME=FILE.safetensors"""
    untrained: bool = True
    """the same of untrained weights, to compare with: twice the work"""
    images: Annotated[int, Field(ge=2)] = 1000
    """test images of the world model's tasks"""
    views: Annotated[int, Field(ge=2)] = 256
    """views in each image's bank"""
    targets: Annotated[int, Field(ge=2)] = 8
    """views of each bank that are asked for; as many as views: every one"""
    components: bool = True
    """MRR also in banks that vary in one component alone, each as costly as the whole"""
    inverse: bool = True
    """MRR also of the way back, from a view to the clean image"""
    train_images: NonNegativeInt = 0
    """training images of the probes, a fixed random choice; 0: all"""
    test_images: NonNegativeInt = 0
    """test images of the probes, a fixed random choice; 0: all"""
    layers: tuple[int, ...] = (-1,)
    """layers whose features are probed, from 0; -1: the encoder's output"""
    num_neighbors: PositiveInt = 20
    """k of the kNN"""
    low_shot: tuple[Annotated[float, Field(gt=0, lt=100)], ...] = (1.0, 10.0)
    """percent of each class's labels"""
    repeats: Annotated[int, Field(ge=2)] = 5
    """random choices of the few labels"""

    @classmethod
    def cheap(cls) -> "MeasureConfig":
        """A thirtieth of the work: figures to compare with each other while a model trains."""
        return cls(
            tasks=("mrr", "rank", "knn", "linear"),
            images=64,
            views=32,
            targets=4,
            components=False,
            inverse=False,
            train_images=2000,
            test_images=1000,
        )


class EvaluateConfig(_Part):
    """An evaluation; `data` and `tracking` start as the run's own."""

    data: DataConfig = DataConfig()
    runtime: RuntimeConfig = RuntimeConfig(engine="local")
    tracking: TrackingConfig = TrackingConfig()
    measure: MeasureConfig = MeasureConfig()
