"""What is tuned: a trained encoder, its predictor or a random one, task tokens and heads (IWM, section 5)."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from iwm_ray.config import PredictorConfig, _Part
from iwm_ray.finetuning.settings import FinetuneConfig, Tune
from iwm_ray.model.encoder import Encoder
from iwm_ray.model.heads import AttentiveHead, LinearHead
from iwm_ray.model.iwm import IWM
from iwm_ray.model.predictor import Predictor
from iwm_ray.randomness import integers, uniforms
from iwm_ray.trained import Trained
from iwm_ray.training.optimizer import is_decayed
from iwm_ray.views.policy import ViewPolicy

Start = Literal["pretrained", "random", "none"]
"""the predictor's weights at the start; none: there is no predictor"""


class Tuned(nn.Module):
    """Images, or the tokens of its encoder, -> logits of a task.

    Args:
        encoder: reads the whole image.
        predictor: the world model; None: the head reads the encoder's tokens.
        heads: one for each task.
        task_tokens: `[1 w]` for each task, in the predictor's width; empty where there is one task only.
        is_frozen: whether the encoder stays as it is.
    """

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor | None,
        heads: Mapping[str, nn.Module],
        task_tokens: Mapping[str, nn.Parameter],
        is_frozen: bool,
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        if not is_frozen:
            for name, parameter in encoder.named_parameters():
                parameter.requires_grad_(name != "vit.pos_embed")
        self.predictor, self.is_frozen = predictor, is_frozen
        self.heads = nn.ModuleDict({module_name(task): head for task, head in heads.items()})
        self.task_tokens = nn.ParameterDict({module_name(task): token for task, token in task_tokens.items()})

    def forward(self, inputs: Tensor, task: str, query: "Query") -> Tensor:
        """Logits.

        Args:
            inputs: `[b 3 s s]` images (see Encoder), or `[b n d]` tokens of this encoder.
            task: whose token and head.
            query: what the predictor is asked for.

        Returns:
            `[b c]`.
        """
        return self.head(task)(self.represent(inputs, task, query))

    def head(self, task: str) -> nn.Module:
        """The head of a task."""
        return self.heads[module_name(task)]

    def represent(self, inputs: Tensor, task: str, query: "Query") -> Tensor:
        """The tokens that the head reads, `[b t d]`: predictions, or those of the encoder without a predictor."""
        tokens = inputs if inputs.ndim == 3 else self.encode(inputs)
        if self.predictor is None:
            return tokens
        count = tokens.shape[0]  # not len(tokens): torch.export would take it for a constant
        grid = torch.arange(tokens.shape[1], device=tokens.device).expand(count, -1)
        target_idx = grid if query.target_idx is None else query.target_idx
        token = None
        if module_name(task) in self.task_tokens:
            token = self.task_tokens[module_name(task)].expand(count, -1, -1)
        return self.predictor(tokens, grid, target_idx, query.action, token)

    def encode(self, images: Tensor) -> Tensor:
        """`[b 3 s s]` -> `[b n d]`, without gradients where the encoder is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            return self.encoder(images)

    def train(self, mode: bool = True) -> "Tuned":
        super().train(mode)
        if self.is_frozen:
            self.encoder.eval()
        return self

    def own_state(self) -> dict[str, Tensor]:
        """What is not the run's: all tensors but those of an encoder that stays as it is."""
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not (self.is_frozen and name.startswith("encoder."))
        }

    @property
    def num_trained(self) -> int:
        """Trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def module_name(task: str) -> str:
    """A name for what belongs to a task: torch's containers refuse a bare `train` or `keys`."""
    return f"of_{task}"


@dataclass(frozen=True)
class Query:
    """What the predictor is asked for, for b images."""

    action: Tensor
    """`[b a]`"""
    target_idx: Tensor | None = None
    """`[b t]` int64 positions; None: the full grid"""


