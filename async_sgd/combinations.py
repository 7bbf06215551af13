"""What cannot be combined in an asynchronous run: refused by name, with the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from async_sgd.compensation import COMPENSATIONS
from async_sgd.rules import RULES
from async_sgd.rules.pieces import Pieces
from async_sgd.rules.ssp import SSP
from paramserver.compression import COMPRESSIONS
from paramserver.groups import refuse_groups
from paramserver.measures import check_measures
from paramserver.optimizers import OPTIMIZERS, SGD
from paramserver.optimizers.base import is_per_worker, needs_norm
from workers.local import LOCALS, Local
from workers.programs import check_adaptive, check_config, check_recurrent

if TYPE_CHECKING:
    from async_sgd.setup import Setup


def check_combination(setup: Setup) -> None:
    """Raise ValueError for a combination of optimizer, rule and policies that cannot work."""
    check_measures(setup.measure)
    _check_program(setup)
    _check_groups(setup)
    is_program = setup.program is not None or setup.form is not None
    check_recurrent(setup.task, setup.config, setup.optimizer_name if is_program else None)
    check_adaptive(setup.task, setup.config, setup.optimizer, setup.optimizer_name)
    if setup.config.adaptive_batch is not None:
        _check_batches(setup)
    if setup.local is not None:
        _check_local(setup, setup.local)
    _check_workers(setup)
    _check_compress(setup)
    if setup.cancels:
        _check_cancel(setup)
    if setup.rule.build(setup.config.workers).tabulates:
        _check_table(setup)
    if setup.shards > 1:
        _check_norms(setup)


def _check_groups(setup: Setup) -> None:
    """Raise ValueError if groups want rates of their own where there is one for all."""
    if setup.program is not None or setup.form is not None:
        refuse_groups(setup.task.groups, setup.optimizer_name)
    elif setup.local is not None:
        name = LOCALS.name_of(setup.local)
        refuse_groups(setup.task.groups, f"local {name}", instead="no local steps")


def _check_workers(setup: Setup) -> None:
    """Raise ValueError if workers' gradients become one that must be told apart."""
    if is_per_worker(setup.optimizer) and setup.rule.build(setup.config.workers).gathers:
        name, rule = setup.optimizer_name, RULES.name_of(setup.rule)
        raise ValueError(
            f"{name} keeps a velocity for each worker, and rule {rule} averages the gradients "
            "of several, which is nobody's: use asp, ssp, bounded or ringmaster, or optimizer "
            "momentum"
        )


def _check_batches(setup: Setup) -> None:
    """Raise ValueError if an update is not one gradient of a batch whose size is to follow."""
    if setup.local is not None:
        raise ValueError(
            f"local {LOCALS.name_of(setup.local)} takes several steps for a push, and "
            "adaptive_batch sizes the batch of one step of the server: leave one of them out"
        )
    if setup.rule.build(setup.config.workers).gathers:
        raise ValueError(
            f"rule {RULES.name_of(setup.rule)} averages several gradients into one update, and "
            "adaptive_batch sizes that of one: use asp, ssp, bounded or ringmaster, or mode "
            "sync"
        )


def _check_compress(setup: Setup) -> None:
    """Raise ValueError for what needs gradients, or reads, that the wire has not changed."""
    push, pull = setup.config.compress, setup.config.compress_pull
    if push is not None and push.feedback:
        name = f"compress {COMPRESSIONS.name_of(push)} has feedback: what is pushed is of"
        if setup.compensation is not None:
            raise ValueError(
                f"{name} gradients at several points, and compensation "
                f"{COMPENSATIONS.name_of(setup.compensation)} corrects the gradient at one: "
                "leave it out, or use bf16, qsgd or random-k"
            )
        if setup.rule.build(setup.config.workers).tabulates:
            raise ValueError(
                f"{name} several gradients, and rule {RULES.name_of(setup.rule)} takes it for "
                "one, which it uses again and again: use bf16, qsgd or random-k"
            )
    if pull is not None and (setup.compensation is not None or "gap" in setup.measure):
        what = "measure gap" if setup.compensation is None else "compensation"
        raise ValueError(
            f"with compress_pull workers compute at what came through, and {what} is of what "
            "the shard has shown them: leave one of them out"
        )


def _check_cancel(setup: Setup) -> None:
    """Raise ValueError for what cannot be given up half way."""
    for way in ("compress", "compress_pull"):
        compression = getattr(setup.config, way)
        if compression is not None and (compression.feedback or compression.remembers):
            raise ValueError(
                f"{way} {COMPRESSIONS.name_of(compression)} remembers what was sent, and a "
                "rule with cancel=true throws it away on its way: leave cancel out, or use "
                "bf16, fp16, qsgd or int8:feedback=false"
            )
    if setup.task.recurrent is not None and setup.task.recurrent.reset == "never":
        raise ValueError(
            f"task {setup.task.name} carries a state from window to window, and a rule with "
            "cancel=true gives up windows half way: leave cancel out, or use reset=pull"
        )
    if setup.form is not None:
        raise ValueError(
            f"{setup.optimizer_name} keeps points from push to push, and a rule with "
            "cancel=true gives up what a worker computes half way: leave cancel out"
        )
    if setup.local is not None and setup.local.num_kept > 0:
        raise ValueError(
            f"local {LOCALS.name_of(setup.local)} keeps {setup.local.num_kept} vectors from push "
            "to push, which half of its steps would have changed when a rule with cancel=true "
            "gives them up: leave cancel out, or use steps that keep nothing, such as sgd"
        )


