"""A tiny run that trains for seconds; what faults must not change is compared with it."""

from collections.abc import Callable
from pathlib import Path

import pytest

TINY = {
    "--encoder.width": 64,
    "--encoder.depth": 2,
    "--predictor.width": 64,
    "--predictor.depth": 2,
    "--optimizer.global-batch-size": 32,
    "--schedule.steps": 45,  # an epoch of photos_tiny has 37
    "--monitor.report-every-steps": 1,
    "--monitor.every-steps": 3,
    "--monitor.num-images": 32,
    "--monitor.num-bank-images": 64,
    "--monitor.mrr-images": 4,
    "--monitor.mrr-views": 8,
    "--runtime.checkpoint-every-steps": 4,
    "--runtime.data-workers": 1,
    "--runtime.threads-per-worker": 1,
    "--tracking.uri": "none",
}

TinyCommand = Callable[..., list[str]]


@pytest.fixture(scope="session")
def photo_cache(tmp_path_factory) -> Path:
    """The cache of all tiny runs: photographs are cut once a session."""
    return tmp_path_factory.mktemp("photos")


@pytest.fixture(scope="session")
def tiny_command(photo_cache) -> TinyCommand:
    """`tiny_command(output, {"--option": value})`: the arguments of a tiny run."""

    def command(output: Path | str, changes: dict[str, object] | None = None) -> list[str]:
        options = TINY | {"--runtime.cache": photo_cache, "--output": output} | (changes or {})
        words = (
            (name, *(value if isinstance(value, tuple) else (value,))) for name, value in options.items()
        )
        return [str(word) for option in words for word in option]

    return command


@pytest.fixture(scope="session")
def clean_run(tiny_command, tmp_path_factory) -> Path:
    """The run directory of an undisturbed tiny run of the local engine."""
    from iwm_ray.pretrain import main

    output = tmp_path_factory.mktemp("clean") / "run"
    with pytest.raises(SystemExit) as ended:
        main(tiny_command(output, {"--runtime.engine": "local"}))
    assert ended.value.code == 0
    return output
