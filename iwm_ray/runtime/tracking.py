"""MLflow beside the run, never in its way.

Rank 0 of the training appends `RUN/metrics.jsonl`; that file is the record, and nothing here is on the step's
path. A thread of the driver process reads the file from a mark and sends what is new. `RUN/tracking.json`
remembers, for each store, the MLflow run, the mark and the files still to upload, so that a dead, slow or
restarted server loses nothing: the same command later continues the same MLflow run. Sending something twice
is harmless, because MLflow keeps one row for the same (key, step, timestamp, value), so the mark only ever
has to be old enough.
"""

import base64
import importlib.util
import json
import logging
import math
import os
import posixpath
import re
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

from pydantic import BaseModel, ConfigDict, ValidationError

from iwm_ray.config import Config
from iwm_ray.errors import UsageError
from iwm_ray.run_directory import RunDirectory

LEDGER_NAME = "tracking.json"

_SERVERS = ("http", "https", "databricks")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_ALLOWED = "sqlite:///mlflow.db, http(s)://HOST:PORT, a postgresql or mysql URI, or none"

_METRICS_PER_REQUEST = 1000  # MLflow's limits
_PARAMS_PER_REQUEST = 100
_TAG_CHARACTERS = 8000
_GROUP = "iwm.group"
_AXIS = "iwm.axis."
# A sweep's runs are compared in one table, which slows with every column and hides what matters. What a trial's run
# leaves out stands in its metrics.jsonl and in its Parquet artifacts.
_OF_ONE_RUN = re.compile(
    r"system/.*|mrr/pooled_.*|mrr/mean_rank.*|mrr/h\d+_(low|high)|monitor/(seconds|knn_chance)"
    r"|train/(?!loss$|lr$|samples_per_second$).*"
)
_POLL_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 15.0
_SYSTEM_METRICS_SECONDS = 10.0
_PROBE_SECONDS = 3.0
_ADDING_SECONDS = 60.0  # to a run that has ended: no training waits
_METRIC_NAME = re.compile(r"[\w\-. :/]{1,250}")

# What MLflow reads from the environment of this process; what the user has set stays. One try of ten seconds:
# our thread tries again by itself, while MLflow's own tries, two minutes each, would block it for many
# minutes.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}

Say = Callable[[str], None]


def say_on_stderr(line: str) -> None:
    """Prints one line about tracking for the user."""
    print(f"tracking: {line}", file=sys.stderr, flush=True)


# ---- which store ----


def tracking_uri(config: Config) -> str:
    """The MLflow store of this run: `tracking.uri`, else MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db`.

    Returns:
        `none`, or a URI; the path of a SQLite file is made absolute.

    Raises:
        UsageError: a file store or an unknown scheme, or credentials in the configuration, which is recorded.
    """
    setting, uri = "tracking.uri", config.tracking.uri
    if not uri:
        setting, uri = "MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        setting, uri = "tracking.uri", "sqlite:///mlflow.db"
    if uri == "none":
        return uri
    shown = without_credentials(uri)
    scheme = "databricks" if uri == "databricks" else uri.partition("://")[0].partition("+")[0]
    if scheme not in _SERVERS + _DATABASES:
        kind = "file stores lose metrics and are refused" if scheme in ("file", uri) else "unknown scheme"
        raise UsageError(f"{setting} {shown!r}: {kind}; use {_ALLOWED}")
    if setting == "tracking.uri" and shown != uri:
        raise UsageError(
            f"tracking.uri {shown!r}: holds credentials, and the configuration is recorded; put them into "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole URI into MLFLOW_TRACKING_URI"
        )
    return _absolute_sqlite(setting, uri) if scheme == "sqlite" else uri


def without_credentials(text: str) -> str:
    """The text with `user:password@` and secret query values of every URI in it taken out."""
    text = re.sub(r"(?<=://)[^/@\s]*@", "", text)
    return re.sub(r"(?i)([?&][\w-]*(?:password|passwd|token|secret|key)[\w-]*=)[^&\s]*", r"\1***", text)


