"""Results as runs of an MLflow server.

API: https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CLIENT_SETTINGS = {
    # By default a server that is down holds a run for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # The client tells its makers what it is used for, unless it is told not to.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # The command prints the address itself, on a line of its own.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Environment of the client, where the user has not set it. It is read by the import below."""
for setting_name, setting_value in CLIENT_SETTINGS.items():
    os.environ.setdefault(setting_name, setting_value)

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Metric, Param  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

from mmcompress.errors import TrackingError  # noqa: E402
from mmcompress.results.records import Side, Summary  # noqa: E402
from mmcompress.runtime.addresses import hide_password  # noqa: E402
from mmcompress.workspace.folder import RunFolder  # noqa: E402

RESULT_TAG = "mmcompress.result"
"""Tag with the SHA-256 of `summary.json`: which result a run of the server holds."""

MAX_VALUES_PER_REQUEST = 100
"""Settings that MLflow takes in one request; of figures it takes 1,000."""

MAX_VALUE_LENGTH = 500
"""Characters of a setting that every version of MLflow takes."""


def open_mlflow(address: str) -> MlflowTracker:
    """Connect to an MLflow server, or to a local store that MLflow knows by its address.

    Args:
        address: `http://HOST:PORT`, or another tracking URI of MLflow.

    Raises:
        TrackingError: It does not answer.
    """
    tracker = MlflowTracker(MlflowClient(tracking_uri=address), address)
    tracker.check()
    return tracker


class MlflowTracker:
    """Keeps every result as one run; the experiment has the name of the pipeline."""

    def __init__(self, client: Any, address: str):
        """Take a connected client."""
        self._client = client
        self._address = address

    def check(self) -> None:
        """Ask the server for an experiment; raises `TrackingError` when it does not answer."""
        try:
            self._client.search_experiments(max_results=1)
        except (MlflowException, OSError) as error:  # those of its HTTP library are OSErrors
            raise self._describe(error) from error

    def log_result(self, summary: Summary, folder: RunFolder) -> str:
        """Send the result of one target; see `Tracker.log_result`."""
        try:
            return self._log_result(summary, folder)
        except (MlflowException, OSError) as error:  # those of its HTTP library are OSErrors
            raise self._describe(error) from error

    def _log_result(self, summary: Summary, folder: RunFolder) -> str:
        experiment_id = self._find_or_create_experiment(summary.pipeline)
        pages = f"{hide_password(self._address)}/#/experiments/{experiment_id}/runs"
        digest = hashlib.sha256(folder.summary.read_bytes()).hexdigest()
        same_result = f"tags.`{RESULT_TAG}` = '{digest}'"
        for known_run in self._client.search_runs([experiment_id], same_result, max_results=1):
            return f"{pages}/{known_run.info.run_id}"
        run = self._client.create_run(
            experiment_id,
            run_name=f"{summary.pipeline} {summary.target.text} seed {summary.seed}",
            tags=_list_tags(summary),
        )
        run_id = run.info.run_id
        self._log_params(run_id, _flatten(summary.settings))
        self._log_metrics(run_id, summary)
        for file in (folder.report, folder.report.with_suffix(".md"), folder.summary):
            if file.exists():
                self._client.log_artifact(run_id, str(file))
        if folder.has_bundle():
            self._client.log_artifacts(run_id, str(folder.bundle), "bundle")
        # A result that has the tag was sent whole: a resumed run does not send it again.
        self._client.set_tag(run_id, RESULT_TAG, digest)
        self._client.set_terminated(run_id, "FINISHED" if summary.target.met else "FAILED")
        return f"{pages}/{run_id}"

    def _find_or_create_experiment(self, name: str) -> str:
        """Return the id of the experiment of a name."""
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        return str(self._client.create_experiment(name))

    def _log_params(self, run_id: str, settings: Mapping[str, str]) -> None:
        params = [Param(name, value[:MAX_VALUE_LENGTH]) for name, value in settings.items()]
        for part in _split(params):
            self._client.log_batch(run_id, params=part)

    def _log_metrics(self, run_id: str, summary: Summary) -> None:
        now = int(1000 * time.time())

        def note(name: str, value: float, *, step: int = 0) -> None:
            metrics.append(Metric(key=name, value=value, timestamp=now, step=step))

        metrics: list[Metric] = []
        for name, value in _list_figures(summary).items():
            note(name, value)
        for step, loss in enumerate(summary.validation_losses):
            note("validation_loss", loss, step=step)
        for step, trial in enumerate(summary.trials):
            note("trial.loss", trial.loss, step=step)
            note("trial.latency_ms", trial.latency_ms, step=step)
        for part in _split(metrics):
            self._client.log_batch(run_id, metrics=part)

    def _describe(self, error: Exception) -> TrackingError:
        """Say in one line what MLflow said."""
        lines = hide_password(str(error)).strip().splitlines() or [type(error).__name__]
        return TrackingError(f"mlflow at {hide_password(self._address)}: {lines[0]}")


def _split(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Split values into parts that fit one request."""
    for start in range(0, len(values), MAX_VALUES_PER_REQUEST):
        yield values[start : start + MAX_VALUES_PER_REQUEST]


def _list_tags(summary: Summary) -> dict[str, str]:
    """List what says where a result comes from."""
    return {
        "target": summary.target.text,
        "target_met": str(summary.target.met).lower(),
        "processor": str(summary.cpu.get("name", "")),
        "mmcompress.commit": summary.commit,
        "mmcompress.command": summary.command[:MAX_VALUE_LENGTH],
    }


def _list_figures(summary: Summary) -> dict[str, float]:
    """List the figures of both sides by their names."""
    figures = {"speedup": summary.speedup, "latency_margin": summary.latency_margin}
    if summary.determined_quality is not None:
        figures["quality_retained"] = summary.determined_quality
    sides: dict[str, Side] = {"dense": summary.baseline, "compressed": summary.compressed}
    for name, side in sides.items():
        figures[f"latency_ms.p50.{name}"] = side.latency_ms.p50
        figures[f"latency_ms.p95.{name}"] = side.latency_ms.p95
        figures[f"size_mb.{name}"] = side.size_mb
        for metric, quality in side.quality.items():
            figures[f"{metric}.{name}"] = quality.value
    return figures


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to texts by dotted key."""
    return dict(_iterate_settings(settings, prefix))


def _iterate_settings(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Iterate over (dotted key, text) of nested settings; empty ones are left out."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _iterate_settings(value, f"{prefix}{key}.")
        elif value not in (None, "", [], ()):
            yield f"{prefix}{key}", str(value)
