"""Whose `verl` is installed: this one is the distribution `xbai-verl`, the public project's is called `verl` itself."""

from __future__ import annotations

from importlib.metadata import distributions

from xbai.errors import UserError

PUBLIC_NAME = "verl"


def check_distribution() -> None:
    """Refuse an environment in which the public project's files lie, or are imported, among these.

    An editable install has no files of its own in the package's folder, and mixes with nothing.

    Raises:
        UserError: naming its version and the way out.
    """
    for found in distributions(name=PUBLIC_NAME):
        if "verl/__init__.py," in (found.read_text("RECORD") or ""):
            raise UserError(
                f"the public project's {PUBLIC_NAME} {found.version} is installed here, whose files have the names of "
                f"this trainer's: pip uninstall {PUBLIC_NAME}, then install this one again (pip install -e verl)"
            )
