"""Frozen encoders: everything whose representation is measured looks alike, a run's encoders and any model of timm.

Each is a small value that travels to other processes and loads its weights there.
"""

import difflib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import timm
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from iwm_ray.errors import UsageError
from iwm_ray.evaluation.features import digest
from iwm_ray.model.encoder import Encoder
from iwm_ray.trained import Trained
from iwm_ray.views.resize import clean_view

LAST = -1
"""the layer that is an encoder's output; others are numbers of its blocks (of a timm model: of its feature stages)"""

_RANDOM_WEIGHTS_SEED = 0
_PREPROCESSING = 1  # goes up when the same weights would give other tokens, so that no old cache is taken


class TokenModel(nn.Module):
    """An encoder with its weights."""

    def tokens(self, images: Tensor, layers: Sequence[int] = (LAST,)) -> list[Tensor]:
        """`[b 3 s s]` uint8 on the model's device -> for each layer `[b n d]`; n and d may differ between layers.

        Raises:
            UsageError: no such layer.
        """
        raise NotImplementedError


class FrozenEncoder(Protocol):
    """What makes tokens of images; a small value."""

    @property
    def name(self) -> str:
        """For a person."""
        ...

    @property
    def hash(self) -> str:
        """Of what decides the tokens of a view."""
        ...

    @property
    def image_size(self) -> int:
        """Side of the images that it reads, pixels."""
        ...

    def view(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """`[h w 3]` -> `[s s 3]`: what it reads of an image."""
        ...

    def load(self) -> TokenModel:
        """The encoder with its weights, on the CPU."""
        ...


@dataclass(frozen=True)
class RunEncoder:
    """An encoder of a pretraining run.

    All three are read as the targets are (IWM.target_tokens): after the encoder's last norm and, where the run
    normalises its targets, after the layer norm without affine; so figures differ by the weights alone, and are
    those of the monitors. The tokens of earlier blocks get the same layer norm.
    """

    trained: Trained
    which: Literal["target", "context", "untrained"] = "target"
    """untrained: the weights of step 0, from which both encoders started"""
    for_predictor: bool = False
    """the tokens as the predictor was trained to read them: without the layer norm of the targets"""
    mirrored: bool = False
    """those of the horizontally flipped images"""

    @property
    def name(self) -> str:
        if self.which == "untrained":
            return f"{self.trained.run.path.name}, untrained"
        return f"{self.trained.run.path.name}, {self.which} encoder, step {self.trained.step}"

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits of what decides the tokens; runs that start alike share their untrained encoder."""
        config = self.trained.config
        start = [config.seed, config.encoder.model_dump(mode="json"), config.views.image_size]
        weights = start if self.which == "untrained" else self.trained.hash
        mirrored = ("mirrored",) if self.mirrored else ()
        return digest(_PREPROCESSING, self.which, weights, self._is_normalized, *mirrored)

    @property
    def image_size(self) -> int:
        """Side of the images that it reads, pixels."""
        return self.trained.config.views.image_size

    def view(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """`[h w 3]` -> `[s s 3]`: its middle square, resized."""
        return clean_view(image, self.image_size)

    def load(self) -> TokenModel:
        """The encoder on the CPU.

        Raises:
            RunError: the checkpoint is damaged.
        """
        model = self.trained.untrained() if self.which == "untrained" else self.trained.load()
        encoder = model.encoder if self.which == "context" else model.target_encoder
        return RunTokens(encoder, self._is_normalized, self.mirrored)

    @property
    def _is_normalized(self) -> bool:
        return self.trained.config.predictor.normalize_targets and not self.for_predictor


@dataclass(frozen=True)
class TimmEncoder:
    """Any model of timm, as a control; use `open`. Class and register tokens are left out: its tokens are patches."""

    model: str
    """timm's name, with its tag where the weights are timm's"""
    image_size: int
    """side of the images that it reads, pixels"""
    mean: tuple[float, ...]
    """of each channel, in 0..1"""
    std: tuple[float, ...]
    weights: Path | None
    """safetensors file with the names of timm's parameters; those of the classifier are passed over"""
    pretrained: bool
    """timm's own weights, which timm downloads"""
    hash: str = field(repr=False)
    """of the weights (of timm's own: of their name), the architecture and the preprocessing"""

    @classmethod
    def open(
        cls,
        model: str,
        weights: Path | None = None,
        *,
        pretrained: bool = False,
        image_size: int = 0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> "TimmEncoder":
        """Finds a model; without `weights` and `pretrained` it has random ones.

        Args:
            model: name as in timm.list_models(), or with a tag (`resnet50.a1_in1k`).
            weights: see the field.
            pretrained: see the field.
            image_size: 0: as the model was trained.
            mean: None: as the model was trained.
            std: None: as the model was trained.

        Raises:
            UsageError: no such model or file, or images smaller than the model can read.
        """
        if not timm.is_model(model):
            close = difflib.get_close_matches(model, timm.list_models(), n=1)
            hint = f"did you mean {close[0]}?" if close else "see timm.list_models()"
            raise UsageError(f"encoder {model}: timm has no such model; {hint}")
        if weights is not None:
            weights = weights.expanduser().absolute()
        known = timm.get_pretrained_cfg(model)
        size = image_size or known.input_size[-1]
        mean, std = tuple(mean or known.mean), tuple(std or known.std)
        content = _file_hash(weights) if weights else ("timm" if pretrained else _RANDOM_WEIGHTS_SEED)
        facts = (_PREPROCESSING, model, timm.__version__, content, size, mean, std)
        found = cls(model, size, mean, std, weights, pretrained, digest(*facts))
        found._check_size()
        return found

    @property
    def name(self) -> str:
        source = (
            self.weights.name if self.weights else "timm's weights" if self.pretrained else "random weights"
        )
        return f"{self.model}, {source}"

    def view(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """`[h w 3]` -> `[s s 3]`: its middle square, resized."""
        return clean_view(image, self.image_size)

    def load(self) -> TokenModel:
        """The model on the CPU.

        Raises:
            UsageError: the weights are not those of this model, or can't be downloaded.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_RANDOM_WEIGHTS_SEED)
            try:
                model = self._create(pretrained=self.pretrained)
            except (RuntimeError, OSError, ValueError) as error:
                raise UsageError(
                    f"encoder {self.model}: timm can't give its weights ({_line(error)})"
                ) from None
        if self.weights:
            _load_weights(model, self.weights)
        return _TimmTokens(model, self.mean, self.std)

    def _create(self, pretrained: bool = False) -> nn.Module:
        # Only models for one size take it as an argument.
        fixed = timm.get_pretrained_cfg(self.model).fixed_input_size
        sizes: dict[str, Any] = {"img_size": self.image_size} if fixed else {}
        return timm.create_model(self.model, pretrained=pretrained, num_classes=0, **sizes)

    def _check_size(self) -> None:
        """Runs the model on nothing but shapes."""
        try:
            with torch.device("meta"):
                model = _TimmTokens(self._create(), self.mean, self.std).eval()
                shape = model.tokens(torch.empty(2, 3, self.image_size, self.image_size, dtype=torch.uint8))[
                    0
                ].shape
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise self._refusal(_line(error)) from None
        if not all(shape):
            raise self._refusal("no token is left")

    def _refusal(self, reason: str) -> UsageError:
        return UsageError(
            f"encoder {self.model}: can't read images of {self.image_size} pixels ({reason}); give a larger or its own size"
        )


class RunTokens(TokenModel):
    """The tokens of a run's encoder.

    Args:
        encoder: with its weights.
        normalize: whether they get the layer norm of the targets.
        mirrored: those of the horizontally flipped images.
    """

    def __init__(self, encoder: Encoder, normalize: bool, mirrored: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalize = normalize
        self.mirrored = mirrored

    def tokens(self, images: Tensor, layers: Sequence[int] = (LAST,)) -> list[Tensor]:
        blocks = self.encoder.vit.blocks
        _check_layers(layers, len(blocks))
        found: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for layer in set(layers) - {LAST}:
                hooks.enter_context(blocks[layer].register_forward_hook(partial(_keep, found, layer)))
            found[LAST] = self.encoder(images.flip(3) if self.mirrored else images)
        return [self._normalized(found[layer]) for layer in layers]

    def _normalized(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:]) if self.normalize else tokens


class _TimmTokens(TokenModel):
    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model: Any = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def tokens(self, images: Tensor, layers: Sequence[int] = (LAST,)) -> list[Tensor]:
        pixels = (images / 255 - self.mean) / self.std
        found = {LAST: self._output(pixels)} if LAST in layers else {}
        inner = sorted(set(layers) - {LAST})
        if inner:
            _check_layers(inner, len(self.model.feature_info))
            maps = self.model.forward_intermediates(
                pixels, indices=inner, intermediates_only=True, output_fmt="NCHW"
            )
            found |= {layer: _from_map(map_) for layer, map_ in zip(inner, maps, strict=True)}
        return [found[layer] for layer in layers]

    def _output(self, pixels: Tensor) -> Tensor:
        output = self.model.forward_features(pixels)
        if output.ndim == 3:
            return output[:, getattr(self.model, "num_prefix_tokens", 0) :]
        return output.flatten(1, 2) if getattr(self.model, "output_fmt", "") == "NHWC" else _from_map(output)


def _keep(found: dict[int, Tensor], layer: int, _module: nn.Module, _input: Any, output: Tensor) -> None:
    found[layer] = output


def _from_map(map_: Tensor) -> Tensor:
    """`[b d h w]` -> `[b h*w d]`."""
    return map_.flatten(2).transpose(1, 2)


def _check_layers(layers: Sequence[int], count: int) -> None:
    wrong = [layer for layer in layers if not LAST <= layer < count]
    if wrong:
        raise UsageError(
            f"layers {wrong[0]}: the encoder has 0 to {count - 1}, and {LAST} for its output; give one of these"
        )


def _load_weights(model: Any, path: Path) -> None:
    try:
        missing, others = model.load_state_dict(load_file(path), strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _weights_refusal(path, _line(error)) from None
    classifier = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    strangers = [name for name in others if not name.startswith(classifiers)]
    if missing or strangers:
        raise _weights_refusal(path, f"it lacks {missing[:1]}, and {strangers[:1]} is not the model's")


def _file_hash(path: Path) -> str:
    try:
        return digest(path.read_bytes())
    except OSError as error:
        raise _weights_refusal(path, error.strerror or str(error)) from None


def _weights_refusal(path: Path, reason: str) -> UsageError:
    return UsageError(
        f"weights {path}: {reason}; give a safetensors file with the names and shapes of timm's parameters"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
