"""Puts our programs behind `scipy.optimize.minimize`, so that scipy's own tests run them.

As a pytest plugin, ``-p tests.support.scipy_adapter``, it replaces scipy's BFGS, CG and Newton-CG
before the tests are imported. Ends, counts and callbacks are reported in scipy's way; what scipy's
functions evaluate numerically, such as a gradient that was not given, is theirs here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.optimize._minimize as scipy_minimize
import scipy.optimize._optimize as scipy_optimize
import torch
from scipy.optimize import OptimizeResult
from torch import Tensor

from paramserver.errors import CurvatureError
from paramserver.optimizers.bfgs import BFGS
from paramserver.optimizers.conjugate_gradient import ConjugateGradient
from paramserver.optimizers.newton import NewtonCG
from paramserver.rounds import Answer, Ask, RoundProgram, Runner, minimise
from tests.support.programs import built

num_runs = 0
"""Runs of our programs so far in this process."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Note with each test how often it ran one of our programs."""
    before = num_runs
    try:
        return (yield)
    finally:
        item.user_properties.append(("runs", num_runs - before))


SUCCESS, MAX_ROUNDS, STALLED, NOT_FINITE, HALTED = 0, 1, 2, 3, 99
_MESSAGES = {
    SUCCESS: scipy_optimize._status_message["success"],
    MAX_ROUNDS: scipy_optimize._status_message["maxiter"],
    STALLED: scipy_optimize._status_message["pr_loss"],
    NOT_FINITE: scipy_optimize._status_message["nan"],
    HALTED: "`callback` raised `StopIteration`.",
}


def _run(
    program: RoundProgram,
    x0: np.ndarray,
    sf: Any,
    hvp: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
    *,
    is_done: Callable[[np.ndarray, np.ndarray], bool],
    callback: Any,
    maxiter: int | None,
    disp: bool,
    return_all: bool,
) -> OptimizeResult:
    """Run ``program`` from ``x0``; ``is_done`` is asked with x and the last step."""
    global num_runs  # noqa: PLW0603  # read by the hook above
    num_runs += 1
    num_hvps, path = 0, [x0.copy()]
    maxiter = 200 * len(x0) if maxiter is None else maxiter

    def answer(ask: Ask, round_: int) -> Answer:
        nonlocal num_hvps
        x = _array(ask.at, x0)
        match ask.kind:
            case "loss":
                return Answer(1, float(sf.fun(x)), ask.at.new_empty(0, len(ask.at)))
            case "gradient":
                loss = float(sf.fun(x))
                return Answer(1, loss, _tensor(sf.grad(x))[None])
            case "hvp":
                assert hvp is not None
                assert ask.vector is not None
                num_hvps += 1
                product = np.asarray(hvp(x, _array(ask.vector, x0)), dtype=float)
                return Answer(1, float("nan"), _tensor(product.reshape(1, -1)))
        raise AssertionError(f"{ask.kind} is not asked for")

    status = MAX_ROUNDS

    def on_round(runner: Runner) -> None:
        nonlocal status
        last, x = path[-1], _array(runner.x, x0)
        if np.array_equal(last, x):  # it ended without a step
            if runner.stop is not None and status == MAX_ROUNDS:
                status = STALLED
            return
        path.append(x)
        shown = OptimizeResult(x=x.copy(), fun=sf.fun(x))
        if scipy_optimize._call_callback_maybe_halt(callback, shown):
            runner.stop, status = "the callback says so", HALTED
        elif is_done(x, x - last):
            runner.stop, status = "scipy's condition is met", SUCCESS

    if is_done(x0, np.full(len(x0), np.inf)):
        status = SUCCESS
    else:
        try:
            minimise(program, _tensor(x0), answer, max_rounds=maxiter, on_round=on_round)
        except CurvatureError:
            status = NOT_FINITE
    x = path[-1]
    fun, jac = sf.fun(x), sf.grad(x)
    if not (np.isfinite(fun) and np.isfinite(jac).all()):
        status = NOT_FINITE
    if disp:
        scipy_optimize._print_success_message_or_warn(status, _MESSAGES[status])
        print(f"         Current function value: {fun:f}")
        print(f"         Iterations: {len(path) - 1:d}")
        print(f"         Function evaluations: {sf.nfev:d}")
        print(f"         Gradient evaluations: {sf.ngev:d}")
    result = OptimizeResult(
        x=x,
        fun=fun,
        jac=jac,
        nit=len(path) - 1,
        nfev=sf.nfev,
        njev=sf.ngev,
        status=status,
        success=status == SUCCESS,
        message=_MESSAGES[status],
    )
    if hvp is not None:
        result["nhev"] = num_hvps
    if return_all:
        result["allvecs"] = path
    return result


def _array(x: Tensor, like: np.ndarray) -> np.ndarray:
    return x.numpy().astype(like.dtype if like.dtype.kind == "f" else float)


def _tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(x, dtype=np.float64))


