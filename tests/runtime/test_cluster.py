"""What is asked of a cluster and what it has; connecting; a run directory that all nodes see."""

import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_ray.config import Config, OptimizerConfig, RuntimeConfig
from iwm_ray.errors import RunError, UsageError
from iwm_ray.runtime import cluster
from iwm_ray.runtime.cluster import (
    Asked,
    Node,
    check_shared_directory,
    cluster_address,
    describe,
    describe_machine,
    look_at,
    preflight,
    refuse_unsafe_switches,
)

REPOSITORY = Path(__file__).parents[2]
ONE = Asked(num_workers=1, cpus=1, gpus=0, data_cpus=1)


def make_config(**runtime: object) -> Config:
    return Config(
        recipe="photos_tiny",
        optimizer=OptimizerConfig(global_batch_size=64),
        runtime=RuntimeConfig.model_validate(runtime),
    )


def cpu_nodes(*cpus: float) -> list[Node]:
    return [Node(f"node{number}", count) for number, count in enumerate(cpus)]


# ---- enough? ----


@pytest.mark.parametrize(
    ("present", "asked", "expected"),
    [
        (cpu_nodes(2), ONE, None),
        (cpu_nodes(1, 1), ONE, None),
        (
            cpu_nodes(2),
            replace(ONE, num_workers=4),
            "runtime.num_workers 4 x 1 CPU + 1 for data need 5 CPUs, the cluster has 2 (1 node: 2); "
            "lower runtime.num_workers or add nodes",
        ),
        (
            cpu_nodes(4, 3, 3),
            replace(ONE, num_workers=2, cpus=4),
            "runtime.num_workers 2: only 1 of them find 4 CPU on one node, the cluster has 10 "
            "(3 nodes: 4, 3, 3); lower runtime.num_workers or runtime.cpus_per_worker",
        ),
        (
            cpu_nodes(1.5, 1.5),
            replace(ONE, num_workers=2, cpus=1),
            "runtime.data_cpus 1: 0 whole CPUs left beside 2 workers, the cluster has 3 (2 nodes: 1.5, 1.5); "
            "lower runtime.num_workers or add nodes",
        ),
        (
            cpu_nodes(4),
            replace(ONE, gpus=1),
            "runtime.use_gpu True: the cluster has no GPU (4 (1 node: 4)); set runtime.use_gpu False",
        ),
        (
            [Node("a", 8, 2), Node("b", 8, 1)],
            replace(ONE, num_workers=4, gpus=1),
            "runtime.num_workers 4 x 1 GPU need 4 GPUs, the cluster has 3 (2 nodes: 2, 1); "
            "lower runtime.num_workers or add nodes",
        ),
        (
            [Node("a", 1, 2), Node("b", 8, 0)],
            replace(ONE, num_workers=2, gpus=1),
            "runtime.num_workers 2: only 1 of them find 1 CPU + 1 GPU on one node, the cluster has 9 "
            "(2 nodes: 8, 1); lower runtime.num_workers or runtime.cpus_per_worker",
        ),
        (
            [Node("a", 4, 0, {"ray.io/node-id": "x", "pool": "cpu"})],
            replace(ONE, data_label="pool=data"),
            "runtime.data_label 'pool=data': no node has it; labels there: pool=cpu",
        ),
        (
            [Node("a", 4), Node("b", 1, 0, {"pool": "data"})],
            replace(ONE, num_workers=4, data_label="pool=data"),
            None,
        ),
        (
            [Node("a", 3), Node("b", 2, 0, {"pool": "data"})],
            replace(ONE, num_workers=3, data_cpus=3, data_label="pool=data"),
            "runtime.num_workers 3 x 1 CPU + 3 for data need 6 CPUs, the cluster has 5 (2 nodes: 3, 2); "
            "lower runtime.num_workers or add nodes",
        ),
        (
            [Node("a", 8), Node("b", 2, 0, {"pool": "data"})],
            replace(ONE, num_workers=3, data_cpus=3, data_label="pool=data"),
            "runtime.data_cpus 3: 2 whole CPUs left on nodes with pool=data beside 3 workers, "
            "the cluster has 10 (2 nodes: 8, 2); lower runtime.num_workers or add nodes",
        ),
        (
            cpu_nodes(*[4] * 6, 2),
            replace(ONE, num_workers=40),
            "runtime.num_workers 40 x 1 CPU + 1 for data need 41 CPUs, the cluster has 26 "
            "(7 nodes: 6 x 4, 1 x 2); lower runtime.num_workers or add nodes",
        ),
        (
            [],
            ONE,
            "runtime.num_workers 1 x 1 CPU + 1 for data need 2 CPUs, the cluster has 0 (0 nodes); "
            "lower runtime.num_workers or add nodes",
        ),
    ],
)
def test_what_a_cluster_lacks(present: list[Node], asked: Asked, expected: str | None) -> None:
    assert describe(present, asked) == expected


