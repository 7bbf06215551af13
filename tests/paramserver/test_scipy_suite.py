"""scipy's own tests of BFGS, CG and Newton-CG, run on our programs.

Of `scipy.optimize.tests.test_optimize` those are selected that name one of the three methods. Of
these, the default run leaves out those that scipy runs with its own L-BFGS-B or trust region, and
pools of processes; with them they are 190.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("scipy")

NAMED = "bfgs or BFGS or _cg or CG or newton or ncg"
OURS = (
    "(bfgs or cg or newton) and not l_bfgs and not l-bfgs and not lbfgsb and not trust"
    " and not TestWorkers"
)

CALLS = "counts calls as in SciPy 0.7.0; ours needs another number"
XTOL = "wants the run to end on a step of length 0; ours ends for want of a lower loss"
INFINITE = "wants to end at a loss of -inf, which to us is a step too long"

EXPECTED_FAILURES = {
    "test_cg": CALLS,
    "test_bfgs": CALLS,
    "test_ncg": CALLS,
    "test_ncg_zero_xtol": XTOL,
    "test_bfgs_infinite": INFINITE,
    "test_bfgs_nan_return": "wants to end at a NaN; ours stays at the last point with a loss",
    "test_hessian_update_strategy": "the Hessian is a quasi-Newton guess, which makes steps short; "
    "scipy's condition takes a short step for the end",
}
"""Names, for all classes that hold them, and why they fail."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("selected", "least"),
    [
        pytest.param(OURS, 80, id="ours"),
        pytest.param(NAMED, 150, id="named", marks=pytest.mark.long),
    ],
)
def test_scipys_tests_pass_but_for_those_listed(tmp_path: Path, selected: str, least: int) -> None:
    report = tmp_path / "report.xml"
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-W", "ignore", "--tb=short"),
        *("-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider"),
        *("-p", "tests.support.scipy_adapter", f"--junitxml={report}"),
        *("--pyargs", "scipy.optimize.tests.test_optimize", "-k", selected),
    ]
    root = Path(__file__).parents[2]

    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    assert report.exists(), done.stdout + done.stderr
    outcomes = _outcomes(report)
    failed = {name for name, (outcome, _) in outcomes.items() if outcome == "failed"}
    listed = {name for name in outcomes if _function(name) in EXPECTED_FAILURES}
    assert failed == listed, done.stdout
    assert {_function(name) for name in listed} == set(EXPECTED_FAILURES)
    assert len(outcomes) - len(failed) >= least
    ours = [name for name, (outcome, runs) in outcomes.items() if outcome == "passed" and runs]
    assert len(ours) >= 70, "scipy's tests no longer reach our programs"


def _function(name: str) -> str:
    """Return a test's name without its class and parameters."""
    return name.split("::")[1].split("[", maxsplit=1)[0]


def _outcomes(report: Path) -> dict[str, tuple[str, int]]:
    """Return how each test ended that was not skipped, and how often it ran our programs."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        failed = case.find("failure") is not None or case.find("error") is not None
        runs = [int(p.attrib["value"]) for p in case.iter("property") if p.get("name") == "runs"]
        name = f"{case.attrib['classname'].split('.')[-1]}::{case.attrib['name']}"
        outcomes[name] = ("failed" if failed else "passed", sum(runs))
    return outcomes