def check_uri(config: Config) -> str | None:
    """Looks whether the store can be used, within about three seconds, without loading MLflow.

    Returns:
        None, or one line that warns the user: the run goes on and its metrics wait in `RUN/metrics.jsonl`.

    Raises:
        UsageError: see `tracking_uri`; and a SQLite file that can't be written.
    """
    uri = tracking_uri(config)
    if uri.startswith("sqlite"):
        file = _sqlite_file(uri)
        folder = next(parent for parent in file.parents if parent.exists())
        if not os.access(file if file.exists() else folder, os.W_OK):
            raise UsageError(f"tracking.uri {uri}: not writable; choose another tracking.uri, or none")
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and file.is_relative_to(Path.cwd()):
            return f"tracking.uri {uri} lies in the submitted job's own folder, which Ray removes; give one that stays"
    if not uri.startswith("http"):
        return None
    problem = _probe(uri)
    if problem is None:
        return None
    return f"{without_credentials(uri)} {problem}; metrics wait in RUN/metrics.jsonl until it answers"


def open_store(config: Config) -> tuple[Any, str]:
    """An MLflow client that reads the configuration's store, and the store's URI as it may be shown.

    Raises:
        UsageError: see `tracking_uri`; and a store that is not there: reading creates none.
    """
    uri = tracking_uri(config)
    shown = without_credentials(uri)
    if uri == "none" or (uri.startswith("sqlite") and not _sqlite_file(uri).is_file()):
        raise UsageError(f"tracking.uri {shown}: there is nothing to read; give the store that has the runs")
    load_mlflow(uri)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    try:
        client.search_experiments(max_results=1)
    except failures() as failure:
        raise UsageError(f"tracking.uri {shown}: does not answer ({reason(failure)})") from None
    return client, shown


def ui_command(uri: str) -> str:
    """The line that opens the MLflow UI of a store: a command, or the address of a server."""
    shown = without_credentials(uri)
    if uri.startswith(_SERVERS):
        return shown
    if shown != uri:
        return 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    if uri.startswith("sqlite"):
        file = _sqlite_file(uri)
        if file.is_relative_to(Path.cwd()):
            shown = f"sqlite:///{file.relative_to(Path.cwd())}"
    return f"mlflow ui --backend-store-uri {shown}"


def _absolute_sqlite(setting: str, uri: str) -> str:
    path, question, options = uri.removeprefix("sqlite:///").partition("?")
    if not uri.startswith("sqlite:///") or path in ("", ":memory:"):
        raise UsageError(f"{setting} {uri!r}: needs a file that outlives the run; use sqlite:///mlflow.db")
    return f"sqlite:///{Path(path).absolute()}{question}{options}"


def _sqlite_file(uri: str) -> Path:
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))


def _probe(uri: str) -> str | None:
    """What is wrong with an MLflow server, or None."""
    parts = urlsplit(uri)
    user = parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = parts.password or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN", "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if user and password:
        pair = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
        headers = {"Authorization": f"Basic {pair}"}
    address = f"{without_credentials(uri).rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        with urlopen(Request(address, headers=headers), timeout=_PROBE_SECONDS):  # noqa: S310 (http or https)
            return None
    except HTTPError as error:
        if error.code in (401, 403):
            return f"refuses us ({error.code}): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return f"answers {error.code}: is that an MLflow server?"
    except (OSError, ValueError) as error:
        return f"does not answer ({reason(error)})"


# ---- what is to be sent ----


class Point(NamedTuple):
    """One value of one metric."""

    name: str
    value: float
    step: int
    time_ms: int


@dataclass(frozen=True)
class Reports:
    """The metrics of some whole lines of `RUN/metrics.jsonl`."""

    points: list[Point]
    end: int
    """byte offset behind the last line read"""


