"""The database of studies, opened by many processes at once and asked with patience."""

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
_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # between tries at a database that does not answer


def open_storage(address: str) -> RDBStorage:
    """The database at an address of SQLAlchemy's, with Optuna's tables; StorageError where it cannot be opened."""
    try:
        with _alone(address):
            tries = (
                0 if address.startswith("sqlite") else 3
            )  # workers that make a server's tables at once disturb each other
            return patiently(lambda: RDBStorage(address, engine_kwargs=_engine(address)), tries)
    except (*TROUBLE, ImportError, ValueError) as error:
        raise StorageError(f"cannot open tune.storage={_hidden(address)} ({one_line(error)})", _hint(error)) from error


def patiently(call: Callable[[], T], attempts: int = len(_WAITS_S)) -> T:
    """The call's answer, asked for again while the database has trouble: a restart, or another worker making the tables."""
    for wait_s in _WAITS_S[:attempts]:
        try:
            return call()
        except TROUBLE as error:
            log.info("the study's database does not answer (%s); asked again in %.0f s", one_line(error), wait_s)
            time.sleep(wait_s)
    return call()


def one_line(error: Exception) -> str:
    """What a database says, without its address's password."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ else error
    said = str(getattr(cause, "orig", None) or cause)  # the driver's own words
    return " ".join(_hidden(said).partition("\n")[0].split())[:200]


def _hidden(text: str) -> str:
    return hide_passwords(text)


def _hint(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install the database's driver, such as pip install psycopg2-binary or pip install pymysql"
    return "write sqlite:///PATH, or the address of a server: postgresql://USER:PASSWORD@HOST/NAME"


def _alone(address: str) -> AbstractContextManager[None]:
    """Processes that all create the tables of a fresh SQLite file crash each other."""
    path = address.removeprefix("sqlite:///")
    return file_lock(Path(f"{path}.lock")) if path != address else nullcontext()


def _engine(address: str) -> dict[str, Any]:
    """SQLite: a minute of patience with other writers. Servers: connections that broke while idle are made anew."""
    return {"connect_args": {"timeout": 60}} if address.startswith("sqlite") else {"pool_pre_ping": True}
