"""Strength of the actions: how much must the views differ for the world model to be needed?

Question: does MRR rise with the strength of the colour jitter and with destructive transforms on the source? (The paper,
18 blocks: jitter alone 0.25, with destructive transforms 0.79, with stronger jitter 0.85; IWM, section 4.)

Space: jitter strength (half, the recipe's, and all it may be) x destructive transforms (none, the paper's) x seeds.

What would count as an answer: the mean MRR of each strength with the spread over at least 3 seeds, with and without
destructive transforms. Each model is asked about actions of its own strength, so look at the controls too.

    python sweeps/strength_sweep.py --dry-run
    python sweeps/strength_sweep.py --size cifar10 --data.path train.parquet --data.test-path test.parquet
    python sweeps/strength_sweep.py --size imagenet --data.path s3://... --runtime.num-workers 8 --seeds 0
    python sweeps/strength_sweep.py --report runs/sweeps/strength-cifar10

Cost: 18 trials; --dry-run says how long training, measuring and finetuning take on the machine at hand.
Predictor and whole are finetuned (--finetune.tune predictor: the predictor alone).
Last result: not run yet.
"""

from iwm_ray.sweep import main
from iwm_ray.sweeping.space import Axis, Size, Sweep, base, finetuning

FACTORS: dict[Size, tuple[float, ...]] = {
    "laptop": (0.25, 0.5, 1),
    "cifar10": (0.25, 0.5, 1),
    "imagenet": (0.5, 1, 2),
}
DESTRUCTIVE = ("grayscale", "blur", "solarize")


def define(size: Size) -> Sweep:
    """The sweep of a size."""
    usual = base(size).views
    jitter = {name: getattr(usual, name) for name in ("brightness", "contrast", "saturation", "hue")}
    axes = (
        Axis(
            "strength",
            {
                str(factor): {f"views.{name}": round(factor * value, 4) for name, value in jitter.items()}
                for factor in FACTORS[size]
            },
        ),
        Axis(
            "destructive",
            {
                "none": {f"views.{name}_probability": 0.0 for name in DESTRUCTIVE},
                "paper": {f"views.{name}_probability": 0.2 for name in DESTRUCTIVE},
            },
        ),
        Axis.of("seed", 0, 1, 2),
    )
    question = "Does MRR rise with the strength of the jitter and with destructive transforms?"
    return Sweep("strength", question, base(size), axes, finetune=finetuning(size))


if __name__ == "__main__":
    main(define)