def read_reports(path: Path, offset: int, limit: int = _METRICS_PER_REQUEST) -> Reports:
    """Reads whole lines from a byte offset until they hold `limit` metrics; a line still being written waits.

    A line that is no report is passed over. A value that is no number is left out; infinity is sent as NaN,
    because MLflow would store it as 1.8e308 and no picture of the curve would show anything else.
    """
    points: list[Point] = []
    if not path.exists():
        return Reports(points, 0)
    with path.open("rb") as file:
        is_marked_file = offset <= file.seek(0, os.SEEK_END)
        offset = offset if is_marked_file else 0  # sending twice is harmless
        file.seek(offset)
        for line in file:
            found = list(_points(line))
            if not line.endswith(b"\n") or (points and len(points) + len(found) > limit):
                break
            points += found
            offset += len(line)
    return Reports(points, offset)


def _points(line: bytes) -> Iterator[Point]:
    try:
        report = json.loads(line)
        step, time_ms = int(report.pop("step")), round(report.pop("time") * 1000)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return
    if max(abs(step), abs(time_ms)) >= 2**63:
        return
    for name, value in report.items():
        is_whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023
        if (is_whole or isinstance(value, float)) and _is_metric_name(name):
            yield Point(name, float(value) if math.isfinite(value) else math.nan, step, time_ms)


def _is_metric_name(name: str) -> bool:
    """Whether MLflow takes the name; one bad name would have it refuse the whole request, again and again."""
    is_path = posixpath.normpath(name) == name and not name.startswith(("/", ".."))
    return is_path and name != "." and _METRIC_NAME.fullmatch(name) is not None


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _File(_Part):
    path: str
    folder: str


class _Dataset(_Part):
    name: str
    digest: str
    source: str
    context: str
    num_samples: int


class _Tag(_Part):
    name: str
    value: str


class _Record(_Part):
    """What one store has and what it still has to get."""

    key: str
    """tag by which an MLflow run is found whose id we were never told"""
    started_ms: int
    run_id: str = ""
    offset: int = 0
    files: tuple[_File, ...] = ()
    datasets: tuple[_Dataset, ...] = ()
    tags: tuple[_Tag, ...] = ()
    experiment_tags: tuple[_Tag, ...] = ()
    status: str = ""
    """how the run ended, until the store knows"""
    is_trial: bool = False
    """whether it gets those metrics alone by which trials are compared"""


class _Stores(_Part):
    stores: dict[str, _Record] = {}


