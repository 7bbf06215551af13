"""What a run's record says, as a page: one run in full, or several side by side.

The page stands alone: plots are inside, and nothing is fetched. What a record does not have, such
as staleness in a synchronous run, is left out, and the page says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy import curves, inside, page, plots
from deploy.outcome import came, measure, traffic
from deploy.progress import TRAIN_SAMPLE
from paramserver.durable import write_durably
from paramserver.errors import RecordError
from paramserver.measures import MEASURES
from paramserver.record import Record, RunFolder, read_record

_MAX_ROWS = 16
"""Workers or causes of waiting that are listed; more are summed up."""

_PROGRESS = (
    "By gradients, updates and time. A point of a long line is the mean of neighbouring values."
)

_MEASURES_CAPTION = (
    "Of the pushes of each staleness the median, and the range of nine tenths of them. gap: how "
    "far the parameters had moved since the read. cosine: between a step along the gradient and "
    "the update before. step: how far the push's update moved the parameters."
)

_NO_RESULT = "the record has no result: the run still goes, or was killed"


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run, or of several side by side, and return where it is.

    Args:
        folders: Records of runs.
        out: The page; None writes ``report.html`` into the folder of the run, and for several runs
            beside the folder of the first.

    Raises:
        ValueError: There is no folder.
        RecordError: A folder is not the record of a run, or the page cannot be written.
    """
    if not folders:
        raise ValueError("a report needs the folder of at least one run")
    records = [read_record(folder) for folder in folders]
    if len(records) == 1:
        text = _one(records[0])
        path = out or RunFolder(folders[0]).report
    else:
        text = _several(records)
        path = out or folders[0].parent / "report.html"
    try:
        write_durably(path, text.encode())
    except OSError as error:
        raise RecordError(f"cannot write the report {path}: {error}") from error
    return path


def _one(record: Record) -> str:
    about = _facts(record)
    found = _result(record).get("versions")
    names = (about.get(key, "").partition(":")[0] for key in ("task", "mode", "optimizer"))
    title = ", ".join(filter(None, names))
    return page.page(
        title or record.path.name,
        f"{record.path.name}: {about['stopped because']}",
        [
            page.tiles(_headline(record)),
            page.facts(about),
            page.section("Training", _training(record)),
            page.section("Inside the net", inside.section(record)),
            page.section("Staleness", _staleness(record)),
            page.section("Speed", _speed(record)),
            page.section("Configuration", [page.facts(_settings(record))]),
            page.section("Versions", [page.facts(found)] if found else []),
        ],
    )


def _several(records: Sequence[Record]) -> str:
    names = [r.path.name for r in records]
    if len(set(names)) < len(names):
        names = [str(r.path) for r in records]
    legend = [(name, colour) for colour, name in enumerate(names)]
    rows: dict[str, list[plots.Series]] = {}
    for (name, colour), record in zip(legend, records, strict=True):
        for label, columns, key in curves.curves(record):
            rows.setdefault(label, []).append(plots.Series(name, colour, columns, key))
    training = [page.note("No run has logged any metrics.")]
    if rows:
        svg = plots.progress("training", rows)
        training = [page.figure(svg, "Progress", _PROGRESS, legend)]
    return page.page(
        f"{len(records)} runs side by side",
        ", ".join(names),
        [
            page.table(["", *names], _side_by_side([_facts(r) for r in records]), wide=True),
            page.section("Training", training),
            page.section("Staleness", _histograms(records, legend)),
            page.section("Speed", _rates(records, legend)),
            page.section("What differs in the configuration", _differences(records, names)),
        ],
    )


_COLOURS = {"train": 0, "test": 1, "validation": 2, TRAIN_SAMPLE: 3}
"""Of the parts of the data that metrics are of."""


def _result(record: Record) -> dict[str, Any]:
    return record.result or {}


