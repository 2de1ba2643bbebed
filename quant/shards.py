"""Evaluations of many samples in shards: what a job offers for others to judge, and how the outcomes come together.

A shard is judged by the sessions that the whole would have been judged by, and every sample by itself: the outcomes of
all shards, one behind the other, are those of the whole, to the byte. They fill the stage that the job asks for when
it is started again. What is measured on a clock is measured there, never in a shard.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eval.dataset import Sample
from eval.evaluation import Outcomes, load_outcomes
from quant.manifest import processor, versions
from quant.parcel import packed, unpacked
from quant.runtime import model_files, target_format
from quant.shares import Share
from quant.source import cache_dir
from quant.stage import digest, sealed

OUTCOMES = "outcomes.npz"
SHARD_SAMPLES = 500
"""Samples of a shard; fewer would be judged before a process has started and loaded the models."""

_SHARE = "share.pickle"


@dataclass(frozen=True)
class Offer:
    """An evaluation that others may judge.

    Attributes:
        stage: name of the stage that its outcomes fill.
        pieces: all samples in their order, cut into shares.
        machine: on which outcomes are the same (see `machine`).
        models, pictures: the files of both models, and of each piece's pictures, for other machines: as zips, or what
            a pool that keeps them knows them by.
    """

    stage: str
    pieces: tuple[Share, ...]
    machine: str
    models: Any = b""
    pictures: tuple[Any, ...] = ()


def machine() -> str:
    """Hash of what the outcomes of an evaluation depend on beside its inputs: the processor, and versions."""
    return digest([processor(), versions()])


def offer(share: Share, stage: Path, folder: Path) -> None:
    """Leave the evaluation that fills a stage in a folder, for the process that has started this one."""
    place = folder / stage.name
    place.mkdir()
    (place / _SHARE).write_bytes(pickle.dumps(share))


def offered(folder: Path, size: int) -> list[Offer]:
    """What a process has left in its folder, in pieces of at most `size` samples. It has just written the pickles."""
    shares = {path.parent.name: pickle.loads(path.read_bytes()) for path in sorted(folder.glob(f"*/{_SHARE}"))}
    return [Offer(stage, tuple(cut(share, size)), machine()) for stage, share in shares.items()]


def cut(share: Share, size: int) -> list[Share]:
    """Neighbouring samples, which are alike in shape, in as few pieces as there have to be, of about one length."""
    count = -(-len(share.samples) // size)
    ends = [len(share.samples) * index // count for index in range(count + 1)]
    return [replace(share, samples=share.samples[a:b]) for a, b in pairwise(ends)]


def joined(parts: Iterable[bytes]) -> bytes:
    """The outcomes of all pieces, in their order, as one file."""
    found = [load_outcomes(io.BytesIO(part)) for part in parts]
    fp32, int8 = (np.concatenate([getattr(part, name) for part in found]) for name in ("fp32", "int8"))
    ids, datasets, broken = (
        [text for part in found for text in getattr(part, name)] for name in ("ids", "datasets", "broken")
    )
    return Outcomes(ids, datasets, fp32, int8, broken).to_bytes()


def take_outcomes(outcomes: Mapping[str, bytes]) -> None:
    """Fill stages with outcomes that were judged elsewhere."""
    for stage, data in outcomes.items():
        with sealed(cache_dir() / "stages" / stage) as temporary:
            (temporary / OUTCOMES).write_bytes(data)


# --- other machines --------------------------------------------------------------------------------


def for_others(given: Iterable[Offer]) -> tuple[Offer, ...]:
    """Offers with all files that they need; pictures that are judged for several targets are packed, and sent, once."""
    zips: dict[frozenset[tuple[str, Path]], bytes] = {}

    def pictures(piece: Share) -> bytes:
        files = _pictures(piece.samples)
        key = frozenset(files.items())
        zips[key] = zips.get(key) or packed(files)
        return zips[key]

    return tuple(
        replace(offer, models=packed(_models(offer.pieces[0])), pictures=tuple(map(pictures, offer.pieces)))
        for offer in given
    )


def _models(whole: Share) -> dict[str, Path]:
    kind, folders = target_format(whole.target), {"fp32": whole.fp32, "int8": whole.int8}
    return {f"{name}/{file.name}": file for name, place in folders.items() for file in model_files(place, kind)}


def arrived(share: Share, models: bytes, pictures: bytes, folder: Path) -> Share:
    """A piece of an offer for others, with its files unpacked in a folder."""
    place, seen = unpacked(models, folder / "models"), unpacked(pictures, folder / "pictures")
    samples = [replace(sample, image=seen / _name(sample)) for sample in share.samples]
    return replace(share, fp32=place / "fp32", int8=place / "int8", samples=samples)


def named_as_there(outcomes: bytes, here: Share, there: Share) -> bytes:
    """Outcomes that name pictures which cannot be read as they are named where they came from."""
    found = load_outcomes(io.BytesIO(outcomes))
    names = {str(own.image): str(other.image) for own, other in zip(here.samples, there.samples, strict=True)}
    for own, other in names.items() if found.broken else ():
        found.broken[:] = [sentence.replace(own, other) for sentence in found.broken]
    return found.to_bytes()


def _pictures(samples: Sequence[Sample]) -> dict[str, Path]:
    """Pictures that are there; one that is missing is missing elsewhere too, and is named there."""
    return {_name(sample): sample.image for sample in samples if sample.image.is_file()}


def _name(sample: Sample) -> str:
    """Of a picture in a parcel: rotations of one share it, and its content is known by it."""
    return f"{sample.picture}{sample.image.suffix}"
