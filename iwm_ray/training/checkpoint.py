"""Checkpoints that outlive a kill at any instant, a full disk and a flipped bit.

A checkpoint is a folder `step_00000500` with model.safetensors, optimizer.safetensors, state.json and
MANIFEST.json. It is written under a dot-name, synced, and renamed into place, so that it exists as a whole or
not at all; it is read back only after every byte has been checked. A sequence number says which is the
newest, never a clock. No pickle is written or read.

One process, rank 0 of the newest attempt, writes: each attempt takes a generation number, and an older one is
refused.
"""

import logging
import math
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW

from iwm_ray.config import Config, flat
from iwm_ray.errors import RunError, SupersededError, UsageError
from iwm_ray.model.iwm import IWM
from iwm_ray.training.manifest import (
    FILES,
    FORMAT_VERSION,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    DamagedError,
    Manifest,
    Record,
    folder_name,
    has_all_bytes,
    is_intact,
    list_manifests,
    read_manifest,
    record,
    sealed,
    verify,
)
from iwm_ray.training.optimizer import expected_moments, moments, set_moments

NUM_KEPT = 2
"""newest intact checkpoints that are kept; the best one is kept besides"""
_DTYPES = {torch.float32: "F32", torch.int64: "I64"}
_LIBRARIES = ("iwm_ray", "torch", "timm", "safetensors", "numpy")
_log = logging.getLogger(__name__)


class SavedState(Record):
    """state.json: what is not a tensor."""

    step: int
    total_steps: int
    skipped: list[int]
    config: dict[str, Any]
    extra: dict[str, Any]


