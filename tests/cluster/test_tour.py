"""A tour of `deploy/cluster.yaml` on three hosts: up, submit, exec, job submit, stop, down.

What was typed and what came of it is kept as a transcript, in the file that ``$TRANSCRIPT`` names
if it is set. Several minutes: the hosts share this machine's processors.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import PROJECT, Host, hosts, processes_in, why_not
from tests.support.certificates import Authority

pytestmark = [
    pytest.mark.long,
    pytest.mark.system,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

PLAIN = "--log-style pretty --log-color false"
TRAINING = "--mode sync --workers 4 --epochs 25"
APART = "--mode async --workers 4 --server-labels role=server --worker-labels role=worker"
SUBMIT = f"ray submit {PLAIN} deploy/cluster.yaml deploy/train.py --"
ON_HEAD = "ssh -q -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null host1"
DASHBOARD = "http://127.0.0.1:8265"
_NOISE = ("File Mount", " To ensure", "Loaded cached", "If you exper", "Fetched IP", "Shared conn")
_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\t\w+ \S+ -- ")


@dataclass
class Tour:
    """The laptop a person sits at, three hosts, and what was said so far."""

    laptop: Host
    head: Host
    others: list[Host]
    said: list[str] = field(default_factory=list)

    def type(self, command: str, *, timeout_s: float = 400, fails: bool = False) -> str:
        """Type ``command`` in the project's folder on the laptop; return what it prints."""
        start = time.monotonic()
        done = self.laptop.run(
            f"cd project && {command}",
            timeout_s=timeout_s,
            RAY_AUTH_MODE="token",
            RAY_API_SERVER_ADDRESS=DASHBOARD,
        )
        took_s = time.monotonic() - start
        lines = [line.rstrip() for line in done.stdout.splitlines()]
        told = [line for line in lines if line and not line.startswith(_NOISE)]
        told = [line for line in told if not _STAMP.match(line)]
        self.said += [f"laptop$ {command}", *told, f"[{took_s:.0f} s, exit {done.returncode}]", ""]
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    def until(self, holds: Callable[[], bool], what: str, limit_s: float = 240) -> None:
        """Wait until something ``holds``."""
        deadline = time.monotonic() + limit_s
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {limit_s:g} s for {what}")
            time.sleep(0.5)

    @property
    def everywhere(self) -> list[Host]:
        """The cluster's hosts."""
        return [self.head, *self.others]

    def result(self, host: Host, folder: str) -> dict[str, Any]:
        """Return the record of a run in ``folder`` of a host's home."""
        found: dict[str, Any] = json.loads((host.home / folder / "result.json").read_text())
        return found


@pytest.fixture(scope="module")
def tour() -> Iterator[Tour]:
    with hosts(3) as (laptop, (head, *others)):
        project = laptop.home / "project"
        left_out = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*cache", ".venv")
        shutil.copytree(PROJECT, project, ignore=left_out)
        file = project / "deploy" / "cluster.yaml"
        text = file.read_text().replace("HEAD_HOST", head.name).replace("SSH_USER", "root")
        names = ", ".join(host.name for host in others)
        file.write_text(text.replace("WORKER_HOST_1, WORKER_HOST_2", names))
        tour = Tour(laptop, head, others)
        pids = [host.pid for host in (laptop, head, *others)]
        networks = [os.readlink(f"/proc/{pid}/ns/net") for pid in pids]
        try:
            tour.type("ray get-auth-token --generate > /dev/null 2>&1")
            tour.type(f"ray up -y {PLAIN} deploy/cluster.yaml > up.log 2>&1")
            tour.until(lambda: "/6.0 CPU" in tour.head.run("ray status", **TOKEN).stdout, "hosts")
            yield tour
        finally:
            if name := os.environ.get("TRANSCRIPT"):
                Path(name).write_text("\n".join(tour.said))
    assert not laptop.folder.parent.exists()
    assert [pid for network in networks for pid in processes_in(network)] == []


TOKEN = {"RAY_AUTH_MODE": "token"}


def test_all_hosts_are_in_the_cluster(tour: Tour) -> None:
    said = tour.type(f"ray exec {PLAIN} deploy/cluster.yaml 'ray status | grep CPU'")

    assert "0.0/6.0 CPU" in said


def test_a_script_is_submitted_and_learns_as_much_as_at_home(tour: Tour) -> None:
    tour.type(f"python -m deploy train {TRAINING} --out ~/runs/home")
    tour.type(f"{SUBMIT} {TRAINING} --out runs/submitted")

    home, there = tour.result(tour.laptop, "runs/home"), tour.result(tour.head, "runs/submitted")
    assert there["updates"] == home["updates"]
    assert there["final"]["accuracy"] == pytest.approx(home["final"]["accuracy"], abs=0.006)
    assert there["final"]["accuracy"] > 0.96
    assert (home["collective"], there["collective"]) == ("shared_memory", "nodes")


