"""Errors that are meant for the person at the keyboard."""

import errno
import functools
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class UserError(Exception):
    """Something the user can put right: a line naming the key, file or line, and what would be right; all mistakes of a
    configuration are one such error, a line each."""


def one_line(error: BaseException) -> str:
    """What an error of a library says."""
    return " ".join(str(error).split())


def first_error(group: BaseExceptionGroup) -> BaseException:
    """What went wrong first in a task group, taken out of the groups around it."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def exit_on_user_error(main: Callable[P, T]) -> Callable[P, T]:
    """Decorate an entry point: a `UserError` becomes its line on stderr and exit status 2, a full disk likewise."""

    @functools.wraps(main)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            sys.stderr.writelines(f"error: {line}\n" for line in str(error).splitlines())
            raise SystemExit(2) from None
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            with suppress(OSError):  # It may be on that disk, too.
                sys.stderr.write(
                    f"error: a file cannot be written ({one_line(error)}); make room, or choose another disk\n"
                )
            raise SystemExit(2) from None

    return wrapper
