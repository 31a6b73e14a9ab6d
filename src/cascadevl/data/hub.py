"""Records from a Hugging Face `datasets` data set: Parquet, Arrow, streamed, or already in memory.

Rows hold what the JSONL files hold, under the same names, pictures as bytes or as paths. They
are kept undecoded until they are needed, so that a broken picture is met by `open_image` and its
limits like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cascadevl.data.meta import HUB, DatasetSpec, StreamSpec
from cascadevl.data.parsing import parse_record
from cascadevl.data.records import JsonlSource, repeated_length
from cascadevl.data.row_stream import RowStream
from cascadevl.data.source import Source, StreamedSource
from cascadevl.errors import ConfigError, DataError
from cascadevl.types import Record

if TYPE_CHECKING:
    import datasets

_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json"}


class HuggingFaceSource:
    """The rows of a map-style `datasets.Dataset` as records.

    Columns: ``conversations`` or ``messages``, or those of preference pairs; ``image`` or
    ``images``, ``video`` or ``videos`` if any; ``id`` if any.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        name: str,
        root: Path | None = None,
        max_tiles: int | None = None,
        augment: bool = False,
        repeat_time: float = 1.0,
    ) -> None:
        """Wrap a data set.

        Args:
            dataset: The rows.
            name: Name of the data set, used in errors and counts.
            root: Folder that relative image and video paths start from.
            max_tiles: The data set's own limit of tiles a picture.
            augment: Whether pictures are degraded in training.
            repeat_time: How often each row is used in an epoch, see `DatasetSpec`.

        Raises:
            DataError: Of kind ``bad_field`` if no column holds conversations.
        """
        _check_columns(dataset.column_names, name)
        self.name = name
        self._rows = _undecoded(dataset)
        self._root, self._max_tiles, self._augment = root, max_tiles, augment
        self._length = repeated_length(len(dataset), repeat_time)

    def __len__(self) -> int:
        """Number of records in an epoch, repeats included."""
        return self._length

    def __getitem__(self, index: int, /) -> Record:
        """Read one record.

        Args:
            index: From 0 to ``len - 1``.

        Raises:
            DataError: If the row is not a record.
            IndexError: If there is no such record.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"record {index} of {self._length} in {self.name}")
        repeat, row = divmod(index, len(self._rows))
        return parse_record(
            self._rows[row],
            source=f"{self.name}:{row}",
            root=self._root,
            position=f"{row}#{repeat + 1}" if repeat else f"{row}",
            dataset=self.name,
            max_tiles=self._max_tiles,
            augment=self._augment,
        )


def load_rows(path: Path) -> datasets.Dataset:
    """Open a local data set without the network.

    Args:
        path: A ``.parquet``, ``.arrow`` or ``.json`` file, or a folder that
            `datasets.Dataset.save_to_disk` wrote.

    Raises:
        DataError: Of kind ``missing_file`` or ``corrupt_dataset``.
        ConfigError: If the file has another suffix, or `datasets` is not installed.
    """
    library = _datasets()
    if not path.exists():
        raise DataError(
            f"the data set {str(path)!r} does not exist",
            kind="missing_file",
            remedy="check the path",
        )
    if not path.is_dir() and path.suffix not in _FORMATS:
        raise _unknown_suffix(path)
    with _opening(path, "write it again with datasets' save_to_disk or to_parquet"):
        if path.is_dir():
            rows = library.load_from_disk(str(path))
        else:
            rows = library.load_dataset(
                _FORMATS[path.suffix], data_files=str(path), split="train", keep_in_memory=False
            )
    if not isinstance(rows, library.Dataset):
        raise DataError(
            f"the folder {str(path)!r} holds several splits: {', '.join(rows)}",
            kind="corrupt_dataset",
            remedy="give the folder of one split",
        )
    return rows


def load_stream(annotation: Path, spec: StreamSpec) -> datasets.IterableDataset:
    """Open a data set to be streamed.

    Args:
        annotation: ``hub:NAME`` for one of the Hub (or a folder in the Hub's form), read over
            the network as training goes; else a ``.parquet``, ``.arrow`` or ``.json`` file, or a
            folder of Parquet files.
        spec: Names subset, split and revision of one of the Hub.

    Raises:
        DataError: Of kind ``missing_file`` or ``corrupt_dataset``.
        ConfigError: If the file has another suffix, or `datasets` is not installed.
    """
    library = _datasets()
    name = str(annotation)
    if name.startswith(HUB):
        with _opening(annotation, "check its name, subset, split and revision, and the network"):
            return library.load_dataset(
                name.removeprefix(HUB),
                spec.subset,
                split=spec.split,
                revision=spec.revision,
                streaming=True,
            )
    files = sorted(map(str, annotation.rglob("*.parquet"))) if annotation.is_dir() else [name]
    if not files:
        raise DataError(
            f"the folder {name!r} holds no Parquet file",
            kind="missing_file",
            remedy="give a folder of Parquet files; one that datasets' save_to_disk wrote is read "
            'by number, without "stream"',
        )
    form = "parquet" if annotation.is_dir() else _FORMATS.get(annotation.suffix)
    if form is None:
        raise _unknown_suffix(annotation)
    with _opening(annotation, "write it again with datasets' to_parquet"):
        return library.load_dataset(form, data_files=files, split="train", streaming=True)


def open_source(spec: DatasetSpec) -> Source | StreamedSource:
    """The records of a meta file's entry, whatever stores them.

    Entries that name a task are opened by `cascadevl.tasks.naming.open_entry`.

    Args:
        spec: The entry.

    Raises:
        DataError: If its file cannot be read.
        ConfigError: If its file has an unknown suffix, or `datasets` is needed and missing.
    """
    if spec.stream is not None:
        rows = load_stream(spec.annotation, spec.stream)
        if rows.column_names is not None:
            _check_columns(rows.column_names, spec.name)
        return RowStream(
            rows,
            name=spec.name,
            num_lanes=spec.stream.lanes,
            buffer_rows=spec.stream.buffer,
            root=spec.root,
            max_tiles=spec.max_dynamic_patch,
            augment=spec.data_augment,
        )
    if spec.annotation.suffix == ".jsonl":
        return JsonlSource(spec)
    return HuggingFaceSource(
        load_rows(spec.annotation),
        name=spec.name,
        root=spec.root,
        max_tiles=spec.max_dynamic_patch,
        augment=spec.data_augment,
        repeat_time=spec.repeat_time,
    )


def _check_columns(names: Sequence[str], source: str) -> None:
    if not {"conversations", "messages", "question"} & set(names):
        raise DataError(
            f"the data set has the columns {', '.join(names)}",
            kind="bad_field",
            source=source,
            field="conversations",
            remedy="name the column of turns 'conversations' or 'messages'; preference pairs have "
            "'question', 'chosen' and 'rejected'",
        )


@contextmanager
def _opening(path: Path, remedy: str) -> Iterator[None]:
    """Word what the library raises for a data set that it cannot open."""
    try:
        yield
    except (OSError, ValueError, _datasets().exceptions.DatasetsError) as error:
        raise DataError(
            f"the data set {str(path)!r} cannot be opened ({error})",
            kind="corrupt_dataset",
            remedy=remedy,
        ) from error


def _unknown_suffix(path: Path) -> ConfigError:
    return ConfigError(
        f"{str(path)!r} ends with {path.suffix!r}, but a data set is a folder or ends with "
        f"{', '.join(_FORMATS)}"
    )


def _undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    """The same rows, with pictures as bytes and paths instead of decoded ones."""
    image = _datasets().Image
    features = dataset.features.copy()

    def undecoded(feature: Any) -> Any:  # datasets' features have no common base class
        if isinstance(feature, image):
            return image(decode=False)
        if isinstance(getattr(feature, "feature", None), image):
            return type(feature)(image(decode=False))
        return feature

    changed = {name: undecoded(feature) for name, feature in features.items()}
    for name, feature in changed.items():
        if feature != features[name]:
            dataset = dataset.cast_column(name, feature)
    return dataset


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "the package `datasets` is not installed; pip install 'cascadevl[data]'"
        ) from error
    module: ModuleType = datasets
    return module
