"""Capacity of the predictor: how deep and wide must a world model be to become equivariant?

Question: does MRR rise with the predictor's depth and width, all else equal? (The paper: 12 blocks of 384 channels stay
invariant, MRR 0.09; 18 blocks reach 0.79; IWM, section 4.)

Space: predictor depth x width x seeds, conditioning `feature`, the recipe's jitter.

What would count as an answer: the mean MRR of each size with the spread over at least 3 seeds. A jump between two depths
that is larger than what seeds differ by speaks for the paper; a smooth rise, or none, against it.

    python sweeps/capacity_sweep.py --dry-run
    python sweeps/capacity_sweep.py --size cifar10 --data.path train.parquet --data.test-path test.parquet
    python sweeps/capacity_sweep.py --size imagenet --data.path s3://... --runtime.num-workers 8 --seeds 0
    python sweeps/capacity_sweep.py --report runs/sweeps/capacity-cifar10

Cost: 27 trials; --dry-run says how long training, measuring and finetuning take on the machine at hand.
Predictor and whole are finetuned (--finetune.tune predictor: the predictor alone).
Last result: CIFAR-10, 27 trials of 1200 steps on 2 CPU cores: MRR 0.083 to 0.169; neither depth (0.025, -0.044 to 0.095)
nor width (0.035, -0.024 to 0.094) moves it by more than seeds differ (docs/log.md, 2026-11-22).
"""

from iwm_ray.sweep import main
from iwm_ray.sweeping.space import Axis, Size, Sweep, base, finetuning

DEPTHS: dict[Size, tuple[int, ...]] = {"laptop": (2, 4, 8), "cifar10": (2, 4, 8), "imagenet": (12, 18, 24)}
WIDTHS: dict[Size, tuple[int, ...]] = {
    "laptop": (64, 128, 192),
    "cifar10": (64, 128, 192),
    "imagenet": (256, 384, 512),
}


def define(size: Size) -> Sweep:
    """The sweep of a size."""
    axes = (
        Axis.of("predictor.depth", *DEPTHS[size]),
        Axis.of("predictor.width", *WIDTHS[size]),
        Axis.of("seed", 0, 1, 2),
    )
    question = "Does MRR rise with the predictor's depth and width?"
    return Sweep("capacity", question, base(size), axes, finetune=finetuning(size))


if __name__ == "__main__":
    main(define)
