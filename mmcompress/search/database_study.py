"""The study of a run in a PostgreSQL database, for `search.storage`. No torch.

The driver alone writes to it. A database that goes away for some minutes is waited for.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.pool import NullPool

from mmcompress.errors import ClusterError, DataError
from mmcompress.registry import name_missing_packages
from mmcompress.runtime.quiet_loggers import silence_logger
from mmcompress.search.sampling import OPTUNA_LOGGER
from mmcompress.search.study import list_trial_faults, read_finished_trials
from mmcompress.storage import read_record, write_record

DRIVER = "postgresql+psycopg"
"""What SQLAlchemy calls the third version of psycopg."""

DATABASE_SECONDS = 10
"""Seconds that the database may take to accept a connection."""

MAX_OUTAGE_SECONDS = 300.0
"""Seconds that a database may be away before the run ends: a restart takes less."""

SECONDS_BETWEEN_RECONNECTS = 1.0
"""Seconds between two tries to reach it."""

WRITE_ID = "write"
"""Attribute of a trial: what tells one write of it from another."""

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class DatabaseRecord:
    """Where the study of a run folder is. `study.json`."""

    storage: str
    """The database, without a password."""
    name: str
    """The name of the study in it."""


def check_database(url: str) -> None:
    """Check that a database answers.

    Args:
        url: `postgresql://USER@HOST:PORT/DATABASE`.

    Raises:
        DataError: It gives no answer, or refuses.
        MissingPackage: The driver of PostgreSQL is not installed.
    """
    with name_missing_packages():
        engine = sqlalchemy.create_engine(_add_driver(url), **_make_engine_options())
    try:
        engine.connect().close()
    except DBAPIError as error:
        raise DataError(f"search.storage: {url}: {_describe_error(error)}") from error
    finally:
        engine.dispose()


@silence_logger(OPTUNA_LOGGER)
def open_database_study(
    url: str, record_path: Path, *, tell: Callable[[str], None]
) -> DatabaseStudy:
    """Open the study of a run folder in a database, or make it.

    Args:
        url: `postgresql://USER@HOST:PORT/DATABASE`.
        record_path: The file of the run folder that holds the name of the study.
        tell: Receives that the database is away, or back.

    Raises:
        DataError: The database gives no answer, or the file is damaged.
    """
    if record_path.exists():
        record = read_record(DatabaseRecord, record_path)
    else:
        record = DatabaseRecord(storage=url, name=f"mmcompress-{uuid.uuid4().hex[:12]}")
        # What was never reached is a mistake; what was is waited for.
        check_database(url)
        write_record(record_path, record)

    def connect(is_repeated: bool) -> RDBStorage:
        storage = RDBStorage(_add_driver(url), engine_kwargs=_make_engine_options())
        optuna.create_study(study_name=record.name, storage=storage, load_if_exists=True)
        return storage

    return DatabaseStudy(record.name, wait_for_database(connect, tell=tell), tell=tell)


@silence_logger(OPTUNA_LOGGER)
def list_database_faults(record_path: Path) -> list[str]:
    """List what is wrong with a study in a database that nobody works on. Nothing is written.

    Args:
        record_path: The file of the run folder that holds the name of the study.

    Returns:
        Faults in words; empty for a study that is whole.

    Raises:
        DataError: The database gives no answer, or the file is damaged.
        MissingPackage: The driver of PostgreSQL is not installed.
    """
    record = read_record(DatabaseRecord, record_path)
    check_database(record.storage)
    try:
        storage = RDBStorage(
            _add_driver(record.storage),
            engine_kwargs=_make_engine_options(),
            skip_table_creation=True,
        )
        study = optuna.load_study(study_name=record.name, storage=storage)
    except (KeyError, RuntimeError, DBAPIError) as error:
        return [f"{record.storage} has no study {record.name}: {_describe_error(error)}"]
    return list_trial_faults(study, read_finished_trials(study))


class DatabaseStudy(optuna.Study):
    """A study that waits for its database.

    Args:
        name: The name of the study.
        storage: The database.
        tell: Receives that the database is away, or back.
    """

    def __init__(self, name: str, storage: RDBStorage, *, tell: Callable[[str], None]):
        self._tell_user = tell
        self._database = storage
        super().__init__(study_name=name, storage=storage)

    def add_trial(self, trial: FrozenTrial) -> None:
        """Write a finished trial, once, even where the answer to the first try was lost."""
        trial.set_user_attr(WRITE_ID, uuid.uuid4().hex)

        def add(is_repeated: bool) -> None:
            # Optuna itself would try again for seconds, and tell nobody.
            self._database.engine.connect().close()
            if not is_repeated or not self._is_written(trial):
                optuna.Study.add_trial(self, trial)

        wait_for_database(add, tell=self._tell_user)

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Read the trials, each once: Optuna itself repeats what it takes for a lost write."""

        def read(is_repeated: bool) -> list[FrozenTrial]:
            return optuna.Study.get_trials(self, deepcopy=deepcopy, states=states)

        trials_by_write: dict[str, FrozenTrial] = {}
        for trial in wait_for_database(read, tell=self._tell_user):
            write = trial.user_attrs.get(WRITE_ID, f"trial {trial.number}")
            trials_by_write.setdefault(write, trial)
        return list(trials_by_write.values())

    @property
    def user_attrs(self) -> dict[str, Any]:
        """What is known of the study beside its trials."""

        def read(is_repeated: bool) -> dict[str, Any]:
            return dict(self._storage.get_study_user_attrs(self._study_id))

        return wait_for_database(read, tell=self._tell_user)

    def _is_written(self, trial: FrozenTrial) -> bool:
        """Return whether the database holds a trial already."""
        write = trial.user_attrs[WRITE_ID]
        written = optuna.Study.get_trials(self, deepcopy=False)
        return any(known.user_attrs.get(WRITE_ID) == write for known in written)


