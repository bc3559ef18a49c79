"""`python -m iwm_ray.doctor`: looks at versions, devices, storage, Ray and tracking, and says what is wrong and the fix.

It takes the command line of `pretrain`, and so judges the place where that run would compute; it starts no run.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from iwm_ray import cli
from iwm_ray.cli import Command
from iwm_ray.errors import RunError, UsageError

_GIB = 2**30
_LITTLE_DISK = 5 * _GIB
_LITTLE_SHARED_MEMORY = 2 * _GIB
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
_DESCRIPTION = "Look at versions, devices, storage, Ray and tracking, and say what is wrong and the fix."


class Finding(NamedTuple):
    """What one look at the machine or the cluster gave."""

    state: Literal["ok", "warning", "wrong"]
    about: str
    what: str
    """one line; of what is not ok, with the fix"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code: 0 where nothing is wrong, else 1."""
    sys.exit(cli.run_command(_main, sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> None:
    command, _ = cli.parse_pretrain(arguments, "doctor", _DESCRIPTION)
    states = []
    for look in (libraries, devices, storage, ray, tracking):
        for finding in _found(look, command):
            states.append(finding.state)
            print(f"{finding.state:8} {finding.about:12} {finding.what}", flush=True)
    if "wrong" in states:
        raise RunError(f"{states.count('wrong')} of {len(states)} are wrong; mend them from the top")


def _found(look: Callable[[Command], Iterator[Finding]], command: Command) -> Iterator[Finding]:
    """What a look gives, also where what it looks with is missing itself."""
    try:
        yield from look(command)
    except ImportError as error:
        yield Finding("wrong", look.__name__, f"{error}; install what is missing")


def libraries(command: Command) -> Iterator[Finding]:
    """Whether each requirement of this package is installed in a version that it allows."""
    try:
        needed = [Requirement(line) for line in requires("iwm_ray") or []]
    except PackageNotFoundError:
        yield Finding(
            "warning", "iwm_ray", "runs from its folder, not installed: its requirements are not known"
        )
        return
    found = []
    for requirement in needed:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            yield Finding("wrong", requirement.name, f"missing; pip install '{requirement}'")
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement.name} {installed}")
        else:
            yield Finding("wrong", requirement.name, f"{installed} is installed; pip install '{requirement}'")
    yield Finding("ok", "libraries", ", ".join(found))
    yield from _torchvision()


def _torchvision() -> Iterator[Finding]:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        yield Finding("wrong", "torchvision", f"{reason}; install it together with torch, from one index")


def devices(command: Command) -> Iterator[Finding]:
    """Processors and memory of this machine, and its GPUs where torch sees them."""
    import torch

    from iwm_ray.runtime.cluster import num_cpus

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("ok", "machine", f"{num_cpus()} CPUs, {memory / _GIB:.0f} GiB of memory")
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield Finding(
            "ok", "GPU", f"{gpu.name}, {gpu.total_memory / _GIB:.0f} GiB, CUDA {torch.version.cuda}"
        )
    if Path("/proc/driver/nvidia").exists() and not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
        fix = "install a torch for this driver, or set CUDA_VISIBLE_DEVICES"
        yield Finding(
            "warning", "GPU", f"the driver is there, but torch (built for {built}) sees none; {fix}"
        )


def storage(command: Command) -> Iterator[Finding]:
    """Whether the run directory and the cache can be written, with room; and the memory that processes share."""
    for setting, folder in _folders(command).items():
        there = _existing(folder)
        free = shutil.disk_usage(there).free
        room = f"{setting} {folder}: {free / _GIB:.0f} GiB free"
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            yield Finding("wrong", "storage", f"{setting} {folder}: {error.strerror}; choose another folder")
            continue
        little = free < _LITTLE_DISK
        yield Finding("warning" if little else "ok", "storage", room + "; make more room" * little)
    if _SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(_SHARED_MEMORY).total
        little = size < _LITTLE_SHARED_MEMORY
        fix = "; images then go by way of the disk: give the container more (docker run --shm-size)"
        room = f"{_SHARED_MEMORY}: {size / _GIB:.1f} GiB"
        yield Finding("warning" if little else "ok", "storage", room + fix * little)


def ray(command: Command) -> Iterator[Finding]:
    """Whether the cluster (or a new one here) starts, has what is asked for, and runs our code on every node."""
    from iwm_ray.runtime import cluster

    if command.config.runtime.engine == "local":
        return
    address = cluster.cluster_address()
    try:
        offer = cluster.preflight(command.config)
        cluster.connect(command.config)
        for setting, folder in _folders(command).items():
            cluster.check_shared_directory(_existing(folder), setting)
    except (UsageError, RunError, OSError) as error:
        yield Finding("wrong", "Ray", str(error))
        return
    yield Finding("ok", "Ray", f"{address or 'a new cluster here'}: {offer}; every node runs our code")


def tracking(command: Command) -> Iterator[Finding]:
    """Whether the MLflow store takes what we send."""
    from iwm_ray.runtime.tracking import check_uri, tracking_uri, without_credentials

    try:
        problem, uri = check_uri(command.config), tracking_uri(command.config)
    except UsageError as error:
        yield Finding("wrong", "tracking", str(error))
        return
    yield Finding("warning" if problem else "ok", "tracking", problem or without_credentials(uri))


def _folders(command: Command) -> dict[str, Path]:
    """What a run writes to, by the setting."""
    cache = Path(command.config.runtime.cache).expanduser()
    return {"--output": command.output or Path("runs"), "runtime.cache": cache}


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


if __name__ == "__main__":
    main()
