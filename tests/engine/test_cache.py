"""The page pool: nothing lost, nothing owned twice, contents found only where they are equal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cascadevl.engine.cache import PagePool, PromptTokens, page_keys


def prompt(*ids: int, step: float = 1.0, pictures=()) -> PromptTokens:
    positions = np.arange(len(ids), dtype=np.float32) * np.float32(step)
    return PromptTokens(np.array(ids, dtype=np.int64), positions, tuple(pictures))


class Pool(RuleBasedStateMachine):
    """Any mix of taking, sharing, naming and releasing, against a plain model of it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12)
        self.holders: list[list[int]] = []
        self.contents: dict[int, bytes] = {}  # what is written in each page

    @rule(count=st.integers(0, 13), room=st.integers(0, 8), behind=st.booleans())
    def allocate(self, count: int, room: int, behind: bool) -> None:
        after = self.holders[-1][-1] if behind and self.holders and self.holders[-1] else None
        free = self.pool.num_free
        pages = self.pool.allocate(count, after=after, room=room)
        if pages is None:
            assert count > free
            assert self.pool.num_free == free
            return
        assert len(set(pages)) == count <= free
        assert not set(pages) & {page for held in self.holders for page in held}
        for page in pages:
            self.contents.pop(page, None)  # it will be overwritten
        self.holders.append(list(pages))

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data())
    def learn(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from([page for held in self.holders for page in held]))
        key = data.draw(st.sampled_from([b"a", b"b", b"c", b"d"]))
        if page not in self.contents:
            self.contents[page] = key
            self.pool.learn(page, key)

    @rule(keys=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=3))
    def find_and_share(self, keys: list[bytes]) -> None:
        pages = self.pool.find(keys)
        assert [self.contents[page] for page in pages] == keys[: len(pages)]
        self.pool.share(pages)
        self.holders.append(list(pages))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.holders) - 1))
        self.pool.release(self.holders.pop(number))

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        assert self.pool.find([b"a"]) == self.pool.find([b"d"]) == ()

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        self.pool.check(self.holders)
        used = {page for held in self.holders for page in held}
        assert self.pool.num_free == 12 - len(used)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_pages_are_consecutive_where_they_can_be() -> None:
    pool = PagePool(32)
    first, second = pool.allocate(2, room=8), pool.allocate(2, room=8)
    assert first == (0, 1)
    assert second == (8, 9)  # the first one's room is left alone
    assert pool.allocate(3, after=1) == (2, 3, 4)
    assert pool.allocate(1, after=7) not in ((8,), (9,))


def test_room_that_is_not_there_is_no_reason_to_fail() -> None:
    pool = PagePool(6)
    assert pool.allocate(2, room=4) == (0, 1)
    assert pool.allocate(2, room=4) == (2, 3)
    pool.release([0, 1])
    assert pool.allocate(4) is not None
    assert pool.num_free == 0


def test_what_was_unused_longest_is_forgotten_first_and_ends_before_beginnings() -> None:
    pool = PagePool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for pages, names in ((old, "ab"), (new, "cd")):
        for page, name in zip(pages, names, strict=True):
            pool.learn(page, name.encode())
    pool.release(old)
    pool.release(new)
    assert pool.num_free == 4
    taken = pool.allocate(1)
    assert taken == (old[1],)  # the end of the older one
    assert pool.find([b"a"]) == (old[0],)
    assert pool.find([b"c", b"d"]) == new


def test_a_page_in_use_can_be_found_and_is_not_overwritten() -> None:
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    pool.learn(page, b"a")
    pool.share(pool.find([b"a"]))
    pool.release([page])
    assert pool.references(page) == 1
    assert pool.allocate(2) is None


def test_releasing_twice_is_a_bug() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(pages)


def test_keys_depend_on_everything_before_the_end_of_a_page_and_on_nothing_behind() -> None:
    base = prompt(1, 2, 3, 4, 5, 6, 7)
    keys = page_keys(base, 2)
    assert len(keys) == 3
    assert len(set(keys)) == 3
    assert page_keys(prompt(1, 2, 3, 4, 9, 9), 2)[:2] == keys[:2]
    assert page_keys(prompt(9, 2, 3, 4, 5, 6), 2)[1] != keys[1]  # an earlier page differs
    assert page_keys(prompt(1, 2, 3, 4, step=0.5), 2)[0] != keys[0]  # positions differ
    seen = [(2, 4, b"cat")], [(2, 4, b"dog")]
    cat, dog = (page_keys(prompt(1, 2, 3, 4, 5, 6, pictures=each), 2) for each in seen)
    assert cat[0] == dog[0] == keys[0]
    assert cat[1] != dog[1]
    assert cat[2] != dog[2]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 5), st.data())
def test_keys_worked_out_before_are_gone_on_from(
    ids: list[int], page_tokens: int, data: st.DataObject
) -> None:
    whole = page_keys(prompt(*ids), page_tokens)
    known = data.draw(st.integers(0, len(whole)))
    assert page_keys(prompt(*ids), page_tokens, whole[:known]) == whole


def test_a_continued_prompt_has_the_keys_of_one_that_was_long_from_the_beginning() -> None:
    short, long = prompt(1, 2, 3), prompt(1, 2, 3, 4, 5, 6)
    assert page_keys(short.followed_by([4, 5, 6]), 2) == page_keys(long, 2)
