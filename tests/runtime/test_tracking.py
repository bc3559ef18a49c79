"""Tracking against MLflow's real server and SQLite store."""

import base64
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from iwm_ray.config import Config, RuntimeConfig, TrackingConfig
from iwm_ray.errors import UsageError
from iwm_ray.runtime.tracking import (
    LEDGER_NAME,
    NullTracker,
    Tracker,
    check_uri,
    open_tracker,
    read_reports,
    tracking_uri,
    ui_command,
    without_credentials,
)

REPOSITORY = Path(__file__).parents[2]


def make_config(uri: str = "", **runtime: int) -> Config:
    return Config(
        recipe="photos_tiny", tracking=TrackingConfig(uri=uri), runtime=RuntimeConfig.model_validate(runtime)
    )


def write_reports(run: Path, steps: range) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            report = {"step": step, "time": 1.7e9 + step, "train/loss": 1 / (step + 1), "train/lr": 1e-3}
            file.write(json.dumps(report) + "\n")


def quiet(line: str) -> None:
    """Swallows what the tracker says."""


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(database) as connection:
        return connection.execute(query).fetchall()


def steps_of(database: Path, name: str = "train/loss") -> list[object]:
    """Every row of a metric, so that a doubled one shows."""
    return [
        step for (step,) in rows(database, f"select step from metrics where key = '{name}' order by step")
    ]


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, made once: migrations take seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    with Tracker(folder, make_config(f"sqlite:///{folder / 'mlflow.db'}"), "first", say=quiet):
        pass
    with sqlite3.connect(folder / "mlflow.db") as connection:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            connection.execute(f"delete from {table}")
        connection.execute("delete from experiments where name = 'iwm_ray'")
    return folder / "mlflow.db"


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(empty_database, tmp_path / "mlflow.db"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass
class Server:
    """MLflow's server in its own process group."""

    database: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(self.database.parent / "artifacts")]
        environment = os.environ | {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        self.process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._is_up, 60)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _is_up(self) -> bool:
        try:
            return bool(urlopen(f"{self.uri}/health", timeout=1).status == 200)
        except OSError:
            return False


@pytest.fixture
def server(database: Path) -> Iterator[Server]:
    server = Server(database, free_port())
    yield server
    server.kill()


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


# ---- which store ----


def test_uri_comes_from_config_then_environment_then_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(make_config()) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:word@server:5000")
    assert tracking_uri(make_config()) == "http://user:word@server:5000"
    assert tracking_uri(make_config("postgresql+psycopg2://host/base")) == "postgresql+psycopg2://host/base"
    assert tracking_uri(make_config("none")) == "none"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("file:./mlruns", "file stores"),
        ("file:///tmp/mlruns", "file stores"),
        ("./mlruns", "file stores"),
        ("/tmp/mlruns", "file stores"),
        ("ftp://host/x", "unknown scheme"),
        ("sqlite:///:memory:", "outlives the run"),
        ("sqlite://", "outlives the run"),
        ("http://user:canary@host", "MLFLOW_TRACKING_USERNAME"),
    ],
)
def test_unusable_uris_are_refused_in_one_line(uri: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        check_uri(make_config(uri))
    assert "\n" not in str(caught.value)
    assert "tracking.uri" in str(caught.value)
    assert "canary" not in str(caught.value)


def test_environments_file_store_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tmp/x")
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_URI 'file:///tmp/x'"):
        tracking_uri(make_config())


@given(
    user=st.from_regex(r"[a-z]{0,5}", fullmatch=True),
    password=st.from_regex(r"CANARY[\w%:.!$]{0,8}", fullmatch=True),
    scheme=st.sampled_from(["http", "https", "postgresql+psycopg2", "s3"]),
)
@settings(deadline=None, max_examples=30)
def test_credentials_never_show(user: str, password: str, scheme: str) -> None:
    text = f"API request to {scheme}://{user}:{password}@host:5000/api failed; {scheme}://host/x?token={password}"
    shown = without_credentials(text)
    assert "CANARY" not in shown
    assert shown.startswith(f"API request to {scheme}://host:5000/api failed")


def test_ui_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        ui_command(f"sqlite:///{tmp_path}/mlflow.db") == "mlflow ui --backend-store-uri sqlite:///mlflow.db"
    )
    assert (
        ui_command("sqlite:////elsewhere/m.db") == "mlflow ui --backend-store-uri sqlite:////elsewhere/m.db"
    )
    assert ui_command("http://user:word@host:5000") == "http://host:5000"
    assert "word" not in ui_command("postgresql://user:word@host/base")


