"""Requests tried again: exponential backoff with jitter, so that many readers do not come back all at once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

Result = TypeVar("Result")


class TemporaryError(Exception):
    """A request failed in a way that may pass: 5xx, 429, a reset, a timeout, a body cut short."""


class GaveUpError(Exception):
    """Every try failed; the message is the last one's."""

    def __init__(self, message: str, tries: int) -> None:
        super().__init__(message)
        self.tries = tries


@dataclass(frozen=True)
class Retry:
    """How often, and how long to wait between: with the defaults about 25 s in all.

    Parameters
    ----------
    tries
        Requests at most.
    first, most
        Seconds to wait after the first failure (doubled after each), and at most. What is waited is between
        half of that and all of it, drawn anew each time.
    """

    tries: int = 8
    first: float = 0.2
    most: float = 20.0

    def run(self, request: Callable[[int], Result], sleep: Callable[[float], None] = time.sleep) -> Result:
        """Call `request` with 0, 1, 2, ... until it does not raise TemporaryError.

        Raises
        ------
        GaveUpError
            It failed `tries` times.
        """
        for number in range(self.tries):
            try:
                return request(number)
            except TemporaryError as error:
                if number + 1 == self.tries:
                    raise GaveUpError(str(error), self.tries) from error
                sleep(self.wait(number))
        raise AssertionError("tries is at least 1")

    def wait(self, number: int) -> float:
        """Seconds to wait after failure `number`, 0 the first."""
        longest = min(self.most, self.first * 2.0**number)
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads readers, hides nothing


DEFAULT_RETRY: Final = Retry()