class Recorded(Protocol):
    """What was asked for, as a checkpoint records it."""

    def hash(self) -> str:
        """Names it."""
        ...

    def flat(self) -> dict[str, Any]:
        """Dotted name -> value, for messages."""
        ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class State(Protocol):
    """What is saved and loaded; TrainState says what its parts are."""

    total_steps: int
    step: int
    skipped: Tensor

    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> AdamW: ...

    @property
    def config(self) -> Recorded: ...

    @property
    def device(self) -> torch.device: ...

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the model that a checkpoint holds, as they lie in memory."""
        ...


@dataclass(frozen=True)
class Saved:
    """What became of a checkpoint."""

    path: Path | None
    """None: it could not be written, and the older ones are untouched"""
    warning: str = ""
    """one line, empty when all went well"""


@dataclass(frozen=True)
class Found:
    """A checkpoint of which every byte has been checked."""

    path: Path
    manifest: Manifest
    state: SavedState
    skipped: tuple[str, ...] = ()
    """damaged checkpoints that were passed over, and why"""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def config(self) -> Config:
        """The configuration of the run that wrote it."""
        return Config.model_validate(self.state.config)


def save(
    directory: Path, state: State, extra: dict[str, Any], generation: int, metric: float | None = None
) -> Saved:
    """Writes the checkpoint of `state.step`, then removes the ones that are no longer needed.

    A step that already has an intact checkpoint of this configuration keeps it: steps are deterministic.

    Args:
        directory: where the run's checkpoints are.
        state: what is saved.
        extra: what else belongs to the run, as JSON.
        generation: this attempt's number, from `next_generation`.
        metric: the higher, the better; the best checkpoint is kept.

    Returns:
        The path, or, where the disk is full or fails, a warning: training goes on.

    Raises:
        SupersededError: a newer attempt has taken over.
        RunError: a weight is not finite.
    """
    path, stage = directory / folder_name(state.step), directory / f".stage-{state.step}-{generation}"
    if _holds(path, state.config):
        return Saved(path)
    published = None
    try:
        _write(stage, state, extra, _describe(directory, state, generation, metric))
        refuse_older_generation(directory, generation)
        _publish(stage, path)
        published = path
        _retain(directory)
    except (OSError, SafetensorError) as error:
        what = "older ones could not be removed" if published else "not written, training goes on without it"
        return Saved(published, f"checkpoint of step {state.step}: {what} ({error}; {_free(directory)})")
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return Saved(path)


def newest_valid(directory: Path) -> Found | None:
    """The newest checkpoint that is intact; None where there is none at all.

    Raises:
        RunError: there are checkpoints, but not one is intact.
        UsageError: one was written by a newer version of iwm_ray.
    """
    manifests, skipped = list_manifests(directory)
    for path, manifest in manifests:
        try:
            found = _check(path, manifest)
        except DamagedError as reason:
            skipped.append(f"{path.name}: {reason}")
        else:
            for line in skipped:
                _log.warning("checkpoint passed over: %s", line)
            return Found(path, manifest, found, tuple(skipped))
    if skipped:
        raise RunError(f"no intact checkpoint in {directory}: {'; '.join(skipped)}")
    return None


def best_valid(directory: Path) -> Found:
    """The checkpoint with the best features when it was written.

    Raises:
        UsageError: none was measured.
        RunError: it is damaged.
    """
    measured = [(item.metric, path) for path, item in list_manifests(directory)[0] if item.metric is not None]
    if not measured:
        raise UsageError(f"no checkpoint in {directory} was measured; ask for the newest")
    return open_checkpoint(max(measured)[1])


def open_checkpoint(path: Path) -> Found:
    """The checkpoint in the folder `path`.

    Raises:
        UsageError: there is none, or one of a newer version.
        RunError: it is damaged.
    """
    if not (path / MANIFEST).exists():
        example = f"RUN/checkpoints/{folder_name(500)}"
        raise UsageError(f"checkpoint {path}: no {MANIFEST} there; give a folder such as {example}")
    try:
        manifest = read_manifest(path)
        return Found(path, manifest, _check(path, manifest))
    except DamagedError as reason:
        raise RunError(f"checkpoint {path} is damaged: {reason}") from None


def load(found: Found, state: State) -> None:
    """Puts weights, moments, step and counters into `state`.

    Raises:
        UsageError: the checkpoint is of another configuration, another length of the run or another model;
        `state` is
            unchanged.
    """
    _refuse_other_run(found, state)
    weights = _read_tensors(found, MODEL, state.weights())
    optimizer = _read_tensors(found, OPTIMIZER, expected_moments(state.model) if found.step else {})
    _copy(weights, state.weights())
    set_moments(state.optimizer, state.model, optimizer)
    state.step = found.step
    state.skipped = torch.tensor(found.state.skipped, device=state.device)


def load_model(found: Found, model: IWM) -> None:
    """Puts the weights into `model`: context encoder, target encoder and predictor.

    Raises:
        UsageError: they do not fit; `model` is unchanged.
    """
    _copy(_read_tensors(found, MODEL, model.state_dict()), model.state_dict())


def next_generation(directory: Path) -> int:
    """Begins an attempt: takes the next number, which locks older attempts out, and clears what they left half done."""
    directory.mkdir(parents=True, exist_ok=True)
    number = _newest_generation(directory) + 1
    while not _take_number(directory / f".generation-{number}"):
        number += 1
    _sync(directory)
    for orphan in [*directory.glob(".stage-*"), *directory.glob(".trash-*")]:
        shutil.rmtree(orphan, ignore_errors=True)
    return number


# Generations


def _take_number(path: Path) -> bool:
    """Whether this process, and no other, has made the file."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def _newest_generation(directory: Path) -> int:
    return max((int(path.name.rsplit("-", 1)[1]) for path in directory.glob(".generation-*")), default=0)


def refuse_older_generation(directory: Path, generation: int) -> None:
    """Raises:
    SupersededError: a newer attempt has taken its number.
    """
    newest = _newest_generation(directory)
    if newest > generation:
        raise SupersededError(
            f"attempt {newest} has taken over {directory}: attempt {generation} must not write any more"
        )


# Writing


def _holds(path: Path, config: Recorded) -> bool:
    """Whether there is an intact checkpoint of this configuration."""
    try:
        manifest = read_manifest(path)
    except DamagedError:
        return False
    return manifest.config_hash == config.hash() and is_intact(path, manifest)


def _describe(directory: Path, state: State, generation: int, metric: float | None) -> Manifest:
    """The manifest, but for the files."""
    manifests, _ = list_manifests(directory)
    return Manifest(
        format_version=FORMAT_VERSION,
        sequence=1 + max((manifest.sequence for _, manifest in manifests), default=0),
        step=state.step,
        generation=generation,
        config_hash=state.config.hash(),
        metric=metric if metric is not None and math.isfinite(metric) else None,
        versions=_versions(),
        files=[],
    )


@cache
def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


