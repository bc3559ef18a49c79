"""The arrows of the architecture, read from the imports: who may know whom (docs/design.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "iwm_ray"

# A module may import its own layer and the ones named before it.
LAYERS = [
    ["errors", "randomness", "wording"],
    ["output"],
    ["config", "batch"],
    ["data", "views", "model", "action_log", "run_directory"],
    ["training"],
    ["trained"],
    ["evaluation"],
    ["pictures"],
    ["feed", "recipes"],
    ["loader", "build", "cli"],
    ["workers"],
    ["finetuning"],
    ["segmentation"],
    ["sweeping"],
    ["session", "plan_report", "progress"],
    ["summary"],
    ["runtime"],
    ["driver", "measurement", "exporting", "prediction"],
    ["tuning_driver"],
    ["model_card"],
    [
        "pretrain",
        "evaluate",
        "visualize",
        "finetune",
        "segment",
        "export",
        "predict",
        "replay",
        "doctor",
        "__main__",
    ],
    ["trial", "sweep_cost"],
    ["sweep"],
]
# Siblings that must not know each other: they meet in Batch and in one integer.
STRANGERS = ["data", "views", "model"]


def layer(name):
    return next(number for number, names in enumerate(LAYERS) if name in names)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def first_part(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    here = first_part(path)
    for name in imports(path):
        if not name.startswith("iwm_ray."):
            continue
        there = name.split(".")[1]
        if not (PACKAGE / there).exists() and not (PACKAGE / f"{there}.py").exists():
            continue
        assert layer(there) <= layer(here), f"{here} imports {there}"
        assert not (here in STRANGERS and there in STRANGERS and here != there), f"{here} imports {there}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ray_and_mlflow_stay_in_the_runtime(path):
    if first_part(path) == "runtime":
        return
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"ray", "mlflow"}


def test_data_tasks_do_not_load_torch():
    code = "import sys, iwm_ray.feed; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_the_command_line_does_not_load_torch_or_ray():
    code = "import sys, iwm_ray.pretrain; print({'torch', 'ray', 'mlflow'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
