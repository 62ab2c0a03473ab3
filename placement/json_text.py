"""JSON of a user's file: whatever is wrong with it is one kind of error."""

from __future__ import annotations

import json
from typing import Any

from placement.errors import UserError


class JsonError(UserError):
    """Text that is not JSON, or more than can be read."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        JsonError: it is not JSON, too deeply nested, or has a number of too many digits.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        msg = f"not JSON: {error}"
        raise JsonError(msg) from error
    except RecursionError as error:
        msg = "not JSON that can be read: too deeply nested"
        raise JsonError(msg) from error
    except ValueError as error:  # Python converts no more digits than sys.get_int_max_str_digits
        msg = "not JSON that can be read: a number has too many digits"
        raise JsonError(msg) from error


def can_encode(text: str) -> bool:
    """Whether it is text: JSON may name halves of surrogate pairs, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
