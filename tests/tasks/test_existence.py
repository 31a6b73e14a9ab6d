"""Questions of existence: true to the pictures, balanced, and negatives of three kinds."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cascadevl.errors import ConfigError, DataError
from cascadevl.tasks.base import Scene
from cascadevl.tasks.easy_vqa import load_pictures
from cascadevl.tasks.existence import MATERIALS, NEGATIVES, Existence, count, negatives
from cascadevl.tasks.naming import task_named
from cascadevl.tasks.pope import Pope, read_pope


def named(prompt: str) -> str:
    found = re.fullmatch(r"Is there an? (.+)\?", prompt)
    assert found is not None
    return found[1]


def wrong_of(scene: Scene) -> list[str]:
    return [named(each.prompt) for each in scene.questions if each.answer == "no"]


@pytest.mark.parametrize("how", NEGATIVES)
@pytest.mark.parametrize("material", list(MATERIALS))
def test_answers_are_true_to_the_description_and_balanced(material: str, how: str):
    task = Existence(px=16, material=material, difficulty=how)
    for index in range(40):
        scene = task.draw("test", 1, index)
        for question in scene.questions:
            words = named(question.prompt).removesuffix(" shape")
            is_there = re.search(rf"\b{words}\b", scene.description) is not None
            assert question.answer == ("yes" if is_there else "no")
        counts = Counter(each.answer for each in scene.questions)
        assert counts["yes"] == counts["no"] <= 3


def test_what_a_picture_does_not_tell_is_not_asked():
    """Some pictures of easy-VQA have no question that tells their colour, or none for the form."""
    material = MATERIALS["easy_vqa"]
    partly = [n for n in range(1000) if material.sight("test", 0, n).unknown]
    assert 0 < len(partly) < 500
    for index in partly[:20]:
        sighting = material.sight("test", 0, index)
        asked = negatives(np.random.default_rng(0), "easy_vqa", sighting, "random")
        assert not {*asked} & {*sighting.unknown}
        assert {*asked, *sighting.unknown, *sighting.objects} == {*material.vocabulary}
    assert len(load_pictures("test")) == 1000


@pytest.mark.parametrize("material", list(MATERIALS))
def test_the_three_kinds_share_pictures_and_what_is_there(material: str):
    for index in range(10):
        scenes = [
            Existence(px=16, material=material, difficulty=how).draw("test", 0, index)
            for how in NEGATIVES
        ]
        assert len({scene.images[0].tobytes() for scene in scenes}) == 1
        yes = [[q.prompt for q in s.questions if q.answer == "yes"] for s in scenes]
        assert yes[0] == yes[1] == yes[2]


def test_negatives_are_of_their_kind():
    counts = count("shapes")
    at = {"single": {how: [] for how in NEGATIVES}, "beside": {how: [] for how in NEGATIVES}}
    for index in range(200):
        sighting = MATERIALS["shapes"].sight("test", 0, index)
        for how in NEGATIVES:
            wrong = wrong_of(Existence(px=16, difficulty=how).draw("test", 0, index))
            assert not {*wrong} & {*sighting.objects}
            at["single"][how] += [counts.single[thing] for thing in wrong]
            at["beside"][how] += [
                sum(counts.pairs[thing, each] for each in sighting.objects) for thing in wrong
            ]
    mean = {what: {how: np.mean(each) for how, each in of.items()} for what, of in at.items()}
    assert mean["single"]["popular"] > 1.5 * mean["single"]["random"]
    assert mean["beside"]["adversarial"] > mean["beside"]["popular"]
    assert mean["beside"]["adversarial"] > 1.5 * mean["beside"]["random"]


def test_one_question_a_picture_is_yes_half_of_the_time():
    task = Existence(px=16, num_questions=1)
    answers = [task.draw("test", 0, index).questions[0].answer for index in range(400)]
    assert 160 < answers.count("yes") < 240


def test_settings():
    assert task_named("existence:adversarial@32") == Existence(px=32, difficulty="adversarial")
    scene = Existence(px=16, wording="Is there {} in the image?").draw("test", 0, 0)
    assert scene.questions[0].prompt.endswith(" in the image?")
    with pytest.raises(ConfigError, match="no material 'coco'"):
        Existence(material="coco")
    with pytest.raises(ConfigError, match="no place"):
        replace(Existence(), wording="Is it there?")


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


LINE = {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "yes"}


def test_the_released_form_is_read(tmp_path: Path):
    PIL.Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png")
    file = write(tmp_path / "coco_pope_random.json", LINE, LINE | {"question_id": 2, "label": "no"})
    task = Pope(path=file, images=tmp_path)
    assert task.num_questions == 2
    first, second = (task.draw("test", 0, index) for index in range(2))
    assert first.scene_id == "pope/a.png/1"
    assert first.image is not None
    assert first.image.size == (6, 4)
    assert [each.questions[0].answer for each in (first, second)] == ["yes", "no"]
    assert first.questions[0].prompt == LINE["text"]
    with pytest.raises(ConfigError, match="has 2 questions"):
        task.draw("test", 0, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": "maybe"}, "field 'label': is 'maybe'; give yes or no"),
        ({"label": None}, "field 'label': is missing"),
        ({"image": 3}, "field 'image': is a value of type int"),
        ({"question_id": None}, "field 'question_id': is missing"),
    ],
)
def test_lines_of_another_form_are_named(tmp_path: Path, change: dict[str, object], words: str):
    file = write(tmp_path / "a.json", LINE, LINE | change)
    with pytest.raises(DataError, match=r"a\.json:2: ") as error:
        read_pope(file)
    assert words in str(error.value)
    with pytest.raises(DataError, match="an object"):
        read_pope(write(tmp_path / "b.json", [1]))


def test_a_picture_that_is_not_there_is_named(tmp_path: Path):
    file = write(tmp_path / "a.json", LINE)
    with pytest.raises(DataError, match=r"a\.json:1.*a\.png"):
        Pope(path=file, images=tmp_path).draw("test", 0, 0)
