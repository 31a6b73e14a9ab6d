"""Folders of documents: which passages there are, and which are found for which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascadevl.data import documents
from cascadevl.data.documents import Documents, Passage, read_passages, terms
from cascadevl.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "more").mkdir()
    (tmp_path / "towers.md").write_text(
        "# Towers\n\nThe Eiffel tower was built in 1889. It is tall.\n\n\n# Cats\nCats purr.\n"
    )
    (tmp_path / "more" / "dogs.TXT").write_text("\ufeffDogs bark at towers.", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_short_files_are_one_passage_with_its_lines(folder: Path):
    passages = read_passages(folder)
    assert [each.source for each in passages] == ["more/dogs.TXT:1-1", "towers.md:1-7"]
    assert passages[0].text == "Dogs bark at towers."
    assert passages[1].text.startswith("# Towers\n\nThe Eiffel")


def test_long_files_are_cut_at_paragraphs_and_nothing_is_lost(tmp_path: Path):
    paragraphs = [f"{number} " + "word " * 70 for number in range(7)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    passages = read_passages(tmp_path)
    assert [each.source for each in passages] == [
        "a.txt:1-3",
        "a.txt:5-7",
        "a.txt:9-11",
        "a.txt:13-13",
    ]
    lines = (tmp_path / "a.txt").read_text().splitlines()
    for each in passages:
        first, _, last = each.source.partition(":")[2].partition("-")
        assert "\n".join(lines[int(first) - 1 : int(last)]).strip() == each.text
    assert [each.text.split()[0] for each in passages] == ["0", "2", "4", "6"]


def test_a_text_without_paragraphs_is_cut_as_well(tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n".join(["ten words " * 5] * 100))
    sizes = [len(each.text.split()) for each in read_passages(tmp_path)]
    assert sum(sizes) == 1000
    assert max(sizes) <= 250


def test_terms_are_words_in_one_form():
    assert terms("Is there a Dog? Dogs, the cities' 2 buses (été)") == [
        *("dog", "dog", "city", "2", "buse", "été"),
    ]


def test_passages_are_found_by_their_words(folder: Path):
    found = Documents.of_folder(folder).search("Was the Eiffel tower built in 1889?", 5)
    assert [each.passage.source for each in found] == ["towers.md:1-7", "more/dogs.TXT:1-1"]
    assert found[0].score > found[1].score > 0
    assert (found[0].overlap, found[1].overlap) == (1.0, 0.25)
    (best,) = Documents.of_folder(folder).search("Eiffel tower 1889", 5, min_overlap=0.5)
    assert best.passage.source == "towers.md:1-7"


def test_what_nobody_speaks_of_is_not_found(folder: Path):
    library = Documents.of_folder(folder)
    assert library.search("zebra", 3) == []
    assert library.search("is there a", 3) == []
    assert library.search("", 3) == []


def test_ranks_are_those_of_bm25_by_hand():
    """Robertson's formula with idf = ln(1 + (n - df + 0.5) / (df + 0.5)), k1 1.5 and b 0.75."""
    import math

    texts = ["cat cat dog", "cat mouse", "bird", "dog dog dog dog cat zebra"]
    library = Documents([Passage(f"{n}", text) for n, text in enumerate(texts)])
    split = [text.split() for text in texts]
    mean = sum(map(len, split)) / len(split)

    def score(words: list[str], term: str) -> float:
        df = sum(term in each for each in split)
        tf = words.count(term)
        weight = tf / (tf + 1.5 * (0.25 + 0.75 * len(words) / mean))
        return math.log(1 + (len(split) - df + 0.5) / (df + 0.5)) * weight

    expected = {f"{n}": score(words, "cat") + score(words, "dog") for n, words in enumerate(split)}
    found = {each.passage.source: each.score for each in library.search("cats and a dog", 4)}
    assert found == pytest.approx(
        {key: value for key, value in expected.items() if value}, rel=1e-5
    )


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match="no such folder"):
        read_passages(tmp_path / "absent")
    with pytest.raises(ConfigError, match="holds no text: 0 files"):
        read_passages(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        read_passages(tmp_path)
    monkeypatch.setattr(documents, "MAX_BYTES", 2)
    with pytest.raises(DataError, match="has 3 bytes, and 2 are the most"):
        read_passages(tmp_path)