def _write(stage: Path, state: State, extra: dict[str, Any], manifest: Manifest) -> None:
    """Writes all files of a checkpoint and waits until they are on the disk, the manifest last."""
    weights, optimizer = state.weights(), moments(state.optimizer, state.model)
    _refuse_non_finite(weights | optimizer, state.step)
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    save_file(weights, stage / MODEL)
    save_file(optimizer, stage / OPTIMIZER)
    saved = SavedState(
        step=state.step,
        total_steps=state.total_steps,
        skipped=state.skipped.tolist(),
        config=state.config.model_dump(mode="json"),
        extra=extra,
    )
    (stage / STATE).write_text(saved.model_dump_json(indent=1))
    for name in FILES:
        _sync(stage / name)
    files = [record(stage / name) for name in FILES]
    (stage / MANIFEST).write_bytes(sealed(manifest.model_copy(update={"files": files}).model_dump()))
    _sync(stage / MANIFEST)
    _sync(stage)


def _refuse_non_finite(tensors: dict[str, Tensor], step: int) -> None:
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise RunError(f"step {step} is not saved: not finite are {_first(bad)}")


def _publish(stage: Path, path: Path) -> None:
    """Renames the finished folder into place; a damaged one of the same step makes room first."""
    if path.exists():
        _discard(path)
    os.rename(stage, path)
    _sync(path.parent)


def _retain(directory: Path) -> None:
    """Removes all but the newest two and the best.

    The newest is read back and checked first: one verified copy is certain. The others were, when they were the newest;
    that their files have kept their sizes is enough now, since reading gigabytes again at every save would cost more
    than what a second verified copy is worth.
    """
    manifests, _ = list_manifests(directory)
    if len(manifests) <= NUM_KEPT or not is_intact(*manifests[0]):
        return
    intact = [(path, manifest) for path, manifest in manifests if has_all_bytes(path, manifest)]
    kept = [path for path, _ in intact[:NUM_KEPT]]
    if len(kept) < NUM_KEPT:
        return
    measured = [(manifest.metric, path) for path, manifest in intact if manifest.metric is not None]
    if measured:
        kept.append(max(measured)[1])
    for path, _ in manifests:
        if path not in kept:
            _discard(path)


def _discard(path: Path) -> None:
    """Removes a checkpoint: first its name, so that half a folder never bears it."""
    trash = path.with_name(f".trash-{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash)


def _sync(path: Path) -> None:
    """Waits until the file, or the entries of the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free(directory: Path) -> str:
    parent = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    return f"{shutil.disk_usage(parent).free / 1e6:.0f} MB are free in {directory}"


# Loading


def _check(path: Path, manifest: Manifest) -> SavedState:
    """Reads and compares every byte before anything is used."""
    verify(path, manifest)
    try:
        return SavedState.model_validate_json((path / STATE).read_bytes())
    except (OSError, ValidationError) as error:
        raise DamagedError(f"{STATE} is not readable ({type(error).__name__})") from None


def _refuse_other_run(found: Found, state: State) -> None:
    if found.manifest.config_hash != state.config.hash():
        recorded, now = flat(found.state.config), state.config.flat()
        changes = [
            f"{name} {recorded.get(name)!r} != {now[name]!r}"
            for name in now
            if recorded.get(name) != now[name] and not name.startswith(("runtime.", "tracking."))
        ]
        raise UsageError(
            f"{found.path.name} is of another configuration: {_first(changes)}; choose another --output"
        )
    if found.state.total_steps != state.total_steps:
        raise UsageError(
            f"{found.path.name} is of a run of {found.state.total_steps} steps, this one has {state.total_steps}: the "
            "data has changed in size; choose another --output"
        )


def _read_tensors(found: Found, name: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, after names, types and shapes have been compared with what is expected."""
    try:
        with safe_open(found.path / name, "pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dictionary)
            there = {key: _size(part.get_dtype(), part.get_shape()) for key, part in parts.items()}
            wanted = {key: _size(_DTYPES[tensor.dtype], tensor.shape) for key, tensor in expected.items()}
            differing = [
                f"{key} {there.get(key, 'missing')} != {wanted.get(key, 'none')}"
                for key in wanted | there
                if there.get(key) != wanted.get(key)
            ]
            if differing:
                raise UsageError(
                    f"{found.path.name} does not fit: {_first(differing)}; use its run's config.json"
                )
            return {key: file.get_tensor(key) for key in expected}
    except SafetensorError as error:
        raise RunError(f"checkpoint {found.path}: {name} is no safetensors file ({error})") from None


def _copy(weights: dict[str, Tensor], into: dict[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(weights[name])


def _size(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype}[{' '.join(str(length) for length in shape)}]"


def _first(lines: list[str]) -> str:
    return lines[0] + (f" (+{len(lines) - 1} more)" if len(lines) > 1 else "")
