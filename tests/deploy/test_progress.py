from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from deploy.progress import Progress, counts, figures, rate, waits

STATUS: dict[str, Any] = {
    "updates": 1840,
    "gradients": 1850,
    "samples": 59200,
    "seconds": 12.41,
    "loss": 0.14213,
    "updates_per_s": 151.4,
    "staleness_mean": 1.04,
    "staleness_max": 3,
    "waiting": {0: ([1], 1.23)},
    "dropped": {"stale": 2, "nan": 1},
    "metrics": {"accuracy": 0.9611, "loss": 0.15},
    "failures": 1,
}


def plain_console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=40), out


def test_one_line_tells_all_figures() -> None:
    assert figures(STATUS) == (
        "12.4 s  1,840 updates  151/s  loss 0.1421  test accuracy 0.9611  test loss 0.15  "
        "staleness 1.0 (max 3)  dropped 3 (1 nan, 2 stale)  1 process lost and replaced"
    )


def test_what_is_missing_is_left_out() -> None:
    assert figures({"updates": 3}) == "3 updates"
    assert figures({}) == ""
    assert waits({}) == []


def test_waits_name_who_waits_for_whom_the_longest_first() -> None:
    status = {"waiting": {0: ([2, 1], 1.23), 3: ([], 7.0), 4: ([1], 0.001)}}

    assert waits(status) == [
        "worker 3 waits 7.0 s for more gradients",
        "worker 0 waits 1.2 s for worker 1 and worker 2",
    ]


def test_many_waits_are_counted() -> None:
    lines = waits({"waiting": {w: ([9], 1.0) for w in range(9)}})

    assert len(lines) == 5
    assert lines[-1] == "and 5 more wait"


def test_rates_and_counts_read_well() -> None:
    assert [rate(12345.6), rate(10.2), rate(1.234), rate(0)] == ["12,346", "10", "1.2", "0"]
    assert counts({"stale": 2, "nan": 1}) == "3 (1 nan, 2 stale)"


def test_without_a_terminal_there_is_a_line_now_and_then_and_a_last_one() -> None:
    console, out = plain_console()
    now = 0.0

    with Progress(console, "starting [2] workers …", every_s=5, now=lambda: now) as progress:
        for updates in range(12):
            progress({"updates": updates})
            now += 1.0

    assert out.getvalue().splitlines() == [
        "starting [2] workers …",
        "0 updates",
        "5 updates",
        "10 updates",
        "11 updates",
    ]


def test_a_plain_line_is_one_line_however_long() -> None:
    console, out = plain_console()

    with Progress(console, "starting") as progress:
        progress(STATUS)

    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("lost and replaced; worker 0 waits 1.2 s for worker 1")


def test_a_terminal_shows_the_figures_and_the_waits_and_is_left_clean() -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)

    with Progress(console, "starting 2 workers …") as progress:
        progress(STATUS)
        assert progress._live is not None
        progress._live.refresh()

    shown = out.getvalue()
    assert "1,840 updates" in shown
    assert "worker 0 waits 1.2 s for worker 1" in shown
    assert shown.endswith("\x1b[2K")  # the live lines are erased, the table comes in their place
