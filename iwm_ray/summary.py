"""What a run ends with: `summary.json`, and the lines printed for a person."""

import json
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from iwm_ray.build import Setup
from iwm_ray.evaluation.health import judge
from iwm_ray.run_directory import RunDirectory, read_lines, write_json
from iwm_ray.training import metrics_log
from iwm_ray.workers import Outcome

Rows = Sequence[Mapping[str, Any]]


def note_start(run: RunDirectory) -> None:
    """Remembers when the user started the run, for the goodput."""
    with run.attempts.open("a") as file:
        file.write(json.dumps({"start": time.time()}) + "\n")


def finished(run: RunDirectory) -> Outcome | None:
    """The outcome of a run that has already come to its end."""
    if not run.summary.exists():
        return None
    summary = json.loads(run.summary.read_text())
    return Outcome("finished", summary["steps"]) if summary["status"] == "finished" else None


def summarise(setup: Setup, outcome: Outcome) -> dict[str, Any]:
    """Writes and returns RUN/summary.json: status, steps, health, and the newest value of every metric."""
    rows = metrics_log.read(setup.run.metrics)
    step = outcome.step if outcome.step >= 0 else max((row["step"] for row in rows), default=0)
    health = judge(rows, setup.config.predictor.conditioning, setup.encoder_width)
    summary = {
        "status": outcome.status,
        "steps": step,
        "total_steps": setup.total_steps,
        "samples": step * setup.config.optimizer.global_batch_size,
        "health": health.status,
        "health_line": health.line,
        "quarantined": setup.run.num_quarantined(),
        "goodput": goodput(setup, rows),
        "metrics": _newest(rows),
    }
    write_json(setup.run.summary, summary)
    return summary


def tags(summary: Mapping[str, Any]) -> dict[str, str]:
    """By which MLflow's table tells sound runs from others."""
    return {f"iwm.{name}": str(summary[name]) for name in ("status", "health", "health_line")}


def renew(run: RunDirectory) -> None:
    """Puts figures that were measured after the run's end into its summary."""
    if run.summary.exists():
        kept = json.loads(run.summary.read_text())
        write_json(run.summary, kept | {"metrics": _newest(metrics_log.read(run.metrics))})


def _newest(rows: Rows) -> dict[str, float]:
    """The value of every metric at its last step."""
    newest: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: row["step"]):  # stable: of one step the line written last
        newest |= {name: value for name, value in row.items() if name not in ("step", "time")}
    return newest


def goodput(setup: Setup, rows: Rows) -> float:
    """Share of the time since the user's starts that went into steps which count, 0 to 1.

    The time between the death of one start and the next is the user's, not the run's, and is left out.
    """
    rows = [row for row in rows if any(name.startswith(("train/", "monitor/")) for name in row)]
    starts = [record["start"] for record in read_lines(setup.run.attempts)]
    ends = [
        max((row["time"] for row in rows if row["time"] < after), default=start)
        for start, after in pairwise(starts)
    ]
    last = max((row["time"] for row in rows), default=0.0)
    total = sum(max(0.0, end - start) for start, end in zip(starts, [*ends, last], strict=False))
    trained = [row for row in rows if "train/samples_per_second" in row]
    steps = [0, *(row["step"] for row in trained)]
    busy = sum(
        (after - before) * setup.config.optimizer.global_batch_size / row["train/samples_per_second"]
        for (before, after), row in zip(pairwise(steps), trained, strict=True)
    )
    return round(min(1.0, busy / total), 3) if total > 0 else 0.0


def lines(setup: Setup, summary: Mapping[str, Any], rows: Rows, ui: str) -> list[str]:
    """The closing lines: MRR and kNN beside chance, health, throughput, picture, and where to look on."""
    found = [
        f"{summary['status']} at step {summary['steps']} of {setup.total_steps}: {setup.run.path}",
        *_mrr_line(setup, summary["metrics"]),
        *_knn_line(rows),
        f"  health  {summary['health_line']}",
        *_speed_line(summary, rows),
    ]
    if summary["quarantined"]:
        found.append(f"  data    {summary['quarantined']} samples could not be read: {setup.run.quarantine}")
    picture = setup.run.pictures / "retrieval.png"
    if picture.exists():
        found.append(f"  picture {picture}")
    if ui:
        found.append(f"  MLflow  {ui}")
    if summary["status"] == "stopped":
        found.append(f"saved at step {summary['steps']}; the same command resumes the run")
    return found


def _mrr_line(setup: Setup, metrics: Mapping[str, float]) -> list[str]:
    if "mrr/mrr" not in metrics:
        return []
    controls = ", ".join(
        f"{words} {metrics[name]:.3f}"
        for words, name in (
            ("chance", "mrr/chance"),
            ("shuffled action", "mrr/shuffled_action"),
            ("zero action", "mrr/zero_action"),
        )
    )
    return [f"  MRR     {metrics['mrr/mrr']:.3f} ({controls}; {_num_views(setup, metrics)} views an image)"]


def _num_views(setup: Setup, metrics: Mapping[str, float]) -> int:
    """Of an evaluation since the end of training, else of the closing measurement."""
    return int(metrics.get("mrr/num_views", setup.config.monitor.mrr_views))


def _knn_line(rows: Rows) -> list[str]:
    read = [row for row in rows if "monitor/knn_top1" in row]
    if not read:
        return []
    before = f", untrained {read[0]['monitor/knn_top1']:.3f}" if read[0]["step"] == 0 else ""
    return [
        f"  kNN     {read[-1]['monitor/knn_top1']:.3f} (chance {read[-1]['monitor/knn_chance']:.3f}{before})"
    ]


def _speed_line(summary: Mapping[str, Any], rows: Rows) -> list[str]:
    trained = [row for row in rows if "train/samples_per_second" in row]
    if not trained:
        return []
    rates = sorted(row["train/samples_per_second"] for row in trained)
    wait = sum(row["train/data_wait_fraction"] for row in trained) / len(trained)
    return [
        f"  speed   {rates[len(rates) // 2]:,.0f} images/s (median), {100 * wait:.1f} % of the time waiting for data, "
        f"goodput {summary['goodput']:.2f}"
    ]
