"""When an answer has ended, and its text until then."""

from __future__ import annotations

from collections.abc import Sequence

from cascadevl.data.processor import CascadeVLProcessor
from cascadevl.engine.requests import FinishReason
from cascadevl.engine.sampling import SamplingParams
from cascadevl.engine.text_stream import Scanner, TextStream
from cascadevl.errors import RequestError


def end_ids(
    processor: CascadeVLProcessor,
    params: SamplingParams,
    config_eos: int | Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Tokens that end an answer: the template's, the checkpoint's and the request's.

    Args:
        processor: Brings the template.
        params: The request's wishes; ``ignore_eos`` leaves its own tokens only.
        config_eos: End-of-sequence ids of the checkpoint's configs.
    """
    ours = () if params.ignore_eos else processor.stop_token_ids(config_eos)
    return tuple(dict.fromkeys([*ours, *params.stop_token_ids]))


def check_stops(processor: CascadeVLProcessor, stops: Sequence[str]) -> None:
    """Refuse stop strings that no answer's text can hold.

    Raises:
        RequestError: If one holds a control token, which is never part of the text.
    """
    for each in stops:
        if match := processor.builder.control.search(each):
            raise RequestError(
                f"the stop string {each!r} holds the control token {match[0]!r}, which answers "
                f"are written without; give its id in stop_token_ids instead"
            )


class AnswerText:
    """The text of one answer as its tokens come, up to the first thing that ends it.

    A stop string ends the answer with the token that completes it; the text is cut before it, and
    its beginning is not given out early. Of several in the text by then, the first counts.

    Attributes:
        text: What was given out.
        token_ids: Its tokens, without the one of `end_ids` that ended it.
        finish_reason: How it ended; None while it goes on.
        ended_by: The token or string that ended it, if one did.
    """

    def __init__(
        self, processor: CascadeVLProcessor, params: SamplingParams, ends: Sequence[int]
    ) -> None:
        """Begin an answer.

        Args:
            processor: Writes the text.
            params: When to end.
            ends: From `end_ids`.

        Raises:
            RequestError: If a stop string cannot come.
        """
        check_stops(processor, params.stop)
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.ended_by: int | str | None = None
        self._params, self._ends = params, frozenset(ends)
        self._stream, self._stops = TextStream(processor), Scanner(params.stop)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """What was given out."""
        return "".join(self._pieces)

    def take(self, token: int) -> str:
        """Take the next token.

        Returns:
            The text that has become certain with it; all the rest if it ends the answer.
        """
        assert self.finish_reason is None, "the answer has ended"
        if token in self._ends:
            self.ended_by = token
            return self._end("stop")
        self.token_ids.append(token)
        search = len(self.token_ids) >= self._params.min_tokens
        piece, found = self._stops.push(self._stream.push(token), search=search)
        self._pieces.append(piece)
        if found is not None:
            self.finish_reason, self.ended_by = "stop", found
        elif len(self.token_ids) == self._params.max_tokens:
            piece += self._end("length")
        return piece

    def cancel(self) -> str:
        """End the answer before its time; gives the rest of its text."""
        return self._end("cancelled")

    def _end(self, reason: FinishReason) -> str:
        """Give out what was held back; bytes of an unfinished character become U+FFFD."""
        self.finish_reason = reason
        piece, found = self._stops.push(self._stream.flush())
        if found is None:
            piece += self._stops.flush()
        elif reason != "cancelled":
            self.finish_reason, self.ended_by = "stop", found
        self._pieces.append(piece)
        return piece
