"""The Image World Model: context encoder, target encoder, predictor and the loss (IWM, section 3).

With `predictor.target pixels` it is a masked autoencoder (MAE: He et al., arXiv 2111.06377): the predictor is the
decoder, and the target encoder, a moving average that MAE does not have, is only what is measured and finetuned.
"""

from copy import deepcopy
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn

from iwm_ray.batch import Batch
from iwm_ray.config import Config, PredictorConfig
from iwm_ray.model.encoder import Encoder, take
from iwm_ray.model.predictor import Predictor
from iwm_ray.randomness import integers


class StepOutput(NamedTuple):
    """What one forward pass of training gives."""

    loss: Tensor
    """scalar float32, the mean over the batch; quarantined samples count as zero"""
    sample_loss: Tensor
    """`[b]` float32, detached, of every sample, quarantined ones too"""


class IWM(nn.Module):
    """Learns to predict, from the source view's tokens and the action, the tokens of the target view.

    The target encoder starts as a copy of the context encoder and moves in `update_target` only: neither
    forward passes nor evaluation can reach it.

    Args:
        encoder: the context encoder.
        predictor: the world model.
        config: what the targets are, whether they are layer-normed, and which loss.
    """

    def __init__(self, encoder: Encoder, predictor: Predictor, config: PredictorConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.target_encoder = deepcopy(encoder).requires_grad_(False)
        self.config = config

    def forward(self, batch: Batch) -> StepOutput:
        """The training loss: mean over samples, positions and channels (IWM, section 3.2)."""
        target = self.targets(batch.target, batch.target_idx)
        context = self.encoder(batch.source, batch.context_idx)
        prediction = self.predictor(context, batch.context_idx, batch.target_idx, batch.action)
        sample_loss = self._distance(prediction.float(), target.float()).mean(dim=(1, 2))
        # A constant denominator: averaged over DDP workers, it is the loss of the joined batch.
        return StepOutput((batch.weight * sample_loss).mean(), sample_loss.detach())

    @torch.no_grad()
    def targets(self, images: Tensor, idx: Tensor) -> Tensor:
        """`[b 3 h w]` target views and `[b t]` positions -> `[b t d]`: what the predictor is trained to predict there.

        Pixels are those of the patch as the encoder embeds them (MAE, section 3: "reconstruction target").
        Differs: layer norm has the biased variance and an eps of 1e-5, MAE's code the unbiased one and 1e-6.
        """
        if self.config.target == "pixels":
            return self._normalize_targets(self.encoder.pixels(images, idx))
        return self._normalize_targets(take(self.target_encoder(images), idx))

    @torch.no_grad()
    def target_tokens(self, images: Tensor) -> Tensor:
        """`[b 3 h w]` -> `[b n d]`: the target encoder's representation; what IWM's predictor is trained to predict."""
        return self._normalize_targets(self.target_encoder(images))

    def predict(
        self,
        images: Tensor,
        action: Tensor,
        encoder: Literal["context", "target"] = "context",
        idx: Tensor | None = None,
    ) -> Tensor:
        """Predicts the tokens of what `action` makes of `images`, at every position.

        Args:
            images: `[b 3 h w]` source views.
            action: `[b a]`.
            encoder: which encoder reads the images.
            idx: `[b c]` int64, the patches that it sees; None: all.

        Returns:
            `[b n d]`, in the space of `targets`.
        """
        reader = self.encoder if encoder == "context" else self.target_encoder
        rows, columns = reader.grid
        grid_idx = torch.arange(rows * columns, device=images.device).expand(len(images), -1)
        return self.predictor(reader(images, idx), grid_idx if idx is None else idx, grid_idx, action)

    @torch.no_grad()
    def update_target(self, momentum: float | Tensor) -> None:
        """Moves the target encoder towards the context encoder: target = momentum x target + (1 - momentum) x
        context.

        Args:
            momentum: 0 to 1; a float64 scalar tensor is not read by the host.
        """
        pairs = zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True)
        targets, sources = zip(
            *((target, source) for target, source in pairs if source.requires_grad), strict=True
        )
        if isinstance(momentum, Tensor):
            torch._foreach_lerp_(targets, sources, [(1 - momentum).float()] * len(targets))
        else:
            torch._foreach_lerp_(targets, sources, 1 - momentum)

    def _normalize_targets(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:]) if self.config.normalize_targets else tokens

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.config.loss == "smooth_l1":
            return F.smooth_l1_loss(prediction, target, reduction="none")
        return (prediction - target).square()


def build_model(config: Config, action_dim: int) -> IWM:
    """The model of a run, with the same weights on every worker: they depend on the run's seed only.

    Args:
        config: the whole run.
        action_dim: length of the action, as the view policy says.

    Raises:
        UsageError: encoder and predictor do not fit together.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(integers(config.seed, 0, "weights", 1)[0] >> 1))
        encoder = Encoder(config.encoder, config.views.image_size)
        patch_values = 3 * config.encoder.patch_size**2
        predictor = Predictor(
            config.predictor,
            encoder.width,
            config.predictor_heads,
            encoder.grid,
            action_dim,
            patch_values if config.predictor.target == "pixels" else encoder.width,
        )
        return IWM(encoder, predictor, config.predictor)
