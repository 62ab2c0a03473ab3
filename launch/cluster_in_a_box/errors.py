"""What can go wrong, as one line for the user."""


class BoxError(ValueError):
    """Something the user can mend; printed without a traceback, exit code 2."""