def test_a_run_over_hosts_does_not_start_in_clear_text_unless_told_to(tour: Tour) -> None:
    said = tour.type(f"{SUBMIT} {APART} --out runs/open", fails=True)

    (error,) = [line for line in said.splitlines() if line.startswith("paramserver: ")]
    assert "a run over the cluster's 3 nodes can be reached from other machines" in error


@pytest.fixture(scope="module")
def tls(tour: Tour) -> str:
    """Return the flags of a certificate that names every host."""
    addresses = tuple(host.address for host in tour.everywhere)
    authority = Authority(tour.head.home / "certificates", "ca", addresses)
    authority.identity("run")
    return " ".join(
        f"--tls-{name} certificates/{file}"
        for name, file in (("certificate", "run.pem"), ("key", "run.key"), ("ca", "ca.pem"))
    )


def test_shards_on_one_host_and_workers_on_others_learn_as_much_as_at_home(
    tour: Tour, tls: str
) -> None:
    at_home = "--mode async --workers 4 --epochs 25"
    tour.type(f"python -m deploy train {at_home} --out ~/runs/home-async")
    seen = _watched(tour, f"{APART} --epochs 25 {tls} --out runs/apart")

    home, there = tour.result(tour.laptop, "runs/home-async"), tour.result(tour.head, "runs/apart")
    assert there["final"]["accuracy"] == pytest.approx(home["final"]["accuracy"], abs=0.015)
    assert there["final"]["accuracy"] > 0.96
    assert (there["gateway"]["workers"], there["gateway"]["guests"]) == (4, 0)
    assert there["gateway"]["address"].startswith(f"{tour.head.address}:")
    assert there["gateway"]["received_bytes"] > 4 * there["gradients"]
    shards = {("host1", kind) for kind in ("ShardServer", "GatewayServer", "Evaluator")}
    assert seen >= shards | {("host2", "Worker"), ("host3", "Worker")}
    assert not seen & {("host1", "Worker"), ("host2", "ShardServer"), ("host3", "ShardServer")}


def test_shards_on_every_host_learn_as_much_as_at_home(tour: Tour, tls: str) -> None:
    seen = _watched(
        tour, f"--mode async --workers 4 --shards 3 --epochs 25 {tls} --out runs/everywhere"
    )

    home = tour.result(tour.laptop, "runs/home-async")
    there = tour.result(tour.head, "runs/everywhere")
    assert there["final"]["accuracy"] == pytest.approx(home["final"]["accuracy"], abs=0.015)
    assert there["final"]["accuracy"] > 0.96
    assert there["gateway"]["workers"] == 4
    assert len(there["gateway"]["others"]) == 2
    everywhere = {"ShardServer", "GatewayServer", "Worker"}
    assert seen >= {(host.name, kind) for host in tour.everywhere for kind in everywhere}


def test_the_loss_of_a_host_with_a_shard_ends_the_run_by_name_and_it_goes_on_from_there(
    tour: Tour,
) -> None:
    """Its gateway's process stands for the host, which others still need."""
    run = "--mode async --workers 4 --shards 3 --clear-text --checkpoint-every-s 2"
    log = tour.laptop.folder / "lost.log"
    command = f"{SUBMIT} {run} --updates 1000000 --out runs/lost"
    process = tour.laptop.begin(f"cd project && {command}", log, **TOKEN)
    tour.until(lambda: _checkpoint(tour, "lost").exists(), "a checkpoint")
    leading = tour.head.pids("^ray::GatewayServer")
    (host, *_) = [h for h in tour.others if h.pids("^ray::GatewayServer")]

    host.run("pkill -KILL -f '^ray::GatewayServer'", check=True)

    assert leading
    assert process.wait(120) != 0
    tour.said += [f"laptop$ {command}", *log.read_text().splitlines(), ""]
    (error,) = [line for line in log.read_text().splitlines() if line.startswith("paramserver: ")]
    assert "a gateway was lost, by which processes on other nodes reach the shards" in error
    there = tour.result(tour.head, "runs/lost")
    assert there["stopped_because"].startswith("error: a gateway was lost")
    assert not any(host.pids("^ray::(Worker|ShardServer|Gateway)") for host in tour.everywhere)
    tour.type(f"{SUBMIT} {run} --updates {there['updates'] + 200} --resume runs/lost")
    assert tour.result(tour.head, "runs/lost")["updates"] == there["updates"] + 200


