"""Which labels and which detections of a picture are one another's, as a metric judges them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Matching:
    """Labels and detections by their number in what was given; each is in one pair at most.

    Attributes:
        labelled, detected: those that are judged.
        pairs: label and detection.
    """

    labelled: frozenset[int]
    detected: frozenset[int]
    pairs: list[tuple[int, int]]

    @property
    def missed(self) -> list[int]:
        """Labels that no detection matches."""
        return sorted(self.labelled - {label for label, _ in self.pairs})

    @property
    def extra(self) -> list[int]:
        """Detections that match no label."""
        return sorted(self.detected - {detection for _, detection in self.pairs})