def test_check_names_a_server_that_is_not_there() -> None:
    warning = check_uri(make_config(f"http://127.0.0.1:{free_port()}"))
    assert warning is not None
    assert "refused" in warning
    assert "\n" not in warning


def test_check_does_not_wait_for_a_silent_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = time.monotonic()
        warning = check_uri(make_config(f"http://127.0.0.1:{listener.getsockname()[1]}"))
    assert warning is not None
    assert "timed out" in warning
    assert time.monotonic() - start < 4


@contextmanager
def guarded_server() -> Iterator[str]:
    """A server that wants user `reader` and password `word`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given_up = self.headers.get("Authorization", "")
            is_right = given_up == "Basic " + base64.b64encode(b"reader:word").decode()
            self.send_response(200 if is_right else 401)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def test_check_sends_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with guarded_server() as host:
        warning = check_uri(make_config(f"http://{host}"))
        assert warning is not None
        assert "401" in warning
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://reader:word@{host}")
        assert check_uri(make_config()) is None
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "word")
        assert check_uri(make_config(f"http://{host}")) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_check_refuses_an_unwritable_database(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="not writable"):
        check_uri(make_config(f"sqlite:///{tmp_path}/locked/mlflow.db"))


# ---- what is sent ----

VALUES = st.one_of(
    st.floats(),
    st.integers(),
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.just(10**400),
)
NAMES = st.sampled_from(["train/loss", "monitor/rankme", "mrr/h@1", "a//b", "../a", "x" * 300])
LINES = st.one_of(
    st.builds(
        lambda step, values: json.dumps({"step": step, "time": 1.5, **values}).encode() + b"\n",
        st.integers(-3, 2**70),
        st.dictionaries(NAMES, VALUES, max_size=5),
    ),
    st.sampled_from(
        [
            b"\n",
            b"{}\n",
            b"[1]\n",
            b"7\n",
            b'{"step": 1, "ti\n',
            b"\xff\xfe\n",
            b'{"step": 1, "time": null}\n',
        ]
    ),
)


def slow_points(content: bytes) -> list[tuple[str, str, int]]:
    """The obvious reading of a whole file."""
    found = []
    for line in content.split(b"\n")[:-1]:
        try:
            report = json.loads(line)
        except ValueError:
            continue
        if (
            not isinstance(report, dict)
            or not isinstance(report.get("time"), float)
            or report["step"] >= 2**63
        ):
            continue
        for name in ("train/loss", "monitor/rankme"):
            value = report.get(name)
            if type(value) is float:
                found.append((name, repr(value if math.isfinite(value) else math.nan), report["step"]))
            if type(value) is int and value < 10**300:
                found.append((name, repr(float(value)), report["step"]))
    return sorted(found)


@given(
    lines=st.lists(LINES, max_size=12),
    cuts=st.lists(st.integers(0, 400), max_size=4),
    limit=st.integers(1, 6),
)
@example(lines=[b'{"step": 0, "time": 1.5, "train/loss": 1.7e308}\n'], cuts=[], limit=1)
@settings(deadline=None, max_examples=60)
def test_a_growing_file_is_read_once_and_whole(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], cuts: list[int], limit: int
) -> None:
    """Whatever the writer's last byte is when we look, every whole line arrives once."""
    content = b"".join(lines)
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    offset, found = 0, []
    for cut in [*sorted(cuts), len(content)]:
        path.write_bytes(content[:cut])
        while (reports := read_reports(path, offset, limit)).end != offset:
            offset = reports.end
            found += [(point.name, repr(point.value), point.step) for point in reports.points]
            assert all(point.time_ms == 1500 for point in reports.points)
    assert offset == len(content)
    assert sorted(found) == slow_points(content)


