"""Where a run computes: the running Ray cluster that RAY_ADDRESS names, or a new one on this machine.

Asking a cluster for more than it has makes Ray wait for ever, so `preflight` compares first, node by node,
and answers in seconds; a run on this machine is refused before Ray is even started.
"""

import atexit
import logging
import math
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from iwm_ray.config import Config
from iwm_ray.errors import RunError, UsageError
from iwm_ray.wording import counted

_CONNECT_SECONDS = 3.0
_NODE_ANSWER_SECONDS = 30.0
_WAIT_POLL_SECONDS = 1.0
_SAY_EVERY_SECONDS = 30.0
_LONGEST_SOCKET_PATH = 107  # bytes, of a Unix domain socket
_SESSION_PATH = "/session_2025-01-01_00-00-00_000000_0000000/sockets/plasma_store.0"

# Read by Ray in this process and handed on to the Train controller and its workers; what the user has set
# stays.
_ENVIRONMENT = {
    # Each report of a worker waits until the controller looks: half a second instead of two.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A worker that does not answer for so long is replaced; Ray's default is ten minutes.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
    # The default from now on; saying so stops a warning in every worker.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

# Each of them lets Ray Data run code that comes inside a data file.
_UNSAFE_SWITCHES = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_WEBDATASET_ALLOW_UNSAFE_DESERIALIZATION",
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    name: str
    cpus: float
    gpus: float = 0
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What a run needs: equal train workers, and CPUs that stay free for the data tasks, one each."""

    num_workers: int
    cpus: float
    """of each worker"""
    gpus: float
    """of each worker"""
    data_cpus: float
    data_label: str = ""
    """`key=value` of the nodes where data tasks may run; empty: all"""

    @classmethod
    def by(cls, config: Config) -> "Asked":
        """What the configuration asks for."""
        runtime = config.runtime
        return cls(
            runtime.num_workers,
            runtime.cpus_per_worker,
            float(runtime.use_gpu),
            runtime.data_cpus,
            runtime.data_label,
        )

    def workers_on(self, node: Node) -> int:
        """How many workers fit on a node."""
        by_cpu = math.floor(node.cpus / self.cpus + 1e-9)
        return min(by_cpu, math.floor(node.gpus / self.gpus + 1e-9)) if self.gpus else by_cpu

    def takes_data(self, node: Node) -> bool:
        """Whether data tasks may run on a node."""
        key, _, value = self.data_label.partition("=")
        return not key or node.labels.get(key) == value

    def bundles(self) -> list[dict[str, float]]:
        """The same, as Ray's autoscaler wants it."""
        worker = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return [worker] * self.num_workers + [{"CPU": 1.0}] * math.ceil(self.data_cpus)


def preflight(config: Config, say: Say = print) -> str:
    """Checks that the run can start where it would run, within ten seconds plus `runtime.wait_resources`.

    A run on this machine is judged without starting Ray; on a running cluster this connects to it.

    Returns:
        One line: what is asked and what is there.

    Raises:
        UsageError: more is asked than there is; or the cluster can't be reached; or pickles would be trusted.
        RunError: the resources did not come within `runtime.wait_resources` seconds.
    """
    refuse_unsafe_switches()
    asked = Asked.by(config)
    if ray.is_initialized() or cluster_address() is not None:
        connect(config)
        present = nodes()
        problem = describe(present, asked)
        if problem and config.runtime.wait_resources:
            _wait(asked, config.runtime.wait_resources, say)
            present = nodes()
        elif problem:
            raise UsageError(problem)
        return f"{_needs(asked)}; the cluster has {_offer(present)}"
    problem = describe_machine(num_cpus(), _num_gpus() if config.runtime.use_gpu else 0, asked)
    if problem:
        raise UsageError(problem)
    return f"{_needs(asked)}; this machine has {num_cpus()}"


def connect(config: Config, debug: bool = False) -> None:
    """Connects this process to Ray; does nothing where it is connected already.

    RAY_ADDRESS names a running cluster (a job that was submitted has it set). Without it a new, private
    cluster is started on this machine; a cluster that happens to run here is never joined. It has no
    dashboard, its files are in a folder of their own that goes when the process ends, and it offers one CPU
    for each CPU of the machine, or more where workers and data tasks together need more: on a small machine
    they take turns.

    Ray replaces the SIGTERM handler of the process: install yours afterwards.

    Args:
        config: what will be asked of the cluster.
        debug: print what the workers print, and keep the folder of a local cluster.

    Raises:
        UsageError: the cluster can't be reached, or wants another token or another Ray version.
    """
    if ray.is_initialized():
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = cluster_address()
    level = logging.INFO if debug else logging.ERROR
    if address is None:
        _start_here(config, debug, level)
        return
    _knock(address)
    try:
        ray.init(address=address, log_to_driver=debug, logging_level=level)
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        if "Authentication" in f"{type(error)} {error.__cause__}":
            fix = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token"
            raise UsageError(f"RAY_ADDRESS {address}: the cluster does not take our token; {fix}") from None
        raise UsageError(
            f"RAY_ADDRESS {address}: {_first_line(error)}; start the cluster or unset it"
        ) from None


def cluster_address() -> str | None:
    """The running cluster that RAY_ADDRESS names; None: there is none, a new one is started on this machine.

    Raises:
        UsageError: the address of another service than Ray's own.
    """
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address in ("", "local"):
        return None
    if "://" in address:
        raise UsageError(
            f"RAY_ADDRESS {address!r}: needs HOST:PORT of a Ray head; from outside a cluster use "
            "`ray job submit --address http://HOST:8265 --working-dir . -- python -m iwm_ray.pretrain ...`"
        )
    return address


def refuse_unsafe_switches() -> None:
    """Raises:
    UsageError: an environment variable is set by which Ray would run code from inside data files.
    """
    for name in _UNSAFE_SWITCHES:
        value = os.environ.get(name, "0")
        if value.lower() not in ("", "0", "false"):
            raise UsageError(f"{name}={value}: would run code from inside data files; unset it")


def nodes() -> list[Node]:
    """The living nodes of the cluster that we are connected to."""
    return [
        Node(
            name=node["NodeManagerHostname"] or node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0),
            gpus=node["Resources"].get("GPU", 0),
            labels=node["Labels"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def num_cpus() -> int:
    """CPUs that this process may use: its affinity and the quota of its container, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder, files in (("", ["cpu.max"]), ("cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"])):
        paths = [Path("/sys/fs/cgroup", folder, file) for file in files]
        if all(path.exists() for path in paths):
            quota, period = " ".join(path.read_text() for path in paths).split()
            if quota not in ("max", "-1"):
                allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(allowed, 1)


# ---- is there enough? ----


def describe(present: Sequence[Node], asked: Asked) -> str | None:
    """What a cluster lacks, in one line with a fix; None where the run fits.

    Each worker needs its CPUs and its GPU on one node. The workers are thought to go first where no data task
    may.
    """
    offer = _offer(present)
    if asked.gpus and not sum(node.gpus for node in present):
        return f"runtime.use_gpu True: the cluster has no GPU ({offer}); set runtime.use_gpu False"
    if asked.data_label and not any(asked.takes_data(node) for node in present):
        found = sorted({f"{key}={value}" for node in present for key, value in node.labels.items()})
        own = [label for label in found if not label.startswith("ray.io/")] or ["none"]
        return f"runtime.data_label {asked.data_label!r}: no node has it; labels there: {', '.join(own[:8])}"
    left = _cpus_left(present, asked)
    if left is not None and sum(left) >= asked.data_cpus:
        return None
    if sum(node.gpus for node in present) < asked.num_workers * asked.gpus:
        needs = (
            f"{asked.num_workers} x {asked.gpus:g} GPU need {counted(asked.num_workers * asked.gpus, 'GPU')}"
        )
        return f"runtime.num_workers {needs}, the cluster has {_offer(present, 'gpus')}; {_FEWER}"
    if sum(node.cpus for node in present) < asked.num_workers * asked.cpus + asked.data_cpus:
        return f"runtime.num_workers {_needs(asked)}, the cluster has {offer}; {_FEWER}"
    if left is None:
        fit = sum(asked.workers_on(node) for node in present)
        bundle = f"{asked.cpus:g} CPU" + (" + 1 GPU" if asked.gpus else "")
        return (
            f"runtime.num_workers {asked.num_workers}: only {fit} of them find {bundle} on one node, "
            f"the cluster has {offer}; lower runtime.num_workers or runtime.cpus_per_worker"
        )
    where = f" on nodes with {asked.data_label}" if asked.data_label else ""
    return (
        f"runtime.data_cpus {asked.data_cpus:g}: {counted(sum(left), 'whole CPU')} left{where} beside "
        f"{counted(asked.num_workers, 'worker')}, the cluster has {offer}; {_FEWER}"
    )


def describe_machine(cpus: int, gpus: int, asked: Asked) -> str | None:
    """What this machine lacks, in one line with a fix; None where the run fits.

    Workers must have their CPUs. Data tasks may take turns with them, so that one CPU is enough for one
    worker.
    """
    if asked.gpus and gpus < asked.num_workers * asked.gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "not set" if visible is None else repr(visible)
        fix = "lower runtime.num_workers" if gpus else "set runtime.use_gpu False"
        needs = counted(asked.num_workers * asked.gpus, "GPU")
        return (
            f"runtime.use_gpu True needs {needs}, this machine has {gpus} visible "
            f"(CUDA_VISIBLE_DEVICES {shown}); {fix}"
        )
    if asked.data_label:
        return f"runtime.data_label {asked.data_label!r}: this machine has no labels; leave it empty"
    needed = asked.num_workers * asked.cpus
    if needed > cpus:
        needs = f"{asked.num_workers} x {asked.cpus:g} CPU need {counted(needed, 'CPU')}"
        return (
            f"runtime.num_workers {needs}, this machine has {cpus}; "
            "lower runtime.num_workers or runtime.cpus_per_worker"
        )
    if asked.data_cpus > cpus:
        return f"runtime.data_cpus {asked.data_cpus:g}: this machine has {counted(cpus, 'CPU')}; lower it"
    return None


_FEWER = "lower runtime.num_workers or add nodes"


def _cpus_left(present: Sequence[Node], asked: Asked) -> list[int] | None:
    """Whole CPUs left on each node that takes data tasks, once the workers are placed; None where they don't
    fit."""
    left = {index: node.cpus for index, node in enumerate(present)}
    room = {index: asked.workers_on(node) for index, node in enumerate(present)}
    if sum(room.values()) < asked.num_workers:
        return None

    def loss(index: int) -> float:
        if not asked.takes_data(present[index]):
            return 0
        return math.floor(left[index] + 1e-9) - math.floor(left[index] - asked.cpus + 1e-9)

    for _ in range(asked.num_workers):
        index = min((index for index in room if room[index]), key=loss)
        room[index] -= 1
        left[index] -= asked.cpus
    return [math.floor(left[index] + 1e-9) for index, node in enumerate(present) if asked.takes_data(node)]


def _needs(asked: Asked) -> str:
    """`4 x 1 CPU + 1 for data need 5 CPUs`"""
    gpus = " + 1 GPU" if asked.gpus else ""
    total = counted(asked.num_workers * asked.cpus + asked.data_cpus, "CPU")
    return f"{asked.num_workers} x {asked.cpus:g} CPU{gpus} + {asked.data_cpus:g} for data need {total}"


def _offer(present: Sequence[Node], what: str = "cpus") -> str:
    """`6 (2 nodes: 4, 2)`, or `26 (7 nodes: 6 x 4, 1 x 2)` where there are many."""
    values = sorted((getattr(node, what) for node in present), reverse=True)
    each = ", ".join(f"{value:g}" for value in values)
    if len(values) > 4:
        each = ", ".join(f"{count} x {value:g}" for value, count in Counter(values).most_common())
    return f"{sum(values):g} ({counted(len(values), 'node')}{': ' if each else ''}{each})"


def _wait(asked: Asked, seconds: float, say: Say) -> None:
    """Asks the autoscaler, then waits until the run fits.

    Raises:
        RunError: it does not in time.
    """
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=asked.bundles())
    start, said = time.monotonic(), -math.inf
    try:
        while problem := describe(nodes(), asked):
            waited = time.monotonic() - start
            if waited > seconds:
                raise RunError(f"{problem} (waited {seconds:g} s, runtime.wait_resources)")
            if waited - said >= _SAY_EVERY_SECONDS:
                said = waited
                say(f"waiting for resources, {waited:.0f} of {seconds:g} s: {problem}")
            time.sleep(min(_WAIT_POLL_SECONDS, seconds))
    finally:
        request_resources(bundles=[])


# ---- does every node see the run directory? ----


def check_shared_directory(folder: Path, setting: str = "--output") -> None:
    """Has every living node with CPUs read what this process wrote into a folder, and write beside it.

    Args:
        folder: the run directory or the cache; it exists, and we are connected.
        setting: what names the folder.

    Raises:
        UsageError: a node does not see the directory, or may not write there, or lacks this package.
        RunError: a node did not answer.
    """
    others = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    token = folder.absolute() / f".token-{uuid.uuid4().hex}"
    token.write_text(token.name)
    try:
        answers = {}
        for node in others:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(look_at).options(num_cpus=0, max_retries=0, scheduling_strategy=here)
            answers[task.remote(str(token))] = node["NodeManagerHostname"] or node["NodeManagerAddress"]
        done, silent = ray.wait(list(answers), num_returns=len(answers), timeout=_NODE_ANSWER_SECONDS)
        for answer in done:
            problem = _ask(answer)
            if problem:
                raise UsageError(f"{setting} {folder}: node {answers[answer]} {problem}")
        if silent:
            raise RunError(f"node {answers[silent[0]]} did not answer within {_NODE_ANSWER_SECONDS:g} s")
    finally:
        token.unlink(missing_ok=True)


def look_at(token: str) -> str:
    """Runs on a node: what is wrong with the run directory there; empty where nothing is."""
    path = Path(token)
    try:
        seen = path.read_text()
    except OSError as error:
        return f"does not see it ({error.strerror}); choose a folder on storage that all nodes share"
    if seen != path.name:
        return "sees another folder of that name; choose a folder on storage that all nodes share"
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".token-"):
            return ""
    except OSError as error:
        return f"may not write there ({error.strerror}); mend its permissions or choose another folder"


def _ask(answer: "ray.ObjectRef[str]") -> str:
    try:
        return str(ray.get(answer))
    except RayError as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
        fix = "install iwm_ray there or use `ray job submit --working-dir .`"
        return f"can't run our code ({reason.strip()}); {fix}"


# ---- connecting ----


def _start_here(config: Config, debug: bool, level: int) -> None:
    asked = Asked.by(config)
    needed = math.ceil(asked.num_workers * asked.cpus + asked.data_cpus)
    ray.init(
        address="local",
        num_cpus=max(num_cpus(), needed),
        num_gpus=None if asked.gpus else 0,
        object_store_memory=_object_store_bytes(config),
        include_dashboard=False,
        log_to_driver=debug,
        logging_level=level,
        _temp_dir=_private_folder(keep=debug),
    )
    token = Path.home() / ".ray" / "auth_token"
    if token.exists() and token.stat().st_uid == os.geteuid():
        token.chmod(0o600)  # Ray writes it for everybody to read


def _object_store_bytes(config: Config) -> int | None:
    """Room for sixteen global batches of two views, half a GiB at least; None, Ray's own bound (30 % of the
    memory, less in a small container), where that would be more than a quarter of the memory."""
    views = 2 * 3 * config.views.image_size**2
    wanted = max(512 * 2**20, 16 * config.optimizer.global_batch_size * views)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return wanted if wanted < memory / 4 else None


def _private_folder(keep: bool) -> str | None:
    """A folder only for this cluster, removed when the process ends; None, Ray's own, where its sockets'
    paths would be too long or the user has chosen one."""
    if "RAY_TMPDIR" in os.environ:
        return None
    folder = tempfile.mkdtemp(prefix="iwm-")
    if len((folder + _SESSION_PATH).encode()) > _LONGEST_SOCKET_PATH:
        os.rmdir(folder)
        return None
    if not keep:
        atexit.register(_close, folder)
    return folder


def _close(folder: str) -> None:
    """At exit: the cluster first, which writes there until its end."""
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def _knock(address: str) -> None:
    """Asks whether anything listens, since Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UsageError(
            f"RAY_ADDRESS {address}: no Ray cluster there ({error.strerror or error}); start it or unset it"
        ) from None


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