def _minimize_bfgs(
    fun: Any,
    x0: Any,
    args: tuple[Any, ...] = (),
    jac: Any = None,
    callback: Any = None,
    gtol: float = 1e-5,
    norm: float = np.inf,
    eps: Any = scipy_optimize._epsilon,
    maxiter: int | None = None,
    disp: bool = False,
    return_all: bool = False,
    finite_diff_rel_step: Any = None,
    xrtol: float = 0,
    c1: float = 1e-4,
    c2: float = 0.9,
    hess_inv0: Any = None,
    workers: Any = None,
    **unknown_options: Any,
) -> OptimizeResult:
    scipy_optimize._check_unknown_options(unknown_options)
    scipy_optimize._check_positive_definite(hess_inv0)
    x0, sf = _prepared(fun, x0, jac, args, eps, finite_diff_rel_step, workers)
    program = built(BFGS(tolerance=0, c1=c1, c2=c2), _tensor(x0))
    if hess_inv0 is not None:
        program.memory["inverse"] = _tensor(hess_inv0)

    def is_done(x: np.ndarray, step: np.ndarray) -> bool:
        if scipy_optimize.vecnorm(sf.grad(x), ord=norm) <= gtol:
            return True
        size = scipy_optimize.vecnorm(step)
        return bool(size <= xrtol * (xrtol + scipy_optimize.vecnorm(x)))

    result = _run(
        program,
        x0,
        sf,
        None,
        is_done=is_done,
        callback=callback,
        maxiter=maxiter,
        disp=disp,
        return_all=return_all,
    )
    result["hess_inv"] = program.memory.get("inverse", torch.eye(len(x0)).double()).numpy()
    return result


def _minimize_cg(
    fun: Any,
    x0: Any,
    args: tuple[Any, ...] = (),
    jac: Any = None,
    callback: Any = None,
    gtol: float = 1e-5,
    norm: float = np.inf,
    eps: Any = scipy_optimize._epsilon,
    maxiter: int | None = None,
    disp: bool = False,
    return_all: bool = False,
    finite_diff_rel_step: Any = None,
    c1: float = 1e-4,
    c2: float = 0.1,
    workers: Any = None,
    **unknown_options: Any,
) -> OptimizeResult:
    scipy_optimize._check_unknown_options(unknown_options)
    x0, sf = _prepared(fun, x0, jac, args, eps, finite_diff_rel_step, workers)
    return _run(
        built(ConjugateGradient(tolerance=0, c1=c1, c2=c2), _tensor(x0)),
        x0,
        sf,
        None,
        is_done=lambda x, step: bool(scipy_optimize.vecnorm(sf.grad(x), ord=norm) <= gtol),
        callback=callback,
        maxiter=maxiter,
        disp=disp,
        return_all=return_all,
    )


def _minimize_newtoncg(
    fun: Any,
    x0: Any,
    args: tuple[Any, ...] = (),
    jac: Any = None,
    hess: Any = None,
    hessp: Any = None,
    callback: Any = None,
    xtol: float = 1e-5,
    eps: Any = scipy_optimize._epsilon,
    maxiter: int | None = None,
    disp: bool = False,
    return_all: bool = False,
    c1: float = 1e-4,
    c2: float = 0.9,
    workers: Any = None,
    **unknown_options: Any,
) -> OptimizeResult:
    scipy_optimize._check_unknown_options(unknown_options)
    if jac is None:
        raise ValueError("Jacobian is required for Newton-CG method")
    x0, sf = _prepared(fun, x0, jac, args, eps, None, workers, hess)

    def hvp(x: np.ndarray, p: np.ndarray) -> np.ndarray:
        if hess is not None:
            return sf.hess(x).dot(p)
        if hessp is not None:
            return hessp(x, p, *args)
        return scipy_optimize.approx_fhess_p(x, p, sf.grad, eps)

    return _run(
        built(NewtonCG(tolerance=0), _tensor(x0)),
        x0,
        sf,
        hvp,
        is_done=lambda x, step: bool(np.abs(step).sum() <= len(x) * xtol),
        callback=callback,
        maxiter=maxiter,
        disp=disp,
        return_all=return_all,
    )


def _prepared(
    fun: Any,
    x0: Any,
    jac: Any,
    args: tuple[Any, ...],
    eps: Any,
    finite_diff_rel_step: Any,
    workers: Any,
    hess: Any = None,
) -> tuple[np.ndarray, Any]:
    x0 = np.atleast_1d(np.asarray(x0).flatten())
    sf = scipy_optimize._prepare_scalar_function(
        fun,
        x0,
        jac=jac,
        args=args,
        epsilon=eps,
        finite_diff_rel_step=finite_diff_rel_step,
        hess=hess,
        workers=workers,
    )
    return (x0 if x0.dtype.kind == "f" else x0.astype(float)), sf


for module in (scipy_minimize, scipy_optimize):
    module._minimize_bfgs = _minimize_bfgs
    module._minimize_cg = _minimize_cg
    module._minimize_newtoncg = _minimize_newtoncg
