"""What tests have tried beyond their number: counts that they record, told at the end of a session.

pytest keeps what a passing test prints to itself, and with xdist tests run in other processes; properties of a test
come back from there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest

RecordProperty = Callable[[str, object], None]

_PREFIX = "tried "


def tried(record_property: RecordProperty, what: str, kind: str, count: int) -> None:
    """Record that a test tried so many things of a kind; call it before anything is asserted of them."""
    record_property(_PREFIX + what, {kind: count})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for group in terminalreporter.stats.values() for report in group]
    ended = [report for report in reports if isinstance(report, pytest.TestReport) and report.when == "call"]
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for name, value in (pair for report in ended for pair in report.user_properties):
        if name.startswith(_PREFIX):
            counts[name.removeprefix(_PREFIX)] |= value
    for what, kinds in sorted(counts.items()):
        of = f" of {len(kinds)} kinds" if len(kinds) > 1 else f" of {next(iter(kinds))}"
        terminalreporter.write_line(f"tried: {sum(kinds.values())} {what}{of}")
