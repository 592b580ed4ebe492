"""The planner's promises, on a clock that the tests turn."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.spec import Component
from server.costs import RECENT, CostTable
from server.requests import StepCost
from server.turns import AGEING, PATIENCE, Claim
from server.worker.batching import Batching, BatchPolicy, StepShape
from server.worker.planner import Plan, PlannedSequence, Planner, Stage, Wait

SMALL, LARGE = StepShape(256, 256, (32,)), StepShape(1024, 1024, (32,))
GUIDED = StepShape(256, 256, (32, 32))


def costs() -> CostTable:
    """Sharing pays at the small size; at the large one it gains 3 %, as on a large GPU."""
    small = [StepCost(256, 256, rows, 0.010 * (0.7 + 0.3 * rows)) for rows in (1, 2, 4, 8)]
    large = [StepCost(1024, 1024, rows, 0.100 * (0.03 + 0.97 * rows)) for rows in (1, 2, 4, 8)]
    decode = StepCost(1024, 1024, 1, 0.035, Component.IMAGE_DECODER)
    return CostTable([*small, *large, decode])


def planner(policy: BatchPolicy | None = None) -> Planner:
    return Planner(costs(), policy or BatchPolicy(max_batch=4))


def sequence(key: int, arrived: float = 0.0, **changes: object) -> PlannedSequence:
    claim = Claim(int(changes.pop("priority", 4)), arrived, changes.pop("deadline", None))
    return PlannedSequence(key=key, shape=changes.pop("shape", SMALL), steps=int(changes.pop("steps", 4)), claim=claim)


def fill(tested: Planner, *sequences: PlannedSequence) -> None:
    for one in sequences:
        tested.add(one, one.claim.arrived)


def run(tested: Planner, now: float = 0.0) -> Plan:
    plan = tested.plan(now)
    assert isinstance(plan, Plan)
    tested.advance(plan)
    return plan


def run_out(tested: Planner, now: float = 0.0) -> list[int]:
    """Runs until nothing is left; the keys in the order in which they were finished."""
    finished = []
    while tested.plan(now) is not None:
        plan = run(tested, now)
        if plan.stage is Stage.DECODE:
            finished += [s.key for s in plan.sequences]
    return finished


def test_a_sequence_keeps_its_place_among_equals_while_it_is_set_aside() -> None:
    tested, images = planner(BatchPolicy(max_batch=1)), [sequence(1) for _ in range(3)]
    fill(tested, *images)
    tested.set_aside(images[0])
    assert run(tested).sequences == (images[1],)
    assert tested.take_back(images[0], 0.0)
    assert run(tested).sequences == (images[0],)


def test_one_sequence_goes_through_its_stages() -> None:
    tested = planner()
    fill(tested, sequence(1, steps=2))
    assert [run(tested).stage for _ in range(4)] == [Stage.ENCODE, Stage.DENOISE, Stage.DENOISE, Stage.DECODE]
    assert tested.plan(0.0) is None


def test_small_steps_are_shared_and_late_arrivals_join() -> None:
    tested = planner()
    fill(tested, sequence(1), sequence(2))
    assert [run(tested).stage for _ in range(3)] == [Stage.ENCODE, Stage.ENCODE, Stage.DENOISE]
    fill(tested, sequence(3, arrived=0.1))
    assert [s.key for s in run(tested, 0.1).sequences] == [1, 2]  # 3 rows were not measured
    fill(tested, sequence(4, arrived=0.2))
    assert [run(tested, 0.2).stage for _ in range(2)] == [Stage.ENCODE, Stage.ENCODE]
    assert [s.key for s in run(tested, 0.2).sequences] == [1, 2, 3, 4]


def test_captions_of_unlike_lengths_do_not_share_a_step() -> None:
    """They would have to be padded, and masks are not among the engines' inputs."""
    tested = planner()
    fill(tested, *(sequence(key, shape=StepShape(256, 256, (captions,))) for key, captions in enumerate((32, 64, 32))))
    steps = [plan for plan in (run(tested) for _ in range(14)) if plan.stage is Stage.DENOISE]
    assert {tuple(s.key for s in plan.sequences) for plan in steps} == {(0, 2), (1,)}


