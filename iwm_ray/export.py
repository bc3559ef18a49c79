"""`python -m iwm_ray.export RUN --format timm`: the encoder, or an adapter's classifier, for other libraries.

The folder is read back by the format's own library, and the maximal difference is printed; its README.md is a model
card.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import iwm_ray
from iwm_ray import cli
from iwm_ray.errors import UsageError
from iwm_ray.output import move, new_output

_FORMATS = ("timm", "hf", "onnx", "torch-export")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    sys.exit(cli.run_command(_main, sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    options = _parser().parse(arguments)
    for name, value, known in (
        ("format", options.format, _FORMATS),
        ("encoder", options.encoder, ("target", "context")),
    ):
        if value not in known:
            raise UsageError(f"--{name} {value!r}: choose {', '.join(known)}{cli.suggest(str(value), known)}")
    from iwm_ray import exporting
    from iwm_ray.finetuning.adapter import Classifier
    from iwm_ray.model_card import model_card
    from iwm_ray.trained import Trained

    folder = _adapter(options.path)
    if folder:
        model = iwm_ray.load(folder, options.task, options.run)
        if not isinstance(model, Classifier):
            raise UsageError(
                f"ADAPTER {folder}: a segmenter has no format here; give an adapter that classifies images"
            )
        trained, exported = model.trained, exporting.Exported.of_classifier(model)
    else:
        _refuse_adapter_options(options)
        trained = Trained.open(options.path, options.checkpoint)
        exported = exporting.Exported.of_encoder(trained, options.encoder)
    exporting.check(options.format, exported)
    name = f"{folder.name}-" if folder else ""
    default = trained.run.path / "export" / f"{name}{trained.path.name}-{options.format}"
    output = new_output(options.output or default)
    with tempfile.TemporaryDirectory(
        prefix=".exporting-", dir=output.parent, ignore_cleanup_errors=True
    ) as scratch:
        written = Path(scratch, "export")
        written.mkdir()
        difference = exporting.write(options.format, exported, written)
        card = model_card(trained, exported, options.format, difference, folder)
        (written / "README.md").write_text(card)
        move(written, output)
    print(f"exported     {output}")
    print(f"difference   {difference:.3g} at most, of {exported.output}, read back from the folder")


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m iwm_ray.export",
        description="Write a trained encoder, or an adapter's classifier, for other libraries. onnx and torch-export "
        "take uint8 RGB images of any number; timm and hf hold encoders only.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "path",
        type=Path,
        metavar="RUN|ADAPTER",
        help=f"for an encoder: {cli.RUN}; for a classifier: RUN/finetune/NAME/adapters/ARM, or RUN/finetune/NAME where "
        "there is only one",
    )
    parser.add_argument("--format", required=True, metavar="|".join(_FORMATS), help="of the folder's files")
    parser.add_argument(
        "--checkpoint", default="newest", metavar="WHICH", help="newest, best, or the step of a kept one"
    )
    parser.add_argument(
        "--encoder", default="target", metavar="target|context", help="which encoder of a run"
    )
    cli.add_adapter_options(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="new folder; default RUN/export/<checkpoint>-<format>"
    )
    cli.add_common_options(parser)
    return parser


def _refuse_adapter_options(options: argparse.Namespace) -> None:
    for name in ("task", "run"):
        if value := getattr(options, name):
            raise UsageError(
                f"--{name} {value}: {options.path} is a run, and only adapters take it; drop --{name} or give an adapter"
            )


def _adapter(path: Path) -> Path | None:
    """The folder of the adapter that `path` names; None: it is a run, or one of its checkpoints."""
    from iwm_ray.finetuning import adapter
    from iwm_ray.segmentation import segmenter

    path = path.expanduser()
    marks = ("adapters", adapter.FACTS, segmenter.FACTS)
    is_tuning = path.parent.name == "finetune" or any((path / mark).exists() for mark in marks)
    return iwm_ray.find_adapter(path) if is_tuning else None


if __name__ == "__main__":
    main()
