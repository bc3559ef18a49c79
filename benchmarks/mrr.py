"""What the MRR costs beside encoding its banks: `python benchmarks/mrr.py [--json]`.

The limit is the time in which the target encoder encodes the same views, made beforehand, in batches of the same size;
beside it stands the ratio to making and encoding them. Ours is everything: drawing and making the views, encoding
them, the predictions, distances and ranks, all controls, and the summary with its intervals.

`flop_ratio` counts the matrix products of both: what no implementation of the same figure can beat, unless actions
share parts of the predictor. They can't: from its first block on, the context tokens attend to mask tokens that
know the action. `flop_ratio_all_targets` is that of taking every view of a bank as a target.

    python benchmarks/mrr.py                                              # the model of recipe cifar10_small
    python benchmarks/mrr.py --model vit_small_patch16_224 --width 0 --depth 0 --heads 0 --image-size 64
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from iwm_ray.config import Config, EncoderConfig, PredictorConfig, ViewsConfig
from iwm_ray.evaluation.banks import bank_draws, bank_tensors
from iwm_ray.evaluation.features import measuring
from iwm_ray.evaluation.mrr import NUM_TARGETS, NUM_VIEWS, rank_images, summarise
from iwm_ray.evaluation.settings import MeasureConfig
from iwm_ray.model.encoder import fuse_attention
from iwm_ray.model.iwm import IWM, build_model
from iwm_ray.views.policy import ViewPolicy


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments)
    print(json.dumps(result) if arguments.json else as_text(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm name of the encoder")
    parser.add_argument("--image-size", type=int, default=32, help="pixels")
    parser.add_argument("--patch-size", type=int, default=8, help="pixels")
    parser.add_argument("--width", type=int, default=128, help="of the encoder; 0: timm's")
    parser.add_argument("--depth", type=int, default=4, help="of the encoder; 0: timm's")
    parser.add_argument("--heads", type=int, default=4, help="of the encoder; 0: timm's")
    parser.add_argument("--predictor-width", type=int, default=128)
    parser.add_argument("--predictor-depth", type=int, default=4)
    parser.add_argument("--conditioning", default="feature", choices=["none", "sequence", "feature", "adaln"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--views", type=int, default=NUM_VIEWS, help="in each bank")
    parser.add_argument("--targets", type=int, default=NUM_TARGETS, help="of each bank")
    parser.add_argument("--batch", type=int, default=64, help="views in one forward pass")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Interleaved rounds of encoding, the whole MRR, and the cheap setting; CPU time of one process."""
    model, policy, images = make_world(arguments)
    banks = make_banks(arguments, policy, images)
    cheap = MeasureConfig.cheap()
    works = {
        "making": lambda: make_banks(arguments, policy, images),
        "encoding": make_encoding(model, banks, arguments.batch),
        "ours": make_mrr(model, policy, images, arguments),
        "cheap": make_mrr(model, policy, images, arguments, cheap.views, cheap.targets),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(arguments.rounds + 1):
        for name in sorted(works, reverse=number % 2 == 0):
            begin = time.process_time()
            works[name]()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - begin)
    ratios = [ours / limit for ours, limit in zip(seconds["ours"], seconds["encoding"], strict=True)]
    made = [
        ours / (making + limit)
        for ours, making, limit in zip(seconds["ours"], seconds["making"], seconds["encoding"], strict=True)
    ]
    every = make_mrr(model, policy, images, arguments, num_targets=arguments.views)
    fuse_attention(model, False)  # the counter does not know every fused kernel
    encoding_flops = count_flops(works["encoding"])
    return {
        "name": "mrr-cost",
        "unit": f"s for {arguments.images} images x {arguments.views} views",
        "ours": statistics.median(seconds["ours"]),
        "limit": statistics.median(seconds["encoding"]),
        "ratio_limit": statistics.median(ratios),
        "ratio_making_and_encoding": statistics.median(made),
        "flop_ratio": count_flops(works["ours"]) / encoding_flops,
        "flop_ratio_all_targets": count_flops(every) / encoding_flops,
        "cheap": statistics.median(seconds["cheap"]),
        "rounds": arguments.rounds,
        "min": min(ratios),
        "max": max(ratios),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "timm")},
        "arguments": vars(arguments),
    }


def make_world(arguments: argparse.Namespace) -> tuple[IWM, ViewPolicy, np.ndarray]:
    """An untrained model and images of noise: the cost does not depend on what they hold."""
    size = arguments.image_size
    encoder = EncoderConfig(
        name=arguments.model,
        patch_size=arguments.patch_size,
        width=arguments.width,
        depth=arguments.depth,
        num_heads=arguments.heads,
    )
    predictor = PredictorConfig(
        depth=arguments.predictor_depth,
        width=arguments.predictor_width,
        conditioning=arguments.conditioning,
    )
    config = Config(
        recipe="benchmark", views=ViewsConfig(image_size=size), encoder=encoder, predictor=predictor
    )
    policy = ViewPolicy.from_config(config.views)
    images = np.random.default_rng(0).integers(0, 256, (arguments.images, size, size, 3), np.uint8)
    return build_model(config, policy.action_dim), policy, images


def make_banks(arguments: argparse.Namespace, policy: ViewPolicy, images: np.ndarray) -> list[Tensor]:
    host = torch.device("cpu")
    draws = [bank_draws(policy, np.array([number]), arguments.views, 0) for number in range(len(images))]
    return [bank_tensors(policy, image, some, host)[1] for image, some in zip(images, draws, strict=True)]


def make_encoding(model: IWM, banks: list[Tensor], batch_size: int) -> Callable[[], object]:
    def encode() -> list[Tensor]:
        with measuring(model):
            return [
                torch.cat([model.target_tokens(part) for part in bank.split(batch_size)]) for bank in banks
            ]

    return encode


def make_mrr(
    model: IWM,
    policy: ViewPolicy,
    images: np.ndarray,
    arguments: argparse.Namespace,
    num_views: int = 0,
    num_targets: int = 0,
) -> Callable[[], object]:
    sizes = {
        "num_views": num_views or arguments.views,
        "num_targets": num_targets or arguments.targets,
        "batch_size": arguments.batch,
    }

    def mrr() -> dict[str, float]:
        return summarise(rank_images(model, policy, images, np.arange(len(images)), seed=0, **sizes), 0)

    return mrr


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of its matrix products."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def as_text(result: dict[str, object]) -> str:
    return "\n".join(
        f"{name:24}{value:.3f}" if isinstance(value, float) else f"{name:24}{value}"
        for name, value in result.items()
    )


if __name__ == "__main__":
    main()