def test_a_shorter_file_is_read_from_its_start(tmp_path: Path) -> None:
    write_reports(tmp_path, range(3))
    assert len(read_reports(tmp_path / "metrics.jsonl", 10_000).points) == 6
    assert read_reports(tmp_path / "missing.jsonl", 0).points == []


# ---- SQLite ----


def test_everything_arrives_in_sqlite(database: Path, run: Path) -> None:
    write_reports(run, range(20))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "time": 1700000020, "train/loss": NaN, "train/lr": Infinity, "x": null}\n')
        file.write('{"step": 21, "time": 17')
    (run / "sheet.png").write_bytes(b"picture")
    config = make_config(f"sqlite:///{database}")
    with Tracker(run, config, "name", {"team": "a b"}, say=quiet) as tracker:
        tracker.log_picture(run / "sheet.png")
        tracker.log_dataset("photos", "d" * 40, "s3://key:canary@bucket/x", num_samples=12)
        assert tracker.finish(deadline_seconds=60)
    assert steps_of(database) == list(range(21))
    assert rows(database, "select distinct timestamp from metrics where step = 7") == [(1_700_000_007_000,)]
    assert rows(database, "select key, is_nan from metrics where step = 20 order by key") == [
        ("train/loss", 1),
        ("train/lr", 1),
    ]
    assert rows(database, "select count(*) from metrics where key like 'system/%'") > [(3,)]
    params = dict(rows(database, "select key, value from params"))
    assert set(params) == set(config.flat())
    assert params["optimizer.global_batch_size"] == "2048"
    tags = dict(rows(database, "select key, value from tags"))
    assert tags["iwm.config_hash"] == config.hash()
    assert tags["team"] == "a b"
    assert (tags["iwm.recipe"], tags["iwm.seed"]) == ("photos_tiny", "0")
    name, digest, source = rows(database, "select name, digest, dataset_source from datasets")[0]
    assert (name, digest, source) == ("photos", "d" * 36, '{"uri": "s3://bucket/x"}')
    ((status, artifacts),) = rows(database, "select status, artifact_uri from runs")
    assert status == "FINISHED"
    assert str(artifacts).startswith(f"file://{database.parent}/mlartifacts/iwm_ray/")
    assert (
        Path(str(artifacts).removeprefix("file://")) / "pictures" / "sheet.png"
    ).read_bytes() == b"picture"


def test_the_same_command_continues_the_same_run(database: Path, run: Path) -> None:
    """Also with another number of workers, which MLflow's params could not record."""
    write_reports(run, range(5))
    with Tracker(run, make_config(f"sqlite:///{database}"), "name", say=quiet) as first:
        pass
    write_reports(run, range(5, 9))
    with Tracker(run, make_config(f"sqlite:///{database}", num_workers=2), "name", say=quiet) as second:
        wait_for(lambda: steps_of(database) == list(range(9)), 20)
        assert rows(database, "select status from runs") == [("RUNNING",)]
    assert second.run_id == first.run_id
    assert rows(database, "select status from runs") == [("FINISHED",)]


def test_sending_again_makes_no_duplicates(database: Path, run: Path) -> None:
    write_reports(run, range(700))
    config = make_config(f"sqlite:///{database}")
    with Tracker(run, config, "name", say=quiet) as tracker:
        tracker.log_dataset("photos", "digest", "/data")
    ledger = json.loads((run / LEDGER_NAME).read_text())
    ledger["stores"][tracker.uri]["offset"] = 0
    (run / LEDGER_NAME).write_text(json.dumps(ledger))
    with Tracker(run, config, "name", say=quiet) as tracker:
        tracker.log_dataset("photos", "digest", "/data")
    assert steps_of(database) == list(range(700))
    assert rows(database, "select count(*) from inputs where source_type = 'DATASET'") == [(1,)]


