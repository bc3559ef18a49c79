"""Conditioning: how should the action enter the predictor?

Question: which way of telling the predictor the action makes it equivariant? (The paper: none 0.00, sequence 0.82, feature
0.79; adaln is ours; METHOD and IWM, section 3.2.)

Space: conditioning x seeds, the recipe's predictor and jitter.

What would count as an answer: none at chance (if it is not, the measurement is wrong); the others far above, with the
spread over at least 3 seeds; an order among them only where it is larger than that spread.

    python sweeps/conditioning_sweep.py --dry-run
    python sweeps/conditioning_sweep.py --size cifar10 --data.path train.parquet --data.test-path test.parquet
    python sweeps/conditioning_sweep.py --size imagenet --data.path s3://... --runtime.num-workers 8 --seeds 0
    python sweeps/conditioning_sweep.py --report runs/sweeps/conditioning-cifar10

Cost: 12 trials; --dry-run says how long training, measuring and finetuning take on the machine at hand.
Predictor and whole are finetuned (--finetune.tune predictor: the predictor alone).
Last result: CIFAR-10, 3600 steps on 2 CPU cores, one seed: none 0.026 (chance 0.024), sequence 0.296, feature 0.373,
adaln 0.421; more seeds are to come (docs/log.md, 2026-11-22).
"""

from iwm_ray.sweep import main
from iwm_ray.sweeping.space import Axis, Size, Sweep, base, finetuning


def define(size: Size) -> Sweep:
    """The sweep of a size."""
    axes = (
        Axis.of("predictor.conditioning", "none", "sequence", "feature", "adaln"),
        Axis.of("seed", 0, 1, 2),
    )
    question = "Which way of telling the predictor the action makes it equivariant?"
    return Sweep("conditioning", question, base(size), axes, finetune=finetuning(size))


if __name__ == "__main__":
    main(define)
