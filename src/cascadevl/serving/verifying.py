"""Answers whose claims are checked before they are sent: asked of whoever answers, all at once."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass

from cascadevl.engine.guard import Guard
from cascadevl.engine.requests import Completion, Request
from cascadevl.errors import RequestError
from cascadevl.scoring.verdicts import Checked, Verification
from cascadevl.serving.engine_thread import Answers
from cascadevl.serving.openai_prompts import Asked
from cascadevl.serving.openai_replies import (
    CheckedClaim,
    ClaimEvidence,
    VerificationReply,
)
from cascadevl.serving.openai_schema import ChatRequest, TextPart, UserMessage
from cascadevl.serving.waiting import together


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """Checks answers to requests.

    Attributes:
        answers: Answers probes, as it does requests.
        guard: Says what to ask.
    """

    answers: Answers
    guard: Guard

    def check(self, body: ChatRequest, asked: Asked) -> None:
        """Refuse a wish that cannot be fulfilled, before anything is answered.

        Args:
            body: The request.
            asked: What it asks.

        Raises:
            RequestError: If there is nothing to hold an answer against, or it will be JSON.
        """
        if not body.verify:
            return
        if asked.request.sampling.json_schema is not None:
            raise RequestError(
                "an answer that must be JSON has no sentences to verify; leave out verify, or "
                "response_format and tool_choice"
            )
        self.guard.check_sources(asked.request)

    async def __call__(
        self, body: ChatRequest, asked: Asked, content: str | None
    ) -> VerificationReply:
        """Check what an answer says.

        Args:
            body: The request.
            asked: What it asked.
            content: The answer, without reasoning and calls; None if it has none.

        Raises:
            RequestError: If a probe does not fit the trained context.
            ServerError: If an answer to a probe is lost.
        """
        question, answer, about = _question(body), content or "", asked.request
        wish = self.guard.extraction(question, answer, about)
        extracted = None if wish is None else (await self._one(wish)).text
        plan = await asyncio.to_thread(self.guard.plan, question, answer, about, extracted)
        completions = await together([self._one(each) for each in plan.requests])
        return _reply(self.guard.conclude(plan, completions), len(completions))

    async def _one(self, request: Request) -> Completion:
        async with aclosing(self.answers.ask(request)) as outputs:
            async for output in outputs:
                if isinstance(output, Completion):
                    return output
        raise AssertionError("an answer ends, or is an error")


def _question(body: ChatRequest) -> str:
    """The text of the last thing that the user said."""
    asked = [each for each in body.messages if isinstance(each, UserMessage)]
    if not asked:
        return ""
    content = asked[-1].content
    if isinstance(content, str):
        return content
    return "\n".join(part.text for part in content if isinstance(part, TextPart))


def _reply(found: Verification, num_probes: int) -> VerificationReply:
    return VerificationReply(
        text=found.text, claims=[_claim(each) for each in found.checks], num_probes=num_probes
    )


def _claim(check: Checked) -> CheckedClaim:
    return CheckedClaim(
        text=check.claim.text,
        question=check.claim.question,
        is_negative=check.claim.is_negative,
        verdict=check.verdict,
        probability=check.probability,
        reason=check.reason,
        evidence=[
            ClaimEvidence(
                source=each.source,
                finding=each.finding,
                probability=each.probability,
                passage=each.passage or None,
            )
            for each in check.evidence
        ],
    )
