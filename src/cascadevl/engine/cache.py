"""The pages that keys and values are kept in: who uses them, and what they hold.

Plain bookkeeping without tensors. A page holds the keys and values of a fixed number of
neighbouring tokens in all layers. Several answers may use one page; it is free when none does. A
free page whose contents are known by a key keeps them until its place is needed, the longest unused
first, so that a next turn, or another question about the same picture, finds what was computed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64


@dataclass(frozen=True, slots=True, eq=False)
class PromptTokens:
    """The tokens of a prompt, visual ones in their places.

    Attributes:
        ids: Token ids.
        positions: Where each token sits (V2PE), float32.
        pictures: First token, end, and fingerprint of every picture, in order.
    """

    ids: Int64[np.ndarray, " tokens"]
    positions: Float[np.ndarray, " tokens"]
    pictures: tuple[tuple[int, int, bytes], ...] = ()

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    def followed_by(self, ids: Sequence[int]) -> PromptTokens:
        """The same with text behind it, each token one position further."""
        behind = self.positions[-1] + np.arange(1, len(ids) + 1, dtype=np.float32)
        return PromptTokens(
            np.concatenate([self.ids, np.asarray(ids, dtype=np.int64)]),
            np.concatenate([self.positions, behind.astype(np.float32)]),
            self.pictures,
        )


def page_keys(
    tokens: PromptTokens, page_tokens: int, known: Sequence[bytes] = ()
) -> tuple[bytes, ...]:
    """A key for every full page of a prompt, equal only where all keys and values are.

    A key depends on everything up to the page's end: tokens, positions and pictures. Keys hold a
    128-bit hash, so that equal keys of different contents do not occur.

    Args:
        tokens: The prompt.
        page_tokens: Tokens a page holds.
        known: Keys of its first pages, if they were worked out before.
    """
    keys = list(known)
    last = keys[-1] if keys else b""
    for page in range(len(keys), len(tokens) // page_tokens):
        start, stop = page * page_tokens, (page + 1) * page_tokens
        content = hashlib.blake2b(last, digest_size=16)
        content.update(tokens.ids[start:stop].tobytes())
        content.update(tokens.positions[start:stop].tobytes())
        for first, end, fingerprint in tokens.pictures:
            if first < stop and end > start:
                content.update(fingerprint)
        last = content.digest()
        keys.append(last)
    return tuple(keys)


class PagePool:
    """Which pages are used, by how many, and what the free ones still hold."""

    def __init__(self, num_pages: int) -> None:
        """Begin with all pages blank."""
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # free but known, longest unused first
        self._blank = bytearray(b"\x01" * num_pages)
        self._num_blank = num_pages
        self._cursor = 0

    @property
    def num_free(self) -> int:
        """Pages that nobody uses."""
        return self._num_blank + len(self._idle)

    def references(self, page: int) -> int:
        """How many use a page."""
        return self._references[page]

    def is_idle(self, page: int) -> bool:
        """Whether a page is free but known."""
        return page in self._idle

    def allocate(
        self, count: int, *, after: int | None = None, room: int = 0
    ) -> tuple[int, ...] | None:
        """Take free pages, each with one user; consecutive ones where there are such.

        Args:
            count: How many.
            after: Preferably those behind this page.
            room: Elsewhere, preferably where so many pages in a row are free, because more will
                be asked for.

        Returns:
            The pages, or None if there are not so many free ones: then nothing has changed.
        """
        if count > self.num_free:
            return None
        if after is not None and self._is_blank_run(after + 1, count):
            return self._take(range(after + 1, after + 1 + count))
        self._forget_oldest(max(count, min(room, self.num_free)) - self._num_blank)
        for wanted in (max(count, room), count):
            start = self._find_run(wanted)
            if start >= 0:
                self._cursor = start + wanted
                return self._take(range(start, start + count))
        pages, place = [], -1
        for _ in range(count):
            place = self._blank.index(1, place + 1)
            pages.append(place)
        return self._take(pages)

    def share(self, pages: Sequence[int]) -> None:
        """Add a user to pages, which may be free but known."""
        for page in pages:
            if self._references[page] == 0:
                del self._idle[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Take a user from each of a sequence's pages; those without any are free.

        Of pages freed together the last is forgotten first, because those before it can be used
        without it, but not the other way round.
        """
        for page in reversed(pages):
            assert self._references[page] > 0, f"page {page} was released more often than taken"
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._blank[page] = 1
                    self._num_blank += 1

    def learn(self, page: int, key: bytes) -> None:
        """Note what a used page holds; another page that holds the same stays the known one."""
        assert self._references[page] > 0, f"page {page} is free and may be overwritten"
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, keys: Sequence[bytes]) -> tuple[int, ...]:
        """Pages that hold the beginning of a prompt, as far as it is known."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return tuple(pages)

    def forget(self) -> None:
        """Forget what all pages hold, and where they were given out last."""
        self._forget_oldest(len(self._idle))
        self._key_of.clear()
        self._page_of.clear()
        self._cursor = 0

    def check(self, users: Sequence[Sequence[int]]) -> None:
        """Assert that these are all users and every page is accounted for once.

        Args:
            users: The pages of every sequence that holds any.
        """
        count = [0] * self.num_pages
        for pages in users:
            for page in pages:
                count[page] += 1
        assert count == self._references, "pages are used by others than those who hold them"
        used = sum(1 for each in count if each)
        assert used + len(self._idle) + self._num_blank == self.num_pages, "a page is lost"
        assert sum(self._blank) == self._num_blank
        assert all(not self._blank[page] and not count[page] for page in self._idle)
        assert {page: key for key, page in self._page_of.items()} == self._key_of
        assert all(page in self._key_of for page in self._idle)

    def _is_blank_run(self, start: int, count: int) -> bool:
        return self._blank.startswith(b"\x01" * count, start) if count else True

    def _find_run(self, count: int) -> int:
        """First page of a run of blank ones, behind the last search if possible; -1 if none."""
        run = b"\x01" * count
        found = self._blank.find(run, self._cursor)
        return found if found >= 0 else self._blank.find(run)

    def _take(self, pages: Sequence[int]) -> tuple[int, ...]:
        for page in pages:
            self._references[page] = 1
            self._blank[page] = 0
        self._num_blank -= len(pages)
        return tuple(pages)

    def _forget_oldest(self, count: int) -> None:
        for _ in range(count):
            page, _nothing = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            self._blank[page] = 1
            self._num_blank += 1