def test_a_run_whose_creation_was_never_confirmed_is_found_again(database: Path, run: Path) -> None:
    write_reports(run, range(3))
    config = make_config(f"sqlite:///{database}")
    with Tracker(run, config, "name", say=quiet) as first:
        pass
    ledger = json.loads((run / LEDGER_NAME).read_text())
    ledger["stores"][first.uri] |= {"run_id": "", "offset": 0}
    (run / LEDGER_NAME).write_text(json.dumps(ledger))
    with Tracker(run, config, "name", say=quiet) as second:
        pass
    assert second.run_id == first.run_id
    assert steps_of(database) == list(range(3))


def test_a_store_that_lost_the_run_gets_everything_again(
    database: Path, empty_database: Path, run: Path
) -> None:
    write_reports(run, range(4))
    config = make_config(f"sqlite:///{database}")
    with Tracker(run, config, "name", say=quiet):
        pass
    with sqlite3.connect(database) as connection:
        connection.execute("update runs set lifecycle_stage = 'deleted'")
    with Tracker(run, config, "name", say=quiet):
        pass
    assert steps_of(database) == [0, 0, 1, 1, 2, 2, 3, 3]  # the deleted run's and the new one's
    shutil.copy(empty_database, database)
    with Tracker(run, config, "name", say=quiet):
        pass
    assert steps_of(database) == list(range(4))


def test_an_unreadable_ledger_starts_a_new_run(database: Path, run: Path) -> None:
    write_reports(run, range(2))
    (run / LEDGER_NAME).write_text('{"stores": ')
    said: list[str] = []
    with Tracker(run, make_config(f"sqlite:///{database}"), "name", say=said.append):
        pass
    assert steps_of(database) == [0, 1]
    assert "not readable" in said[0]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_how_the_run_ended_is_recorded(
    database: Path, run: Path, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error), Tracker(run, make_config(f"sqlite:///{database}"), "name", say=quiet):
        raise error
    assert rows(database, "select status from runs") == [(status,)]


def test_a_vanished_file_stops_nothing(database: Path, run: Path) -> None:
    write_reports(run, range(2))
    with Tracker(run, make_config(f"sqlite:///{database}"), "name", say=quiet) as tracker:
        tracker.log_picture(run / "gone.png")
        assert tracker.finish(deadline_seconds=60)
    assert steps_of(database) == [0, 1]