def _check_table(setup: Setup) -> None:
    """Raise ValueError for what has no meaning where gradients are used several times."""
    rule = RULES.name_of(setup.rule)
    for what, is_there in (
        ("damping shortens the step of one gradient", setup.damping is not None),
        ("compensation corrects a gradient for one update", setup.compensation is not None),
    ):
        if is_there:
            raise ValueError(
                f"{what}, and an update of rule {rule} averages gradients of every worker, "
                "each used in several: leave it out, or use asp, ssp, bounded or ringmaster"
            )


def _check_local(setup: Setup, local: Local) -> None:
    """Raise ValueError for what local steps cannot be combined with."""
    name, steps = setup.optimizer_name, f"local {LOCALS.name_of(local)}"
    local.check(setup.config.workers)
    if setup.program is not None or setup.form is not None:
        raise ValueError(
            f"{name} asks workers for more than a gradient, each at the point it names, and "
            f"{steps} leaves that point: use a push rule, such as sgd or nesterov"
        )
    if setup.compensation is not None:
        raise ValueError(
            f"{steps} pushes how far a worker came, which is no gradient, and compensation "
            f"{COMPENSATIONS.name_of(setup.compensation)} corrects gradients: leave it out, and "
            "shorten the steps by damping"
        )
    if local.as_it_is:
        _check_as_it_is(setup, steps)
    if local.keeps_reads:
        _check_keeps_reads(setup, steps)


def _check_keeps_reads(setup: Setup, steps: str) -> None:
    """Raise ValueError for what counts on a new read after every push."""
    rule = RULES.name_of(setup.rule)
    if setup.rule.build(setup.config.workers).gathers or isinstance(setup.rule, SSP):
        raise ValueError(
            f"{steps} pushes several times of one read, and rule {rule} counts on a new one "
            "after every push: use asp, bounded or ringmaster, or fetch as often as you push"
        )
    if "gap" in setup.measure:
        raise ValueError(
            f"{steps} goes on from what it fetched some pushes ago, which no shard keeps to "
            "measure the gap from: leave gap out, or fetch as often as you push"
        )


def _check_as_it_is(setup: Setup, steps: str) -> None:
    """Raise ValueError if the server would not add up what is pushed as it is."""
    clip = setup.config.clip
    changed = {
        f"optimizer {setup.optimizer_name}": setup.optimizer != SGD(lr=1.0),
        f"rule {RULES.name_of(setup.rule)}": setup.rule.build(setup.config.workers).gathers,
        "a damping": setup.damping is not None,
        "a schedule": setup.config.schedule is not None,
        "compress": setup.config.compress is not None,
        "a clip with where=reduced": clip is not None and clip.where == "reduced",
    }
    for what in (what for what, changes in changed.items() if changes):
        raise ValueError(
            f"{steps} draws a worker and the server together by the same force, and {what} "
            "changes what the server gets of it: use optimizer sgd:lr=1, a rule that averages "
            "nothing, and none of damping, schedule, compress and clip with where=reduced"
        )


def _check_norms(setup: Setup) -> None:
    """Raise ValueError if something needs a norm that several shards cannot know.

    Workers measure that of what they push, but no shard has more than a slice of a mean, or of
    a gradient that was corrected.
    """
    if setup.rule.build(setup.config.workers).gathers:
        what, instead = "an averaged", "a rule that averages nothing"
    elif setup.compensation is not None:
        what, instead = "a compensated", "no compensation"
    else:
        return
    clip = setup.config.clip
    if clip is not None and clip.where == "reduced" and clip.norm_needed:
        raise ValueError(
            f"clipping {what} gradient by its norm needs the norm over all shards, which no "
            "shard has: clip with where=worker, or use 1 shard"
        )
    if needs_norm(setup.optimizer):
        raise ValueError(
            f"{OPTIMIZERS.name_of(setup.optimizer)} needs the norm of {what} gradient over all "
            f"shards, which no shard has: use 1 shard, or {instead}"
        )


def _check_program(setup: Setup) -> None:
    """Raise ValueError for what a round program, or a push rule, cannot be combined with."""
    name = OPTIMIZERS.name_of(setup.optimizer)
    needs = setup.program or setup.form
    if needs is None:
        if isinstance(setup.rule, Pieces):
            raise ValueError(f"rule pieces is for round programs, and {name} is a push rule")
        return
    if setup.damping is not None and setup.program is not None:
        raise ValueError(f"{name} is a round program: nothing in a round is stale, or damped")
    if setup.compensation is not None:
        raise ValueError(
            f"{name} does not push a gradient alone, and a compensation corrects nothing else: "
            "leave it out, and shorten the steps by damping"
            if setup.form is not None
            else f"{name} is a round program: nothing in a round is stale, or compensated"
        )
    if setup.measure:
        raise ValueError(
            f"{name} does not push a gradient alone, and measure {','.join(setup.measure)} is "
            "of gradients that are stale: leave it out, or use a push rule"
        )
    check_config(name, setup.config)
    if setup.form is not None and setup.form.work == "block" and setup.config.schedule is not None:
        raise ValueError(
            f"{name} moves to where a worker found the least: a schedule changes nothing about "
            "that; damping does"
        )
    if needs.whole and setup.shards > 1:
        raise ValueError(
            f"{name} needs the whole vector in one place: use 1 shard, not {setup.shards}"
        )
