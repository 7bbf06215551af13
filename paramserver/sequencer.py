"""The one order: who is applied when, at which version, and who may go on.

The sequencer lives beside the leading shard. It turns joins, pushes and departures into orders that
every shard executes alike. It is a plain state machine: time is an argument, nothing waits, nothing
is sent. What it decided is in the ledger, what it promised is checked as it goes.
"""

from __future__ import annotations

import math
from typing import Literal

from paramserver.batch_sizes import Averages, Sizer
from paramserver.conservation import Conservation
from paramserver.errors import (
    InvariantError,
    NonFiniteGradientError,
    ParamServerError,
    ProtocolError,
    StragglerTimeoutError,
    TaskError,
)
from paramserver.ledger import Ledger, Move
from paramserver.messages import Action, Kind, Message
from paramserver.progress import Budget, Member, Progress, Wait, all_made, hopeless
from paramserver.rules import Damping, Drop, Push, Rule


class Sequencer:
    """Orders the events of a run. Calls come one at a time; ``now`` never goes back.

    Each event returns the orders it causes. An order with `Action.READ` for a worker also is the
    worker's permission to go on; `ended` workers get none.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        damping: Damping | None = None,
        budget: Budget | None = None,
        on_nan: Literal["drop", "stop", "pass"] = "stop",
        wait_timeout_s: float = 60.0,
        progress: Progress | None = None,
        ledger: Ledger | None = None,
        expected: int = 0,
        sizer: Sizer | None = None,
    ) -> None:
        """Start at ``progress``, adding to ``ledger``; without them, at the beginning.

        ``on_nan="pass"`` accepts numbers that are not finite, which a round program expects of
        points that are too far away.

        Nobody is granted a read before ``expected`` workers have joined: a rule that averages over
        all of them would otherwise close its first round with those that came first. ``sizer`` says
        of how many samples each gradient is; without one workers know.
        """
        start = progress or Progress()
        self.version = start.version
        self.gradients = start.gradients
        self.samples = start.samples
        self.ledger = Ledger() if ledger is None else ledger
        if ledger is not None:
            ledger.move(Move.RESUME, -1, 0, 0.0)
        self.conservation = Conservation(start.version)
        self.worst: dict[str, tuple[float, float]] = {}
        """Largest value seen of each of the rule's bounds, and its limit then."""
        self.waits: dict[str, Wait] = {}
        self.ended: str | None = None
        """Why the run ended; None while it goes."""
        self.error: ParamServerError | None = None
        """What broke the run, if something did."""
        self.num_cancelled = 0
        """Gradients that were cancelled."""
        self.counts = True
        """Whether what is accepted counts as gradients and samples; products do not."""
        self.rule, self.damping, self.sizer = rule, damping, sizer
        self._budget = budget or Budget()
        self._expected = expected
        self._last = -1  # the worker that pushed last
        self._on_nan, self._spoilt = on_nan, 0  # gradients in a row that were not finite
        self._wait_timeout_s = wait_timeout_s
        self._waiting: dict[int, None] = {}  # workers that wait, the longest first
        self._workers = {
            w: Member(t["incarnation"], t["seq"], t["clock"], live=False)
            for w, t in start.workers.items()
        }
        self.num_live = 0
        """How many workers take part."""
        self._end_if_done()

    def progress(self) -> Progress:
        """Return where the run stands."""
        table = {
            w: {"incarnation": s.incarnation, "seq": s.seq, "clock": s.clock}
            for w, s in sorted(self._workers.items())
        }
        averages = Averages() if self.sizer is None else self.sizer.averages
        return Progress(self.version, self.gradients, self.samples, table, averages)

    def clock(self, worker: int) -> int:
        """Return how many iterations ``worker`` has ended, over all its incarnations."""
        return self._workers[worker].clock

    def seq(self, worker: int) -> int:
        """Return the number of the last push of ``worker`` that was decided about."""
        return self._workers[worker].seq

    def incarnation(self, worker: int) -> int:
        """Return the latest incarnation of ``worker``."""
        return self._workers[worker].incarnation

    def is_live(self, worker: int, incarnation: int) -> bool:
        """Whether this very incarnation of ``worker`` takes part."""
        state = self._workers.get(worker)
        return state is not None and state.live and state.incarnation == incarnation

    def is_computing(self, worker: int) -> bool:
        """Whether ``worker`` was granted a read and has not pushed since."""
        return self.conservation.read_version(worker) is not None

    def live(self) -> list[int]:
        """Workers that take part."""
        return [w for w, s in self._workers.items() if s.live]

    def waiting(self, now: float) -> dict[int, tuple[frozenset[int], float]]:
        """Return, for each worker that waits, for whom and for how many seconds."""
        states = {w: self._workers[w] for w in self._waiting}
        return {
            w: (s.waits_for, now - s.waits_since)
            for w, s in states.items()
            if s.waits_since is not None
        }

    def on_join(self, worker: int, incarnation: int, now: float) -> list[Message]:
        """``worker`` takes part; an earlier incarnation of it has ended.

        Raises:
            ProtocolError: The incarnation is not newer than the worker's last one.
        """
        orders: list[Message] = []
        state = self._workers.get(worker)
        if state is not None:
            if incarnation <= state.incarnation:
                raise ProtocolError(
                    f"worker {worker} joined as incarnation {incarnation}, after "
                    f"{state.incarnation}: it has been replaced"
                )
            orders += self.on_leave(worker, now)
            state.incarnation, state.seq, state.live = incarnation, 0, True
            state.cancelled.clear()
            state.kept = None
        else:
            state = self._workers[worker] = Member(incarnation)
        self.num_live += 1
        self.ledger.move(Move.JOIN, worker, incarnation, now)
        if self.ended is None:
            self.rule.on_join(worker, state.clock)
            if self.num_live >= self._expected:
                asking = self.live() if self._expected > 0 else [worker]
                self._expected = 0
                orders += self._release(worker, now, asking)
        return orders

    def is_duplicate(self, push: Message) -> bool:
        """Whether ``push`` was decided about before; it must not be given to `on_push`.

        Raises:
            ProtocolError: The push is of a worker or incarnation that does not take part, skips a
                number, or names another version than the worker was granted.
        """
        state = self._workers.get(push.worker)
        if state is None or not state.live or push.incarnation != state.incarnation:
            raise ProtocolError(
                f"worker {push.worker}, incarnation {push.incarnation}, does not take part"
            )
        if push.seq > state.seq + 1:
            raise ProtocolError(
                f"worker {push.worker} sent push {push.seq}; {state.seq + 1} was expected"
            )
        if push.seq <= state.seq:
            return True
        if push.norm < 0:
            raise ProtocolError(f"worker {push.worker} sent a gradient of norm {push.norm}")
        granted = self.conservation.read_version(push.worker)
        if push.read_version != granted and push.read_version not in state.cancelled:
            raise ProtocolError(
                f"worker {push.worker} says it read version {push.read_version}; it was granted "
                f"{'none' if granted is None else granted}"
            )
        return False

    def on_push(self, m: Message, now: float) -> list[Message]:
        """Decide about a gradient that has arrived, for the first time."""
        state = self._workers[m.worker]
        self._last = m.worker
        state.seq, state.clock = m.seq, state.clock + 1
        state.kept = m.read_version if m.step else None
        push = Push(m.worker, state.clock, m.read_version, self.version, max(m.samples, 1))
        is_late = self._has_been_cancelled(m, state)
        if is_late:  # it may have been computed on what was being overwritten
            m = m._replace(loss=math.nan, norm=math.nan)
        else:
            self.conservation.on_arrival(m.worker, m.read_version, self.version)
        reason = "cancelled" if is_late else self._refuse(m, state)
        verdict = Drop(reason) if reason else self.rule.on_push(push)
        if isinstance(verdict, Drop):
            self._record(m, state, push, now, 0.0, verdict.reason)
            orders = [self._order(Action.DISCARD, m.worker)]
        else:
            scale = verdict.scale
            if self.damping is not None:
                scale *= self.damping.scale(push.staleness, self.num_live)
            if self.counts:
                self.gradients += 1
                self.samples += push.samples
            self._record(m, state, push, now, scale, None)
            orders = [self._take(m, push, scale, verdict.step)]
            self._check(push)
            self._learn(m)
        self._end_if_done()
        return orders + self._release(m.worker, now, [*self._cancel(now), m.worker])

    def on_leave(self, worker: int, now: float) -> list[Message]:
        """Forget ``worker``, dead or done; nobody waits for it any more."""
        state = self._workers.get(worker)
        if state is None or not state.live:
            return []
        state.live, state.waits_since, state.waits_for = False, None, frozenset()
        self.num_live -= 1
        self.ledger.move(Move.LEAVE, worker, state.incarnation, now)
        self._waiting.pop(worker, None)
        self.conservation.on_abandon(worker, self.version)
        orders = [self._order(Action.LEAVE, worker)]
        if self.rule.on_leave(worker) and self.ended is None:
            self._bump()
            orders.append(self._order(Action.STEP, worker))
            self._end_if_done()
        return orders + self._release(worker, now, self._cancel(now))

    def release(self, now: float) -> list[Message]:
        """Let go on who may, now that the rule has changed its mind by itself."""
        return self._release(self._last, now, [])

    def on_tick(self, now: float) -> None:
        """Stop the run if a worker has waited too long."""
        if self.ended is not None:
            return
        for worker, (others, waited_s) in self.waiting(now).items():
            if waited_s > self._wait_timeout_s:
                clocks = {w: self._workers[w].clock for w in others if w in self._workers}
                clock = self._workers[worker].clock
                self.fail(StragglerTimeoutError(worker, clock, clocks, waited_s))
                return

    def stop(self, reason: str) -> None:
        """End the run: pushes that arrive from now on are dropped, nobody is granted a read."""
        if self.ended is None:
            self.ended = reason

    def fail(self, error: ParamServerError) -> None:
        """End the run because of ``error``; the first one is kept."""
        if self.error is None:
            self.error = error
        self.stop(str(error))

    def _has_been_cancelled(self, m: Message, state: Member) -> bool:
        """Whether a push comes of a read that was cancelled while it was on its way.

        Its worker has been granted another read, which is lost: it did not wait for it, and is
        granted one more.
        """
        is_late = m.read_version in state.cancelled
        state.cancelled.clear()
        if is_late:
            self.conservation.on_abandon(m.worker, self.version)
        return is_late

    def _cancel(self, now: float) -> list[int]:
        """Name the workers whose gradients have become too old to be used, which read anew."""
        age = self.rule.cancel_age
        if age is None or self.ended is not None:
            return []
        too_old = self.conservation.read_by(self.version - age)
        for worker, read_version in too_old:
            state = self._workers[worker]
            state.cancelled.add(read_version)
            self.ledger.move(Move.CANCEL, worker, state.incarnation, now)
            self.num_cancelled += 1
        return [worker for worker, _ in too_old]

    def _refuse(self, m: Message, state: Member) -> str | None:
        """Return why ``m`` is not even shown to the rule, or None."""
        if self.ended is not None:
            return "ended"
        if self._on_nan == "pass" or (math.isfinite(m.norm) and math.isfinite(m.loss)):
            self._spoilt = 0
            return None
        self._spoilt += 1
        if self._on_nan == "stop":
            what = m.text or ("loss" if math.isfinite(m.norm) else "")
            self.fail(NonFiniteGradientError(m.worker, state.clock, what))
        return "nonfinite"

    def _take(self, m: Message, push: Push, scale: float, step: bool) -> Message:
        if step:
            self._bump()
        return Message(
            Kind.ORDER, Action.TAKE, m.worker, m.incarnation, m.seq, push.clock, self.version,
            push.read_version, push.staleness, m.samples, 0, -1, int(step), scale, m.loss, m.norm,
        )  # fmt: skip

    def _learn(self, m: Message) -> None:
        """Let the next batches follow what an accepted push says of the noise."""
        if self.sizer is None:
            return
        try:
            self.sizer.add(m.noise, m.loss)
        except TaskError as error:
            self.fail(error)

    def _bump(self) -> None:
        self.version += 1
        self.conservation.on_bump(self.version)

    def _record(
        self, m: Message, state: Member, push: Push, now: float, scale: float, drop: str | None
    ) -> None:
        self.ledger.append(
            version=self.version + (drop is None),
            worker=m.worker, incarnation=m.incarnation, seq=m.seq, clock=state.clock,
            read_version=m.read_version, staleness=push.staleness, start=state.read_at, end=now,
            samples=push.samples, loss=m.loss, grad_norm=m.norm, scale=scale, dropped=drop,
        )  # fmt: skip

    def _check(self, push: Push) -> None:
        """Check the rule's bounds and the conservation of staleness after an accepted push."""
        bounds = [(b.name, b.limit, b.value, b.worker) for b in self.rule.bounds(push)]
        if not self.conservation.holds:
            law = self.conservation.report()
            bounds.append(("staleness uncounted", 0, abs(law["left"] - law["right"]), push.worker))
        for name, limit, value, worker in bounds:
            if name not in self.worst or value >= self.worst[name][0]:
                self.worst[name] = (value, limit)
            if value > limit:
                rule = self.rule.name
                self.fail(InvariantError(rule, name, limit, value, worker, self.version))

    def _end_if_done(self) -> None:
        updates, samples = self._budget.updates, self._budget.samples
        if updates is not None and (reason := all_made(updates, self.version)) is not None:
            self.stop(reason)
        elif samples is not None and self.samples >= samples:
            self.stop(f"{self.samples} samples")
        elif (reason := hopeless(self._spoilt, len(self._workers))) is not None:
            self.stop(reason)

    def _release(self, cause: int, now: float, asking: list[int]) -> list[Message]:
        """Grant reads to those that waited and to ``asking`` workers, if the rule lets them."""
        orders: list[Message] = []
        if self.ended is not None:
            for worker in self._waiting:
                self._workers[worker].waits_since = None
            self._waiting.clear()
            return orders
        for worker in [*self._waiting, *asking]:
            state = self._workers[worker]
            others = self.rule.waits_for(worker)
            if others:
                state.waits_for = others
                if state.waits_since is None:
                    state.waits_since = now
                    self._waiting[worker] = None
                continue
            if state.waits_since is not None:
                wait = self.waits.setdefault(f"worker {worker} for worker {cause}", Wait())
                wait.count += 1
                wait.seconds += now - state.waits_since
                state.waits_since, state.waits_for = None, frozenset()
                del self._waiting[worker]
            was_cancelled = self.is_computing(worker)
            if state.kept is None:
                self.conservation.on_read(worker, self.version)
            else:
                self.conservation.on_kept(worker, state.kept)
            state.read_at = now
            order = self._order(Action.READ, worker, state.seq)
            # A slow follower may carry it out when the worker has been replaced, who is told then.
            orders.append(
                order._replace(
                    incarnation=state.incarnation,
                    samples=0 if self.sizer is None else self.sizer.size(self.version),
                    step=int(was_cancelled),
                )
            )
        return orders

    def _order(self, action: Action, worker: int, seq: int = 0) -> Message:
        return Message(Kind.ORDER, action, worker, 0, seq, 0, self.version)
