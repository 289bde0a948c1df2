"""A discrete-event simulator of asynchronous rollouts: plans a pod before anyone rents it.

NumPy and a heap; no real time, no thread.

    engines       each has slots; with n requests decoding, each gets a token every token_s + token_s_a_request * n seconds (a step reads the
                  weights once, and each request's cache). A new turn first prefills, beside them;
                  without a free slot it waits.
    environments  a turn takes a latency drawn from a distribution; `concurrency` episodes are open at once
    episodes      turns of (generate, act); an episode stays with one engine, the one with the fewest episodes when it began
    groups        group_size episodes (and `redundancy` more) of one task; a group is trainable when group_size of them have finished
    trainer       takes groups_per_step groups, trains for train_s, publishes for publish_s while the engines stand still; then version += 1

An episode may start while accepted + running < (async_ratio + version + 1) * batch, the capacity
rule of AReaL (arXiv 2505.24298, Eq. 3). Groups begin in order, and what is dropped is replaced in
its group, so group g may begin when g < (async_ratio + version + 1) * groups_per_step. With
async_ratio 0 that is synchronous training: nothing of the next step begins before the weights of
this one are there. In-flight episodes go on across an update.

The capacity rule bounds how many samples are ahead, not how old each one gets: short episodes
overtake, and a late one is trained on when it is there. `late` says what happens to a sample whose
staleness (trainer's version minus the version that began it) would exceed async_ratio:

    wait   the trainer takes complete groups, the oldest first, but waits for a late one rather than go on where some would become too old
    keep   it takes whichever groups are complete; nothing is lost, but the histogram has a tail
    drop   as keep, and samples beyond the bound are dropped, or cancelled while they run, and replaced from the same task

Seconds are simulated. The same seed gives the same episodes (turns, tokens, latencies of the n-th
episode) whatever the other numbers are, so that two plans are compared on the same samples.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import heapq
import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from rome.rollout.simulator.distributions import Constant, Distribution, Lognormal, Recorded

__all__ = [
    "Constant",
    "Distribution",
    "Lognormal",
    "Outcome",
    "Plan",
    "Recorded",
    "Speedup",
    "agentic",
    "bound",
    "simulate",
    "speedup",
    "with_train_share",
]
Late = Literal["wait", "keep", "drop"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A pod and what runs on it.

    Seconds and tokens; `batch`, the trajectories of a step, is groups_per_step * group_size.
    """

    engines: int = 1
    slots: int = 64  # requests that an engine runs at once
    token_s: float = 0.01  # of one decoding step of an engine, however many requests run
    token_s_a_request: float = 0.0  # and what each running request adds to it
    prefill_tokens_per_s: float = math.inf  # of one request
    concurrency: int = 64  # open episodes
    latency: Distribution = Lognormal(1.0, 1.0)  # of the environment, a turn
    turns: Distribution = Constant(8)  # whole numbers from 1
    tokens: Distribution = Constant(50)  # sampled a turn
    prompt_tokens: Distribution = Constant(
        0
    )  # read a turn: the prompt, then observations; the prefix before it is cached
    group_size: int = 8
    # more episodes a group than are needed; the first group_size win, the others are cancelled
    redundancy: int = 0
    groups_per_step: int = 8
    async_ratio: int = 1
    late: Late = "wait"
    train_s: float = 1.0
    publish_s: float = 0.0
    # stand still while the trainer trains, which takes their devices; what ran there goes on
    # elsewhere
    lent_engines: int = 0

    def __post_init__(self) -> None:
        for name in ("engines", "slots", "concurrency", "group_size", "groups_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; set it to 1 or more")
        for name in (
            "token_s",
            "token_s_a_request",
            "redundancy",
            "async_ratio",
            "train_s",
            "publish_s",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; set it to 0 or more")
        if not 0 <= self.lent_engines < self.engines:
            raise ValueError(
                f"lent_engines is {self.lent_engines} of {self.engines}; some engine must go on"
                " while the others are lent"
            )
        if self.prefill_tokens_per_s <= 0:
            raise ValueError(
                f"prefill_tokens_per_s is {self.prefill_tokens_per_s}; set it above 0 (inf: prefill"
                " costs nothing)"
            )
        if self.late not in ("wait", "keep", "drop"):
            raise ValueError(f"late {self.late!r} unknown; set it to wait, keep or drop")

    @property
    def batch(self) -> int:
        return self.groups_per_step * self.group_size


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a simulated run showed.

    Rates and shares leave out the warm-up; counts and the histogram are of the whole run.
    """

    steps: int
    seconds: float  # of the whole run
    step_seconds: float  # mean, after the warm-up
    trajectories_per_s: float  # trained, after the warm-up
    trainer_wait: float  # share of the time in which the trainer has too few trajectories
    engine_idle: float  # share of engine time without a single request
    slot_use: float  # mean share of slots that run a request
    open_episodes: float  # mean
    staleness: dict[int, int]  # version that trained it minus version that began it -> trajectories
    started: int
    trained: int
    dropped: dict[str, int]
    in_flight: int  # running, or finished and not yet trained on
    # mean unhindered seconds of a trained episode / of all that were trained or dropped, minus 1;
    # below 0: the long ones are missing
    short_bias: float
    episode_seconds: float  # mean time from start to finish of what was trained
    events: int


@dataclasses.dataclass
class _Episode:
    number: int
    group: int
    version: int
    began: float
    latency: list[float]
    tokens: list[float]
    prefill: list[float]  # seconds
    unhindered: float  # seconds that it takes alone
    engine: _Engine | None = None
    turn: int = 0
    ended: float = math.nan
    cancelled: bool = False


@dataclasses.dataclass
class _Group:
    open: list[_Episode] = dataclasses.field(default_factory=list)
    finished: list[_Episode] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Engine:
    """Processor sharing, exactly: every running request is as many tokens further as `clock` has
    grown since it began to decode.
    """

    episodes: int = 0
    clock: float = 0.0  # tokens that a request running from the beginning would have
    at: float = 0.0  # the time of `clock`
    decoding: list[tuple[float, int, _Episode]] = dataclasses.field(
        default_factory=list
    )  # heap of (clock at which it is done, ...)
    waiting: collections.deque[_Episode] = dataclasses.field(default_factory=collections.deque)
    running: int = 0
    lent: bool = False
    schedule: int = 0  # of the next completion; older events are void


def simulate(plan: Plan, *, steps: int, seed: int = 0, warm_up: int | None = None) -> Outcome:
    """Runs `steps` training steps.

    warm_up: steps that rates leave out; by default a quarter of them.
    Raises: ValueError for a plan or a number of steps that means nothing.
    """
    warm_up = steps // 4 if warm_up is None else warm_up
    if not 0 <= warm_up < steps:
        raise ValueError(f"steps={steps} with warm_up={warm_up}: raise steps above it")
    return _Run(plan, seed, steps, warm_up).run()


def bound(plan: Plan) -> float:
    """Seconds that a step must take at least in the long run, however asynchronous: the busiest of
    trainer, environments and engines.

    The trainer trains and publishes; each trajectory occupies one of the `concurrency` places for
    as long as it takes alone; its tokens come from engines of which every slot is taken, and which
    stand still while weights are published.
    """
    alone = plan.turns.mean * (
        plan.latency.mean + _alone_s(plan, plan.tokens.mean, plan.prompt_tokens.mean)
    )
    each = (
        plan.turns.mean
        * (
            plan.tokens.mean * _token_s(plan, plan.slots)
            + plan.prompt_tokens.mean / plan.prefill_tokens_per_s
        )
        / plan.slots
    )
    return max(
        plan.train_s + plan.publish_s,
        plan.batch * alone / plan.concurrency,
        plan.batch * each / plan.engines + plan.publish_s,
    )


@dataclasses.dataclass(frozen=True)
class Speedup:
    """Of asynchronous over synchronous training on the same samples, and the most that any
    async_ratio could give (`bound`).
    """

    predicted: float
    bound: float
    synchronous: Outcome
    asynchronous: Outcome


def speedup(plan: Plan, *, steps: int, seed: int = 0) -> Speedup:
    synchronous = simulate(dataclasses.replace(plan, async_ratio=0), steps=steps, seed=seed)
    asynchronous = simulate(plan, steps=steps, seed=seed)
    return Speedup(
        synchronous.step_seconds / asynchronous.step_seconds,
        synchronous.step_seconds / bound(plan),
        synchronous,
        asynchronous,
    )


def with_train_share(plan: Plan, share: float, seed: int = 0, steps: int = 100) -> Plan:
    """The plan whose train step takes this share of the mean synchronous rollout time."""
    rollout = simulate(
        dataclasses.replace(plan, async_ratio=0, train_s=0.0, publish_s=0.0),
        steps=steps,
        seed=seed,
        warm_up=0,
    )
    return dataclasses.replace(plan, train_s=share * rollout.step_seconds)


def agentic(async_ratio: int = 1, late: Late = "wait") -> Plan:
    """64 episodes at once in groups of 8, 8 turns, latency lognormal with mean 1 s and sigma 1, 64
    trajectories a step.

    The engine answers a turn of 50 tokens in 0.05 s and a little: environments and trainer are what
    matters. The train step is to be a quarter of the synchronous rollout time (`with_train_share`);
    the 5.5 s here are that, within 3 %.
    """
    return Plan(
        token_s=0.001, token_s_a_request=4e-6, async_ratio=async_ratio, late=late, train_s=5.5
    )


def _token_s(plan: Plan, running: int) -> float:
    return plan.token_s + plan.token_s_a_request * running


def _alone_s(plan: Plan, tokens: float, prompt_tokens: float) -> float:
    return tokens * _token_s(plan, 1) + prompt_tokens / plan.prefill_tokens_per_s


class _Run:
    """The state of one simulation and its events, each a method: what happens, and what it lets
    begin.
    """

    def __init__(self, plan: Plan, seed: int, steps: int, warm_up: int) -> None:
        self.plan, self.seed, self.steps, self.warm_up = plan, seed, steps, warm_up
        self.now, self.version, self.events, self.pushed = 0.0, 0, 0, 0
        self.heap: list[tuple[float, int, Callable[..., None], tuple]] = []
        self.engines = [_Engine() for _ in range(plan.engines)]
        self.groups: dict[int, _Group] = {}  # begun and not yet trained on, in order
        self.complete_groups: list[int] = []  # of them, in order
        self.begun = 0  # groups
        self.to_start: collections.deque[int] = (
            collections.deque()
        )  # a group's number for each episode that it still needs
        self.open = 0
        self.paused = self.training = False
        self.started = self.trained = 0
        self.dropped: collections.Counter[str] = collections.Counter()
        self.staleness: collections.Counter[int] = collections.Counter()
        self.lengths: dict[bool, list[float]] = {
            True: [],
            False: [],
        }  # unhindered seconds of what was trained, and of what was dropped
        self.spans: list[float] = []
        self.area = dict.fromkeys(
            ("open", "idle", "slots", "waiting"), 0.0
        )  # integrals over time, since the warm-up
        self.measured_from = 0.0

    def run(self) -> Outcome:
        self.begin_episodes()
        while self.version < self.steps:
            if not self.heap:
                raise AssertionError(
                    f"the simulation has nothing left to do at {self.now:.3f} s, in step"
                    f" {self.version}"
                )
            time, _, happen, arguments = heapq.heappop(self.heap)
            self.pass_time(time)
            self.events += 1
            happen(*arguments)
        return self.outcome()

    def at(self, time: float, happen: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self.heap, (time, self.pushed, happen, arguments))
        self.pushed += 1

    def pass_time(self, time: float) -> None:
        spent = time - self.now
        self.area["open"] += spent * self.open
        self.area["idle"] += spent * sum(engine.running == 0 for engine in self.engines)
        self.area["slots"] += spent * sum(engine.running for engine in self.engines)
        self.area["waiting"] += spent * (not self.training)
        self.now = time

    # -- episodes
    # ---------------------------------------------------------------------------------------------

    def begin_episodes(self) -> None:
        """Starts what capacity and concurrency allow."""
        plan = self.plan
        while self.open < plan.concurrency:
            if not self.to_start:
                if self.begun >= (plan.async_ratio + self.version + 1) * plan.groups_per_step:
                    return
                self.groups[self.begun] = _Group()
                self.to_start.extend([self.begun] * (plan.group_size + plan.redundancy))
                self.begun += 1
            self.begin_episode(self.to_start.popleft())

    def begin_episode(self, group: int) -> None:
        plan = self.plan
        rng = np.random.default_rng((self.seed, self.started))
        turns = max(1, round(float(plan.turns.draw(rng, 1)[0])))
        latency, tokens, prompt = (
            distribution.draw(rng, turns)
            for distribution in (plan.latency, plan.tokens, plan.prompt_tokens)
        )
        unhindered = float(
            latency.sum() + sum(_alone_s(plan, *pair) for pair in zip(tokens, prompt))
        )
        episode = _Episode(
            self.started,
            group,
            self.version,
            self.now,
            latency.tolist(),
            tokens.tolist(),
            (prompt / plan.prefill_tokens_per_s).tolist(),
            unhindered,
        )
        self.settle(episode)
        self.started += 1
        self.open += 1
        self.groups[group].open.append(episode)
        self.ask(episode)

    def settle(self, episode: _Episode) -> None:
        episode.engine = min(
            (engine for engine in self.engines if not engine.lent),
            key=lambda engine: engine.episodes,
        )
        episode.engine.episodes += 1

    def ask(self, episode: _Episode) -> None:
        """The episode wants its next turn, or the rest of one, from its engine."""
        if episode.engine.lent:
            episode.engine.episodes -= 1
            self.settle(episode)
        engine = episode.engine
        if engine.running < self.plan.slots and not self.paused:
            engine.running += 1
            self.at(self.now + episode.prefill[episode.turn], self.decode, engine, episode)
        else:
            engine.waiting.append(episode)

    def decode(self, engine: _Engine, episode: _Episode) -> None:
        """Its prompt has been read."""
        if episode.cancelled or engine.lent:
            self.free_slot(engine)
            if not episode.cancelled:
                self.ask(episode)
            return
        self.advance(engine)
        heapq.heappush(
            engine.decoding, (engine.clock + episode.tokens[episode.turn], episode.number, episode)
        )
        self.reschedule(engine)

    def advance(self, engine: _Engine) -> None:
        """Brings the engine's clock to now; to be called before the number of its requests changes."""
        if engine.decoding and not self.paused:
            engine.clock += (self.now - engine.at) / max(
                _token_s(self.plan, len(engine.decoding)), 1e-12
            )
        engine.at = self.now

    def reschedule(self, engine: _Engine) -> None:
        engine.schedule += 1
        if engine.decoding and not self.paused:
            left = max(0.0, engine.decoding[0][0] - engine.clock)
            self.at(
                self.now + left * _token_s(self.plan, len(engine.decoding)),
                self.complete,
                engine,
                engine.schedule,
            )

    def complete(self, engine: _Engine, schedule: int) -> None:
        """The turn nearest to its end is sampled; its call goes to the environment."""
        if schedule != engine.schedule:
            return
        self.advance(engine)
        done, _, episode = heapq.heappop(engine.decoding)
        engine.clock = max(engine.clock, done)
        self.free_slot(engine)
        if not episode.cancelled:
            self.at(self.now + episode.latency[episode.turn], self.observe, episode)

    def free_slot(self, engine: _Engine) -> None:
        engine.running -= 1
        self.admit(engine)
        self.reschedule(engine)

    def admit(self, engine: _Engine) -> None:
        while (
            engine.waiting
            and not engine.lent
            and engine.running < self.plan.slots
            and not self.paused
        ):
            episode = engine.waiting.popleft()
            if not episode.cancelled:
                self.ask(episode)

    def observe(self, episode: _Episode) -> None:
        """The environment has answered."""
        if episode.cancelled:
            return
        episode.turn += 1
        if episode.turn < len(episode.tokens):
            self.ask(episode)
            return
        episode.ended = self.now
        group = self.groups[episode.group]
        group.open.remove(episode)
        group.finished.append(episode)
        self.close(episode)
        if len(group.finished) == self.plan.group_size:
            bisect.insort(self.complete_groups, episode.group)
            for late in list(group.open):
                self.cancel(late, "redundant")
            self.to_start = collections.deque(
                number for number in self.to_start if number != episode.group
            )
        self.train_if_ready()
        self.begin_episodes()

    def close(self, episode: _Episode) -> None:
        episode.engine.episodes -= 1
        self.open -= 1

    def cancel(self, episode: _Episode, reason: str) -> None:
        """Ends a running episode. What its engine is sampling for it ends now, too."""
        episode.cancelled = True
        self.groups[episode.group].open.remove(episode)
        self.drop(episode, reason)
        self.close(episode)
        engine = episode.engine
        place = next(
            (
                index
                for index, (_, number, _) in enumerate(engine.decoding)
                if number == episode.number
            ),
            None,
        )
        if place is not None:
            self.advance(engine)
            del engine.decoding[place]
            heapq.heapify(engine.decoding)
            self.free_slot(engine)

    def drop(self, episode: _Episode, reason: str) -> None:
        self.dropped[reason] += 1
        self.lengths[False].append(episode.unhindered)

    # -- the trainer
    # ---------------------------------------------------------------------------------------------

    def train_if_ready(self) -> None:
        plan = self.plan
        if self.training or len(self.complete_groups) < plan.groups_per_step:
            return
        taken = self.complete_groups[: plan.groups_per_step]
        if plan.late == "wait" and not self.others_can_follow(set(taken)):
            return
        del self.complete_groups[: plan.groups_per_step]
        for number in taken:
            for episode in self.groups.pop(number).finished:
                self.trained += 1
                self.staleness[self.version - episode.version] += 1
                self.lengths[True].append(episode.unhindered)
                self.spans.append(episode.ended - episode.began)
        self.training = True
        for engine in self.engines[: plan.lent_engines]:
            self.lend(engine)
        self.at(self.now + plan.train_s, self.publish)

    def others_can_follow(self, taken: set[int]) -> bool:
        """Whether all other groups can still be trained on within the bound, groups_per_step of
        them in each step after this one.

        Groups begin in order, so the oldest come first. The capacity rule lets so few begin that it
        holds whenever the oldest are taken.
        """
        others = (group for number, group in self.groups.items() if number not in taken)
        return all(
            self.age(group) + 1 + place // self.plan.groups_per_step <= self.plan.async_ratio
            for place, group in enumerate(others)
        )

    def age(self, group: _Group) -> int:
        return max(
            (self.version - episode.version for episode in group.open + group.finished), default=0
        )

    def lend(self, engine: _Engine) -> None:
        """Its requests go on elsewhere, from the tokens that they have; their prompts are read
        again there.
        """
        self.advance(engine)
        engine.lent, moved, engine.decoding = True, engine.decoding, []
        engine.running -= len(moved)
        self.reschedule(engine)
        waiting, engine.waiting = engine.waiting, collections.deque()
        for done, _, episode in moved:
            episode.tokens[episode.turn] = done - engine.clock
            self.ask(episode)
        for episode in waiting:
            if not episode.cancelled:
                self.ask(episode)

    def publish(self) -> None:
        for engine in self.engines:
            engine.lent = False
        for engine in self.engines:
            self.advance(engine)
        self.paused = True
        for engine in self.engines:
            self.reschedule(engine)  # voids the completions that were due
        self.at(self.now + self.plan.publish_s, self.published)

    def published(self) -> None:
        self.paused = self.training = False
        for engine in self.engines:
            engine.at = self.now
            self.admit(engine)
            self.reschedule(engine)
        self.version += 1
        if self.version == self.warm_up:
            self.measured_from = self.now
            self.area = dict.fromkeys(self.area, 0.0)
        if self.version == self.steps:
            return
        if self.plan.late == "drop":
            self.drop_stale()
        self.train_if_ready()
        self.begin_episodes()

    def drop_stale(self) -> None:
        """Whatever would be trained on beyond the bound from now on is replaced from the same task,
        before new tasks begin.
        """
        for number, group in self.groups.items():
            for episode in [
                episode
                for episode in group.open
                if self.version - episode.version > self.plan.async_ratio
            ]:
                self.cancel(episode, "stale")
                self.to_start.appendleft(number)
            for episode in [
                episode
                for episode in group.finished
                if self.version - episode.version > self.plan.async_ratio
            ]:
                group.finished.remove(episode)
                if number in self.complete_groups:
                    self.complete_groups.remove(number)
                self.drop(episode, "stale")
                self.to_start.appendleft(number)

    # -- the end
    # ---------------------------------------------------------------------------------------------

    def outcome(self) -> Outcome:
        plan, seconds = self.plan, self.now - self.measured_from
        measured = self.steps - self.warm_up
        in_flight = sum(len(group.open) + len(group.finished) for group in self.groups.values())
        if self.started != self.trained + self.dropped.total() + in_flight:
            raise AssertionError(
                f"sample accounting does not add up: {self.started} started, {self.trained}"
                f" trained, {self.dropped} dropped, {in_flight} in flight"
            )
        trained, every = (
            np.mean(self.lengths[True]),
            np.mean(self.lengths[True] + self.lengths[False]),
        )
        per_s = lambda area: area / seconds if seconds else 0.0
        return Outcome(
            steps=self.steps,
            seconds=self.now,
            step_seconds=seconds / measured,
            trajectories_per_s=per_s(measured * plan.batch),
            trainer_wait=per_s(self.area["waiting"]),
            engine_idle=per_s(self.area["idle"]) / plan.engines,
            slot_use=per_s(self.area["slots"]) / plan.engines / plan.slots,
            open_episodes=per_s(self.area["open"]),
            staleness=dict(sorted(self.staleness.items())),
            started=self.started,
            trained=self.trained,
            dropped=dict(self.dropped),
            in_flight=in_flight,
            short_bias=float(trained / every - 1) if every else 0.0,
            episode_seconds=float(np.mean(self.spans)),
            events=self.events,
        )