def wait_for_database(ask: Callable[[bool], Answer], *, tell: Callable[[str], None]) -> Answer:
    """Ask a database, again and again while it is away.

    Args:
        ask: Asks it; it is told whether it was asked before.
        tell: Receives that the database is away, or back.

    Raises:
        ClusterError: The database was away for too long.
    """
    first_outage: float | None = None
    while True:
        try:
            answer = ask(first_outage is not None)
        except Exception as error:
            if not is_outage(error):
                raise
            now = time.monotonic()
            if first_outage is None:
                first_outage = now
                tell("search.storage: the database is away; waiting for it")
            if now - first_outage > MAX_OUTAGE_SECONDS:
                raise ClusterError(
                    f"search.storage: the database gives no answer for "
                    f"{MAX_OUTAGE_SECONDS / 60:.0f} min: {_describe_error(error)}. Finished "
                    "trials are kept; --resume goes on"
                ) from error
            time.sleep(SECONDS_BETWEEN_RECONNECTS)
        else:
            if first_outage is not None:
                tell("search.storage: the database is back")
            return answer


def is_outage(error: BaseException) -> bool:
    """Return whether an error says that the database is away, not that something else is wrong."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OperationalError | InterfaceError):
            return True
        if isinstance(cause, DBAPIError) and cause.connection_invalidated:
            return True
        cause = cause.__cause__
    return False


def _add_driver(url: str) -> str:
    """Return the URL with the name of the driver."""
    with_driver = sqlalchemy.make_url(url).set(drivername=DRIVER)
    return with_driver.render_as_string(hide_password=False)


def _make_engine_options() -> dict[str, Any]:
    """Return the options of the connection.

    None is kept between two trials: it would not outlive a restart of the server.
    """
    return {"poolclass": NullPool, "connect_args": {"connect_timeout": DATABASE_SECONDS}}


def _describe_error(error: BaseException) -> str:
    """Return the first line of what the database or its driver says."""
    cause = getattr(error, "orig", None) or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[0]