def can_be_placed(present: list[Node], asked: Asked) -> bool:
    """The slow, obvious twin: tries every way to spread the workers."""
    for places in itertools.combinations_with_replacement(range(len(present)), asked.num_workers):
        cpus, gpus = [node.cpus for node in present], [node.gpus for node in present]
        for place in places:
            cpus[place] -= asked.cpus
            gpus[place] -= asked.gpus
        left = sum(math.floor(cpu) for cpu, node in zip(cpus, present, strict=True) if asked.takes_data(node))
        if min([*cpus, *gpus]) >= 0 and left >= asked.data_cpus:
            return True
    return False


@given(
    present=st.lists(
        st.builds(
            Node,
            name=st.just("node"),
            cpus=st.integers(0, 5),
            gpus=st.integers(0, 3),
            labels=st.sampled_from([{}, {"pool": "data"}, {"pool": "other"}]),
        ),
        min_size=1,
        max_size=4,
    ),
    asked=st.builds(
        Asked,
        num_workers=st.integers(1, 4),
        cpus=st.sampled_from([0.5, 1, 2, 3]),
        gpus=st.sampled_from([0, 1]),
        data_cpus=st.sampled_from([0.5, 1, 2, 3]),
        data_label=st.sampled_from(["", "pool=data"]),
    ),
)
@settings(deadline=None, max_examples=300)
def test_a_problem_is_named_exactly_where_there_is_one(present: list[Node], asked: Asked) -> None:
    problem = describe(present, asked)
    assert (problem is None) == can_be_placed(present, asked)
    assert problem is None or ("\n" not in problem and "; " in problem)


@pytest.mark.parametrize(
    ("cpus", "gpus", "asked", "words"),
    [
        (1, 0, ONE, None),
        (2, 0, replace(ONE, num_workers=2), None),
        (2, 0, replace(ONE, num_workers=4, cpus=0.5), None),
        (
            2,
            0,
            replace(ONE, num_workers=3),
            "3 x 1 CPU need 3 CPUs, this machine has 2; lower runtime.num_workers",
        ),
        (2, 0, replace(ONE, data_cpus=3), "runtime.data_cpus 3: this machine has 2 CPUs"),
        (8, 0, replace(ONE, gpus=1), "needs 1 GPU, this machine has 0 visible (CUDA_VISIBLE_DEVICES 'none')"),
        (8, 1, replace(ONE, num_workers=2, gpus=1), "needs 2 GPUs, this machine has 1 visible"),
        (8, 0, replace(ONE, data_label="a=b"), "runtime.data_label 'a=b': this machine has no labels"),
    ],
)
def test_what_this_machine_lacks(
    monkeypatch: pytest.MonkeyPatch, cpus: int, gpus: int, asked: Asked, words: str | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "none")
    problem = describe_machine(cpus, gpus, asked)
    assert problem is None if words is None else (problem is not None and words in problem)


def test_machine_counts_its_cpus() -> None:
    assert 1 <= cluster.num_cpus() <= (os.cpu_count() or 1)


# ---- refusals without a cluster ----