def test_a_sequence_that_starts_over_needs_all_of_its_steps_again() -> None:
    tested = planner()
    spoilt = sequence(1, shape=LARGE, steps=8, deadline=1.0)
    fill(tested, spoilt)
    for _ in range(9):
        run(tested)
    assert spoilt.stage is Stage.DECODE
    tested.restart(spoilt)
    assert tested.hopeless(0.1) == []
    assert tested.hopeless(0.2) == [spoilt], "for 8 steps and its decode 0.8 s are too little"
    assert [run(tested).stage for _ in range(9)] == [Stage.DENOISE] * 8 + [Stage.DECODE]


def test_large_equal_work_is_not_interleaved() -> None:
    tested = planner()
    fill(tested, *(sequence(key, shape=LARGE) for key in (1, 2, 3)))
    plans = [run(tested) for _ in range(6)]
    assert [s.key for plan in plans for s in plan.sequences] == [1] * 6


def test_higher_priority_takes_over_at_the_next_step() -> None:
    tested = planner()
    fill(tested, sequence(1, shape=LARGE))
    run(tested), run(tested)
    fill(tested, sequence(2, arrived=0.1, shape=LARGE, priority=1))
    assert run_out(tested, 0.1) == [2, 1]


def test_nearer_deadline_takes_over_within_its_level_only() -> None:
    tested = planner()
    fill(tested, sequence(1, shape=LARGE), sequence(2, shape=LARGE, deadline=9.0))
    fill(tested, sequence(3, shape=LARGE, deadline=5.0), sequence(4, shape=LARGE, priority=5, deadline=2.0))
    assert run_out(tested) == [3, 2, 1, 4]


def test_a_finished_image_does_not_wait_for_its_peers() -> None:
    tested = planner()
    fill(tested, sequence(1, steps=8), sequence(2, steps=2, arrived=0.1))
    assert run_out(tested, 0.1) == [2, 1]


def test_a_batch_never_costs_the_first_its_deadline() -> None:
    tested = planner()
    fill(tested, sequence(1, steps=10, deadline=0.12), *(sequence(k) for k in (2, 3, 4)))
    assert [run(tested).stage for _ in range(2)] == [Stage.ENCODE, Stage.DENOISE]


def test_hopeless_sequences_are_named_before_they_cost_anything() -> None:
    tested = planner()
    fill(tested, sequence(1, shape=LARGE, steps=8, deadline=0.8), sequence(2, shape=LARGE, steps=8, deadline=0.9))
    assert [s.key for s in tested.hopeless(0.0)] == [1]
    assert [s.key for s in tested.hopeless(0.1)] == [1, 2]


def test_what_has_not_begun_leaves_when_too_little_time_is_left_behind_the_others() -> None:
    tested = planner()
    one, two, three = (sequence(key, shape=LARGE, steps=8, deadline=1.7) for key in (1, 2, 3))  # 0.835 s each
    fill(tested, one, two, three, sequence(4, steps=2, priority=5, deadline=1.7))
    assert [s.key for s in tested.hopeless(0.0)] == [3]  # and not the short one, which finds 0.03 s
    assert [s.key for s in tested.hopeless(0.04)] == [2, 3]
    tested.remove(1, 0.04)
    assert [s.key for s in tested.hopeless(0.04)] == [3]
    run(tested), run(tested)
    assert two.started
    tested.remove(3, 0.8)
    assert tested.hopeless(0.9) == []  # begun, and there is time for the 7 steps that are left


