"""The invariance-equivariance spectrum: the whole map, and the report of every sweep.

Question: how does what a world model knows of its actions (MRR) go with what its representation is good for, and which
settings move a model along that line?

Space: conditioning x predictor depth x jitter strength (the paper's, and METHOD's strong one) x seeds, seed by seed.

What would count as an answer: MRR from chance to as high as it goes, on at least 12 configurations with 3 seeds; the
rank correlation of MRR with the linear probe, the attentive probe, the gain of predictor finetuning over its control,
and end-to-end finetuning, with intervals (paper, IWM section 5: -0.85 for the linear probe, +0.93 for predictor
finetuning).

    python sweeps/spectrum.py                                           photographs, a first look
    python sweeps/spectrum.py --size cifar10 --data.path train.parquet --data.test-path test.parquet
    python sweeps/spectrum.py --size imagenet --data.path s3://... --runtime.num-workers 8 --dry-run   also without GPUs
    python sweeps/spectrum.py --report runs/sweeps/spectrum-cifar10     the report alone, from the folder
    python sweeps/spectrum.py --report spectrum --tracking.uri http://mlflow:5000     or from MLflow alone
    python sweeps/spectrum.py --report runs/sweeps/spectrum-cifar10 --want-mrr 0.5

Cost: 36 trials; --dry-run says how long training, measuring and finetuning take on the machine at hand. End-to-end
finetuning is the dearer half of the finetuning; --finetune.tune predictor leaves it out.
Last result: CIFAR-10, 36 trials of 3600 steps on 2 CPU cores: MRR 0.023 (none) to 0.356 (feature, strong jitter); with
the action every outcome is better (end to end +2.8 points, 1.3 to 4.2), with strong jitter worse; rank correlation of MRR
with finetuned +0.33 (-0.41 to +0.74), with linear +0.17 (-0.40 to +0.66) (docs/log.md, 2026-11-22).
"""

from iwm_ray.sweep import main
from iwm_ray.sweeping.space import Axis, Size, Sweep, base, finetuning

DEPTHS: dict[Size, tuple[int, ...]] = {"laptop": (2, 4), "cifar10": (1, 4), "imagenet": (12, 18)}


def define(size: Size) -> Sweep:
    """The sweep of a size."""
    jitter = {
        "paper": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
        "strong": {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2},
    }
    strength = Axis(
        "strength",
        {
            name: {f"views.{part}": value for part, value in strengths.items()}
            for name, strengths in jitter.items()
        },
    )
    axes = (
        Axis.of("predictor.conditioning", "none", "feature", "sequence"),
        Axis.of("predictor.depth", *DEPTHS[size]),
        strength,
        Axis.of("seed", 0, 1, 2),
    )
    return Sweep(
        "spectrum",
        "How does MRR go with what features are good for?",
        base(size),
        axes,
        finetune=finetuning(size),
    )


if __name__ == "__main__":
    main(define)