def _facts(record: Record) -> dict[str, str]:
    """Return what there is to say in words, in the order it is read."""
    asked = {**record.config, **_result(record)}
    done = {**(record.metrics[-1] if record.metrics else {}), **_result(record)}
    said: dict[str, str] = {}
    given = ("mode", "task", "optimizer", "form", "rule", "damping", "compensation", "local")
    for key in (*given, "workers", "shards"):
        if asked.get(key) is not None:
            said[key] = _value(asked[key])
    for key in ("updates", "gradients", "samples"):
        if key in done:
            rate = _result(record).get(f"{key}_per_s")
            said[key] = _value(done[key]) + (f" ({rate:,.4g} a second)" if rate else "")
    if "seconds" in done:
        said["time"] = f"{done['seconds']:,.1f} s"
    if "gateway" in done:
        said["over gRPC"] = came(done["gateway"], done["workers"])
    for when in ("final", "best"):
        if done.get(when):
            said[when] = _metrics(done[when])
    if done.get("kept") == "best":
        said["kept"] = f"version {_value(done['best']['version'])}, the best one, in best/"
    for key in ("staleness", "state_staleness"):
        if key in done:
            figures = (f"{k} {_value(done[key][k])}" for k in ("mean", "p50", "p95", "max"))
            said[key.replace("_", " ")] = ", ".join(figures)
    for name, of in done.get("measures", {}).items():
        said[name] = measure(of)
    for way, of in done.get("traffic", {}).items():
        said[f"{way}ed"] = traffic(of)
    if "dropped" in done:
        dropped = [f"{count:,} {reason}" for reason, count in done["dropped"].items()]
        said["dropped"] = ", ".join(dropped) or "none"
    if "cancelled" in done:
        said["cancelled"] = f"{done['cancelled']:,} gradients under way"
    if "failures" in done:
        failures = [f"{f['what']} at {f['seconds']:,.1f} s" for f in done["failures"]]
        more = len(failures) - _MAX_ROWS
        failures[_MAX_ROWS:] = [f"{more} more"] if more > 0 else []
        said["failures"] = ", ".join(failures) or "none"
    for bound in done.get("invariants", []):
        limit, worst = bound["bound"], bound["worst"]
        held = "✓ held" if worst <= limit else "✗ broken"
        said[bound["name"]] = f"{held}: at most {_value(limit)}, worst seen {_value(worst)}"
    if "conservation" in done:
        law = done["conservation"]
        said["conservation of staleness"] = (
            f"✓ holds: {law['left']:,} = {law['right']:,}"
            if law["holds"]
            else f"✗ broken: {law['left']:,} ≠ {law['right']:,}"
        )
    return {**said, "stopped because": done.get("stopped_because", _NO_RESULT)}


def _headline(record: Record) -> Iterator[tuple[str, str, str]]:
    """Return the few numbers that matter most."""
    r = _result(record)
    best = r.get("best", {})
    for name in sorted(r.get("final", {}), key=lambda name: name == "loss")[:1]:
        at = f"best {_figure(best[name])}" if name in best else ""
        when = f" at {best['seconds']:,.1f} s" if at and "seconds" in best else ""
        yield f"final {name}", _figure(r["final"][name]), at + when
    for name, per in (("updates", "updates_per_s"), ("gradients", "gradients_per_s")):
        if name in r and per in r:
            yield name, f"{r[name]:,}", f"{r[per]:,.4g} a second"
    if "staleness" in r:
        s = r["staleness"]
        yield "mean staleness", _value(s["mean"]), f"p95 {s['p95']}, largest {s['max']}"


def _training(record: Record) -> Iterator[str]:
    rows: dict[str, list[plots.Series]] = {}
    legend: dict[str, int] = {}
    for label, columns, key in curves.curves(record):
        part, _, metric = label.partition(" ")
        colour = legend.setdefault(part, _COLOURS[part])
        rows.setdefault(metric, []).append(plots.Series(part, colour, columns, key))
    if not rows:
        yield page.note("No metrics were logged.")
        return
    svg = plots.progress("training", rows)
    yield page.figure(svg, "Progress", _PROGRESS, list(legend.items()))
    lost = sum(int(np.isnan(s.columns[s.key]).sum()) for row in rows.values() for s in row)
    if lost:
        yield page.note(f"{lost} values were not finite and leave gaps.")


def _staleness(record: Record) -> Iterator[str]:
    counts = curves.staleness_counts(record)
    if counts:
        like = _result(record).get("like")
        histograms, legend, note = [(0, counts)], [], "Applied pushes, all workers."
        if like is not None:
            recorded = {int(s): n for s, n in like["staleness"]["histogram"].items()}
            histograms = [*histograms, (1, recorded)]
            legend = [("simulated", 0), ("recorded", 1)]
            note += (
                f" The recorded run {like['path']} made {like['gradients_per_s']:,.4g} gradients a "
                f"second; the two histograms are {like['distance']:.3f} apart (total variation)."
            )
        svg = plots.histogram("histogram", histograms)
        yield page.figure(svg, "How stale gradients were", note, legend)
    pushes = curves.applied_pushes(record)
    if pushes is None:
        yield page.note(
            "Staleness over time is not shown: the record has no applied pushes. A synchronous run "
            "has none, and a run that was killed has those up to its last checkpoint."
        )
        return
    workers = sorted(set(pushes["worker"].tolist()))
    svg = plots.staleness_over_time("over-time", pushes, workers)
    if len(workers) <= plots.NUM_COLOURS:
        legend = [(f"worker {worker}", colour) for colour, worker in enumerate(workers)]
        yield page.figure(svg, "Staleness of each worker over time", legend=legend)
    else:
        caption = f"The line is the mean of {len(workers)} workers, the band their means' range."
        yield page.figure(svg, "Staleness over time", caption)
    shown = workers[:_MAX_ROWS]
    caption = "" if len(shown) == len(workers) else f"The first {len(shown)} of {len(workers)}."
    svg = plots.worker_histograms("histograms", pushes, shown)
    yield page.figure(svg, "How stale each worker's gradients were", caption)
    measures = [name for name in MEASURES if name in pushes and not np.isnan(pushes[name]).all()]
    if measures:
        svg = plots.by_staleness("measures", pushes, measures)
        yield page.figure(svg, "What staleness did", _MEASURES_CAPTION)
    per_worker = _result(record).get("staleness", {}).get("per_worker", {})
    if per_worker:
        yield page.table(
            ["worker", "applied pushes", "mean staleness", "largest"],
            [
                (w, f"{f['pushes']:,}", f"{f['mean']:.3f}", str(f["max"]))
                for w, f in list(per_worker.items())[:_MAX_ROWS]
            ],
        )
    if len(per_worker) > _MAX_ROWS:
        yield page.note(f"and {len(per_worker) - _MAX_ROWS} more workers, listed in result.json.")


