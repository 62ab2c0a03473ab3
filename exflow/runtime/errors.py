"""What can go wrong between ranks."""

from __future__ import annotations

from placement.errors import UserError


class RankFailureError(UserError):
    """Another rank cannot go on, so none does."""


class ContactLostError(UserError):
    """A collective failed: a rank is gone, or does not answer."""