@dataclass(frozen=True)
class Asking:
    """How queries are made: the paper's null action and full grid, or its ablations."""

    policy: ViewPolicy
    num_positions: int
    """patches of the grid"""
    is_random: bool = False
    """an action of pretraining instead of the null action"""
    fraction: float = 1.0
    """share of the positions that are asked for"""

    def query(self, places: int | NDArray[np.int64], seed: int, step: int, device: torch.device) -> Query:
        """The query for some images; its draws are keyed by seed, step and place.

        Args:
            places: `[b]`, of the images in the batch; a number: that of the images, which are the whole batch.
            seed: of the draws.
            step: of the training, or any other number.
            device: where the query is to lie.
        """
        places = np.arange(places) if isinstance(places, int) else places
        count = len(places)
        action = torch.zeros(count, self.policy.action_dim)
        if self.is_random:
            sides = np.full(count, 64)  # only the crop depends on it, and no crop is made
            draws = self.policy.draw(seed, np.full(count, step), places, sides, sides)
            action = torch.from_numpy(self.policy.encode(draws))
        return Query(action.to(device), self._positions(places, seed, step, device))

    def _positions(
        self, places: NDArray[np.int64], seed: int, step: int, device: torch.device
    ) -> Tensor | None:
        chosen = max(1, round(self.fraction * self.num_positions))
        if chosen == self.num_positions:
            return None
        order = uniforms(seed, step, places, "positions", self.num_positions).argsort(1)
        return torch.from_numpy(np.sort(order[:, :chosen], axis=1)).to(device)


def assemble(
    trained: Trained,
    model: IWM,
    config: FinetuneConfig,
    tune: Tune,
    start: Start,
    tasks: dict[str, int],
    seed: int,
) -> Tuned:
    """The network of one arm; heads and task tokens depend on the seed alone, not on the predictor.

    Args:
        trained: where the model comes from.
        model: its weights; they are copied, not changed.
        config: the finetuning.
        tune: what is trained.
        start: the predictor's weights.
        tasks: name -> number of classes.
        seed: of heads, task tokens and a random predictor.
    """
    encoder = deepcopy(model.target_encoder if config.encoder == "target" else model.encoder)
    predictor = None
    if start == "pretrained":
        predictor = pretrained_predictor(trained, model, encoder, seed)
    elif start == "random":
        predictor = random_predictor(trained, encoder, seed)
    heads: dict[str, nn.Module] = {}
    task_tokens: dict[str, nn.Parameter] = {}
    for number, (name, num_classes) in enumerate(tasks.items()):
        with seeded(seed, "head", 0):  # a task's head is the same alone and among others
            heads[name] = make_head(config.head, encoder, num_classes)
        if predictor is not None and len(tasks) > 1:
            with seeded(seed, "task token", number):
                token = torch.randn(1, predictor.mask_token.shape[0]) * 0.02
            task_tokens[name] = nn.Parameter(token)
    tuned = Tuned(encoder, predictor, heads, task_tokens, is_frozen=tune == "predictor")
    if tune != "predictor":
        set_drop_path(encoder, config.drop_path)
    return tuned


def pretrained_predictor(trained: Trained, model: IWM, encoder: Encoder, seed: int) -> Predictor:
    """A copy of the run's predictor, from tokens to tokens.

    One that gives pixels (MAE's decoder) gets the control's projection instead of its own: pixels are no representation,
    and heads read tokens of the encoder's width, whatever the pretraining was.
    """
    predictor = deepcopy(model.predictor)
    if predictor.target == "pixels":
        predictor.unembed = random_predictor(trained, encoder, seed).unembed
    return predictor


def random_predictor(trained: Trained, encoder: Encoder, seed: int) -> Predictor:
    """A predictor of the run's shape that nobody has trained: the control."""
    run = trained.config
    with seeded(seed, "predictor", 0):
        return Predictor(
            run.predictor, encoder.width, run.predictor_heads, encoder.grid, trained.policy.action_dim
        )


def make_head(kind: Literal["attentive", "linear"], encoder: Encoder, num_classes: int) -> nn.Module:
    """A head on tokens of the encoder's width, with as many heads as the encoder's attention has."""
    if kind == "linear":
        return LinearHead(encoder.width, num_classes)
    return AttentiveHead(encoder.width, num_classes, encoder.vit.blocks[0].attn.num_heads)


