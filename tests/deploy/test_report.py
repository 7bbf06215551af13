from __future__ import annotations

import heapq
import json
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deploy.report import write_report
from paramserver.conservation import Conservation
from paramserver.errors import RecordError
from paramserver.ledger import Ledger
from paramserver.measures import summary
from paramserver.record import RunFolder, versions


def make_config(**changes: object) -> dict[str, object]:
    plain = {
        "task": "digits",
        "mode": "async",
        "optimizer": {"name": "adam", "lr": 0.001, "betas": (0.9, 0.999)},
        "rule": {"name": "ssp", "bound": 4},
        "workers": 4,
        "shards": 2,
        "batch_size": 32,
        "epochs": 3.0,
        "updates": None,
        "until": None,
        "seed": 0,
    }
    return {**plain, **changes}


def make_async(
    path: Path,
    *,
    workers: int = 4,
    updates: int = 400,
    seed: int = 0,
    measures: Mapping[str, NDArray[np.float64]] | None = None,
) -> RunFolder:
    """Write the record of a run in virtual time: exact staleness, made-up losses."""
    folder = RunFolder.create(path, "digits-async")
    config = make_config(workers=workers, seed=seed)
    folder.write_config(config)
    random = np.random.default_rng(seed)
    ledger, law = Ledger(), Conservation()
    read = dict.fromkeys(range(workers), (0, 0.0))
    done = [(random.gamma(4, 0.01), worker) for worker in range(workers)]
    heapq.heapify(done)
    for worker in range(workers):
        law.on_read(worker, 0)
    for version in range(1, updates + 1):
        now, worker = heapq.heappop(done)
        read_version, start = read[worker]
        law.on_arrival(worker, read_version, version - 1)
        law.on_bump(version)
        loss = 2.3 * math.exp(-version / 90) + 0.05 + 0.03 * random.random()
        ledger.append(
            version=version, worker=worker, incarnation=1, seq=version, clock=version,
            read_version=read_version, staleness=version - 1 - read_version, start=start, end=now,
            samples=32, loss=loss, grad_norm=loss,
        )  # fmt: skip
        law.on_read(worker, version)
        read[worker] = (version, now)
        slow = 1 + worker % 3 + 2 * (worker == 0 and now > 3)
        heapq.heappush(done, (now + random.gamma(4, 0.01) * slow, worker))
        at = {"gradients": version, "updates": version, "seconds": now}
        if version % 4 == 0:
            folder.log({"kind": "train", **at, "loss": loss, "updates_per_s": version / now})
        if version % 25 == 0:
            accuracy = 0.97 - 0.87 * math.exp(-version / 70) + 0.01 * random.random()
            test = {"loss": 1.1 * loss, "accuracy": accuracy}
            folder.log({"kind": "test", **at, "version": version, **test})
    ledger.measure(measures or {})
    ledger.save(folder.updates)
    per_worker = ledger.staleness.per_worker().items()
    folder.write_result(
        {
            "config": config,
            "versions": versions(),
            **{key: config[key] for key in ("mode", "optimizer", "task", "workers", "shards")},
            **at,
            "samples": 32 * updates,
            "updates_per_s": updates / now,
            "gradients_per_s": updates / now,
            "final": test,
            "best": {**test, "version": updates, "seconds": now},
            "staleness": {
                **ledger.staleness.summary(),
                "per_worker": {
                    w: {"pushes": f.pushes, "mean": f.mean, "max": f.max} for w, f in per_worker
                },
            },
            "measures": summary(ledger.columns()),
            "dropped": {"nonfinite": 2},
            "failures": [{"what": "worker 1", "seconds": 1.2}],
            "invariants": [{"name": "clocks ahead of the slowest", "bound": 4, "worst": 4}],
            "conservation": law.report(),
            "waits": {
                f"worker {w} for worker {(w + 1) % workers}": {
                    "count": 3 + w,
                    "seconds": 0.4 / (w + 1),
                }
                for w in range(workers)
            },
            "stopped_because": f"{updates} updates",
        }
    )
    return folder


def make_sync(path: Path, *, updates: int = 120) -> RunFolder:
    """Write the record of a synchronous run: no ledger, no staleness, no waits."""
    folder = RunFolder.create(path, "digits-sync")
    config = make_config(mode="sync", workers=2, rule=None, shards=1)
    folder.write_config(config)
    for step in range(1, updates + 1):
        loss = 2.3 * math.exp(-step / 30) + 0.06
        at = {"gradients": 2 * step, "updates": step, "seconds": 0.05 * step}
        if step % 3 == 0:
            folder.log({"kind": "train", **at, "loss": loss})
        if step % 20 == 0:
            test = {"loss": 1.05 * loss, "accuracy": 0.96 - 0.8 * math.exp(-step / 25)}
            folder.log({"kind": "test", **at, **test})
    folder.write_result(
        {
            "config": config,
            "versions": versions(),
            **{key: config[key] for key in ("mode", "optimizer", "task", "workers")},
            **at,
            "updates_per_s": 20.0,
            "gradients_per_s": 40.0,
            "final": test,
            "best": {**test, "version": updates, "seconds": 6.0},
            "failures": [],
            "stopped_because": f"{updates} updates",
        }
    )
    return folder


