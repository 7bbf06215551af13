r"""Workers whose node was lost, and for whom the cluster may have no other place.

    lost ---- 2 s ---- no place: told once ---- resources_timeout_s, and nobody works: error
                 \---- place found: all is well

The others go on meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from paramserver.errors import ResourceError

logger = logging.getLogger(__name__)

_QUIET_S: Final = 2.0
"""Seconds Ray has to find another place before a person is told what is missing."""

_LATE_S: Final = 60.0
"""Seconds after which Ray surely knows of a node that is lost; it had its places up to then."""


class Vacancies:
    """Looks, while the run goes on, whether lost workers have found another place."""

    def __init__(self, lack: Callable[[], str | None], limit_s: float) -> None:
        """Ask ``lack`` what is missing; run without any worker for ``limit_s`` seconds at most."""
        self._lack, self._limit_s = lack, limit_s
        self._since: float | None = None
        self._is_told = False

    def open(self, now: float) -> None:
        """Note that a worker was lost at second ``now`` and is to have another place."""
        self._since, self._is_told = now, False

    def look(self, num_live: int, now: float) -> None:
        """Tell what is missing for lost workers, if anything is, while ``num_live`` go on.

        Raises:
            ResourceError: Nobody works, and there was no place in time.
        """
        if self._since is None or now - self._since < _QUIET_S:
            return
        lack = self._lack()
        if lack is None:
            self._since = None if now - self._since > _LATE_S else self._since
        elif not num_live and now - self._since > self._limit_s:
            raise ResourceError(
                f"no worker is left, and the cluster had none {self._limit_s:g} s later for "
                f"{lack}: add nodes and go on from the last checkpoint, or raise "
                "resources_timeout_s"
            )
        elif not self._is_told:
            self._is_told = True
            logger.warning("waiting for %s; the run goes on with those it has", lack)