class PredictorShape(_Part):
    """What a predictor is made from besides its encoder."""

    config: PredictorConfig
    num_heads: PositiveInt
    action_dim: NonNegativeInt

    @classmethod
    def of(cls, trained: Trained) -> "PredictorShape":
        """That of a run's predictor."""
        run = trained.config
        return cls(config=run.predictor, num_heads=run.predictor_heads, action_dim=trained.policy.action_dim)

    def make(self, encoder: Encoder) -> Predictor:
        """A predictor whose weights are to be loaded."""
        return Predictor(self.config, encoder.width, self.num_heads, encoder.grid, self.action_dim)


def set_drop_path(encoder: Encoder, rate: float) -> None:
    """Stochastic depth: 0 at the first block, `rate` at the last."""
    blocks = encoder.vit.blocks
    for number, block in enumerate(blocks):
        share = rate * number / max(1, len(blocks) - 1)
        block.drop_path1 = DropPath(share) if share else nn.Identity()
        block.drop_path2 = DropPath(share) if share else nn.Identity()


class DropPath(nn.Module):
    """Leaves out a residual branch for some images, as `draw_paths` says.

    Args:
        rate: share of the images.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.kept = torch.ones(0)
        """`[b]` 1 / (1 - rate) where the branch stays, else 0"""

    def forward(self, branch: Tensor) -> Tensor:
        return branch * self.kept.to(branch.dtype)[:, None, None] if self.training else branch


def draw_paths(tuned: Tuned, seed: int, step: int, places: NDArray[np.int64], device: torch.device) -> None:
    """Draws for every image which branches stay in a step; the draws are keyed by seed, step and place in the batch."""
    paths = [module for module in tuned.modules() if isinstance(module, DropPath)]
    if not paths:
        return
    drawn = torch.from_numpy(uniforms(seed, step, places, "drop path", len(paths))).to(device)
    for number, path in enumerate(paths):
        path.kept = (drawn[:, number] >= path.rate).float() / (1 - path.rate)


class Rates(Protocol):
    """What decides the learning rates and weight decays of a network's parts; see FinetuneConfig."""

    @property
    def pretrained_lr_factor(self) -> float: ...

    @property
    def layer_decay(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...


def parameter_groups(tuned: Tuned, config: Rates, start: Start) -> list[dict[str, Any]]:
    """AdamW's groups: each has `scale`, its share of the learning rate, and its weight decay.

    What starts at random learns at the full rate, what is pretrained at `pretrained_lr_factor` of it, and the
    encoder's blocks the less, the further they are from its end (`layer_decay`).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in tuned.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if name.startswith("encoder."):
            scale = config.pretrained_lr_factor * config.layer_decay ** _height_above(tuned.encoder, name)
        elif name.startswith("predictor.") and start == "pretrained" and not _is_new(tuned, name):
            scale = config.pretrained_lr_factor
        is_token = name.startswith("task_tokens.") or name.endswith("query")
        decay = config.weight_decay if is_decayed(name, parameter) and not is_token else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": parameters, "scale": scale, "weight_decay": decay, "lr": 0.0}
        for (scale, decay), parameters in groups.items()
    ]


def _is_new(tuned: Tuned, name: str) -> bool:
    """Whether a parameter of a pretrained predictor starts at random (see pretrained_predictor)."""
    assert tuned.predictor is not None
    return tuned.predictor.target == "pixels" and name.startswith("predictor.unembed.")


def _height_above(encoder: Encoder, name: str) -> int:
    """How many blocks lie above a parameter of the encoder; one more for the patches' embedding."""
    depth = len(encoder.vit.blocks)
    if name.startswith("encoder.vit.blocks."):
        return depth - 1 - int(name.split(".")[3])
    return 0 if name.startswith("encoder.vit.norm.") else depth


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of all tensors: two modules are alike or not, wherever they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def seeded(seed: int, purpose: str, number: int) -> Iterator[None]:
    """A context in which torch's draws on the CPU depend on these three alone; outside, nothing has been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_key(seed, purpose, number))
        yield


def _key(seed: int, purpose: str, number: int) -> int:
    return int(integers(seed, number, purpose, 1)[0] >> np.uint64(1))
