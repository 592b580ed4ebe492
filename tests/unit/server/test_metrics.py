"""What is counted of a request, by the events that pass and by how it ends."""

from collections.abc import Sequence

import pytest

from server.frontend.metrics import Metrics
from server.requests import Completed, Event, Progress, Queued, Started, Timings
from tests.unit.server.test_queue import FakeWorker, make

TIMINGS = Timings(queue_ms=1.0, encode_ms=2.0, denoise_ms=4.0, decode_ms=8.0, image_encode_ms=16.0, total_ms=31.0)
DONE = Completed(TIMINGS, (), prompt_cached=False, denoiser_forwards=2)
CACHED = Completed(TIMINGS, (), prompt_cached=False, denoiser_forwards=2, response_cached=True)


class Counted:
    """The figures of a model, and those that a request has moved."""

    def __init__(self) -> None:
        self.metrics, self.queue = Metrics(), make(FakeWorker())
        self.statistics = self.queue.statistics
        self.pending: list[int] = []  # after each event

    def request(self, *events: Event, end: type[BaseException] | None = None) -> None:
        with self.metrics.request(self.queue) as record:
            for event in events:
                record.see(event)
                self.pending.append(self.statistics.pending)
            if end is not None:
                raise end

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"zserve_{name}", {"model": "demo", **labels})


def test_a_request_is_pending_until_it_is_started_and_again_when_its_worker_is_lost() -> None:
    counted = Counted()
    counted.request(Queued(0), Started("a"), Queued(0), Started("b"), DONE)
    assert counted.pending == [1, 0, 1, 0, 0]


@pytest.mark.parametrize(("events", "outcome"), [([Queued(0)], "cancelled"), ([Started("a"), DONE], "ok")])
def test_who_leaves_has_cancelled_the_request_unless_it_was_done(events: Sequence[Event], outcome: str) -> None:
    counted = Counted()
    with pytest.raises(GeneratorExit):
        counted.request(*events, end=GeneratorExit)
    assert counted.value("requests_total", outcome=outcome) == 1
    assert (counted.statistics.success.count, counted.statistics.fail.count) == ((0, 1), (1, 0))[outcome == "ok"]
    assert (counted.statistics.pending, counted.statistics.under_way) == (0, 0)


def test_a_step_is_counted_once_however_many_images_shared_it() -> None:
    counted = Counted()
    counted.request(*(Progress(1, 2, image, 40.0, batch_size=2, batch_index=image) for image in range(2)))
    steps = [counted.value(f"step_duration_seconds_{what}") for what in ("count", "sum")]
    assert steps == [1, 0.04]
    assert [counted.value(f"batch_size_{what}") for what in ("count", "sum")] == [1, 2]


def test_the_time_of_every_stage_is_counted_under_both_names() -> None:
    counted = Counted()
    counted.request(DONE)
    stages = ("queue", "encode", "denoise", "decode", "image_encode")
    assert [counted.value("stage_duration_seconds_sum", stage=stage) for stage in stages] == [
        *(0.001, 0.002, 0.004, 0.008, 0.016)
    ]
    milliseconds = {stage: duration.ns / 1e6 for stage, duration in counted.statistics.stages.items()}
    assert milliseconds == {"queue": 1.0, "compute_input": 0.0, "compute_infer": 14.0, "compute_output": 16.0}


def test_an_answer_from_the_cache_is_a_success_that_has_computed_nothing() -> None:
    counted = Counted()
    counted.request(CACHED)
    figures = counted.statistics
    assert (figures.success.count, figures.inference_count, figures.execution_count) == (1, 0, 0)
    assert {stage: duration.count for stage, duration in figures.stages.items() if duration.count} == {"queue": 1}
    assert counted.value("stage_duration_seconds_count", stage="denoise") is None
