"""What `--dry-run` prints: the whole plan of a run, before anything is created or started."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from iwm_ray.batch import Batch
from iwm_ray.build import Setup
from iwm_ray.data.decode import Undecodable
from iwm_ray.errors import UsageError
from iwm_ray.model.iwm import IWM, build_model
from iwm_ray.progress import duration

_SAMPLES_READ = 16
# Weights, gradient, two AdamW moments; and the target encoder's weights. Bytes a parameter, float32.
_TRAINED_BYTES, _TARGET_BYTES = 16, 4


def plan_lines(setup: Setup) -> list[str]:
    """The plan in lines: data, steps, tokens, parameters, memory, arithmetic, expected time.

    Raises:
        UsageError: not one of the first samples can be read.
    """
    config, index = setup.config, setup.feed.index
    with torch.device("meta"):
        model = build_model(config, setup.policy.action_dim)
    flops = step_flops(setup, model)
    masks = setup.feed.masks
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    encoder, predictor = (
        sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.predictor)
    )
    total = flops * setup.total_steps
    rate = gemm_rate() * config.runtime.num_workers
    size = config.optimizer.global_batch_size
    actions = ", ".join(f"{field.name} ({field.unit})" for field in setup.policy.schema)
    return [
        f"plan of {config.recipe}, configuration {config.hash()}: {setup.run.path}",
        f"  data       {len(index):,} images, {len(index.class_names)} classes under {config.data.path}; "
        f"{_check_samples(setup)}",
        f"  steps      {setup.total_steps:,} of {size} images; {config.steps_per_epoch(len(index)):,} an epoch, "
        f"{len(index) % size} images left out of each, other ones each time",
        f"  tokens     {masks.num_context_tokens} context + {masks.num_target_tokens} predicted of "
        f"{config.grid[0]} x {config.grid[1]}",
        f"  action     {setup.policy.action_dim}: {actions}; conditioning {config.predictor.conditioning}",
        f"  parameters {encoder / 1e6:.1f} M encoder + {predictor / 1e6:.1f} M predictor",
        f"  memory     {(trained * _TRAINED_BYTES + encoder * _TARGET_BYTES) / 2**30:.2f} GiB a worker for weights and "
        "optimizer, activations on top",
        f"  arithmetic {flops / size / 1e9:.2f} GFLOP an image, {total:.2e} FLOP in all",
        f"  time       {_expected(setup, total, rate)}",
    ]


def step_flops(setup: Setup, model: IWM) -> int:
    """FLOPs of one step over the global batch, counted on the meta device; backward counts twice the forward."""
    views, masks, size = setup.config.views, setup.feed.masks, setup.config.optimizer.global_batch_size
    with torch.device("meta"):
        images = torch.empty(1, 3, views.image_size, views.image_size, dtype=torch.uint8)
        batch = Batch(
            source=images,
            target=images,
            action=torch.empty(1, setup.policy.action_dim),
            context_idx=torch.empty(1, masks.num_context_tokens, dtype=torch.int64),
            target_idx=torch.empty(1, masks.num_target_tokens, dtype=torch.int64),
            weight=torch.empty(1),
            counter=torch.empty(1, dtype=torch.int64),
        )
        with FlopCounterMode(display=False) as counter:
            model(batch).loss.backward()
    return counter.get_total_flops() * size


def gemm_rate() -> float:
    """FLOP/s of a matrix product on this machine's CPU now: what a CPU run is paced by."""
    from time import perf_counter

    matrix = torch.rand(768, 768)
    matrix @ matrix
    begin = perf_counter()
    for _ in range(8):
        matrix @ matrix
    return 8 * 2 * 768**3 / (perf_counter() - begin)


def _expected(setup: Setup, total_flops: float, cpu_rate: float) -> str:
    if setup.config.runtime.use_gpu:
        return (
            f"{total_flops / 1e15 / 3600:,.1f} GPU-hours at 1000 TFLOP/s; expect 20 to 50 % of a GPU's peak"
        )
    # Small matrices and all that is not a matrix product: measured 0.3 of the rate at 32 px, 0.8 at 224 px.
    low, high = (total_flops / (cpu_rate * share) for share in (0.8, 0.25))
    return f"{duration(low)} to {duration(high)} on this machine's CPU, and half a minute to start"


def _check_samples(setup: Setup) -> str:
    reasons = []
    count = min(_SAMPLES_READ, len(setup.feed.index))
    for sample in range(count):
        try:
            setup.feed.image(sample)
        except Undecodable as error:
            reasons.append(str(error))
    if len(reasons) == count:
        raise UsageError(
            f"data.path {setup.config.data.path}: none of the first {count} images can be decoded ({reasons[0]}); "
            "give JPEG, PNG or WebP images"
        )
    return f"{count - len(reasons)} of {count} samples read"
