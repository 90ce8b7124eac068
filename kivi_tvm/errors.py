"""The root of every error that the user, not a bug, causes."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can correct; the command line prints it without a traceback."""
