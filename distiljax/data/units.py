"""A corpus cut into units of work: each is prepared on its own, by any process, with the same result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from distiljax.data.sources import Piece, Source, SourceSpec, open_source, parse
from distiljax.errors import UserError

# A unit is one shard and what a killed run repeats. Small units spread evenly over workers; large corpora are kept to
# some thousand of them.
MIN_UNIT_BYTES = 8 << 20
MAX_UNIT_BYTES = 256 << 20
UNITS_WANTED = 1024


@dataclasses.dataclass(frozen=True)
class Unit:
    """Pieces of one source that are read one after the other.

    Attributes:
      number: its place in the corpus; of two equal documents the one in the earlier unit is kept.
      source: index of the source in the settings.
      split: the source's split that it is read from; None where the source has no splits.
      kept: the corpus that its rows belong to; None if only its held-out documents are wanted, or nothing but to know
        what not to repeat.
      held_out: the corpus of the documents that the holdout takes; None if they are wanted nowhere.
      divided: whether the holdout takes any.
      pieces: what is read.
    """

    number: int
    source: int
    split: str | None
    kept: str | None
    held_out: str | None
    divided: bool
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of text, roughly."""
        return sum(piece.size for piece in self.pieces)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The corpora that it contributes to."""
        return tuple(name for name in (self.kept, self.held_out) if name)


def plan(settings: dict[str, Any], splits: Sequence[str]) -> list[Unit]:
    """Cuts the text of some splits into units. It depends on the sources and settings only.

    Units of splits that the sources have come before those of "train", so that a training document which also
    stands in the validation text is the one that is dropped.

    Args:
      settings: a checked data config.
      splits: "train" (the source's split `settings["split"]`, or the one its spelling names), "validation" (where a
        source has none, the share `holdout` of its training documents) or other splits of the sources.

    Raises:
      UserError: a source or a split is not there, or only some sources have a weight.
    """
    weights(settings)
    sources = [open_source(spelling) for spelling in settings["source"]]
    readings = [
        reading
        for index, source in enumerate(sources)
        for reading in _readings(index, source, settings, splits)
    ]
    readings.sort(key=lambda reading: (reading.divided or reading.kept == "train", reading.source))
    total = sum(sources[reading.source].size(reading.split) for reading in readings)
    target = min(max(total // UNITS_WANTED, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units: list[Unit] = []
    for reading in readings:
        for pieces in _groups(sources[reading.source].pieces(reading.split, target), target):
            units.append(dataclasses.replace(reading, number=len(units), pieces=tuple(pieces)))
    if not units:
        raise UserError(f"{', '.join(settings['source'])} is empty; expected text")
    return units


def weights(settings: dict[str, Any]) -> tuple[float, ...]:
    """Share of the rows to draw from each source, as the sources' spellings have it; empty if none says.

    Raises:
      UserError: only some say, or rows are bucketed, which cannot be mixed.
    """
    specs = [parse(spelling) for spelling in settings["source"]]
    found = [spec.weight for spec in specs if spec.weight is not None]
    if found and len(found) < len(specs):
        without: SourceSpec = next(spec for spec in specs if spec.weight is None)
        raise UserError(
            f"data.source {without.text} has no weight but others have; give each ?weight=, or none"
        )
    if found and settings["layout"] == "bucketed":
        raise UserError(
            "data.source has weights and data.layout is bucketed; leave out the weights, or choose packed or padded"
        )
    return tuple(weight / sum(found) for weight in found)


def fingerprint(units: Sequence[Unit], split: str | None = None) -> str:
    """Identity of the input, of one corpus or of all, as far as names and sizes tell."""
    read = [
        (unit.source, unit.split, [dataclasses.astuple(piece) for piece in unit.pieces])
        for unit in units
        if split is None or split in unit.outputs
    ]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()


def _readings(index: int, source: Source, settings: dict[str, Any], splits: Sequence[str]) -> list[Unit]:
    """What has to be read of a source for the wanted splits: units without pieces."""
    names = source.splits()
    text = source.spec.text
    train = source.spec.split or settings["split"]
    if not names and source.spec.split:
        raise UserError(f"{text} has no splits; leave out ?split={source.spec.split}")
    # A source that is one split through and through is named by it: `?split=test` is all there is to train on.
    divided = settings["holdout"] > 0 and "validation" not in names
    readings = []
    for split in splits:
        if split == "train" or (split == "validation" and "validation" not in names):
            continue
        if split not in names:
            raise UserError(
                f"{text} has no split {split!r}; it has {', '.join(names) or 'no splits: only train'}"
            )
        readings.append(Unit(0, index, split, split, None, False, ()))
    if "train" in splits and "validation" in names and "validation" not in splits and settings["deduplicate"]:
        # Its text is dropped from the training text, whether or not it is prepared with it.
        readings.append(Unit(0, index, "validation", None, None, False, ()))
    held_out = "validation" if "validation" in splits and "validation" not in names else None
    if "train" in splits or held_out:
        if names and train not in names:
            raise UserError(f"{text} has no split {train!r}; it has {', '.join(names)}")
        if held_out and not divided:
            raise UserError(
                f"{text} has no validation split; set data.holdout to the share of documents to hold out, such as 0.02"
            )
        kept = "train" if "train" in splits else None
        readings.append(Unit(0, index, train if names else None, kept, held_out, divided, ()))
    return readings


def _groups(pieces: Sequence[Piece], target: int) -> list[list[Piece]]:
    """Consecutive pieces together, up to `target` bytes where they are smaller."""
    groups: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not groups or size + piece.size > target:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size
    return groups
