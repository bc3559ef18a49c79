"""AdamW as masked latent prediction uses it: two groups, rates set by the step, bad steps left out on the device."""

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from iwm_ray.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over what is trained: group 0 is decayed, group 1 (biases, one-dimensional parameters) is not.

    The fused kernel is used everywhere: it is the fastest, and the one that can leave out a step on the
    device.
    """
    trained = trained_parameters(model)
    decayed = [parameter for name, parameter in trained.items() if is_decayed(name, parameter)]
    others = [parameter for name, parameter in trained.items() if not is_decayed(name, parameter)]
    groups = [{"params": decayed}, {"params": others}]
    return AdamW(groups, lr=0.0, betas=config.betas, weight_decay=0.0, fused=True)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, without the target encoder and the fixed positions."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to biases, nor to scales and the mask token, which have one dimension."""
    return parameter.ndim > 1 and not name.endswith("bias")


def set_rates(optimizer: AdamW, learning_rate: float, weight_decay: float) -> None:
    """Sets the rates of the next step; plain numbers, so that no device waits for the host."""
    decayed, others = optimizer.param_groups
    decayed["lr"] = others["lr"] = learning_rate
    decayed["weight_decay"] = weight_decay


def apply_gradients(optimizer: AdamW, max_norm: float) -> tuple[Tensor, Tensor]:
    """One optimizer step, which leaves weights and moments as they are if a gradient is not finite.

    Nothing is read by the host: the norm is computed and judged on the device. After DDP's all-reduce it is
    the same on every worker, and so is the verdict.

    Args:
        max_norm: gradients of a larger norm are scaled down to it; 0: never.

    Returns:
        The norm of all gradients before clipping, and whether the step was left out (0 or 1); float32
        scalars.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    skipped = (~norm.isfinite()).float()
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    optimizer.found_inf = skipped  # type: ignore[attr-defined]  # AdamW's fused kernel reads it, as it does for torch.amp
    optimizer.step()
    return norm, skipped


def moments(optimizer: AdamW, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state under names that outlive a process: `exp_avg.<parameter>` and so on; empty at step 0."""
    return {
        f"{slot}.{name}": value
        for name, parameter in trained_parameters(model).items()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def expected_moments(model: nn.Module) -> dict[str, Tensor]:
    """What `moments` gives after a step, as tensors without memory."""
    trained = trained_parameters(model)
    shapes = {f"{slot}.{name}": p.shape for slot in ("exp_avg", "exp_avg_sq") for name, p in trained.items()}
    shapes |= {f"step.{name}": torch.Size() for name in trained}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def set_moments(optimizer: AdamW, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts back what `moments` gave, on each parameter's device."""
    trained = trained_parameters(model)
    optimizer.state.clear()
    for key, value in tensors.items():
        slot, name = key.split(".", 1)
        optimizer.state[trained[name]][slot] = value.to(trained[name].device, copy=True)
