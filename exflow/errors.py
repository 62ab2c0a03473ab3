"""The runtime's user errors; see `placement.errors`."""

from __future__ import annotations

from placement.errors import UserError


class CheckpointError(UserError):
    """A model that is not there, not complete, or not of a family that is known."""
