"""The error a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake: the message says what was expected, what came, and what to do.

    The command lines print it as `error: ...` on stderr, without a traceback, and exit with code 2.
    Modules derive their own: `TraceError`, `PlanError`, `CorpusError`, `CheckpointError`, ...
    """
