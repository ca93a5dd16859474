"""Database of studies, opened by many processes at once, with retries."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from image_classifier.atomic_io import file_lock
from image_classifier.errors import StorageError
from image_classifier.text import hide_passwords

log = logging.getLogger(__name__)

T = TypeVar("T")
TROUBLE = (optuna.exceptions.StorageInternalError, SQLAlchemyError)
_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # between attempts at a database that does not answer
HEARTBEAT_S = 10  # between two heartbeats of a running trial
GRACE_S = 60  # after the last one its worker is taken for dead


def open_storage(address: str) -> RDBStorage:
    """Open the database at an address of SQLAlchemy's, with Optuna's tables.

    Raises:
        StorageError: It cannot be opened.
    """
    try:
        with _schema_lock(address):
            # Workers that create a server's tables at the same time disturb each other.
            attempts = 0 if address.startswith("sqlite") else 3
            return patiently(lambda: _connect(address), attempts)
    except (*TROUBLE, ImportError, ValueError) as error:
        fact = f"cannot open tune.storage={hide_passwords(address)} ({one_line(error)})"
        raise StorageError(fact, _hint(error)) from error


def _connect(address: str) -> RDBStorage:
    # SQLite: wait a minute for other writers. Servers: reopen connections that broke while they were idle.
    engine = {"connect_args": {"timeout": 60}} if address.startswith("sqlite") else {"pool_pre_ping": True}
    return RDBStorage(address, engine_kwargs=engine, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S)


def stale_trial_ids(storage: RDBStorage, study_id: int) -> set[int]:
    """Return the ids of running trials without a heartbeat for GRACE_S, by the database's clock.

    Optuna's public way, `fail_stale_trials`, would fail them for good, so its private `_get_stale_trial_ids` is used.
    """
    return set(storage._get_stale_trial_ids(study_id))


def patiently(call: Callable[[], T], attempts: int = len(_WAITS_S)) -> T:
    """Return the call's result; retry while the database restarts or another worker creates its tables."""
    for wait_s in _WAITS_S[:attempts]:
        try:
            return call()
        except TROUBLE as error:
            log.info("the study's database does not answer (%s); next attempt in %.0f s", one_line(error), wait_s)
            time.sleep(wait_s)
    return call()


def one_line(error: Exception) -> str:
    """Return a database's message as one line, without the password of its address."""
    cause: BaseException = error
    if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__:
        cause = error.__cause__
    message = str(getattr(cause, "orig", None) or cause)  # the driver's message where there is one
    return " ".join(hide_passwords(message).partition("\n")[0].split())[:200]


def _hint(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install the database's driver, such as pip install psycopg2-binary or pip install pymysql"
    return "write sqlite:///PATH, or the address of a server: postgresql://USER:PASSWORD@HOST/NAME"


def _schema_lock(address: str) -> AbstractContextManager[Any]:
    """Lock a SQLite file: processes that create the tables of a new one at the same time crash each other."""
    path = address.removeprefix("sqlite:///")
    return file_lock(Path(f"{path}.lock")) if path != address else nullcontext()
