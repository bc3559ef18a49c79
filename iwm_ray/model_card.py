"""The model card of an export: where the weights come from, how good they are, how to load them.

Everything in it is read from the run's files; what a run does not record is said to be unknown.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from iwm_ray.build import cache_folder
from iwm_ray.config import flat
from iwm_ray.data.index import Index
from iwm_ray.errors import UsageError
from iwm_ray.exporting import ONNX_FILE, TORCH_FILE, Exported, Format
from iwm_ray.finetuning.adapter import FACTS
from iwm_ray.run_directory import read_lines
from iwm_ray.trained import Trained

_SETTINGS = ("views", "masks", "encoder", "predictor", "optimizer", "schedule")
_NOT_A_QUALITY = ("train/", "monitor/seconds")

_LOADING: dict[Format, str] = {
    "timm": """\
import timm
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
output = model.forward_features(transform(image)[None])""",
    "hf": """\
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel  # transformers reads timm's layout, timm must be there

image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
model = AutoModel.from_pretrained(".").eval()
processor = AutoImageProcessor.from_pretrained(".")
output = model(**processor(image, return_tensors="pt")).last_hidden_state""",
    "onnx": f"""\
import numpy
import onnxruntime
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
image = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BILINEAR)
images = numpy.array(image).transpose(2, 0, 1)[None]  # [1 3 SIZE SIZE] uint8
session = onnxruntime.InferenceSession("{ONNX_FILE}")
(output,) = session.run(None, {{"images": images}})""",
    "torch-export": f"""\
import numpy
import torch
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
image = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BILINEAR)
images = torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None]  # [1 3 SIZE SIZE] uint8
model = torch.export.load("{TORCH_FILE}").module()
output = model(images)""",
}


def model_card(
    trained: Trained, exported: Exported, format: Format, difference: float, adapter: Path | None = None
) -> str:
    """The card as Markdown.

    Args:
        trained: the run and checkpoint.
        exported: what was written.
        format: how.
        difference: see exporting.write.
        adapter: folder of the adapter, where it is one.
    """
    sections = [
        _head(trained, exported, format, difference),
        _data(trained),
        _training(trained),
        *([_adapter(adapter)] if adapter else []),
        _figures(trained, adapter is not None),
        _actions(trained),
        _loading(exported, format),
        "## Licence\n\nThe run states no licence for these weights: it depends on that of the images above. The code "
        "(iwm_ray) is under Apache-2.0.",
    ]
    return "\n\n".join(sections) + "\n"


def _head(trained: Trained, exported: Exported, format: Format, difference: float) -> str:
    size = exported.image_size
    takes = (
        f"float32 `[b 3 {size} {size}]` RGB, normalised as config.json says"
        if format in ("timm", "hf")
        else f"uint8 `[b 3 {size} {size}]` RGB, any b; the normalisation is inside"
    )
    what = "encoder" if exported.encoder is not None else "classifier (encoder, predictor, head)"
    return f"""\
# Image World Model: {what}

The {what} of an Image World Model (arXiv 2403.00504), written by iwm_ray in the format `{format}`.

- run: `{trained.run.path.name}`, checkpoint `{trained.path.name}`, weights SHA-256 `{trained.hash}`
- input: {takes}; shorter side resized to {size} (antialiased bilinear), centre cropped
- output: {exported.output}
- maximal difference to iwm_ray's own output, on random images: {difference:.2g}"""


def _data(trained: Trained) -> str:
    config = trained.config
    known = _json(trained.run.environment)
    recorded = known.get("data_hash")
    count = "unknown: the images are no longer there as the run read them"
    with suppress(UsageError):
        index = Index.open(config.data, config.data.path, cache_folder(config))
        if recorded == index.hash:
            count = f"{len(index):,}"
        elif recorded is None:
            count = f"{len(index):,} now; the run did not record which it read"
    return f"""\
## Training data

- images: `{config.data.path}`
- hash: {f"`{recorded}`" if recorded else "not recorded"}
- number of images: {count}
- labels: not used in pretraining"""


def _training(trained: Trained) -> str:
    config = trained.config
    known = _json(trained.run.environment)
    versions = ", ".join(f"{name} {value}" for name, value in known.get("versions", {}).items() if value)
    settings = "\n".join(
        f"{name} = {json.dumps(value)}"
        for name, value in config.flat().items()
        if name.partition(".")[0] in _SETTINGS
    )
    return f"""\
## Training

- recipe: `{config.recipe}`, seed {config.seed}; hash of the configuration `{config.hash()}`
- steps: {trained.step:,}, samples seen: {trained.step * config.optimizer.global_batch_size:,}
- code: commit `{known.get("git_commit") or "unknown"}`; {versions or "versions not recorded"}

```
{settings}
```"""


