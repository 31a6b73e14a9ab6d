"""A folder of text files as passages that can be searched: what answers are held against.

Ranked by BM25 (the library `bm25s`, extra ``guard``), by the words alone: no model, no network, and
a passage is found for reasons that can be seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascadevl.errors import ConfigError, DataError

SUFFIXES = (".txt", ".md", ".markdown", ".rst")
"""Files that are read; others are left alone."""

MAX_BYTES = 2**26
"""Most bytes of one file."""

_PASSAGE_WORDS = 120
_WORD = re.compile(r"[^\W_]+", re.UNICODE)
_STOP_WORDS = frozenset(
    (
        *("a", "an", "and", "are", "as", "at", "be", "been", "by", "can", "do", "does", "for"),
        *("from", "had", "has", "have", "in", "is", "it", "its", "of", "on", "or", "that", "the"),
        *("there", "this", "to", "was", "were", "what", "which", "who", "will", "with"),
    )
)


def terms(text: str) -> list[str]:
    """What of a text is searched by: its words in small letters, without plurals and small words.

    Args:
        text: The text.
    """
    words = (word.lower() for word in _WORD.findall(text))
    return [_singular(word) for word in words if word not in _STOP_WORDS]


def _singular(word: str) -> str:
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    is_plural = len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
    return word[:-1] if is_plural else word


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document.

    Attributes:
        source: File, from the folder on, and lines: ``faq.md:3-9``.
        text: What stands there.
    """

    source: str
    text: str


@dataclass(frozen=True, slots=True)
class Found:
    """A passage that was found.

    Attributes:
        passage: The passage.
        score: By BM25.
        overlap: Share of the search's different terms that it holds.
    """

    passage: Passage
    score: float
    overlap: float


def read_passages(folder: Path) -> list[Passage]:
    """The passages of all text files of a folder and those in it, in the order of their names.

    A passage is a paragraph, or several short ones together; a heading stays with what follows it.

    Args:
        folder: The folder.

    Raises:
        DataError: If it is not there, or a file cannot be read as UTF-8 or is too long.
        ConfigError: If it holds no text.
    """
    if not folder.is_dir():
        raise DataError(
            "there is no such folder of documents",
            kind="missing_file",
            source=str(folder),
            remedy="check the path",
        )
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    passages = [passage for file in files for passage in _passages(file, folder)]
    if not passages:
        raise ConfigError(
            f"{folder} holds no text: {len(files)} files end in {', '.join(SUFFIXES)}; "
            f"name a folder with documents"
        )
    return passages


def _passages(file: Path, folder: Path) -> Iterator[Passage]:
    name = file.relative_to(folder).as_posix()
    text = _read(file)
    start, lines, num_words = 1, list[str](), 0
    for number, line in enumerate(text.splitlines(), start=1):
        is_full = num_words >= _PASSAGE_WORDS
        begins_anew = not line.strip() or line.startswith("#")
        if lines and ((is_full and begins_anew) or num_words >= 2 * _PASSAGE_WORDS):
            yield Passage(f"{name}:{start}-{number - 1}", "\n".join(lines).strip())
            lines, num_words = [], 0
        if not lines and not line.strip():
            continue
        if not lines:
            start = number
        lines.append(line)
        num_words += len(line.split())
    if lines:
        yield Passage(f"{name}:{start}-{start + len(lines) - 1}", "\n".join(lines).strip())


def _read(file: Path) -> str:
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise DataError(
                f"the document has {size} bytes, and {MAX_BYTES} are the most",
                kind="too_long",
                source=str(file),
                remedy="split it",
            )
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the document is not UTF-8 ({error})",
            kind="encoding",
            source=str(file),
            remedy="save it as UTF-8",
        ) from error
    except OSError as error:
        raise DataError(
            f"the document cannot be read ({error})",
            kind="missing_file",
            source=str(file),
            remedy="check the path and who may read it",
        ) from error


class Documents:
    """Passages that can be searched."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        """Index them.

        Args:
            passages: At least one.

        Raises:
            ConfigError: If bm25s is not installed.
        """
        try:
            import bm25s
        except ImportError as error:
            raise ConfigError(
                "documents need the extra 'guard': pip install 'cascadevl[guard]'"
            ) from error
        self.passages = tuple(passages)
        self._terms = [frozenset(terms(each.text)) for each in passages]
        self._known = frozenset[str]().union(*self._terms)
        self._index: Any = bm25s.BM25()
        # A passage of small words alone has no terms; one that nobody searches keeps its place.
        tokens = [terms(each.text) or [""] for each in passages]
        self._index.index(tokens, show_progress=False)

    @classmethod
    def of_folder(cls, folder: Path) -> Documents:
        """Those of all text files of a folder.

        Args:
            folder: The folder.

        Raises:
            DataError: If it or a file of it cannot be read.
            ConfigError: If it holds no text, or bm25s is not installed.
        """
        return cls(read_passages(folder))

    def search(self, text: str, most: int, *, min_overlap: float = 0.0) -> list[Found]:
        """The passages that fit a text best, the best one first.

        Args:
            text: What is looked for.
            most: How many.
            min_overlap: Share of the text's different terms that a passage must hold.
        """
        wanted = list(dict.fromkeys(terms(text)))
        known = [term for term in wanted if term in self._known]
        if not known:
            return []
        scores = self._index.get_scores(known)
        found = [
            Found(passage, float(score), len(held.intersection(wanted)) / len(wanted))
            for passage, held, score in zip(self.passages, self._terms, scores, strict=True)
        ]
        fitting = [each for each in found if each.overlap >= min_overlap and each.score > 0]
        return sorted(fitting, key=lambda each: -each.score)[:most]