def test_a_step_that_runs_is_waited_for_but_not_by_what_only_has_to_be_decoded() -> None:
    tested = planner()
    fill(tested, *(sequence(key, shape=LARGE, steps=1, deadline=1.0) for key in (1, 2)))
    for _ in range(2):
        run(tested)
    assert [s.key for s in tested.hopeless(0.0, free=0.97)] == [2]  # 1 is drawn, and decoded beside the step
    assert tested.hopeless(0.0, free=0.8) == []


def test_what_is_only_encoded_leaves_like_what_is_not() -> None:
    tested = planner(BatchPolicy(max_batch=1))
    one, two = (sequence(key, shape=LARGE, steps=8, deadline=1.7) for key in (1, 2))
    fill(tested, one, two)
    run(tested)
    one.stage, two.stage = Stage.DENOISE, Stage.DENOISE
    assert [s.key for s in tested.hopeless(0.04)] == [2]


@pytest.mark.parametrize(("stage", "seconds"), [(Stage.ENCODE, 0.5), (Stage.DECODE, 0.535)])
def test_others_make_encoding_and_decoding_longer_and_so_a_deadline_nearer(stage: Stage, seconds: float) -> None:
    tested = planner()
    done, waits = sequence(1, shape=LARGE, steps=1), sequence(2, shape=LARGE, steps=8, deadline=1.2)
    tested.observe_beside(Plan(stage, (done,)), seconds)
    fill(tested, waits)
    assert tested.hopeless(0.0) == []  # alone it takes 0.835 s
    fill(tested, sequence(3, shape=LARGE, steps=1, priority=5))
    assert tested.hopeless(0.0) == [waits]


def test_waiting_lifts_a_low_priority() -> None:
    tested = planner()
    fill(tested, sequence(1, shape=LARGE, priority=3))
    fill(tested, sequence(2, arrived=59.0, shape=LARGE, priority=1))
    assert tested.plan(59.0).sequences[0].key == 2  # type: ignore[union-attr]
    assert tested.plan(60.0).sequences[0].key == 1  # type: ignore[union-attr]


def test_guidance_counts_its_rows() -> None:
    tested = planner()
    fill(tested, *(sequence(key, shape=GUIDED) for key in range(8)))
    plans = [run(tested) for _ in range(5)]
    assert len(plans[-1].sequences) == 4


def test_steps_are_shared_by_as_many_rows_as_were_measured() -> None:
    """A guided image has two rows in a forward, or a forward for each where their captions are of unlike length."""
    table = CostTable(StepCost(256, 256, rows, 0.010 * (0.7 + 0.3 * rows)) for rows in (1, 2, 8))
    batching, unlike = Batching(table, BatchPolicy(max_batch=4)), StepShape(256, 256, (32, 64))
    assert [batching.count(shape, 4, float("inf")) for shape in (SMALL, GUIDED, unlike)] == [2, 4, 2]
    assert batching.seconds(GUIDED, 4) == table.step(256, 256, 8)
    assert batching.seconds(unlike, 2) == 2 * table.step(256, 256, 2)


def test_who_will_be_late_even_alone_is_not_made_later_by_others() -> None:
    assert Batching(costs(), BatchPolicy(max_batch=4)).count(SMALL, 4, most_seconds=0.001) == 1


def test_what_a_step_takes_is_learnt_for_as_many_rows_as_its_one_forward_had() -> None:
    tested = planner()
    one, two, guided = sequence(1), sequence(2), sequence(3, shape=GUIDED)
    unlike = sequence(4, shape=StepShape(256, 256, (32, 64)))  # two forwards
    for _ in range(RECENT):
        tested.observe(Plan(Stage.DENOISE, (guided,)), 9.0)
        tested.observe(Plan(Stage.DENOISE, (unlike,)), 99.0)
    steps = (one,), (one, two), (guided,), (unlike,)
    assert [tested.expected_seconds(Plan(Stage.DENOISE, step)) for step in steps] == [0.010, 9.0, 9.0, 0.020]


