"""Export: an encoder or a classifier in the formats of other libraries, and read back by them.

`timm` and `hf` are one layout (safetensors and timm's config.json), which timm and transformers both read.
`onnx` and `torch-export` hold a graph with the normalisation inside: it takes uint8 RGB images.
"""

import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from iwm_ray.errors import UsageError
from iwm_ray.evaluation.features import measuring
from iwm_ray.finetuning.adapter import Classifier
from iwm_ray.finetuning.model import Query, Tuned
from iwm_ray.model.encoder import Encoder
from iwm_ray.run_directory import write_json
from iwm_ray.trained import Trained

Format = Literal["timm", "hf", "onnx", "torch-export"]
FORMATS: tuple[Format, ...] = get_args(Format)
ONNX_FILE, TORCH_FILE = "model.onnx", "model.pt2"
_TRACED_BATCH = 2  # torch.export takes a size of 0 or 1 for a constant
_CHECKED_BATCH = 5  # another one, so that the graph's batch size is seen to be free

_LIBRARIES: dict[Format, tuple[str, ...]] = {
    "timm": (),
    "hf": ("transformers",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch-export": (),
}


@dataclass(frozen=True)
class Exported:
    """What is written: a network on images, and how it was described to timm where it is a plain encoder."""

    network: nn.Module
    """uint8 `[b 3 s s]` RGB -> its output"""
    image_size: int
    """side of the images, pixels"""
    output: str
    """what comes out, in words"""
    encoder: Encoder | None = None
    """None: more than an encoder, which timm has no layout for"""
    timm_name: str = ""
    """timm's name of the encoder's family"""
    class_names: tuple[str, ...] = ()
    """of a classifier's output"""

    @classmethod
    def of_encoder(cls, trained: Trained, which: Literal["target", "context"]) -> "Exported":
        """One of a run's two encoders."""
        model = trained.load()
        encoder = model.target_encoder if which == "target" else model.encoder
        output = f"tokens: float32 [b {encoder.grid[0] * encoder.grid[1]} {encoder.width}]"
        return cls(encoder, trained.config.views.image_size, output, encoder, trained.config.encoder.name)

    @classmethod
    def of_classifier(cls, classifier: Classifier) -> "Exported":
        """An adapter on its encoder.

        Raises:
            UsageError: it draws its questions at random, which a graph cannot.
        """
        asking = classifier.asking
        if asking.is_random or asking.fraction < 1:
            raise UsageError(
                "action random or target_fraction below 1: a graph cannot draw; export an adapter tuned with the "
                "null action and the full target"
            )
        network = _Probabilities(classifier.tuned, classifier.task, asking.policy.action_dim)
        output = f"probabilities: float32 [b {len(classifier.class_names)}]"
        return cls(network, classifier.image_size, output, class_names=classifier.class_names)


class _Probabilities(nn.Module):
    """A classifier as one function of images: the null action, the full grid."""

    def __init__(self, tuned: Tuned, task: str, action_dim: int) -> None:
        super().__init__()
        self.tuned, self.task, self.action_dim = tuned, task, action_dim

    def forward(self, images: Tensor) -> Tensor:
        """`[b 3 s s]` uint8 -> `[b c]`."""
        action = torch.zeros(images.shape[0], self.action_dim, device=images.device)
        return self.tuned(images, self.task, Query(action)).softmax(1)


def check(format: Format, exported: Exported) -> None:
    """Refuses what cannot be written, before anything is.

    Raises:
        UsageError: a library is missing, or the format has no place for the network.
    """
    if exported.encoder is None and format in ("timm", "hf"):
        raise UsageError(
            f"--format {format}: holds encoders only, an adapter is more than that; use onnx or torch-export"
        )
    missing = [name for name in _LIBRARIES[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--format {format}: needs {', '.join(missing)}; pip install 'iwm_ray[export]', or choose another"
        )


def write(format: Format, exported: Exported, folder: Path) -> float:
    """Writes a network into a folder, loads it by the format's own library, and compares.

    Args:
        format: see the module.
        exported: on the CPU.
        folder: exists, empty.

    Returns:
        the maximal absolute difference of the outputs on random images.
    """
    writers = {"timm": _write_timm, "hf": _write_timm, "onnx": _write_onnx, "torch-export": _write_torch}
    readers = {"timm": read_timm, "hf": read_hf, "onnx": read_onnx, "torch-export": read_torch}
    with measuring(exported.network):
        writers[format](exported, folder)
        images = example_images(exported.image_size, _CHECKED_BATCH)
        expected = exported.network(images)
        found = readers[format](folder)(images)
    return float((expected - found).abs().max())


def example_images(size: int, count: int) -> Tensor:
    """`[count 3 size size]` uint8 noise, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


# Writers


def _write_timm(exported: Exported, folder: Path) -> None:
    encoder = exported.encoder
    assert encoder is not None
    tensors = {name: tensor.contiguous() for name, tensor in encoder.vit.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", timm_config(encoder, exported.timm_name))


def timm_config(encoder: Encoder, name: str) -> dict[str, object]:
    """What stands in config.json, as timm's hub layout has it: architecture, its arguments, preprocessing."""
    size = encoder.grid[0] * encoder.patch_size
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.width,
        "global_pool": "avg",
        "model_args": {
            "img_size": size,
            "patch_size": encoder.patch_size,
            "embed_dim": encoder.width,
            "depth": len(encoder.vit.blocks),
            "num_heads": encoder.vit.blocks[0].attn.num_heads,
            "class_token": False,
            "reg_tokens": 0,
            "global_pool": "avg",
            "fc_norm": False,
        },
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(IMAGENET_DEFAULT_MEAN),
            "std": list(IMAGENET_DEFAULT_STD),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _write_onnx(exported: Exported, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converter about itself
        torch.onnx.export(
            exported.network,
            (example_images(exported.image_size, _TRACED_BATCH),),
            folder / ONNX_FILE,
            dynamo=True,
            input_names=["images"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )


def _write_torch(exported: Exported, folder: Path) -> None:
    images = example_images(exported.image_size, _TRACED_BATCH)
    program = torch.export.export(
        exported.network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(program, folder / TORCH_FILE)


# Readers: what the model card tells its readers to do


def read_timm(folder: Path) -> Callable[[Tensor], Tensor]:
    """The folder as timm's model, from uint8 images to tokens."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    return lambda images: model.forward_features(_normalized(images, data["mean"], data["std"]))


def read_hf(folder: Path) -> Callable[[Tensor], Tensor]:
    """The folder as transformers' model."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    data = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    return lambda images: model(_normalized(images, data["mean"], data["std"])).last_hidden_state


def read_onnx(folder: Path) -> Callable[[Tensor], Tensor]:
    """The graph in onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def read_torch(folder: Path) -> Callable[[Tensor], Tensor]:
    """The exported program."""
    return torch.export.load(folder / TORCH_FILE).module()


def _normalized(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """`[b 3 s s]` uint8 -> float32, as timm's own transforms do it."""
    return (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
