"""The store of rollouts: exact, in order, and unharmed by whatever ends a process."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.data.conftest import picture
from tests.data.some_rollouts import answer, rollout

from cascadevl.data.image import open_image
from cascadevl.data.journal import JOURNAL
from cascadevl.data.rollouts import ROLLOUTS, StoredRollouts, open_store
from cascadevl.errors import ConfigError, DataError
from cascadevl.types import ImageRef, Message, Rollout, VideoRef

SETTINGS = {"seed": 3}


def write(folder: Path, *rollouts: Rollout) -> None:
    with open_store(folder, SETTINGS) as store:
        store.append(rollouts)


def lines(folder: Path) -> list[bytes]:
    return (folder / ROLLOUTS).read_bytes().splitlines()


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    picture(8, 6).save(tmp_path / "a.png")
    sampled = replace(
        answer('It is "4"\n\\boxed{4} \u4e07 \U0001f600', correct=True),
        token_ids=(1, 151645),
        logprobs=(-0.1234567890123, -1e-9),
        rewards={"accuracy": 1.0, "format": 0.0},
        reward=0.9,
    )
    written = Rollout(
        problem_id='q:1:"x"\\',
        prompt=(
            Message.of("system", "Think."),
            Message.of("user", ImageRef(tmp_path / "a.png"), "\nA or B?"),
        ),
        reference="B",
        answers=(sampled, answer("A", cut=True)),
        weight_version="step 3",
        metric="choice",
        choices=(("A", "one"), ("B", "two")),
    )
    open_question = Rollout(
        problem_id="p", prompt=(Message.of("user", "Why?"),), reference="", answers=()
    )
    write(tmp_path / "store", written, open_question)
    assert list(StoredRollouts(tmp_path / "store")) == [open_question, written]


def test_drawn_pictures_are_kept_once_and_exactly(tmp_path: Path) -> None:
    drawn = picture(31, 17, seed=5)
    prompt = (Message.of("user", ImageRef(drawn), ImageRef(drawn.copy()), "\nSame?"),)
    transparent = picture(4, 4).convert("RGBA")
    transparent.putalpha(7)
    other = (Message.of("user", ImageRef(transparent)),)
    write(tmp_path, rollout(1, prompt=prompt), rollout(2, prompt=other))
    assert len(list((tmp_path / "images").iterdir())) == 2
    first, second = StoredRollouts(tmp_path)
    for part in first.prompt[0].parts[:2]:
        assert isinstance(part, ImageRef)
        seen = open_image(part, source="x")
        np.testing.assert_array_equal(np.asarray(seen), np.asarray(drawn))
    shown = second.prompt[0].parts[0]
    assert isinstance(shown, ImageRef)
    as_trained = open_image(ImageRef(transparent), source="x")
    np.testing.assert_array_equal(np.asarray(open_image(shown, source="x")), np.asarray(as_trained))


def test_a_folder_may_move_with_its_pictures(tmp_path: Path) -> None:
    write(tmp_path / "a", rollout(0))
    (tmp_path / "a").rename(tmp_path / "b")
    (moved,) = StoredRollouts(tmp_path / "b")
    part = moved.prompt[1].parts[0]
    assert isinstance(part, ImageRef)
    seen = open_image(part, source="x")
    np.testing.assert_array_equal(np.asarray(seen), np.asarray(picture(12, 9)))


def test_they_are_ordered_by_identity_however_they_came(tmp_path: Path) -> None:
    numbers = list(range(9))
    random.Random(1).shuffle(numbers)
    for number in numbers:
        write(tmp_path, rollout(number, weights=f"w{number % 2}"))
    stored = StoredRollouts(tmp_path)
    expected = sorted((f"w{number % 2}", f"sums:{number}") for number in range(9))
    assert stored.identities == expected
    assert [(each.weight_version, each.problem_id) for each in stored] == expected
    assert stored[4].problem_id == expected[4][1]
    assert len(stored) == 9


def test_the_same_question_to_the_same_weights_is_kept_once(tmp_path: Path) -> None:
    with open_store(tmp_path, SETTINGS) as store:
        assert store.append([rollout(1), rollout(2)]) == 2
        assert ("w1", "sums:1") in store
        assert ("w2", "sums:1") not in store
        changed = rollout(1, answers=())
        assert store.append([changed, rollout(1, weights="w2"), rollout(3), rollout(3)]) == 2
        assert len(store) == 4
    assert [len(each.answers) for each in StoredRollouts(tmp_path)] == [3, 3, 3, 3]
    with open_store(tmp_path, SETTINGS) as store:
        assert store.append([rollout(2)]) == 0
        assert len(store) == 4


def test_a_batch_is_kept_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    """At any byte where a process may end within the second batch."""
    write(tmp_path / "x", rollout(0), rollout(1))
    write(tmp_path / "x", rollout(2), rollout(3))
    whole, notes = lines(tmp_path / "x"), (tmp_path / "x" / JOURNAL).read_bytes()
    content = (tmp_path / "x" / ROLLOUTS).read_bytes()
    first_note = notes[: notes.rstrip(b"\n").rfind(b"\n") + 1]
    start = json.loads(first_note.splitlines()[-1])["sizes"][ROLLOUTS]
    chance = random.Random(0)
    for end in [
        start,
        start + 1,
        len(content),
        *(chance.randint(start, len(content)) for _ in range(9)),
    ]:
        (tmp_path / "x" / ROLLOUTS).write_bytes(content[:end])
        (tmp_path / "x" / JOURNAL).write_bytes(
            first_note + notes[len(first_note) : chance.randint(len(first_note), len(notes) - 1)]
        )
        assert len(StoredRollouts(tmp_path / "x")) == 2
        write(tmp_path / "x", rollout(2), rollout(3))
        assert lines(tmp_path / "x") == whole


def test_a_process_that_is_killed_at_random_moments_loses_nothing(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.data.kill_store", str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_picture_that_was_half_written_is_written_again(tmp_path: Path) -> None:
    write(tmp_path / "x", rollout(0))
    (name,) = (path.name for path in (tmp_path / "x" / "images").iterdir())
    (tmp_path / "y" / "images").mkdir(parents=True)
    (tmp_path / "y" / "images" / name.replace(".png", ".partial")).write_bytes(b"half")
    write(tmp_path / "y", rollout(0))
    image = (tmp_path / "y" / "images" / name).read_bytes()
    assert image == (tmp_path / "x" / "images" / name).read_bytes()


def test_what_is_being_written_is_read_as_far_as_it_is_complete(tmp_path: Path) -> None:
    with open_store(tmp_path, SETTINGS) as store:
        assert list(StoredRollouts(tmp_path)) == []
        store.append([rollout(1)])
        with (tmp_path / ROLLOUTS).open("ab") as file:
            file.write(lines(tmp_path)[0] + b"\n" + lines(tmp_path)[0][:40])
        assert [each.problem_id for each in StoredRollouts(tmp_path)] == ["sums:1"]


def test_two_at_a_time_do_not_write_one_store(tmp_path: Path) -> None:
    with (
        open_store(tmp_path, SETTINGS),
        pytest.raises(ConfigError, match="being written"),
        open_store(tmp_path, SETTINGS),
    ):
        pass
    write(tmp_path, rollout(1))


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    write(tmp_path, rollout(1))
    with (
        pytest.raises(ConfigError, match="seed = 3 and cannot go on with 4"),
        open_store(tmp_path, {"seed": 4}),
    ):
        pass
    assert len(StoredRollouts(tmp_path)) == 1


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no store of rollouts") as caught:
        StoredRollouts(tmp_path / "absent")
    assert caught.value.kind == "missing_file"


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    write(tmp_path, rollout(1))
    path = tmp_path / ROLLOUTS
    path.write_bytes(path.read_bytes().replace(b'"reference"', b'"referenze"'))
    with pytest.raises(DataError, match=r"rollouts\.jsonl, sums:1: the line is no rollout"):
        StoredRollouts(tmp_path)[0]
    path.write_bytes(path.read_bytes().replace(b'"problem_id"', b'"problem_ib"'))
    with pytest.raises(DataError, match=r"byte 0: the line is no rollout"):
        StoredRollouts(tmp_path)


def test_lines_may_have_their_fields_in_any_order(tmp_path: Path) -> None:
    write(tmp_path, rollout(2))
    (expected,) = StoredRollouts(tmp_path)
    fields = json.loads(lines(tmp_path)[0])
    line = json.dumps(dict(reversed(fields.items())), ensure_ascii=False) + "\n"
    assert len(line.encode()) == (tmp_path / ROLLOUTS).stat().st_size
    (tmp_path / ROLLOUTS).write_text(line, "utf-8")
    assert list(StoredRollouts(tmp_path)) == [expected]


def test_a_video_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    film = (Message.of("user", VideoRef(source=Path("a.mp4")), "What happens?"),)
    with open_store(tmp_path, SETTINGS) as store:
        with pytest.raises(DataError, match="sums:2"):
            store.append([rollout(1), rollout(2, prompt=film)])
        assert len(store) == 0
    assert lines(tmp_path) == []