def test_preferred_sizes_are_kept_to() -> None:
    tested = planner(BatchPolicy(max_batch=4, preferred=(2,)))
    fill(tested, *(sequence(key) for key in range(4)))
    assert [len(run(tested).sequences) for _ in range(3)] == [1, 1, 2]


def test_the_first_waits_for_company_once() -> None:
    tested = planner(BatchPolicy(max_batch=4, max_delay=0.05))
    fill(tested, sequence(1))
    assert tested.plan(0.0) == Wait(0.05)
    fill(tested, sequence(2, arrived=0.03))
    assert tested.plan(0.03) == Wait(0.05)
    assert isinstance(tested.plan(0.05), Plan)


def test_who_has_begun_does_not_wait_for_company_when_its_own_has_left() -> None:
    tested = planner(BatchPolicy(max_batch=4, max_delay=60.0))
    fill(tested, *(sequence(key) for key in range(4)))
    assert [len(run(tested).sequences) for _ in range(5)] == [1, 1, 1, 1, 4]
    for key in range(3):
        tested.remove(key, 0.0)
    assert [s.key for s in run(tested).sequences] == [3]


def test_no_waiting_for_company_that_would_not_pay() -> None:
    tested = planner(BatchPolicy(max_batch=4, max_delay=0.05))
    fill(tested, sequence(1, shape=LARGE))
    assert isinstance(tested.plan(0.0), Plan)


def test_batches_that_ran_out_of_memory_are_not_tried_again() -> None:
    tested = planner()
    fill(tested, *(sequence(key) for key in range(4)))
    tested.limit_batch(SMALL, 2)
    assert [len(run(tested).sequences) for _ in range(3)] == [1, 1, 2]


def test_forecasts_come_true() -> None:
    tested = planner()
    fill(tested, *(sequence(key, shape=LARGE, steps=8) for key in range(3)))
    run(tested)
    told = tested.forecast(0.0)
    assert [(f.position, pytest.approx(f.starts)) for f in told.values()] == [(0, 0.835), (1, 1.67)]
    assert list(told) == [1, 2]


def test_a_forecast_knows_of_both_prompts_of_a_guided_image() -> None:
    table = CostTable([StepCost(256, 256, 2, 0.01), StepCost(0, 0, 1, 0.5, Component.PROMPT_ENCODER)])
    tested = Planner(table, BatchPolicy(max_batch=1))
    fill(tested, sequence(1, shape=GUIDED, steps=4), sequence(2))
    assert tested.forecast(0.0)[2].starts == pytest.approx(2 * 0.5 + 4 * 0.01)


def test_a_request_that_has_begun_waits_no_more_between_two_of_its_images() -> None:
    tested = planner(BatchPolicy(max_batch=1))
    fill(tested, sequence(1, steps=1), sequence(1, steps=1), sequence(2, steps=1))
    assert list(tested.forecast(0.0)) == [1, 2]
    waiting = []
    for _ in range(6):  # both images of the first, one after the other
        run(tested)
        waiting.append(list(tested.forecast(0.0)))
    assert waiting == [[2]] * 6
    run(tested)
    assert tested.forecast(0.0) == {}
    tested.remove(1, 0.0)
    fill(tested, sequence(1))
    assert list(tested.forecast(0.0)) == [1]


@dataclass
class Machine:
    """A device that takes the measured time for every plan, and a log of what it did."""

    tested: Planner
    now: float = 0.0
    done: dict[int, float] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)

    def turn(self) -> None:
        plan = self.tested.plan(self.now)
        assert isinstance(plan, Plan)
        self.plans.append(plan)
        self.tested.advance(plan)
        shape = plan.sequences[0].shape
        if plan.stage is Stage.DENOISE:
            self.now += costs().step(shape.height, shape.width, shape.rows * len(plan.sequences))
        if plan.stage is Stage.DECODE:
            for one in plan.sequences:
                assert one.key not in self.done, "finished twice"
                self.done[one.key] = self.now


