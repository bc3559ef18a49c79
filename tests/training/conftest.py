"""A run so small that a step takes milliseconds."""

import pytest
import torch

from iwm_ray.batch import Batch
from iwm_ray.config import (
    Config,
    EncoderConfig,
    OptimizerConfig,
    PredictorConfig,
    RuntimeConfig,
    ScheduleConfig,
    ViewsConfig,
)
from iwm_ray.model.iwm import build_model
from iwm_ray.training.loop import TrainState, fit


class ToyRun:
    """Images of 16 x 16 whose target view is the source view, brightened by the action."""

    total_steps = 100

    def config(self, conditioning="feature", batch_size=8, clip=0.0, runtime=None, **schedule):
        return Config(
            recipe="test",
            views=ViewsConfig(image_size=16),
            encoder=EncoderConfig(name="vit_tiny_patch16_224", patch_size=4, width=32, depth=2, num_heads=2),
            predictor=PredictorConfig(depth=2, width=24, num_heads=2, conditioning=conditioning),
            optimizer=OptimizerConfig(global_batch_size=batch_size, lr=2e-3, clip_grad_norm=clip),
            schedule=ScheduleConfig(**{"momentum_start": 0.9} | schedule),
            runtime=RuntimeConfig(**runtime or {}),
        )

    def state(self, config=None, device="cpu"):
        config = config or self.config()
        return TrainState.start(build_model(config, action_dim=1).to(device), config, self.total_steps)

    def batch(self, step, num_samples=8):
        generator = torch.Generator().manual_seed(step)
        coarse = torch.rand(num_samples, 3, 4, 4, generator=generator) * 150
        source = torch.nn.functional.interpolate(coarse, size=16)
        action = torch.rand(num_samples, 1, generator=generator) * 2 - 1
        order = torch.stack([torch.randperm(16, generator=generator) for _ in range(num_samples)])
        return Batch(
            source=source.to(torch.uint8),
            target=(source + 50 + 50 * action[:, :, None, None]).to(torch.uint8),
            action=action,
            context_idx=order[:, :9].sort().values,
            target_idx=order[:, 9:].sort().values,
            weight=torch.ones(num_samples),
            counter=torch.arange(step * num_samples, (step + 1) * num_samples),
        )

    def batches(self, first=0, num_samples=8):
        step = first
        while True:
            yield self.batch(step, num_samples)
            step += 1

    def train(self, state, until, forward=None, num_samples=8):
        """Losses of the steps from `state.step` to `until`."""
        losses = []
        batches = self.batches(state.step, num_samples)
        fit(state, batches, until, lambda _, stats: losses.append(stats.read()["loss"]), forward)
        return losses


@pytest.fixture
def toy():
    return ToyRun()


@pytest.fixture
def same():
    """Whether two states have the same bits: weights, moments, step and counters."""

    def compare(one, other):
        weights = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
        pairs = list(weights)
        for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
            slots, others = one.optimizer.state.get(a, {}), other.optimizer.state.get(b, {})
            if slots.keys() != others.keys():
                return False
            pairs += [(slots[key], others[key]) for key in slots]
        pairs.append((one.skipped, other.skipped))
        return one.step == other.step and all(torch.equal(a, b) for a, b in pairs)

    return compare
