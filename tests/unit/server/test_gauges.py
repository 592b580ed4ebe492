"""Gauges of the machine: when they are read, from what, and what becomes of a failure."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest
from prometheus_client.core import Metric

from server.cli import parser, read_config
from server.frontend.gauges import CpuGauges, Gauges, GpuGauges
from server.frontend.gpus import Gpu

NEVER = 3600.0


def values(families: Iterator[Metric]) -> dict[str, float]:
    return {s.name: s.value for family in families for s in family.samples}


class Counting:
    """A source whose gauge is the number of its readings."""

    def __init__(self) -> None:
        self.readings = 0
        self.third = threading.Event()
        self.failing = False

    def __call__(self) -> Iterator[Metric]:
        self.readings += 1
        if self.readings >= 3:
            self.third.set()
        if self.failing:
            raise OSError("no sensor")
        family = Metric("readings", "", "gauge")
        family.add_sample("readings", {}, self.readings)
        yield family


def test_a_scrape_shows_the_last_reading() -> None:
    source = Counting()
    gauges = Gauges([source], NEVER)
    gauges.start()
    assert [values(gauges.collect()) for _ in range(3)] == [{"readings": 1}] * 3
    gauges.stop()


def test_readings_go_on_without_scrapes_until_it_is_stopped() -> None:
    source = Counting()
    gauges = Gauges([source], 0.001)
    gauges.start()
    assert source.third.wait(60)
    gauges.stop()
    assert values(gauges.collect()) == {"readings": source.readings}
    assert "gauges" not in [t.name for t in threading.enumerate()]


def test_what_cannot_be_read_is_missing_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    source = Counting()
    source.failing = True
    gauges = Gauges([source], 0.001)
    gauges.start()
    assert source.third.wait(60)
    assert values(gauges.collect()) == {}
    assert caplog.text.count("no sensor") == 1
    source.failing = False
    while not values(gauges.collect()):
        pass
    gauges.stop()


def test_utilization_is_that_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    times = dict.fromkeys(("user", "nice", "system", "irq", "softirq", "steal", "idle", "iowait"), 10.0)
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(**times))
    read = CpuGauges()
    assert values(read())["nv_cpu_utilization"] == 0
    times["user"] += 1
    times["steal"] += 1
    times["idle"] += 5
    times["iowait"] += 1
    assert values(read())["nv_cpu_utilization"] == 0.25
    times["idle"] += 5
    assert values(read())["nv_cpu_utilization"] == 0


def test_a_gpu_without_a_sensor_has_no_such_gauge() -> None:
    gpus = [Gpu("GPU-0", {"nv_gpu_power_usage": lambda: 5.0}, ValueError), Gpu("GPU-1", {}, ValueError)]
    (family,) = GpuGauges(gpus)()
    assert [(s.labels, s.value) for s in family.samples] == [({"gpu_uuid": "GPU-0"}, 5.0)]


def test_flags_have_tritons_defaults() -> None:
    config = read_config(parser().parse_args([]))
    assert (config.allow_gpu_metrics, config.allow_cpu_metrics, config.metrics_interval_ms) == (True, True, 2000)
    flags = ["--allow-gpu-metrics=false", "--allow-cpu-metrics", "0", "--metrics-interval-ms", "500"]
    config = read_config(parser().parse_args(flags))
    assert (config.allow_gpu_metrics, config.allow_cpu_metrics, config.metrics_interval_ms) == (False, False, 500)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x"])
def test_an_interval_is_above_0(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([f"--metrics-interval-ms={text}"])
    assert "a whole number above 0 is accepted" in capsys.readouterr().err
