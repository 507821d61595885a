"""Parquet files that cannot be read."""

import pyarrow as pa

from xbai.errors import UserError, one_line

UNREADABLE = (pa.ArrowException, OSError)
"""What reading a damaged file fails by."""


def not_parquet(subject: str, error: BaseException) -> UserError:
    """The error to raise then; `subject` begins its line, such as "FILE:" or "KEY: FILE is"."""
    return UserError(f"{subject} cut off, or not a parquet file ({one_line(error)[:300]})")
