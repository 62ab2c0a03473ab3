"""What can be wrong with a record that is imported and with a plan that is exported."""

from __future__ import annotations

from placement.errors import UserError


class RecordError(UserError):
    """A recording of an engine that cannot be read as a routing trace."""


class ExportError(UserError):
    """A plan that a target cannot express, or an exported file that its engine would refuse."""


class ConfigError(UserError):
    """A model's config.json that does not tell what is needed."""
