"""How a run went, as the short table that `paramserver train` ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from async_sgd.delays import DELAYS
from async_sgd.rules import RULES
from deploy.flags import spell
from deploy.progress import counts, rate
from paramserver.optimizers import OPTIMIZERS


def outcome(record: Mapping[str, Any]) -> Table:
    """Return the table of a run's ``result.json``; what it does not tell has no row."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(record).items():
        table.add_row(name, Text(value))
    return table


def _rows(record: Mapping[str, Any]) -> dict[str, str]:
    config = record.get("config", {})
    rows: dict[str, str] = {}
    for name in ("mode", "task"):
        if name in record:
            rows[name] = str(record[name])
    if "optimizer" in record:
        rows["optimizer"] = spell(OPTIMIZERS, record["optimizer"])
    if config.get("rule"):
        rows["rule"] = spell(RULES, config["rule"])
    is_simulated = record.get("mode") == "simulate"
    if is_simulated and config.get("delay"):
        rows["delay"] = spell(DELAYS, config["delay"])
    shards = ("shards",) if record.get("mode") == "async" else ()
    sizes = ("workers", *shards, "updates")
    rows |= {name: f"{record[name]:,}" for name in sizes if name in record}
    if "gradients_per_s" in record:
        rows["gradients/s"] = rate(record["gradients_per_s"])
    if "seconds" in record:
        rows["virtual seconds" if is_simulated else "seconds"] = f"{record['seconds']:.1f}"
    if "gateway" in record:
        rows["over gRPC"] = came(record["gateway"], record["workers"])
    if record.get("final"):
        rows["final"] = _metrics(record["final"])
    best = record.get("best")
    if best:
        where = f" at version {best['version']:,}" if "version" in best else ""
        when = f" after {best['seconds']:.1f} s" if "seconds" in best else ""
        rows["best"] = _metrics(best) + where + when
    if record.get("kept") == "best":
        rows["kept"] = "the best version, in the record's best/"
    return rows | _staleness(record) | _ending(record)


def _staleness(record: Mapping[str, Any]) -> dict[str, str]:
    rows = {}
    staleness = record.get("staleness")
    if staleness:
        shown = [f"{k} {staleness[k]:.3g}" for k in ("mean", "p95", "max") if k in staleness]
        rows["staleness"] = ", ".join(shown)
    states = record.get("state_staleness")
    if states:
        rows["state staleness"] = ", ".join(f"{k} {states[k]:.3g}" for k in ("mean", "p95", "max"))
    for name, of in record.get("measures", {}).items():
        rows[name] = measure(of)
    for way, of in record.get("traffic", {}).items():
        rows[f"{way}ed"] = traffic(of)
    like = record.get("like")
    if like:
        rows["recorded run"] = (
            f"{rate(like['gradients_per_s'])} gradients/s; its histogram of staleness is "
            f"{like['distance']:.3f} away (total variation)"
        )
        rows["its delays"] = f"much like {spell(DELAYS, like['law'])}"
    law = record.get("conservation")
    if law:
        holds = f"holds: {law['left']:,} = {law['right']:,}"
        broken = f"BROKEN: {law['left']:,} is not {law['right']:,}"
        rows["law of staleness"] = holds if law["holds"] else broken
    return rows


def _ending(record: Mapping[str, Any]) -> dict[str, str]:
    rows = {}
    if "dropped" in record:
        rows["dropped"] = counts(record["dropped"]) if record["dropped"] else "none"
    if "cancelled" in record:
        rows["cancelled"] = f"{record['cancelled']:,} gradients under way"
    if "failures" in record and record.get("mode") != "simulate":
        failures = [f"{f['what']} after {f['seconds']:.1f} s" for f in record["failures"]]
        rows["failures"] = ", ".join(failures) or "none"
    if record.get("warnings"):
        rows["warnings"] = "; ".join(record["warnings"])
    if "stopped_because" in record:
        rows["stopped because"] = str(record["stopped_because"])
    return rows


def measure(of: Mapping[str, float | None]) -> str:
    """Write the mean and the largest value of what was measured of each push."""
    shown = [f"{which} {value:.4g}" for which, value in of.items() if value is not None]
    return ", ".join(shown) or "no value"


def traffic(of: Mapping[str, int]) -> str:
    """Write how much went one way, and how much that saved."""
    if of["bytes"] == of["plain_bytes"]:
        return f"{of['bytes'] / 1e6:,.1f} MB"
    saved = of["plain_bytes"] / max(of["bytes"], 1)
    return (
        f"{of['bytes'] / 1e6:,.1f} MB in the place of {of['plain_bytes'] / 1e6:,.1f}, 1/{saved:.1f}"
    )


def came(gateway: Mapping[str, Any], workers: int) -> str:
    """Write who came by gRPC, and how much went over it."""
    guests = f" and {gateway['guests']:,} guests" if gateway["guests"] else ""
    received, sent = (f"{gateway[f'{way}_bytes'] / 1e6:,.1f} MB" for way in ("received", "sent"))
    return f"{gateway['workers']:,} of {workers:,} workers{guests}; {received} in, {sent} out"


def _metrics(values: Mapping[str, float]) -> str:
    names = sorted(name for name in values if name not in ("version", "seconds"))
    return ", ".join(f"{name.replace('_', ' ')} {values[name]:.4g}" for name in names)
