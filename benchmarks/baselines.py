"""The paper's comparison in small: what is the pretraining of a predictor worth to its finetuning (IWM, section 5)?

    python benchmarks/baselines.py --data.path train.parquet --data.test-path test.parquet

IWM, I-JEPA and MAE on CIFAR-10: the same encoder, predictor, batch and number of images. For each the predictor is
finetuned beside its control (a random predictor, the same seeds), and the target encoder is probed. Every part is a
command of its own, which the same command continues. The paper, ImageNet, ViT-B, 300 epochs and 100 of finetuning:
+1.8 points (IWM-Equi), +0.9 (I-JEPA), +0.1 to +0.3 (MAE). About half an hour on an idle core (estimate).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

METHODS = {
    "IWM": ("cifar10_small", "+1.8"),
    "I-JEPA": ("ijepa_cifar10_small", "+0.9"),
    "MAE": ("mae_cifar10_small", "+0.1 to +0.3"),
}
COLUMNS = ("method", "pretrained", "random", "difference (95 %)", "paper", "linear", "kNN", "MRR")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data.path", dest="train", required=True, help="labelled training images")
    parser.add_argument("--data.test-path", dest="test", required=True, help="labelled test images")
    parser.add_argument("--output", type=Path, default=Path("runs/baselines"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1500, help="of pretraining, 128 images each")
    parser.add_argument("--epochs", type=float, default=6, help="of finetuning, over 5000 images")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: needs 1 or more")
    for part in (pretrain, finetune, evaluate):  # each goes on where it was stopped
        for recipe, _ in METHODS.values():
            part(options.output / recipe, recipe, options)
    print("\n".join(table(options.output)))


def pretrain(run: Path, recipe: str, options: argparse.Namespace) -> None:
    local = ("--runtime.engine", "local", "--tracking.uri", "none", "--output", run)
    threads = ("--runtime.data-workers", 1, "--runtime.threads-per-worker", 1)
    command("pretrain", recipe, "--steps", options.steps, *data(options), *local, *threads)


def finetune(run: Path, recipe: str, options: argparse.Namespace) -> None:
    some = ("--data.num-train", 5000, "--data.num-test", 5000, "--epochs", options.epochs)
    command("finetune", run, "--tune", "predictor", "--seeds", 0, 1, 2, *data(options), *some)


def evaluate(run: Path, recipe: str, options: argparse.Namespace) -> None:
    less = ("--measure.train-images", 10_000, "--measure.test-images", 5000)
    command("evaluate", run, "--tasks", "linear", "knn", *less)


def data(options: argparse.Namespace) -> tuple[str, ...]:
    return ("--data.path", options.train, "--data.test-path", options.test)


def command(name: str, *words: object) -> None:
    words = (*words, "--runtime.precision", "bf16")
    print("iwm_ray", name, *words, flush=True)
    if code := subprocess.run([sys.executable, "-m", f"iwm_ray.{name}", *map(str, words)]).returncode:
        sys.exit(code)  # the command has said why


def table(folder: Path) -> list[str]:
    """Markdown, from the runs' own summaries; points and percent."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for method, (recipe, paper) in METHODS.items():
        found = json.loads((folder / recipe / "summary.json").read_text())["metrics"]
        task = next(name for name in found if name.endswith("/difference")).removesuffix("/difference")
        low, high = (100 * found[f"{task}/difference_{end}"] for end in ("low", "high"))
        rows.append((
            method,
            percent(found, f"{task}/top1"),
            percent(found, f"{task}/top1_random_predictor"),
            f"{100 * found[f'{task}/difference']:+.1f} ({low:+.1f} to {high:+.1f})",
            paper,
            percent(found, "linear/top1"),
            percent(found, "knn/top1"),
            f"{found['mrr/mrr']:.3f}" if "mrr/mrr" in found else "-",
        ))  # fmt: skip
    return [f"| {' | '.join(row)} |" for row in rows]


def percent(found: dict[str, float], name: str) -> str:
    """A figure with its interval, where it has one."""
    if f"{name}_low" not in found:
        return f"{100 * found[name]:.1f}"
    return f"{100 * found[name]:.1f} ({100 * found[f'{name}_low']:.1f}-{100 * found[f'{name}_high']:.1f})"


if __name__ == "__main__":
    main()