def run_script(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own that knows no cluster."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=inherited | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done


def test_too_many_workers_for_this_machine_are_refused_before_ray_starts() -> None:
    start = time.monotonic()
    done = run_script(
        "import sys, ray\n"
        "from iwm_ray.config import Config, RuntimeConfig\n"
        "from iwm_ray.errors import UsageError\n"
        "from iwm_ray.runtime.cluster import preflight\n"
        "try:\n"
        "    preflight(Config(recipe='x', runtime=RuntimeConfig(num_workers=1024)))\n"
        "except UsageError as error:\n"
        "    print(ray.is_initialized(), 'torch' in sys.modules, error)\n"
    )
    words = "False False runtime.num_workers 1024 x 1 CPU need 1024 CPUs, this machine has "
    assert done.stdout.startswith(words)
    assert done.stderr == ""
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://head:10001"])
def test_addresses_of_other_services_are_refused(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match="ray job submit"):
        cluster_address()


@pytest.mark.parametrize(
    ("value", "address"), [("", None), ("local", None), ("10.0.0.1:6379", "10.0.0.1:6379")]
)
def test_address(monkeypatch: pytest.MonkeyPatch, value: str, address: str | None) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    assert cluster_address() == address


def test_a_cluster_that_is_not_there_is_named_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    start = time.monotonic()
    with pytest.raises(UsageError, match=rf"RAY_ADDRESS 127\.0\.0\.1:{port}: no Ray cluster there"):
        preflight(make_config())
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("name", cluster._UNSAFE_SWITCHES)
def test_switches_that_trust_pickles_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    refuse_unsafe_switches()
    monkeypatch.setenv(name, "0")
    refuse_unsafe_switches()
    monkeypatch.setenv(name, "1")
    with pytest.raises(UsageError, match=f"{name}=1"):
        preflight(make_config())


# ---- on clusters ----


@pytest.mark.ray
def test_preflight_on_a_running_cluster(ray_cluster: str, tmp_path: Path) -> None:
    assert preflight(make_config(num_workers=2)) == (
        "2 x 1 CPU + 1 for data need 3 CPUs; the cluster has 4 (1 node: 4)"
    )
    with pytest.raises(
        UsageError, match=r"4 x 1 CPU \+ 1 for data need 5 CPUs, the cluster has 4 \(1 node: 4\)"
    ):
        preflight(make_config(num_workers=4))
    with pytest.raises(UsageError, match="the cluster has no GPU"):
        preflight(make_config(use_gpu=True))
    check_shared_directory(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_waiting_ends_with_a_run_error(ray_cluster: str) -> None:
    said: list[str] = []
    start = time.monotonic()
    with pytest.raises(RunError, match=r"need 9 CPUs.*\(waited 1.5 s, runtime.wait_resources\)"):
        preflight(make_config(num_workers=8, wait_resources=1.5), said.append)
    assert time.monotonic() - start < 6
    assert len(said) == 1
    assert said[0].startswith("waiting for resources, 0 of 1.5 s: runtime.num_workers 8")


@pytest.mark.ray
def test_a_directory_that_only_the_driver_sees_is_refused(ray_cluster: str, tmp_path: Path) -> None:
    own = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(UsageError, match=r"does not see it .*storage that all nodes share"):
        check_shared_directory(Path(f"/proc/self/fd/{own}"))
    os.close(own)


def test_what_a_node_answers(tmp_path: Path) -> None:
    token = tmp_path / ".token-1"
    assert "does not see it (No such file or directory)" in look_at(str(token))
    token.write_text("other")
    assert "another folder" in look_at(str(token))
    token.write_text(token.name)
    assert look_at(str(token)) == ""
    assert [path.name for path in tmp_path.iterdir()] == [".token-1"]


@pytest.mark.ray
@pytest.mark.parametrize("environment", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 64}])
def test_a_cluster_that_wants_another_token_is_named(ray_cluster: str, environment: dict[str, str]) -> None:
    """Ray tries for twenty seconds, here for two."""
    done = run_script(
        "from iwm_ray.config import Config\n"
        "from iwm_ray.errors import UsageError\n"
        "from iwm_ray.runtime.cluster import connect\n"
        "try:\n"
        "    connect(Config(recipe='x'))\n"
        "except UsageError as error:\n"
        "    print(error)\n",
        RAY_ADDRESS=ray_cluster,
        RAY_NUM_REDIS_GET_RETRIES="2",
        **environment,
    )
    assert done.stdout == (
        f"RAY_ADDRESS {ray_cluster}: the cluster does not take our token; "
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token\n"
    )


@pytest.fixture
def short_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose name is short enough for Ray's sockets."""
    folder = Path("/tmp") / f"iwm{os.getpid()}"
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder)