def test_nothing_is_printed(tmp_path: Path) -> None:
    """No migrations, no emoji, no warnings: the terminal belongs to the run."""
    script = (
        "import pathlib, sys\n"
        "from iwm_ray.config import Config\n"
        "from iwm_ray.runtime.tracking import open_tracker\n"
        "run = pathlib.Path('run'); run.mkdir()\n"
        "with open_tracker(run, Config(recipe='photos_tiny'), 'name'): pass\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "run"]
    assert rows(tmp_path / "mlflow.db", "select status from runs") == [("FINISHED",)]


# ---- servers that fail ----


def test_a_killed_server_loses_and_doubles_nothing(database: Path, run: Path, server: Server) -> None:
    """Written before, while and after the server is dead: every metric arrives once, in one MLflow run."""
    said: list[str] = []
    server.start()
    with Tracker(run, make_config(server.uri), "name", say=said.append) as tracker:
        write_reports(run, range(10))
        (run / "sheet.png").write_bytes(b"picture")
        tracker.log_picture(run / "sheet.png")
        wait_for(lambda: steps_of(database) == list(range(10)), 30)
        server.kill()
        write_reports(run, range(10, 600))
        wait_for(lambda: any("takes no metrics" in line for line in said), 30)
        server.start()
        write_reports(run, range(600, 610))
        assert tracker.finish(deadline_seconds=60)
    assert steps_of(database) == list(range(610))
    assert rows(database, "select status from runs") == [("FINISHED",)]
    assert len(list((database.parent / "artifacts").rglob("pictures/sheet.png"))) == 1
    assert len(said) == 2
    assert said[0].startswith(f"{server.uri} takes no metrics (")
    assert "is back" in said[1]


def test_a_server_that_comes_up_after_the_run_gets_it_from_the_next_command(
    database: Path, run: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the credentials of its URI are written nowhere."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri.replace("://", "://user:canary@"))
    said: list[str] = []
    write_reports(run, range(30))
    start = time.monotonic()
    with Tracker(run, make_config(), "name", say=said.append) as tracker:
        tracker.log_dataset("photos", "digest", "/data")
        assert not tracker.finish("FAILED")
    assert time.monotonic() - start < 10
    assert "30 reports, 1 data sets, the status FAILED did not reach http://127.0.0.1" in said[-1]
    server.start()
    with Tracker(run, make_config(), "name", say=said.append) as tracker:
        assert tracker.finish(deadline_seconds=60)
    assert steps_of(database) == list(range(30))
    assert rows(database, "select count(*) from datasets") == [(1,)]
    assert rows(database, "select status from runs") == [("FINISHED",)]
    files = [path for path in run.rglob("*") if path.is_file()]
    assert all(b"canary" not in path.read_bytes() for path in [*files, database])
    assert "canary" not in "".join(said)


def test_a_silent_server_delays_the_end_by_no_more_than_the_deadline(run: Path) -> None:
    write_reports(run, range(5))
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        tracker = Tracker(run, make_config(uri), "name", say=said.append).start()
        time.sleep(0.5)
        start = time.monotonic()
        assert not tracker.finish(deadline_seconds=1.5)
        assert 1.4 < time.monotonic() - start < 6
        # While the server is still silent: its end would be one more thing to say.
        assert "5 reports, the status FINISHED did not reach" in said[-1]


def test_a_locked_database_is_waited_for(database: Path, run: Path) -> None:
    write_reports(run, range(5))
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("begin exclusive")
    with Tracker(run, make_config(f"sqlite:///{database}"), "name", say=quiet) as tracker:
        time.sleep(2)
        connection.execute("rollback")
        assert tracker.finish(deadline_seconds=60)
    assert steps_of(database) == list(range(5))


# ---- no MLflow ----


def test_no_tracking_leaves_no_trace(run: Path) -> None:
    write_reports(run, range(2))
    with open_tracker(run, make_config("none"), "name") as tracker:
        tracker.log_picture(run / "x.png")
        tracker.log_file(run / "x.parquet", "tables")
        tracker.log_dataset("photos", "digest", "/data")
        assert tracker.finish()
    assert type(tracker) is NullTracker
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_both_trackers_have_the_same_calls() -> None:
    own = {name for name in vars(Tracker) if not name.startswith("_")}
    assert own <= set(vars(NullTracker))


def test_a_trial_gets_few_metrics_and_its_axes_as_params(database: Path, run: Path) -> None:
    """Also what a later command, which knows nothing of the sweep, adds to it."""
    config = make_config(f"sqlite:///{database}")
    tags = {"mlflow.parentRunId": "f" * 32, "iwm.axis.depth": "4", "iwm.group": "depth=4"}
    rows_of = [
        {"mrr/mrr": 0.3, "mrr/mrr_low": 0.2, "mrr/pooled_h1": 0.1, "train/momentum": 0.9},
        {"mrr/mean_rank": 9.0},
    ]
    for step, figures in enumerate(rows_of):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "time": 1.7e9} | figures) + "\n")
        with Tracker(run, config, "name", tags if step == 0 else None, say=quiet) as tracker:
            tracker.log_tags({"iwm.health": "ok"})
            tracker.log_experiment_tag("some.view", "{}")
    assert {name for (name,) in rows(database, "select key from latest_metrics")} == {
        "mrr/mrr",
        "mrr/mrr_low",
    }
    found = dict(rows(database, "select key, value from tags"))
    assert (found["iwm.health"], found["iwm.group"]) == ("ok", "depth=4")
    assert found["mlflow.parentRunId"] == "f" * 32
    assert "iwm.axis.depth" not in found
    assert rows(database, "select value from params where key = 'axis.depth'") == [("4",)]
    assert rows(database, "select key, value from experiment_tags") == [("some.view", "{}")]