@pytest.fixture(scope="module")
def dashboard(tour: Tour) -> Iterator[None]:
    log = tour.laptop.folder / "dashboard.log"
    process = tour.laptop.begin("cd project && ray dashboard deploy/cluster.yaml", log, **TOKEN)
    tour.said += ["laptop$ ray dashboard deploy/cluster.yaml &", ""]
    answers = "(echo > /dev/tcp/127.0.0.1/8265)"
    tour.until(lambda: tour.laptop.run(answers).returncode == 0, "the dashboard")
    yield
    process.terminate()
    process.wait()


def test_a_job_is_submitted_and_makes_the_same_run(tour: Tour, dashboard: None) -> None:
    tour.type(
        "ray job submit --working-dir . --submission-id first -- "
        f"python -m deploy train {TRAINING} 2>&1"
    )

    job, there = tour.result(tour.head, "runs/first"), tour.result(tour.head, "runs/submitted")
    assert job["final"] == pytest.approx(there["final"], abs=1e-3)


def test_a_stopped_job_leaves_its_record_and_a_resubmitted_one_goes_on(
    tour: Tour, dashboard: None
) -> None:
    training = "python -m deploy train --mode sync --workers 4 --checkpoint-every-s 2"
    tour.type(
        "ray job submit --no-wait --working-dir . --submission-id long -- "
        f"{training} --updates 100000"
    )
    tour.until(lambda: _checkpoint(tour, "long").exists(), "a checkpoint")
    tour.until(lambda: _exported(tour) >= SHOWN, "metrics for Prometheus")

    tour.type("ray job stop long")

    stopped = tour.result(tour.head, "runs/long")
    assert stopped["stopped_because"] == "interrupted"
    tour.type(
        f"ray job submit --working-dir . -- {training} --updates {stopped['updates'] + 50} "
        "--resume /home/trainer/runs/long 2>&1"
    )
    assert tour.result(tour.head, "runs/long")["updates"] == stopped["updates"] + 50


def test_workers_end_with_a_killed_driver_and_the_run_goes_on_from_its_checkpoint(
    tour: Tour,
) -> None:
    training = "--mode sync --workers 4 --checkpoint-every-s 2"
    command = f"cd project && {SUBMIT} {training} --updates 100000 --out runs/killed"
    process = tour.laptop.begin(command, tour.laptop.folder / "killed.log", **TOKEN)
    tour.until(lambda: _checkpoint(tour, "killed").exists(), "a checkpoint")
    driver = "^python .*train.py .*runs/killed"

    tour.head.run(f"pkill -KILL -f {driver!r}", check=True)

    process.wait(60)
    tour.until(lambda: not any(host.pids("^ray::Rank") for host in tour.everywhere), "their end")
    assert not (tour.head.home / "runs/killed/result.json").exists()
    tour.type(f"{SUBMIT} {training} --updates 400 --resume runs/killed")
    assert tour.result(tour.head, "runs/killed")["updates"] >= 400


def _updates(metrics: Path) -> int:
    """Return how many updates the last line of a run's metrics tells of."""
    lines = metrics.read_text().splitlines()
    return max((json.loads(line).get("updates", 0) for line in lines[-5:]), default=0)


def _watched(tour: Tour, flags: str) -> set[tuple[str, str]]:
    """Submit a run and wait for its end; return which kinds of its processes were where."""
    seen: set[tuple[str, str]] = set()
    log = tour.laptop.folder / "watched.log"
    process = tour.laptop.begin(f"cd project && {SUBMIT} {flags}", log, **TOKEN)
    while process.poll() is None:
        seen |= {(host.name, kind) for host in tour.everywhere for kind in _kinds(host)}
        time.sleep(0.2)
    tour.said += [f"laptop$ {SUBMIT} {flags}", *log.read_text().splitlines(), ""]
    assert process.returncode == 0, log.read_text()
    return seen


def _kinds(host: Host) -> set[str]:
    """Return which kinds of a run's processes are on ``host``."""
    listed = host.run("ps -eo args").stdout
    return set(re.findall(r"^ray::(ShardServer|GatewayServer|Worker|Evaluator)\b", listed, re.M))


SHOWN = {
    f"ray_paramserver_{name}"
    for name in ("updates_total", "gradient_bytes_total", "updates_per_second", "loss", "waiting")
}


def _exported(tour: Tour) -> set[str]:
    """Return the names of the metrics of the head's node that are ours."""
    read = "import urllib.request as r; print(r.urlopen('http://host1:8090').read().decode())"
    page = tour.laptop.run(f'python3 -c "{read}"').stdout
    return {name for name in re.findall(r"^(\w+){", page, re.M) if "paramserver" in name}