def _wait_label(who: str, wait: Mapping[str, Any]) -> str:
    """Name a wait; a synchronous run does not count its waits, every step has one."""
    return f"{who}, {wait['count']:,} times" if "count" in wait else who


def _speed(record: Record) -> Iterator[str]:
    counters = curves.counters(record)
    if counters is not None:
        same = np.array_equal(counters["gradients"], counters["updates"])
        keys = ["gradients"] if same else ["gradients", "updates"]
        svg = plots.throughput("throughput", [(i, counters, key) for i, key in enumerate(keys)])
        names = ["each gradient is an update"] if same else keys
        legend = [(name, colour) for colour, name in enumerate(names)]
        yield page.figure(svg, "Throughput over time", legend=legend)
    waits = _result(record).get("waits")
    if waits is None:
        yield page.note("Waits are not shown: the record has none.")
    elif not waits:
        yield page.note("No worker waited for another.")
    else:
        longest = sorted(waits.items(), key=lambda item: -item[1]["seconds"])
        bars = {_wait_label(who, w): w["seconds"] for who, w in longest[:_MAX_ROWS]}
        rest = sum(w["seconds"] for _, w in longest[_MAX_ROWS:])
        if rest:
            bars[f"{len(longest) - _MAX_ROWS} others"] = rest
        total = sum(w["seconds"] for w in waits.values())
        at_work = max(_result(record)["workers"] * _result(record)["seconds"], 1e-9)
        caption = f"{total:,.1f} s in all, {100 * total / at_work:.1f} % of the workers' time."
        yield page.figure(plots.waits("waits", bars), "Who waited for whom", caption)


def _settings(record: Record) -> dict[str, str]:
    config = _result(record).get("config", record.config)
    return {key.replace("_", " "): _value(value) for key, value in config.items()}


def _side_by_side(columns: Sequence[Mapping[str, str]]) -> Iterator[list[str]]:
    for key in dict.fromkeys(key for column in columns for key in column):
        yield [key, *(column.get(key, "") for column in columns)]


def _histograms(records: Sequence[Record], legend: Sequence[tuple[str, int]]) -> Iterator[str]:
    counts = [curves.staleness_counts(record) for record in records]
    shown = [(entry, of) for entry, of in zip(legend, counts, strict=True) if of]
    if shown:
        svg = plots.histogram("histogram", [(colour, of) for (_, colour), of in shown])
        entries = [entry for entry, _ in shown]
        yield page.figure(svg, "How stale gradients were", "Applied pushes.", entries)
    without = [name for (name, _), of in zip(legend, counts, strict=True) if not of]
    if without:
        yield page.note(f"No staleness in the record of {', '.join(without)}.")


def _rates(records: Sequence[Record], legend: Sequence[tuple[str, int]]) -> Iterator[str]:
    counters = [curves.counters(record) for record in records]
    rates = [
        (colour, columns, "gradients")
        for (_, colour), columns in zip(legend, counters, strict=True)
        if columns is not None
    ]
    if rates:
        svg = plots.throughput("throughput", rates)
        yield page.figure(svg, "Gradients a second over time", legend=legend)


def _differences(records: Sequence[Record], names: Sequence[str]) -> Iterator[str]:
    rows = [row for row in _side_by_side([_settings(r) for r in records]) if len({*row[1:]}) > 1]
    if rows:
        yield page.table(["", *names], rows, wide=True)
        yield page.note("All other settings are the same.")
    else:
        yield page.note("The configurations are the same.")


def _metrics(values: Mapping[str, Any]) -> str:
    said = ", ".join(f"{k} {_figure(v)}" for k, v in values.items() if k not in curves.NOT_METRICS)
    at = [f"version {values['version']:,}"] if "version" in values else []
    at += [f"{values['seconds']:,.1f} s"] if "seconds" in values else []
    return f"{said} (at {', '.join(at)})" if at else said


def _figure(value: float | None) -> str:
    """Write a metric; a record holds null for what is not finite."""
    return "not finite" if value is None else _value(value)


def _value(value: object) -> str:
    """Write a value of a record as people read it; a plug-in as the command line takes it."""
    if isinstance(value, dict):
        keys = ",".join(
            f"{k}={'/'.join(map(str, v)) if isinstance(v, list) else v}"
            for k, v in value.items()
            if k != "name"
        )
        return ":".join(filter(None, [str(value.get("name", "")), keys]))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return str(value) or "none"