arrivals = st.lists(
    st.fixed_dictionaries(
        {
            "gap": st.just(0.0) | st.floats(0, 20),  # many come at once, or few would ever meet
            "priority": st.integers(1, 5),
            "shape": st.sampled_from([SMALL, LARGE, GUIDED]),
            "steps": st.integers(1, 9),
            "slack": st.none() | st.floats(0.05, 100),
            "cancel": st.booleans(),
        }
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(arrivals, st.integers(1, 8))
def test_promises(work: list[dict], max_batch: int) -> None:
    """None lost, none doubled, none starved, no batch too large or mixed, every step done, levels respected."""
    machine = Machine(planner(BatchPolicy(max_batch)))
    tested, all_of_them, gone = machine.tested, [], set()
    arrived = 0.0
    for key, item in enumerate(work):
        arrived += item["gap"]
        while len(tested) and machine.now < arrived:
            machine.turn()
        machine.now = max(machine.now, arrived)
        deadline = None if item["slack"] is None else arrived + item["slack"]
        one = sequence(key, arrived, **{k: item[k] for k in ("priority", "shape", "steps")}, deadline=deadline)
        all_of_them.append(one)
        tested.add(one, machine.now)
        if item["cancel"] and key > 0 and key - 1 not in machine.done:
            tested.remove(key - 1, machine.now)
            gone.add(key - 1)
        for late in tested.hopeless(machine.now):
            tested.remove(late.key, machine.now)
            gone.add(late.key)
    while len(tested):
        machine.turn()
    assert set(machine.done) | gone == set(range(len(work)))
    assert not set(machine.done) & gone
    assert all(one.left == 0 for one in all_of_them if one.key in machine.done)
    for plan in machine.plans:
        assert 1 <= len(plan.sequences) <= max_batch
        assert len({s.shape for s in plan.sequences}) == 1
        assert plan.stage is Stage.DENOISE or len(plan.sequences) == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(arrivals)
def test_every_step_goes_to_the_highest_level(work: list[dict]) -> None:
    tested = planner()
    live = []
    for key, item in enumerate(work):
        live.append(sequence(key, item["gap"], priority=item["priority"], shape=item["shape"], steps=item["steps"]))
        tested.add(live[-1], 20.0)
    now = 20.0
    while (plan := tested.plan(now)) is not None:
        assert isinstance(plan, Plan)
        best = min(s.claim.level(now) for s in live)
        assert {s.claim.level(now) for s in plan.sequences} == {best}
        tested.advance(plan)
        live = [s for s in live if not (plan.stage is Stage.DECODE and s in plan.sequences)]
        now += 0.7


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.floats(0.2, 2.0))
def test_nothing_starves_under_a_stream_of_more_urgent_work(priority: int, load: float) -> None:
    """Overtaken for as long as ageing and patience say, and by nothing that arrives later."""
    machine = Machine(planner())
    victim = sequence(-1, 0.0, priority=priority, shape=LARGE, steps=2)
    machine.tested.add(victim, 0.0)
    bound = (priority - 1) * AGEING + PATIENCE
    key = 0
    arrived = 0.0
    while -1 not in machine.done and arrived < bound + 5:
        arrived += 0.9 / load
        while len(machine.tested) and machine.now < arrived:
            machine.turn()
        machine.now = max(machine.now, arrived)
        rival = sequence(key, machine.now, priority=1, shape=LARGE, steps=8, deadline=machine.now + 50)
        machine.tested.add(rival, machine.now)
        key += 1
    while -1 not in machine.done:
        machine.turn()
    finished_before = [k for k, at in machine.done.items() if k >= 0 and at < machine.done[-1]]
    latest = max((k for k in finished_before), default=-1)
    assert (latest + 1) * 0.9 / load <= bound + 1