class _Ledger:
    """`RUN/tracking.json`; two threads may use it."""

    def __init__(self, path: Path, store: str, say: Say) -> None:
        self._path, self._store, self._say = path, store, say
        self._lock = threading.RLock()
        self._stores = self._read()
        fresh = _Record(key=uuid.uuid4().hex, started_ms=_now_ms())
        self.record = self._stores.get(store, fresh)

    def change(self, **values: Any) -> None:
        """Changes fields of the record, durably."""
        with self._lock:
            self.record = self.record.model_copy(update=values)
            self._write()

    def add(self, field: str, item: _Part) -> None:
        """Puts an item on one of the record's lists."""
        with self._lock:
            kept = tuple(other for other in getattr(self.record, field) if other != item)
            self.change(**{field: (*kept, item)})

    def remove(self, field: str, item: _Part) -> None:
        """Takes an item off a list."""
        with self._lock:
            self.change(**{field: tuple(other for other in getattr(self.record, field) if other != item)})

    def forget_run(self) -> None:
        """Begins anew in a store that no longer has the run: everything will be sent again."""
        self.change(run_id="", offset=0, key=uuid.uuid4().hex)

    def _read(self) -> dict[str, _Record]:
        try:
            return _Stores.model_validate_json(self._path.read_bytes()).stores
        except FileNotFoundError:
            return {}
        except ValidationError:
            self._say(f"{self._path} is not readable; all metrics go to a new MLflow run")
            return {}

    def _write(self) -> None:
        """Replaces the file; on a full disk the memory of this process is all there is, and enough."""
        stores = _Stores(stores={**self._stores, self._store: self.record})
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            with partial.open("w") as file:
                file.write(stores.model_dump_json(indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
        except OSError as error:
            self._say(f"{self._path} can't be written ({error.strerror}); metrics may be sent again")


# ---- the MLflow side: everything here runs in the thread ----


class _SystemMetrics:
    """CPU, memory, disk, network and GPUs of the driver's machine, every ten seconds.

    MLflow's own SystemMetricsMonitor thread gives up for ever at the first failed request and blocks when
    told to finish, so only its readings are used. About an hour of them waits in memory for a dead server.
    """

    def __init__(self, uri: str, started_ms: int) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.points: deque[Point] = deque(maxlen=int(3600 / _SYSTEM_METRICS_SECONDS) * 16)
        self._monitor = SystemMetricsMonitor(run_id="", tracking_uri=uri)
        self._started_ms = started_ms
        self._next = time.monotonic()

    def read(self) -> None:
        """Takes a reading where one is due. Its step is the seconds since the run first began."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _SYSTEM_METRICS_SECONDS
        self._monitor.collect_metrics()
        now = _now_ms()
        step = (now - self._started_ms) // 1000
        for name, value in self._monitor.aggregate_metrics().items():
            self.points.append(Point(f"system/{name}", float(value), step, now))
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()


class _Sender:
    """Brings one MLflow run up to date with the run directory."""

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        uri: str,
        name: str,
        tags: dict[str, str],
        params: dict[str, Any],
        ledger: _Ledger,
    ) -> None:
        self._run, self._config, self._uri = run, config, uri
        self._name, self._tags, self._params, self._ledger = name, tags, params, ledger
        self._client: Any = None
        self._is_open = False
        self._system: _SystemMetrics | None = None

    def send(self, given_up: threading.Event) -> None:
        """Sends everything there is. Any failure leaves the rest for the next call."""
        from mlflow.tracking import MlflowClient

        status = self._ledger.record.status
        self._client = self._client or MlflowClient(tracking_uri=self._uri)
        if not self._is_open:
            self._open_run()
        run_id = self._ledger.record.run_id
        self._send_reports(run_id, given_up)
        if not self._ledger.record.is_trial:
            self._send_system_metrics(run_id)
        for dataset in self._ledger.record.datasets:
            self._send_dataset(run_id, dataset)
        for tag in self._ledger.record.tags:
            self._client.set_tag(run_id, tag.name, tag.value)
            self._ledger.remove("tags", tag)
        for tag in self._ledger.record.experiment_tags:
            self._client.set_experiment_tag(self._experiment(), tag.name, tag.value)
            self._ledger.remove("experiment_tags", tag)
        for file in self._ledger.record.files:
            if Path(file.path).exists():
                self._client.log_artifact(run_id, file.path, file.folder)
            self._ledger.remove("files", file)
        if status and not given_up.is_set():
            self._client.set_terminated(run_id, status)
            self._ledger.change(status="")

    def look_again(self) -> None:
        """After a failure: the run may have been deleted, or the server may have lost it."""
        self._is_open = False

    def _open_run(self) -> None:
        from mlflow.entities import LifecycleStage
        from mlflow.exceptions import MlflowException

        run = None
        if self._ledger.record.run_id:
            try:
                run = self._client.get_run(self._ledger.record.run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            if run is None or run.info.lifecycle_stage != LifecycleStage.ACTIVE:
                run = None
                self._ledger.forget_run()
        run = run or self._find_or_create_run()
        self._ledger.change(run_id=run.info.run_id)
        if run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._describe(run)
        self._is_open = True

    def _find_or_create_run(self) -> Any:
        experiment = self._experiment()
        key = self._ledger.record.key
        # A create that timed out may have been carried out all the same.
        found = self._client.search_runs([experiment], f"tags.`iwm.key` = '{key}'", max_results=1)
        if found:
            return found[0]
        return self._client.create_run(
            experiment, start_time=self._ledger.record.started_ms, tags={"iwm.key": key}, run_name=self._name
        )

    def _experiment(self) -> str:
        name = self._config.tracking.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = None
        if self._uri.startswith("sqlite"):  # beside the database, wherever the command is given
            location = (_sqlite_file(self._uri).parent / "mlartifacts" / quote(name, safe="")).as_uri()
        return str(self._client.create_experiment(name, artifact_location=location))

    def _describe(self, run: Any) -> None:
        """Params and tags. MLflow never changes a param: a run resumed with more workers keeps its first
        value."""
        from mlflow.entities import Param, RunTag
        from mlflow.tracking.context.registry import resolve_tags

        flat = {name: without_credentials(str(value)) for name, value in self._params.items()}
        # Parallel coordinates and scatters take params, no tags.
        flat |= {name.removeprefix("iwm."): value for name, value in self._tags.items() if _AXIS in name}
        params = [Param(name, value) for name, value in flat.items() if name not in run.data.params]
        for first in range(0, len(params), _PARAMS_PER_REQUEST):
            self._client.log_batch(run.info.run_id, params=params[first : first + _PARAMS_PER_REQUEST])
        tags = resolve_tags() | {
            "iwm.config_hash": self._config.hash(),
            "iwm.recipe": self._config.recipe,
            "iwm.seed": str(self._config.seed),
        }
        tags |= {name: without_credentials(value) for name, value in self._tags.items() if _AXIS not in name}
        self._client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def _send_reports(self, run_id: str, given_up: threading.Event) -> None:
        while not given_up.is_set():
            offset = self._ledger.record.offset
            reports = read_reports(self._run.metrics, offset)
            if reports.end == offset:
                return
            is_trial = self._ledger.record.is_trial
            self._send_points(
                run_id,
                [each for each in reports.points if not (is_trial and _OF_ONE_RUN.fullmatch(each.name))],
            )
            self._ledger.change(offset=reports.end)

    def _send_system_metrics(self, run_id: str) -> None:
        if self._system is None:
            self._system = _SystemMetrics(self._uri, self._ledger.record.started_ms)
        self._system.read()
        points = list(self._system.points)
        self._send_points(run_id, points)
        for _ in points:
            self._system.points.popleft()

    def _send_points(self, run_id: str, points: list[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(point.name, point.value, point.time_ms, point.step) for point in points]
        for first in range(0, len(metrics), _METRICS_PER_REQUEST):
            self._client.log_batch(run_id, metrics=metrics[first : first + _METRICS_PER_REQUEST])

    def _send_dataset(self, run_id: str, dataset: _Dataset) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        scheme = urlsplit(dataset.source).scheme
        entity = Dataset(
            name=dataset.name[:500],
            digest=dataset.digest[:36],
            source_type=scheme or "local",
            source=json.dumps({"uri": without_credentials(dataset.source)}),
            profile=json.dumps({"num_samples": dataset.num_samples}),
        )
        tag = InputTag("mlflow.data.context", dataset.context)
        self._client.log_inputs(run_id, [DatasetInput(entity, [tag])])
        self._ledger.remove("datasets", dataset)


# ---- what the runtime uses ----


class NullTracker:
    """No MLflow: accepts the same calls and does nothing."""

    uri = "none"

    @property
    def run_id(self) -> str:
        """The MLflow run: there is none."""
        return ""

    def start(self) -> Self:
        """Does nothing."""
        return self

    def log_picture(self, path: Path) -> None:
        """Does nothing."""

    def log_file(self, path: Path, folder: str) -> None:
        """Does nothing."""

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Does nothing."""

    def log_experiment_tag(self, name: str, value: str) -> None:
        """Does nothing."""

    def log_dataset(
        self, name: str, digest: str, source: str, context: str = "training", num_samples: int = 0
    ) -> None:
        """Does nothing."""

    def finish(self, status: str = "FINISHED", deadline_seconds: float = 10.0) -> bool:
        """Nothing is left to send."""
        return True

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")


class Tracker(NullTracker):
    """Keeps an MLflow run up to date with a run directory, from a thread of the driver process.

    No call but `finish` waits for the store, and `finish` waits no longer than its deadline.

    Args:
        run_dir: the run directory; it exists.
        config: gives the params, the experiment and the store.
        run_name: shown in MLflow's list of runs.
        tags: more tags for the MLflow run. `mlflow.parentRunId` makes it a child; `iwm.group` a trial of a sweep,
            which gets fewer metrics; `iwm.axis.NAME` becomes the param `axis.NAME`.
        params: of the MLflow run; None: those of `config`.
        say: receives one line when the store goes, comes back, or has not got everything at the end.

    Raises:
        UsageError: see `tracking_uri`.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        run_name: str,
        tags: dict[str, str] | None = None,
        params: dict[str, Any] | None = None,
        say: Say = say_on_stderr,
    ) -> None:
        run = RunDirectory(run_dir.absolute())
        self.uri = tracking_uri(config)
        self._shown, self._metrics, self._say = without_credentials(self.uri), run.metrics, say
        self._ledger = _Ledger(run.path / LEDGER_NAME, self._shown, say)
        self._is_trial = self._ledger.record.is_trial or _GROUP in (tags or {})
        params = config.flat() if params is None else params
        self._sender = _Sender(run, config, self.uri, run_name, tags or {}, params, self._ledger)
        self._closing, self._given_up = threading.Event(), threading.Event()
        self._is_down = False
        self._thread = threading.Thread(target=self._keep_sending, name="tracking", daemon=True)

    @property
    def run_id(self) -> str:
        """The MLflow run; empty until the store has answered."""
        return self._ledger.record.run_id

    def start(self) -> Self:
        """Starts the thread; loads MLflow (about a second)."""
        load_mlflow(self.uri)
        self._ledger.change(status="", is_trial=self._is_trial)
        self._thread.start()
        return self

    def log_picture(self, path: Path) -> None:
        """Uploads a picture to the artifact folder `pictures`, soon."""
        self.log_file(path, "pictures")

    def log_file(self, path: Path, folder: str) -> None:
        """Uploads a file to an artifact folder, soon; it must stay where it is."""
        self._ledger.add("files", _File(path=str(path.absolute()), folder=folder))

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags that were not known when the run began, soon; a value is cut at MLflow's 8000 characters."""
        for name, value in tags.items():
            self._ledger.add("tags", _Tag(name=name, value=without_credentials(value)[:_TAG_CHARACTERS]))

    def log_experiment_tag(self, name: str, value: str) -> None:
        """Sets a tag of the whole experiment, soon."""
        self._ledger.add("experiment_tags", _Tag(name=name, value=value))

    def log_dataset(
        self, name: str, digest: str, source: str, context: str = "training", num_samples: int = 0
    ) -> None:
        """Names a data set as an input of the run.

        Args:
            name: what the user calls it, at most 500 characters.
            digest: fingerprint of its contents; MLflow keeps 36 characters.
            source: path or URI.
            context: training or evaluation.
            num_samples: images in it.
        """
        item = _Dataset(name=name, digest=digest, source=source, context=context, num_samples=num_samples)
        self._ledger.add("datasets", item)

    def finish(self, status: str = "FINISHED", deadline_seconds: float = 10.0) -> bool:
        """Sends the rest and closes the MLflow run. What does not arrive in time waits for the next command.

        Args:
            status: FINISHED, FAILED or KILLED.
            deadline_seconds: the longest wait.

        Returns:
            Whether everything has arrived.
        """
        if self._closing.is_set():
            return not self._left()
        self._ledger.change(status=status)
        self._closing.set()
        self._thread.join(deadline_seconds)
        self._given_up.set()
        left = self._left()
        if left:
            self._say(f"{left} did not reach {self._shown}; they are kept, and the same command sends them")
        return not left

    def _left(self) -> str:
        """What the store has not got, in words; empty when it has everything."""
        record = self._ledger.record
        lines = 0
        if self._metrics.exists():
            with self._metrics.open("rb") as file:
                file.seek(record.offset)
                lines = sum(line.endswith(b"\n") for line in file)
        counts = {
            "reports": lines,
            "files": len(record.files),
            "data sets": len(record.datasets),
            "tags": len(record.tags),
        }
        parts = [f"{count} {what}" for what, count in counts.items() if count]
        if record.status:
            parts.append(f"the status {record.status}")
        return ", ".join(parts)

    def _keep_sending(self) -> None:
        pause, tries_left = _POLL_SECONDS, 2
        while not self._given_up.is_set():
            is_last = self._closing.is_set()
            try:
                self._sender.send(self._given_up)
            except failures() as failure:
                self._sender.look_again()
                self._say_down(failure)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                tries_left -= is_last
                if tries_left == 0:
                    return
                if is_last:
                    self._given_up.wait(_POLL_SECONDS)
            else:
                self._say_up()
                pause = _POLL_SECONDS
                if is_last:
                    return
            self._closing.wait(pause)

    def _say_down(self, failure: BaseException) -> None:
        if not self._is_down:
            self._is_down = True
            self._say(f"{self._shown} takes no metrics ({reason(failure)}); they wait in {self._metrics}")

    def _say_up(self) -> None:
        if self._is_down:
            self._is_down = False
            self._say(f"{self._shown} is back and has all metrics")


def open_tracker(
    run_dir: Path,
    config: Config,
    run_name: str,
    tags: dict[str, str] | None = None,
    params: dict[str, Any] | None = None,
    say: Say = say_on_stderr,
) -> NullTracker:
    """A `Tracker`, or one that does nothing where `tracking.uri` is `none`.

    Raises:
        UsageError: see `tracking_uri`.
    """
    if tracking_uri(config) == "none":
        return NullTracker()
    return Tracker(run_dir, config, run_name, tags, params, say)


@contextmanager
def reopened(run: RunDirectory, config: Config) -> Iterator[NullTracker]:
    """The MLflow run of a run that has ended, to add what was measured or drawn since; waits for the store.

    Raises:
        UsageError: the run is live: its directory is its own.
    """
    with run.lock():
        if importlib.util.find_spec("mlflow") is None:
            yield NullTracker()
            return
        with open_tracker(run.path, config, run.path.name) as tracker:
            yield tracker
            tracker.finish(deadline_seconds=_ADDING_SECONDS)


def load_mlflow(uri: str) -> None:
    """Imports MLflow, in the caller's thread, since two threads that import the same packages can trip over
    one another, and quiets it: what a user must know, the tracker says."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow.system_metrics.system_metrics_monitor
    import mlflow.tracking

    if uri.startswith(_DATABASES):
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    for name in ("mlflow", "alembic", "urllib3.connectionpool", "git"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def failures() -> tuple[type[BaseException], ...]:
    """What a store may throw. Artifact stores throw their own libraries' errors, none of which must stop the
    metrics; a library that is not loaded can't have thrown."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    names = [
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("boto3.exceptions", "Boto3Error"),
        ("google.api_core.exceptions", "GoogleAPIError"),
        ("google.auth.exceptions", "GoogleAuthError"),
        ("azure.core.exceptions", "AzureError"),
    ]
    loaded = [getattr(sys.modules[module], name) for module, name in names if module in sys.modules]
    return (MlflowException, SQLAlchemyError, OSError, ImportError, *loaded)


def reason(failure: BaseException) -> str:
    """The innermost cause in one short line, without credentials."""
    inner: BaseException | None = failure
    while inner is not None:
        failure = inner
        wrapped = next((argument for argument in failure.args if isinstance(argument, BaseException)), None)
        inner = failure.__cause__ or failure.__context__ or wrapped
    lines = str(failure).strip().splitlines()
    return without_credentials(lines[0] if lines else type(failure).__name__)[:200]


def _now_ms() -> int:
    return int(time.time() * 1000)
