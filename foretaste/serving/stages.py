"""How long each stage of an answer took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, final

Stage = Literal["encode", "search", "rank", "rules"]
"""From a history to a vector; from it, or from all scores, to the best items; the second model's
judgement of them; what the request asks of the list."""


@final
class Stages:
    """The seconds of one answer, stage by stage; a stage that was not needed is not there."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[Stage, float] = {}
        self._clock = clock

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Add the time of what is done inside to a stage."""
        begun = self._clock()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + self._clock() - begun
