"""The encoder: a Vision Transformer of timm that runs on chosen patches only (IWM, section 3).

The context encoder sees the kept patches of the source view, the target encoder all patches of the target
view. Patches are chosen before they are embedded, so a dropped patch costs nothing.
"""

import difflib

import timm
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from iwm_ray.config import EncoderConfig
from iwm_ray.errors import UsageError


class Encoder(nn.Module):
    """A Vision Transformer without class token, with fixed 2-D sin-cos positions.

    `.vit` is an ordinary timm model: its state_dict loads into
    `timm.create_model(name, ..., class_token=False, global_pool="avg", fc_norm=False, num_classes=0)`, whose
    `forward_features` then gives the tokens of `forward(images)`.

    Args:
        config: name of the timm model and what differs from it.
        image_size: side of the images, pixels; a multiple of `config.patch_size`.

    Raises:
        UsageError: timm has no Vision Transformer of that name, or its sizes do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig, image_size: int) -> None:
        super().__init__()
        self.vit = _create_vit(config, image_size)
        self.patch_size = config.patch_size
        self.grid = (image_size // config.patch_size, image_size // config.patch_size)
        self.width: int = self.vit.embed_dim
        self.vit.pos_embed = nn.Parameter(sincos_positions(self.grid, self.width)[None], requires_grad=False)
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD)[:, None], persistent=False)

    def forward(self, images: Tensor, idx: Tensor | None = None) -> Tensor:
        """Encodes the patches at `idx`, or all of them.

        Args:
            images: `[b 3 h w]` RGB, uint8, or float in 0..1.
            idx: `[b c]` int64 positions in the patch grid, row by row; None: every position.

        Returns:
            `[b n d]` tokens after the final norm; n is c, or the size of the grid.
        """
        positions = self.vit.pos_embed if idx is None else self.vit.pos_embed[0, idx]
        projection = self.vit.patch_embed.proj
        tokens = F.linear(self.pixels(images, idx), projection.weight.flatten(1), projection.bias)
        tokens = self.vit.norm_pre(self.vit.patch_embed.norm(tokens) + positions)
        return self.vit.norm(self.vit.blocks(tokens))

    def pixels(self, images: Tensor, idx: Tensor | None = None) -> Tensor:
        """The patches as they are embedded; arguments as of `forward`.

        Returns:
            `[b n 3*p*p]` pixels, channel by channel, normalised by ImageNet's mean and standard deviation.
        """
        patches = self._patches(images)
        return self._normalize(patches if idx is None else take(patches, idx))

    def _patches(self, images: Tensor) -> Tensor:
        """`[b 3 h w]` -> `[b n 3*p*p]`, pixels in the order of the convolution's weight."""
        rows, columns = self.grid
        tiles = images.unflatten(3, (columns, self.patch_size)).unflatten(2, (rows, self.patch_size))
        return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _normalize(self, patches: Tensor) -> Tensor:
        unit = 255 if patches.dtype == torch.uint8 else 1
        channels = patches.unflatten(2, (3, -1)).to(self.mean.dtype)
        return ((channels - unit * self.mean) * (1 / (unit * self.std))).flatten(2)


def take(tokens: Tensor, idx: Tensor) -> Tensor:
    """`[b n d]` and `[b c]` int64 -> `[b c d]`: each sample's own rows."""
    num_samples, num_tokens, _ = tokens.shape
    first = torch.arange(num_samples, device=tokens.device)[:, None] * num_tokens
    return tokens.flatten(0, 1).index_select(0, (idx + first).flatten()).unflatten(0, idx.shape)


def sincos_positions(grid: tuple[int, int], width: int, spacing: float = 1.0) -> Tensor:
    """`[n width]` float32: sines and cosines of the row, then of the column, as I-JEPA fixes them.

    Args:
        grid: rows and columns.
        width: of the tokens.
        spacing: from a position to the next; below 1 a larger grid has the extent of a smaller one.
    """
    frequencies = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    axes = torch.meshgrid(
        *((torch.arange(size, dtype=torch.float64) + 0.5) * spacing - 0.5 for size in grid), indexing="ij"
    )
    angles = [axis.flatten()[:, None] * frequencies for axis in axes]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


def fuse_attention(model: nn.Module, fused: bool) -> None:
    """Chooses torch's fused attention, or matmul and softmax, which is faster on CPUs in bfloat16 (benchmarks/step.py)."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = fused


def check_token_width(setting: str, width: int, num_heads: int) -> None:
    """Raises UsageError where sin-cos positions or the heads do not divide the width."""
    if width % 4:
        raise UsageError(f"{setting}.width {width}: needs a multiple of 4 for the 2-D sin-cos positions")
    if width % num_heads:
        raise UsageError(f"{setting}.num_heads {num_heads} does not divide {setting}.width {width}")


def _create_vit(config: EncoderConfig, image_size: int) -> VisionTransformer:
    known = timm.list_models(module=["vision_transformer", "deit"])
    if config.name not in known:
        close = difflib.get_close_matches(config.name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see timm.list_models('vit*')"
        raise UsageError(f"encoder.name {config.name}: timm has no such Vision Transformer; {hint}")
    changes = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.num_heads}
    if config.width and config.num_heads:
        check_token_width("encoder", config.width, config.num_heads)
    try:
        vit = timm.create_model(
            config.name,
            img_size=image_size,
            patch_size=config.patch_size,
            num_classes=0,
            class_token=False,
            reg_tokens=0,
            global_pool="avg",
            fc_norm=False,  # the norm belongs to the tokens, not to their mean
            fix_init=True,  # I-JEPA too divides each block's last projections by sqrt(2 x its number)
            **{name: value for name, value in changes.items() if value},
        )
    except (AssertionError, TypeError) as error:
        raise UsageError(
            f"encoder {config.name} with {changes}: timm refuses it ({error}); change encoder.*"
        ) from error
    if type(vit) is not VisionTransformer:  # a subclass has more tokens, or another forward pass
        raise UsageError(f"encoder.name {config.name}: is a {type(vit).__name__}; choose a plain vit_* name")
    check_token_width("encoder", vit.embed_dim, vit.blocks[0].attn.num_heads)
    return vit
