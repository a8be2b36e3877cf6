"""The indexed dataset: sequences of token ids in a `.bin`, where each begins in an `.idx`.

Owns the byte format (Megatron's MMapIndexedDataset, so files go both ways), reading it by memory map and writing it
in bounded memory. Knows nothing of text, tokenizers or samples.

The `.idx`, little endian and without padding: 9 bytes of magic; u64 version 1; u8 code of the token type; u64 number
of sequences N; u64 length D of the document index; N x i32 lengths in tokens; N x i64 offsets in the `.bin` in bytes;
D x i64 document boundaries in sequences, from 0 to N. The `.bin` holds the tokens of all sequences back to back."""

import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from cordee.errors import Problem, ProblemError, raise_all
from cordee.files import create_new, sync_directory

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER = struct.Struct("<9sQBQQ")
_LENGTH, _OFFSET = np.dtype("<i4"), np.dtype("<i8")
_BLOCK = 1 << 16  # numbers of an index that are in memory at a time
_PIECE = 1 << 20  # bytes of a file that are read at a time to find whether it changed

Tokens = npt.NDArray[Any]


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def fingerprint(path: Path, bound: int = 1 << 30) -> int:
    """A number that another content of a file most likely changes: CRC-32 of its size and of at most `bound` bytes.

    A file up to `bound` is read whole, and any change of up to 32 bits in a row is seen for certain. Of a larger one
    the first and last MiB and pieces evenly between them are read, `bound` bytes together: another tokenizer, order
    or selection of texts changes them, while a single change elsewhere is seen with the chance bound / size. No proof
    against somebody who means to deceive. Takes about a second per GiB that is read."""
    size = path.stat().st_size
    value = zlib.crc32(size.to_bytes(8, "little"))
    count = -(-size // _PIECE) if size <= bound else max(2, bound // _PIECE)
    with path.open("rb") as file:  # buffered: a raw read may give less than was asked for
        for number in range(count):
            file.seek(number * _PIECE if size <= bound else number * (size - _PIECE) // (count - 1))
            value = zlib.crc32(file.read(_PIECE), value)
    return value


class IndexedDataset:
    """The sequences of a `.bin`/`.idx` pair, read by memory map.

    `dataset[i]` is sequence i as an array of `dtype` (a view of the file: do not write to it), `dataset[a:b]` a list
    of them. `sequence_lengths` is int32 [sequences], `sequence_offsets` int64 [sequences] in bytes and
    `document_indices` int64 [documents + 1] in sequences.

    Opening checks what costs nothing (both files there, header, sizes); `problems` checks every entry.

    Raises `ProblemError` if the pair is incomplete, damaged or of another format."""

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        self.dtype, sequences, documents = _read_header(self.prefix)
        index = np.memmap(idx_path(prefix), mode="r", dtype=np.uint8)
        start = _HEADER.size
        self.sequence_lengths = np.frombuffer(index, _LENGTH, sequences, start)
        start += self.sequence_lengths.nbytes
        self.sequence_offsets = np.frombuffer(index, _OFFSET, sequences, start)
        start += self.sequence_offsets.nbytes
        self.document_indices = np.frombuffer(index, _OFFSET, documents, start)
        raise_all(_edge_problems(self))
        # A memory map of an empty file is an error; a plain view of the map slices faster than a memmap.
        size = bin_path(prefix).stat().st_size
        self._tokens = np.asarray(np.memmap(bin_path(prefix), self.dtype, "r")) if size else np.empty(0, self.dtype)

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...

    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        if isinstance(index, slice):
            return [self.get(i) for i in range(*index.indices(len(self)))]
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> Tokens:
        """`length` tokens of sequence `index` from token `offset` on, by default all to its end."""
        start = int(self.sequence_offsets[index]) // self.dtype.itemsize
        stop = start + int(self.sequence_lengths[index])
        start += offset
        return self._tokens[start : stop if length is None else min(start + length, stop)]

    def gather(self, sequences: Sequence[int] | npt.NDArray[Any], first: int, last: int) -> npt.NDArray[np.int64]:
        """Tokens of whole sequences one after the other as int64, but from token `first` of the first sequence on and
        only `last` tokens of the last one (counted from its own beginning)."""
        starts = self.sequence_offsets[sequences] // self.dtype.itemsize
        stops = starts + self.sequence_lengths[sequences]
        stops[-1] = starts[-1] + last
        starts[0] += first
        pieces = zip(starts.tolist(), stops.tolist(), strict=True)
        return np.concatenate([self._tokens[start:stop] for start, stop in pieces], dtype=np.int64, casting="unsafe")

    def tokens_between(self, first: int, last: int) -> int:
        """Tokens of the sequences `[first, last)`, by where they begin and end: no other entry is read."""
        if first == last:
            return 0
        size = int(self.sequence_offsets[last - 1]) - int(self.sequence_offsets[first])
        return size // self.dtype.itemsize + int(self.sequence_lengths[last - 1])

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        return self._tokens.size

    def problems(self) -> list[Problem]:
        """What is wrong inside the index. Reads all of it: for a check before a run, not at every opening."""
        return list(_entry_problems(self))

    def __reduce__(self) -> "tuple[type[IndexedDataset], tuple[str]]":
        return type(self), (self.prefix,)


def _read_header(prefix: str) -> tuple[np.dtype[Any], int, int]:
    """Type of the tokens, number of sequences, length of the document index; both files are there, `.idx` whole."""
    raise_all(_missing(prefix))
    path = idx_path(prefix)
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        why = f"it has {size} bytes, fewer than the header's {_HEADER.size}"
        raise ProblemError([_corrupt(path, why, _HEADER.size)])
    magic, version, code, sequences, documents = _HEADER.unpack(header)
    expected = _HEADER.size + sequences * (_LENGTH.itemsize + _OFFSET.itemsize) + documents * _OFFSET.itemsize
    if magic != MAGIC:
        why, limit = f"it begins with {magic!r} instead of {MAGIC!r}, so it is no index of tokens", MAGIC
    elif version != VERSION:
        why, limit = f"it has version {version}; only version {VERSION} is known", VERSION
    elif code not in DTYPES:
        limit = sorted(DTYPES)
        why = f"its code {code} for the type of the tokens is unknown; known are {limit}"
    elif size not in (expected, expected + sequences):  # a multimodal index has one more byte per sequence
        what = "is cut off" if size < expected else "is too long"
        why, limit = f"it {what}: {size} bytes where its header announces {expected}", expected
    else:
        return DTYPES[code], sequences, documents
    raise ProblemError([_corrupt(path, why, limit)])


def _missing(prefix: str) -> Iterator[Problem]:
    pair = (bin_path(prefix), idx_path(prefix))
    absent = [path for path in pair if not path.is_file()]
    if len(absent) == 2:
        is_file = prefix.endswith((".bin", ".idx")) and Path(prefix).is_file()
        fix = f"give the prefix: {prefix[:-4]}" if is_file else "check the path; `cordee preprocess` writes such pairs"
        also = "" if Path(prefix).exists() else "no such file, and "
        why = f"there is {also}neither {pair[0].name} nor {pair[1].name}"
        yield Problem("dataset", prefix, why, fix, "unreadable", limit=tuple(path.name for path in absent))
    elif absent:
        why = f"{absent[0].name} of the pair is missing"
        fix = "copy the missing file beside the other, or preprocess again"
        yield Problem("dataset", prefix, why, fix, "unreadable", limit=(absent[0].name,))


def _corrupt(path: Path, why: str, limit: object) -> Problem:
    return Problem("dataset", path, why, "copy or preprocess it again", limit=limit)


def _edge_problems(dataset: IndexedDataset) -> Iterator[Problem]:
    """Problems that the first and last entries and the size of the `.bin` show."""
    path = idx_path(dataset.prefix)
    documents = dataset.document_indices
    if len(documents) == 0 or documents[0] != 0 or documents[-1] != len(dataset):
        edges = f"from {documents[0]} to {documents[-1]}" if len(documents) else "nowhere"
        why = f"its documents run {edges} instead of from 0 to its {len(dataset)} sequences"
        yield _corrupt(path, why, (0, len(dataset)))
    size = bin_path(dataset.prefix).stat().st_size
    end = 0
    if len(dataset):
        end = int(dataset.sequence_offsets[-1]) + int(dataset.sequence_lengths[-1]) * dataset.dtype.itemsize
    if size != end:
        what = "is cut off" if size < end else "does not belong to it"
        why = f"the .bin {what}: it has {size} bytes, but the .idx accounts for {end}"
        yield _corrupt(bin_path(dataset.prefix), why, end)


def _entry_problems(dataset: IndexedDataset) -> Iterator[Problem]:
    path = idx_path(dataset.prefix)
    if np.any(np.diff(dataset.document_indices) < 0):
        yield _corrupt(path, "its document boundaries go backwards", "ascending boundaries")
    offset = 0
    for start in range(0, len(dataset), _BLOCK):
        lengths = dataset.sequence_lengths[start : start + _BLOCK]
        if np.any(lengths < 0):
            sequence = start + int(np.argmax(lengths < 0))
            yield _corrupt(path, f"sequence {sequence} has a negative length", (sequence, 0))
            return
        ends = offset + np.cumsum(lengths, dtype=np.int64) * dataset.dtype.itemsize
        wrong = dataset.sequence_offsets[start : start + _BLOCK] != np.concatenate(([offset], ends[:-1]))
        if np.any(wrong):
            sequence = start + int(np.argmax(wrong))
            end = offset if sequence == start else int(ends[sequence - start - 1])
            yield _corrupt(path, f"sequence {sequence} does not begin where the one before it ends", (sequence, end))
            return
        offset = int(ends[-1])


class IndexedDatasetBuilder:
    """Writes a `.bin`/`.idx` pair in memory that does not grow with it.

    Everything goes to `<prefix>.bin.incomplete` and its like; `finalize` flushes the files to disk and gives them
    their names, `abort` removes them. As a context manager it does the one or the other, so that a failure leaves
    nothing behind under the final names:

        with IndexedDatasetBuilder("corpus_text_document") as builder:
            builder.add_sequence([1, 2, 3])
            builder.end_document()"""

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike = np.int32):
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        assert self.dtype in _CODES, f"{self.dtype} cannot be stored"
        self.sequences = 0
        self.tokens = 0
        self._documents = 1  # boundaries: the first is 0
        paths = [bin_path(prefix), idx_path(prefix), Path(f"{prefix}.doc")]
        self._temporary = [path.with_name(path.name + ".incomplete") for path in paths]
        self._bin, self._idx, self._doc = (create_new(path) for path in self._temporary)
        # The lengths follow the header in the index, so they are written where they stay.
        self._idx.write(bytes(_HEADER.size))
        self._doc.write(np.zeros(1, _OFFSET).tobytes())

    def add_sequence(self, tokens: Sequence[int] | Tokens) -> None:
        """Append one sequence [length]. Raises `ValueError` for a token that `dtype` cannot hold."""
        self._write(self._cast(tokens), [len(tokens)])

    def end_document(self) -> None:
        """The sequences since the last call are a document."""
        self._end_documents([self.sequences])

    def add_documents(self, tokens: Sequence[int] | Tokens, lengths: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append documents of one sequence each: all their tokens, and how many belong to each."""
        before = self.sequences
        self._write(self._cast(tokens), lengths)
        self._end_documents(np.arange(before + 1, self.sequences + 1))

    def add_index(self, prefix: str | Path) -> None:
        """Append another pair, sequences and documents. Raises `ProblemError` if its tokens have another type."""
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            why = f"its tokens are {other.dtype}, those before it {self.dtype}"
            fix = "preprocess it again, or merge it apart"
            raise ProblemError.of("dataset", prefix, why, fix, "type", limit=self.dtype)
        for start in range(0, len(other.document_indices), _BLOCK):
            # The first boundary is the end of what is already here.
            self._end_documents(other.document_indices[max(start, 1) : start + _BLOCK] + self.sequences)
        for start in range(0, len(other), _BLOCK):
            self._add_lengths(other.sequence_lengths[start : start + _BLOCK])
        with open(bin_path(prefix), "rb") as file:
            shutil.copyfileobj(file, self._bin, 1 << 20)

    def finalize(self) -> None:
        """Complete both files, flush them to disk and give them their final names."""
        self._finish_index()
        for file in (self._bin, self._idx):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._doc.close()
        self._temporary[2].unlink()
        # An old index goes first, and the new one comes last: at no moment do two files stand together that do not
        # belong together.
        idx_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._temporary[0], bin_path(self.prefix))
        os.replace(self._temporary[1], idx_path(self.prefix))
        sync_directory(idx_path(self.prefix).parent)

    def abort(self) -> None:
        """Remove what was written so far; the final names are untouched."""
        for file in (self._bin, self._idx, self._doc):
            with suppress(OSError):  # what does not reach a full disk is thrown away anyway
                file.close()
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def __enter__(self) -> "IndexedDatasetBuilder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.finalize()
        except BaseException:
            self.abort()
            raise

    def _cast(self, tokens: Sequence[int] | Tokens) -> Tokens:
        array = np.asarray(tokens)
        if array.size and not np.can_cast(array.dtype, self.dtype) and np.issubdtype(self.dtype, np.integer):
            limits = np.iinfo(self.dtype.name)
            if array.min() < limits.min or array.max() > limits.max:
                raise ValueError(f"tokens from {array.min()} to {array.max()} do not fit in {self.dtype}")
        return np.ascontiguousarray(array, self.dtype)

    def _write(self, tokens: Tokens, lengths: Sequence[int] | npt.NDArray[Any]) -> None:
        assert tokens.size == np.sum(lengths), "every token belongs to one sequence"
        self._bin.write(tokens.data if tokens.size else b"")
        self._add_lengths(lengths)

    def _add_lengths(self, lengths: Sequence[int] | npt.NDArray[Any]) -> None:
        self._idx.write(np.asarray(lengths, _LENGTH).tobytes())
        self.sequences += len(lengths)
        self.tokens += int(np.sum(lengths))

    def _end_documents(self, boundaries: Sequence[int] | npt.NDArray[Any]) -> None:
        self._doc.write(np.asarray(boundaries, _OFFSET).tobytes())
        self._documents += len(boundaries)

    def _finish_index(self) -> None:
        """Behind the lengths: the offsets, which follow from them, and the document boundaries."""
        offset = 0
        for lengths in self._lengths():
            ends = offset + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            self._idx.write(np.concatenate(([offset], ends[:-1])).astype(_OFFSET).tobytes())
            offset = int(ends[-1])
        self._doc.seek(0)
        shutil.copyfileobj(self._doc, self._idx, 1 << 20)
        self._idx.seek(0)
        self._idx.write(_HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], self.sequences, self._documents))

    def _lengths(self) -> Iterable[npt.NDArray[np.int32]]:
        """The lengths written so far, in blocks, each time leaving the file's position at its end."""
        for start in range(0, self.sequences, _BLOCK):
            self._idx.seek(_HEADER.size + start * _LENGTH.itemsize)
            block = self._idx.read(min(_BLOCK, self.sequences - start) * _LENGTH.itemsize)
            self._idx.seek(0, os.SEEK_END)
            yield np.frombuffer(block, _LENGTH)