class Page(HTMLParser):
    """What a page says, and what it would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.text, self.num_plots = path, "", 0
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.num_plots += given.get("role") == "img"
        if "id" in given:
            self.ids.append(given["id"])
        links = [given.get(name, "#") for name in ("src", "href", "xlink:href")]
        self.fetched += [link for link in links if not link.startswith("#")]
        if tag in ("script", "link", "iframe"):
            self.fetched.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data if data.strip() else " "


@pytest.fixture(scope="module")
def async_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report([make_async(tmp_path_factory.mktemp("runs") / "run").path]))


@pytest.fixture(scope="module")
def sync_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report([make_sync(tmp_path_factory.mktemp("runs") / "run").path]))


def test_a_page_tells_all_of_an_asynchronous_run(async_page: Page) -> None:
    assert async_page.path.name == "report.html"
    assert async_page.num_plots == 6
    for said in (
        "digits, async, adam",
        "adam:lr=0.001,betas=0.9/0.999",
        "ssp:bound=4",
        "400 updates",
        "2 nonfinite",
        "worker 1 at 1.2 s",
        "✓ held: at most 4, worst seen 4",
        "✓ holds: 1,200 = 1,200",  # 400 updates with 3 other reads in flight
        "best",
        "staleness (updates between read and apply)",
        "worker 3 for worker 0, 6 times",
        "worker 3: mean",
        "batch size",
        "python",
    ):
        assert said in async_page.text, said


def test_measures_are_drawn_against_staleness(tmp_path: Path) -> None:
    measures = {"gap": np.linspace(0, 1, 60), "step": np.full(60, math.nan)}

    page = Page(write_report([make_async(tmp_path / "run", updates=60, measures=measures).path]))

    assert page.num_plots == 7
    assert 'aria-label="gap against staleness"' in page.path.read_text()
    assert "mean 0.5, max 1" in page.text
    assert "no value" in page.text  # of the step, which has no panel


def test_the_page_looks_inside_the_net(tmp_path: Path) -> None:
    folder = make_sync(tmp_path / "run")
    for at in (20, 40):
        folder.log(
            {
                "kind": "diagnostics",
                **{"gradients": at, "updates": at, "seconds": at / 2, "version": at},
                "gradient": {"0.weight": 0.25 / at, "0.bias": 0.5 / at},
                "weight": {"0.weight": 7.0, "0.bias": 1.0},
                "step": {"0.weight": 0.0013, "0.bias": 0.01} if at > 20 else {},
                "units": {"layer 1 (relu)": {"dead": 0.625}},
                "noise_scale": math.nan if at > 20 else 96.0,
                "warnings": [],
            }
        )
    folder.write_result(
        {
            **json.loads(folder.result.read_text()),
            "warnings": ["version 40: 62 % of the units of 1 are dead"],
        }
    )

    page = Page(write_report([folder.path]))

    for said in (
        "Inside the net",
        "version 40: 62 % of the units of 1 are dead",
        "62.5 % dead",
        "0.00625",  # the last gradient of 0.weight
        "0.0013",
        "gradient noise scale",
    ):
        assert said in page.text or said in page.path.read_text(), said


def test_of_many_workers_the_first_are_drawn(tmp_path: Path) -> None:
    page = Page(write_report([make_async(tmp_path / "run", workers=20, updates=60).path]))

    assert "worker 15: mean" in page.text
    assert "worker 16: mean" not in page.text
    assert "The first 16 of 20" in page.text


@pytest.mark.parametrize("name", ["async_page", "sync_page"])
def test_a_page_stands_alone(request: pytest.FixtureRequest, name: str) -> None:
    page: Page = request.getfixturevalue(name)

    assert page.fetched == []
    assert len(page.ids) == len(set(page.ids))


def test_every_colour_is_the_pages_own(tmp_path: Path) -> None:
    folders = [make_async(tmp_path / str(i), updates=25, seed=i).path for i in range(8)]

    html = write_report(folders).read_text()

    plots = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert set(re.findall(r"(?:stroke|fill): ([^;\"]+)", plots)) <= {
        "none", "var(--ink)", "var(--muted)", "var(--grid)", *(f"var(--c{i})" for i in range(6))
    }  # fmt: skip
    for name in set(re.findall(r"var\((--\w+)\)", html)):
        assert html.count(f"{name}: #") == 2, f"{name} needs a light and a dark colour"


def test_the_same_record_gives_the_same_page(tmp_path: Path) -> None:
    folder = make_async(tmp_path / "run", updates=25)

    pages = [write_report([folder.path], tmp_path / f"{i}.html").read_bytes() for i in range(2)]

    assert pages[0] == pages[1]


def test_a_synchronous_run_has_no_staleness_and_the_page_says_so(sync_page: Page) -> None:
    assert sync_page.num_plots == 2
    assert "Staleness over time is not shown: the record has no applied pushes" in sync_page.text
    assert "Waits are not shown" in sync_page.text
    assert "mean staleness" not in sync_page.text


def test_a_killed_run_is_shown_up_to_where_it_got(tmp_path: Path) -> None:
    folder = make_async(tmp_path / "run", updates=100)
    folder.result.unlink()

    page = Page(write_report([folder.path]))

    assert "the record has no result: the run still goes, or was killed" in page.text
    assert "updates100" in page.text
    assert page.num_plots == 5  # staleness is counted from the ledger
    assert "Versions" not in page.text


def test_a_run_that_was_killed_at_once_has_a_page(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "digits-async")
    folder.write_config(make_config())

    page = Page(write_report([folder.path]))

    assert page.num_plots == 0
    assert "No metrics were logged." in page.text


def test_losses_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    folder = make_sync(tmp_path / "run")
    at = {"gradients": 300, "updates": 150, "seconds": 9.0}
    folder.log({"kind": "train", **at, "loss": math.nan})
    folder.log({"kind": "test", **at, "loss": math.inf, "accuracy": 0.1})

    page = Page(write_report([folder.path]))

    assert "2 values were not finite and leave gaps." in page.text


def test_a_broken_invariant_stands_out(tmp_path: Path) -> None:
    folder = make_sync(tmp_path / "run")
    folder.write_result(
        {
            "config": make_config(),
            "final": {"loss": math.nan},
            "invariants": [{"name": "staleness", "bound": 4, "worst": 7}],
            "conservation": {"left": 12, "right": 13, "holds": False},
            "stopped_because": "error: <staleness> must be at most 4",
        }
    )

    page = Page(write_report([folder.path]))

    assert "✗ broken: at most 4, worst seen 7" in page.text
    assert "✗ broken: 12 ≠ 13" in page.text
    assert "not finite" in page.text
    assert "error: <staleness> must be at most 4" in page.text


def test_many_workers_are_summed_up(tmp_path: Path) -> None:
    folder = make_async(tmp_path / "run", workers=40, updates=400)

    page = Page(write_report([folder.path]))

    assert "The line is the mean of 40 workers, the band their means' range." in page.text
    assert "and 24 more workers, listed in result.json." in page.text
    assert "24 others" in page.text


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    folders = [
        make_async(tmp_path / "a", updates=100).path,
        make_async(tmp_path / "b", updates=100, workers=2, seed=7).path,
        make_sync(tmp_path / "c").path,
    ]

    path = write_report(folders)

    page = Page(path)
    assert path == tmp_path / "report.html"
    assert page.num_plots == 3
    assert page.fetched == []
    assert len(page.ids) == len(set(page.ids))
    for said in ("3 runs side by side", "test accuracy", "No staleness in the record of c."):
        assert said in page.text, said
    differing = page.text.partition("What differs in the configuration")[2]
    for said in ("seed", "mode", "workers", "ssp:bound=4"):
        assert said in differing, said
    assert "batch size" not in differing


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_sync(tmp_path / name / "run").path for name in ("a", "b")]

    page = Page(write_report(folders, tmp_path / "both.html"))

    assert str(folders[0]) in page.text
    assert str(folders[1]) in page.text
    assert "The configurations are the same." in page.text


def test_a_page_goes_where_it_is_told(tmp_path: Path) -> None:
    folder = make_sync(tmp_path / "run")

    path = write_report([folder.path], tmp_path / "page.html")

    assert path == tmp_path / "page.html"
    assert path.exists()
    assert not folder.report.exists()


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^a report needs the folder of at least one run$"):
        write_report([])
    with pytest.raises(RecordError, match=r"is not the record of a run"):
        write_report([tmp_path])
    folder = make_sync(tmp_path / "run").path
    with pytest.raises(RecordError, match=r"^cannot write the report .*nowhere"):
        write_report([folder], tmp_path / "nowhere" / "page.html")
