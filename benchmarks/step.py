"""One training step, ours against the I-JEPA way, at the same model, tokens and precision.

    python benchmarks/step.py                       # ViT-T/16 at 224, batch 8, one thread, float32
    python benchmarks/step.py --dtype bf16 --compile
    python benchmarks/step.py --device cuda --model vit_base_patch16_224 --predictor-width 384 --batch 128 --dtype bf16

Ours predicts the union of the blocks in one pass. The peer is our own rewrite of how I-JEPA's published code does it:
every patch is embedded and the kept ones gathered, each block is predicted apart (four times the context, batched as
B x 4), attention is matmul and softmax, AdamW and the moving average go parameter by parameter, and the loss is read at
every step. Both have the same context tokens: I-JEPA's truncation of masks to the shortest in the batch is left out.

Rounds are interleaved in one process, and ratios are taken within a round; on CPUs the clock is CPU time, so that other
load hurts less. The limit is a large matrix product of the same type, measured in the same rounds.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from iwm_ray.batch import Batch
from iwm_ray.config import Config, EncoderConfig, OptimizerConfig, PredictorConfig, RuntimeConfig, ViewsConfig
from iwm_ray.model.encoder import Encoder, fuse_attention
from iwm_ray.model.iwm import IWM, build_model
from iwm_ray.training.loop import TrainState, autocast, train_step

ACTION_DIM, NUM_BLOCKS, BLOCK_SCALE = 7, 4, 0.18


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:  # a process of its own, so that the peak is this step's
        print(peak_memory_of_process(make_steps(arguments)[arguments.memory_of]))
        return
    result = measure(arguments)
    print(json.dumps(result) if arguments.json else as_text(result))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm name of the encoder")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--predictor-depth", type=int, default=12)
    parser.add_argument("--predictor-width", type=int, default=192)
    parser.add_argument("--conditioning", default="feature", choices=["none", "sequence", "feature", "adaln"])
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile our forward pass")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--memory-of", choices=["ours", "peer"], help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Interleaved rounds of ours, peer and matrix product."""
    steps = make_steps(arguments) | {"gemm": make_gemm(arguments)}
    clock = make_clock(arguments.device)
    flops = count_flops(arguments)
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.rounds):
        for name in sorted(steps, reverse=number % 2 == 0):
            begin = clock()
            steps[name]()
            seconds[name].append(clock() - begin)
    ratios = [peer / ours for ours, peer in zip(seconds["ours"], seconds["peer"], strict=True)]
    gemm_flops = 2 * gemm_size(arguments.device) ** 3
    shares = [
        (flops / ours) / (gemm_flops / gemm)
        for ours, gemm in zip(seconds["ours"], seconds["gemm"], strict=True)
    ]
    memory = {name: peak_memory(arguments, steps, name) for name in ("ours", "peer")}
    ours, peer, gemm = (statistics.median(seconds[name]) for name in ("ours", "peer", "gemm"))
    return {
        "name": f"step-{arguments.device}-{arguments.dtype}" + ("-compile" if arguments.compile else ""),
        "unit": "images/s",
        "ours": arguments.batch / ours,
        "peer": arguments.batch / peer,
        "limit": arguments.batch * gemm_flops / gemm / flops,
        "ratio_peer": statistics.median(ratios),
        "ratio_limit": statistics.median(shares),
        "rounds": arguments.rounds,
        "min": min(ratios),
        "lower_quartile": sorted(ratios)[len(ratios) // 4],
        "max": max(ratios),
        "memory_mib_ours": memory["ours"] / 2**20,
        "memory_mib_peer": memory["peer"] / 2**20,
        "memory_ratio": memory["ours"] / memory["peer"],
        "gigaflops_a_step": flops / 1e9,
        "gemm_gigaflops_a_second": gemm_flops / gemm / 1e9,
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "timm")},
        "arguments": vars(arguments),
    }


# What is measured