LOCAL = """
import json, os, pathlib, ray
from iwm_ray.config import Config, OptimizerConfig, RuntimeConfig
from iwm_ray.runtime.cluster import connect, nodes, num_cpus
small = OptimizerConfig(global_batch_size=1)
connect(Config(recipe="x", optimizer=small, runtime=RuntimeConfig(num_workers=1, data_cpus=num_cpus())))
connect(Config(recipe="x"))

@ray.remote
def interval():
    print("noise")
    return os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]

print(json.dumps({
    "CPUs more than the machine": nodes()[0].cpus - num_cpus(),
    "interval": ray.get(interval.remote()),
    "store": ray.cluster_resources()["object_store_memory"],
    "folders": os.listdir(os.environ["TMPDIR"]),
    "token": oct((pathlib.Path.home() / ".ray" / "auth_token").stat().st_mode),
}))
"""


@pytest.mark.ray
def test_a_run_without_address_starts_a_private_cluster(
    ray_cluster: str, short_folder: Path, tmp_path: Path
) -> None:
    """It does not join the one that runs here, leaves nothing behind, and prints nothing."""
    done = run_script(LOCAL, TMPDIR=str(short_folder), HOME=str(tmp_path))
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert found["CPUs more than the machine"] == 1
    assert found["interval"] == "0.5"
    assert 100e6 < found["store"] < 600e6
    assert found["token"] == "0o100600"
    assert len(found["folders"]) == 1
    assert list(short_folder.iterdir()) == []


def test_long_temporary_folders_are_left_to_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60)
    deep.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    assert cluster._private_folder(keep=True) is None
    assert list(deep.iterdir()) == []


MANY_NODES = """
import json, os, sys, threading, ray
from pathlib import Path
from ray.cluster_utils import Cluster
from iwm_ray.config import Config, OptimizerConfig, RuntimeConfig
from iwm_ray.errors import UsageError
from iwm_ray.runtime.cluster import check_shared_directory, nodes, preflight

def config(**runtime):
    batch = OptimizerConfig(global_batch_size=64)
    return Config(recipe="x", optimizer=batch, runtime=RuntimeConfig(**runtime))

def answer(**runtime):
    try:
        return preflight(config(**runtime), lambda line: None)
    except UsageError as error:
        return str(error)

small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
cluster.add_node(num_cpus=2, labels={"pool": "data"}, object_store_memory=80 * 2**20)
cluster.add_node(num_cpus=1, num_gpus=2, object_store_memory=80 * 2**20)
cluster.wait_for_nodes()
os.environ["RAY_ADDRESS"] = cluster.address
found = {
    "fits": answer(num_workers=1, use_gpu=True, data_label="pool=data"),
    "no room for the second worker's CPU": answer(num_workers=2, use_gpu=True),
    "label": answer(data_label="pool=none"),
    "nodes": sorted([node.cpus, node.gpus, node.labels.get("pool")] for node in nodes()),
}
folder = Path(sys.argv[1])
check_shared_directory(folder)
found["left in the folder"] = [path.name for path in folder.iterdir()]
answers = []
waiting = threading.Thread(target=lambda: answers.append(answer(num_workers=4, wait_resources=60)))
waiting.start()
cluster.add_node(num_cpus=3, object_store_memory=80 * 2**20)
waiting.join()
found["came while waiting"] = answers[0]
print(json.dumps(found))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.ray
def test_a_cluster_of_several_nodes(tmp_path: Path) -> None:
    found = json.loads(run_script(MANY_NODES, str(tmp_path)).stdout)
    assert found["nodes"] == [[0, 0, None], [1, 2, None], [2, 0, "data"]]
    assert found["fits"] == "1 x 1 CPU + 1 GPU + 1 for data need 2 CPUs; the cluster has 3 (3 nodes: 2, 1, 0)"
    assert found["no room for the second worker's CPU"].startswith(
        "runtime.num_workers 2: only 1 of them find 1 CPU + 1 GPU on one node"
    )
    assert found["label"] == "runtime.data_label 'pool=none': no node has it; labels there: pool=data"
    assert found["left in the folder"] == []
    assert found["came while waiting"].startswith("4 x 1 CPU + 1 for data need 5 CPUs; the cluster has 6")