def _checkpoint(tour: Tour, run: str) -> Path:
    return tour.head.home / "runs" / run / "checkpoint" / "manifest.json"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--workers 40 --resources-timeout-s 5",
            "waited 5 s for 34 of 40 workers: each needs 1 CPU; the cluster's 3 nodes have "
            "2 + 2 + 2 CPU free",
        ),
        ("--network-interface eth9", "has no network interface 'eth9' (it has lo, eth0)"),
        ("--worker-labels role=none --resources-timeout-s 5", "on a node labelled role=none"),
        ("--address 10.77.0.99:6379", "no Ray at 10.77.0.99:6379: "),
    ],
    ids=["too few nodes", "unknown interface", "unknown label", "unreachable address"],
)
def test_bad_input_is_one_clear_error(tour: Tour, flags: str, message: str) -> None:
    said = tour.type(f"{SUBMIT} --mode sync {flags}", fails=True)

    (error,) = [line for line in said.splitlines() if line.startswith("paramserver: ")]
    assert message in error


def test_nobody_joins_without_the_token(tour: Tour) -> None:
    asked = tour.laptop.run(
        "cd project && python -m deploy train --address host1:6379 --mode sync",
        RAY_AUTH_MODE="disabled",
    )

    assert asked.returncode == 1
    assert "paramserver: no Ray at host1:6379" in asked.stdout


def test_workers_of_a_host_that_dies_are_lost_by_name_and_the_others_go_on(tour: Tour) -> None:
    log = tour.laptop.folder / "dies.log"
    command = f"{SUBMIT} {APART} --clear-text --updates 1000000 --out runs/dies"
    process = tour.laptop.begin(f"cd project && {command}", log, **TOKEN)
    metrics = tour.head.home / "runs/dies/metrics.jsonl"

    def has_made(updates: int) -> bool:
        assert process.poll() is None, log.read_text()
        return metrics.exists() and _updates(metrics) > updates

    tour.until(lambda: has_made(200), "updates")

    tour.others.pop().stop()

    needs = "waiting for 2 of 4 workers: each needs 1 CPU on a node labelled role=worker"
    tour.until(lambda: needs in " ".join(log.read_text().split()), "the loss to be told")
    seen = _updates(metrics)
    tour.until(lambda: has_made(seen + 200), "more updates")
    tour.head.run("pkill -INT -f '^python .*train.py .*runs/dies'", check=True)
    process.wait(120)
    tour.said += [f"laptop$ {command}", *log.read_text().splitlines(), ""]
    there = tour.result(tour.head, "runs/dies")
    assert there["stopped_because"] == "interrupted"
    lost = {failure["what"] for failure in there["failures"]}
    assert len(lost) == 2
    assert lost < {f"worker {i}" for i in range(4)}


def test_a_host_with_a_shard_that_dies_ends_the_run_by_name_and_it_goes_on_without_that_host(
    tour: Tour,
) -> None:
    shards = f"--shards {len(tour.everywhere)}"
    run = f"--mode async --workers 2 {shards} --clear-text --checkpoint-every-s 2"
    log = tour.laptop.folder / "shard-dies.log"
    command = f"{SUBMIT} {run} --updates 1000000 --out runs/shard-dies"
    process = tour.laptop.begin(f"cd project && {command}", log, **TOKEN)
    tour.until(lambda: _checkpoint(tour, "shard-dies").exists(), "a checkpoint")
    (host, *_) = [h for h in tour.others if h.pids("^ray::ShardServer")]
    tour.others.remove(host)

    host.stop()

    assert process.wait(240) != 0
    tour.said += [f"laptop$ {command}", *log.read_text().splitlines(), ""]
    (error,) = [line for line in log.read_text().splitlines() if line.startswith("paramserver: ")]
    assert re.search(r"shard [012] was lost; go on from the last checkpoint with resume=", error)
    there = tour.result(tour.head, "runs/shard-dies")
    assert there["stopped_because"].startswith("error: shard ")
    assert not tour.head.pids("^ray::(Worker|ShardServer|Gateway)")
    tour.type(f"{SUBMIT} {run} --updates {there['updates'] + 200} --resume runs/shard-dies")
    assert tour.result(tour.head, "runs/shard-dies")["updates"] == there["updates"] + 200


def test_down_ends_every_process_of_ray(tour: Tour) -> None:
    tour.type(f"ray down -y {PLAIN} deploy/cluster.yaml > down.log 2>&1")

    tour.until(
        lambda: not any(host.pids("raylet|gcs_server") for host in tour.everywhere), "Ray to end"
    )