def make_config(arguments: argparse.Namespace) -> Config:
    return Config(
        recipe="benchmark",
        views=ViewsConfig(image_size=arguments.image_size),
        encoder=EncoderConfig(name=arguments.model),
        predictor=PredictorConfig(
            depth=arguments.predictor_depth,
            width=arguments.predictor_width,
            conditioning=arguments.conditioning,
        ),
        optimizer=OptimizerConfig(global_batch_size=arguments.batch),
        runtime=RuntimeConfig(precision=arguments.dtype, compile=arguments.compile),
    )


def make_steps(arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Both steps, on models with the same weights."""
    config = make_config(arguments)
    device = torch.device(arguments.device)
    batch, blocks = make_batch(config)
    batch, blocks = batch.to(device), blocks.to(device)
    steps: dict[str, Callable[[], object]] = {}
    if arguments.memory_of != "peer":
        state = TrainState.start(build_model(config, ACTION_DIM).to(device), config, total_steps=1000)
        steps["ours"] = lambda: train_step(state, batch, state.model)
    if arguments.memory_of != "ours":
        model = build_model(config, ACTION_DIM).to(device)
        check_same_function(model, config, batch)
        fuse_attention(model, False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False)
        steps["peer"] = lambda: peer_step(model, optimizer, batch, blocks, autocast(config.runtime, device))
    return steps


def make_batch(config: Config) -> tuple[Batch, Tensor]:
    """A batch of noise, and `[b k s]` positions of its square blocks; the union has the same size in every image."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = config.grid
    side = round((BLOCK_SCALE * rows * columns) ** 0.5)
    square = (torch.arange(side)[:, None] * columns + torch.arange(side)).flatten()

    def draw() -> tuple[Tensor, Tensor]:
        top, left = torch.randint(0, rows - side + 1, (2, NUM_BLOCKS), generator=generator)
        blocks = (top * columns + left)[:, None] + square
        return blocks, blocks.unique()

    size = round(statistics.mean(len(draw()[1]) for _ in range(500)))
    drawn: list[tuple[Tensor, Tensor]] = []
    while len(drawn) < config.optimizer.global_batch_size:
        blocks, union = draw()
        drawn += [(blocks, union)] if len(union) == size else []
    target_idx = torch.stack([union for _, union in drawn])
    kept = torch.ones(len(drawn), rows * columns, dtype=torch.bool).scatter_(1, target_idx, False)
    image_shape = (2, len(drawn), 3, config.views.image_size, config.views.image_size)
    source, target = torch.randint(0, 256, image_shape, dtype=torch.uint8, generator=generator)
    batch = Batch(
        source=source,
        target=target,
        action=torch.randn(len(drawn), ACTION_DIM, generator=generator),
        context_idx=kept.nonzero()[:, 1].reshape(len(drawn), -1),
        target_idx=target_idx,
        weight=torch.ones(len(drawn)),
        counter=torch.arange(len(drawn)),
    )
    return batch, torch.stack([blocks for blocks, _ in drawn])


def make_gemm(arguments: argparse.Namespace) -> Callable[[], object]:
    size = gemm_size(arguments.device)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    left, right = torch.randn(2, size, size, device=arguments.device).to(dtype)
    return lambda: left @ right


def gemm_size(device: str) -> int:
    return 8192 if device == "cuda" else 2048


def count_flops(arguments: argparse.Namespace) -> int:
    """Floating-point operations of our step, all matrix products counted."""
    config = make_config(argparse.Namespace(**vars(arguments) | {"compile": False}))
    state = TrainState.start(build_model(config, ACTION_DIM), config, total_steps=1000)
    fuse_attention(state.model, False)  # the counter does not know every fused kernel
    with FlopCounterMode(display=False) as counter:
        train_step(state, make_batch(config)[0], state.model)
    return counter.get_total_flops()


# The peer


def peer_step(
    model: IWM, optimizer: torch.optim.Optimizer, batch: Batch, blocks: Tensor, precision: torch.autocast
) -> float:
    with precision:
        loss = blockwise_loss(model, batch, blocks)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for online, target in zip(model.encoder.parameters(), model.target_encoder.parameters(), strict=True):
            target.data.mul_(0.996).add_((1.0 - 0.996) * online.detach().data)
    return float(loss.detach())


def blockwise_loss(model: IWM, batch: Batch, blocks: Tensor) -> Tensor:
    """Mean squared error of blocks that are predicted apart, each from the whole context."""
    num_blocks = blocks.shape[1]
    apart = torch.cat(blocks.unbind(1))  # [k*b s]
    with torch.no_grad():
        tokens = encode_like_ijepa(model.target_encoder, batch.target, None)
        target = gather_like_ijepa(F.layer_norm(tokens, tokens.shape[-1:]).repeat(num_blocks, 1, 1), apart)
    predictor = model.predictor
    context = predictor.embed(encode_like_ijepa(model.encoder, batch.source, batch.context_idx))
    positions = predictor.positions.expand(len(batch), -1, -1)
    context = (context + gather_like_ijepa(positions, batch.context_idx)).repeat(num_blocks, 1, 1)
    action = batch.action.repeat(num_blocks, 1)
    queries = predictor.mask_token + gather_like_ijepa(positions.repeat(num_blocks, 1, 1), apart)
    prefix, embedding = predictor.conditioning.prefix(action), predictor.conditioning.embedding(action)
    parts = [context, predictor.conditioning.mask_tokens(queries, action)]
    tokens = torch.cat(parts if prefix is None else [prefix, *parts], dim=1)
    for block in predictor.blocks:
        tokens = block(tokens, tokens.shape[1], embedding)
    prediction = predictor.unembed(predictor.norm(tokens)[:, -apart.shape[1] :])
    return (prediction.float() - target.float()).square().mean()


def encode_like_ijepa(encoder: Encoder, images: Tensor, idx: Tensor | None) -> Tensor:
    """Embeds every patch, then drops the ones that are not wanted."""
    mean, std = encoder.mean[:, None], encoder.std[:, None]
    tokens = encoder.vit.patch_embed((images / 255 - mean) / std) + encoder.vit.pos_embed
    if idx is not None:
        tokens = gather_like_ijepa(tokens, idx)
    return encoder.vit.norm(encoder.vit.blocks(tokens))


def gather_like_ijepa(tokens: Tensor, idx: Tensor) -> Tensor:
    """`[b n d]` and `[b c]` -> `[b c d]`, with an index for every number."""
    return torch.gather(tokens, dim=1, index=idx.unsqueeze(-1).repeat(1, 1, tokens.shape[-1]))


def check_same_function(model: IWM, config: Config, batch: Batch) -> None:
    """With a single block, predicting apart and predicting the union are the same."""
    with torch.no_grad(), autocast(config.runtime, batch.weight.device):
        apart, union = blockwise_loss(model, batch, batch.target_idx[:, None]), model(batch).loss
    torch.testing.assert_close(
        apart, union, atol=0, rtol=1e-2 if config.runtime.precision == "bf16" else 1e-5
    )


# Clocks and memory


def make_clock(device: str) -> Callable[[], float]:
    """Seconds: CPU time of this process, or wall time after the GPU has finished."""
    if device == "cpu":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wall


def peak_memory(arguments: argparse.Namespace, steps: dict[str, Callable[[], object]], name: str) -> int:
    """Bytes that one step needs above what lies there between steps."""
    if arguments.device == "cuda":
        steps[name]()
        rest = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steps[name]()
        return torch.cuda.max_memory_allocated() - rest
    command = [sys.executable, *sys.argv, "--memory-of", name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak_memory_of_process(step: Callable[[], object]) -> int:
    """The same on a CPU: growth of this process's resident memory (Linux)."""
    step()  # moments exist from now on
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    rest = resident_bytes("VmRSS")
    step()
    return resident_bytes("VmHWM") - rest


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def as_text(result: dict[str, object]) -> str:
    return "\n".join(
        f"{name:26}{value:.3f}" if isinstance(value, float) else f"{name:26}{value}"
        for name, value in result.items()
    )


if __name__ == "__main__":
    main()
