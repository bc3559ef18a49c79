"""The configuration of an evaluation: where, on which images, how much of what."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from iwm_ray.config import DataConfig, RuntimeConfig, TrackingConfig, _Part

TaskName = Literal["mrr", "action_r2", "error", "rank", "knn", "linear", "attentive", "lowshot"]
WORLD_MODEL: tuple[TaskName, ...] = ("mrr", "action_r2", "error")
"""tasks that need a predictor"""
REPRESENTATION: tuple[TaskName, ...] = ("rank", "knn", "linear", "attentive", "lowshot")
"""tasks that any encoder can do"""


class MeasureConfig(_Part):
    """What is measured, and on how many images."""

    tasks: tuple[TaskName, ...] = WORLD_MODEL + REPRESENTATION
    """mrr: does the predictor know what an action does? action_r2: can the action be read off the tokens? (and LiDAR,
    from the same views); error: of the prediction, by component and strength; rank: RankMe; knn, linear, attentive:
    classes from frozen features; lowshot: linear, with the labels of few images"""
    encoders: tuple[str, ...] = ()
    """more encoders for the tasks that need no predictor: `context`, or timm's names (with a tag, timm's weights are
    downloaded), or NAME=FILE.safetensors"""
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

    def cheap(self) -> "MeasureConfig":
        """A thirtieth of the work: figures to compare with each other while a model trains."""
        small = {"images": 64, "views": 32, "targets": 4, "components": False, "inverse": False}
        tasks = tuple(task for task in self.tasks if task in ("mrr", "rank", "knn", "linear"))
        return self.model_copy(update={**small, "tasks": tasks, "train_images": 2000, "test_images": 1000})


class EvaluateConfig(_Part):
    """An evaluation; `data` and `tracking` start as the run's own."""

    data: DataConfig = DataConfig()
    runtime: RuntimeConfig = RuntimeConfig(engine="local")
    tracking: TrackingConfig = TrackingConfig()
    measure: MeasureConfig = MeasureConfig()
