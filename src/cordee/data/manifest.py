"""The note beside a dataset: how it was made and what it holds.

Owns `<prefix>.json`: counts, the tokenizer's fingerprint, the sources and what was left out. A dataset without it (made
by another tool) is as good; it can only be checked less."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cordee import sealed
from cordee.data.indexed import IndexedDataset
from cordee.errors import ProblemError
from cordee.files import write_durably
from cordee.log import logger

FORMAT = 2  # 1 had no checksum: what was changed in it nobody can tell any more


@dataclass(frozen=True, kw_only=True)
class TokenizerNote:
    """What a tokenizer must share with the one that made a dataset."""

    type: str
    fingerprint: str
    vocab_size: int
    eod: int | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`sources` are file names with their sizes in bytes (or what else the text came from); `left_out` counts records
    by reason; `max_token` is the largest id (-1 if there is none)."""

    documents: int
    tokens: int
    max_token: int
    tokenizer: TokenizerNote | None = None
    append_eod: bool = False
    sources: dict[str, int | None] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    def write(self, prefix: str | Path) -> None:
        write_durably(manifest_path(prefix), sealed.seal({"format": FORMAT, **dataclasses.asdict(self)}) + "\n")


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def read_manifest(dataset: IndexedDataset) -> Manifest | None:
    """The manifest of a dataset, or None if it has none.

    Raises `ProblemError` if it cannot be read or describes another dataset."""
    path = manifest_path(dataset.prefix)
    if not path.exists():
        return None
    try:
        found = sealed.read(path, sealed.of(Manifest, max_token=sealed.count(-1)), FORMAT)
        note = found.pop("tokenizer")
        manifest = Manifest(tokenizer=None if note is None else TokenizerNote(**note), **found)
    except sealed.OlderFormat as error:
        logger.warning("ignored: %s: %s; preprocess again to have the data checked against it", path, error)
        return None
    except (OSError, ValueError) as error:
        raise _unusable(path, f"it cannot be read: {error}") from error
    if (manifest.documents, manifest.tokens) != (dataset.num_documents, dataset.num_tokens):
        why = (
            f"it describes {manifest.documents} documents and {manifest.tokens} tokens, "
            f"but the dataset has {dataset.num_documents} and {dataset.num_tokens}"
        )
        raise _unusable(path, why, (dataset.num_documents, dataset.num_tokens))
    return manifest


def merged(manifests: Sequence[Manifest]) -> Manifest:
    """The manifest of datasets put one behind the other. Raises `ProblemError` if their tokenizers differ."""
    tokenizers = {manifest.tokenizer for manifest in manifests}
    if len(tokenizers) > 1:
        kinds = ", ".join(sorted(f"{note.type} {note.fingerprint[:8]}" for note in tokenizers if note))
        why = f"they were made with different tokenizers: {kinds}"
        raise ProblemError.of("--merge-group-keys", None, why, "preprocess them with one tokenizer", "tokenizers")
    left_out = Counter[str]()
    for manifest in manifests:
        left_out.update(manifest.left_out)
    return Manifest(
        documents=sum(manifest.documents for manifest in manifests),
        tokens=sum(manifest.tokens for manifest in manifests),
        max_token=max((manifest.max_token for manifest in manifests), default=-1),
        tokenizer=tokenizers.pop() if tokenizers else None,
        append_eod=all(manifest.append_eod for manifest in manifests),
        sources={name: size for manifest in manifests for name, size in manifest.sources.items()},
        left_out=dict(left_out),
    )


def _unusable(path: Path, why: str, limit: object = None) -> ProblemError:
    fix = "remove it (the dataset works without), or preprocess again"
    return ProblemError.of("dataset", path, why, fix, limit=limit)
