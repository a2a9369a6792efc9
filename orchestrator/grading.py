"""Verdicts from the verifier service. Infrastructure errors are retried; what stays an error is never a zero."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter

from orchestrator.rewards import bad_reference
from protocol.clients import VerifierClient
from protocol.errors import ErrorCode, ProtocolError
from protocol.messages import Verdict, VerdictStatus, VerifyItem

RETRY_PAUSE_S = 0.25
TRIES = 4


class Grader:
    """Grades one completion at a time, the moment it is there. `statuses` counts final verdicts by status."""

    def __init__(self, client: VerifierClient, *, task: str, timeout_s: float) -> None:
        self._client, self._task, self._timeout_s = client, task, timeout_s
        self.statuses: Counter[str] = Counter()

    async def grade(self, completion: str, reference: str) -> Verdict:
        """The verdict; after TRIES failures of the infrastructure, one of status `error`."""
        item = VerifyItem(id=uuid.uuid4().hex, completion=completion, reference=reference, task=self._task)
        verdict = Verdict(id=item.id, status=VerdictStatus.ERROR, score=0.0, detail="not asked")
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(RETRY_PAUSE_S * 2**attempt)
            try:
                (verdict,) = await self._client.verify([item], timeout_s=self._timeout_s)
            except ProtocolError as error:
                verdict = Verdict(id=item.id, status=VerdictStatus.ERROR, score=0.0, detail=str(error))
                if error.code in (ErrorCode.INVALID, ErrorCode.REFUSED):
                    break
                continue
            if verdict.status is not VerdictStatus.ERROR or bad_reference(verdict):
                break
        self.statuses[verdict.status.value] += 1
        return verdict