def _adapter(folder: Path) -> str:
    """What the adapter's own training has written, beside its control and the best constant answer."""
    tuning = folder.parent.parent
    facts, own = _json(folder / FACTS), _json(tuning / "arms" / f"{folder.name}.json")
    settings, arm, figures = own.get("settings", {}), own.get("arm", {}), own.get("figures", {})
    seed = arm.get("seed", "unknown")
    known = _json(tuning / "summary.json").get("metrics", {})
    chance = {name: known.get(f"finetune/{name.split('/')[1]}/chance") for name in figures}
    controls = {"random predictor": _control(tuning / "arms", arm), "best constant answer": chance}
    tasks = "\n".join(
        f"- task `{name}`, {len(names)} classes: {', '.join(names)}" for name, names in facts["tasks"].items()
    )
    paths = {key: settings.get("data", {}).get(key, []) for key in ("path", "test_path")}
    values = "\n".join(f"{name} = {json.dumps(value)}" for name, value in flat(settings).items())
    return f"""\
## Finetuning

- adapter: `{folder.name}`, head {facts["head"]}, {facts["encoder"]} encoder, seed {seed}
- data: `{" ".join(paths["path"]) or "not recorded"}`, tested on `{" ".join(paths["test_path"]) or "not recorded"}`
{tasks}

```
{values or "settings not recorded"}
```

{_table(figures, controls)}"""


def _control(arms: Path, arm: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of the same training from a random predictor, under the names of the pretrained one's."""
    for path in sorted(arms.glob("*.json")):
        found = _json(path)
        other = found.get("arm", {})
        if other == {**arm, "start": "random", "lr": other.get("lr")}:
            figures = found.get("figures", {})
            return {name.replace("_random_predictor", ""): value for name, value in figures.items()}
    return {}


def _figures(trained: Trained, is_tuned: bool) -> str:
    """What was measured of this very checkpoint: metrics.jsonl at its step, beside evaluation's untrained weights.

    Figures of networks that were tuned from it are not its own; an adapter's card has those of its own training.
    """
    metrics: dict[str, float] = {}
    for row in read_lines(trained.run.metrics):
        if row.get("step") == trained.step:
            own = {name: value for name, value in row.items() if not name.startswith("finetune/")}
            metrics |= {name: value for name, value in own.items() if name not in ("step", "time")}
    untrained: dict[str, float] = {}
    for path in sorted((trained.run.path / "evaluation" / trained.path.name).glob("*.json")):
        measured = _json(path).get("measured", {})
        metrics |= measured.get("trained", {})
        untrained |= measured.get("untrained", {})
    head = "## Figures of the pretrained checkpoint, before finetuning" if is_tuned else "## Figures"
    return f"{head}\n\n{_table(metrics, {'untrained weights': untrained})}"


def _table(metrics: Mapping[str, float | None], controls: Mapping[str, Mapping[str, float | None]]) -> str:
    """One row for each figure, with its interval and, by heading, what it is to be compared with."""
    rows = []
    for name, value in sorted(metrics.items()):
        if value is None or name.endswith(("_low", "_high")) or name.startswith(_NOT_A_QUALITY):
            continue
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        between = f"{low:.4g} to {high:.4g}" if low is not None and high is not None else ""
        beside = [known.get(name) for known in controls.values()]
        cells = ["" if control is None else f"{control:.4g}" for control in beside]
        rows.append((f"`{name}`", f"{value:.4g}", between, *cells))
    if not rows:
        return "Nothing was measured at this step."
    return _markdown(("metric", "value", "95 % interval", *controls), rows)


def _actions(trained: Trained) -> str:
    rows = [
        (f"`{field.name}`", field.unit, f"{field.identity:g}", f"{field.scale:g}")
        for field in trained.policy.schema
    ]
    text = "The predictor is told these components; each is (value - identity) / scale. "
    text += "An encoder takes no action; a classifier asks with the null action, all zeros."
    if not rows:
        return "## Action\n\nThe views of this run have no photometric action."
    return f"## Action\n\n{text}\n\n{_markdown(('component', 'unit', 'identity', 'scale'), rows)}"


def _loading(exported: Exported, format: Format) -> str:
    lines = _LOADING[format].replace("SIZE", str(exported.image_size))
    if exported.class_names:
        lines += f"\nprint({list(exported.class_names)!r}[output[0].argmax()])"
    return f"## Loading\n\nRun in this folder, with any photo.jpg:\n\n```python\n{lines}\n```"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _json(path: Path) -> dict[str, Any]:
    """A JSON file; empty where it is missing or damaged."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}
