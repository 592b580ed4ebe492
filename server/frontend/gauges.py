"""Gauges of the machine under Triton's names, read at an interval, however often they are scraped."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import psutil
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from server.frontend.gpus import Gpu

log = logging.getLogger(__name__)

Labels = dict[str, str]

GPU_FAMILIES = {
    "nv_gpu_utilization": ("GPU utilization rate [0.0 - 1.0)", "gauge"),
    "nv_gpu_memory_total_bytes": ("GPU total memory, in bytes", "gauge"),
    "nv_gpu_memory_used_bytes": ("GPU used memory, in bytes", "gauge"),
    "nv_gpu_power_usage": ("GPU power usage in watts", "gauge"),
    "nv_gpu_power_limit": ("GPU power management limit in watts", "gauge"),
    "nv_energy_consumption": ("GPU energy consumption in joules since the server started", "counter"),
}

Source = Callable[[], Iterator[Metric]]


class Gauges(Collector):
    """The latest reading of all sources, taken by a thread of its own."""

    def __init__(self, sources: Sequence[Source], interval: float) -> None:
        self._sources, self._interval = sources, interval
        self._latest: list[Metric] = []
        self._failing = False  # whether the last reading failed
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gauges", daemon=True)

    def start(self) -> None:
        """Takes the first reading, then starts the thread."""
        self._read()
        if self._sources:
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def collect(self) -> Iterator[Metric]:
        """All families."""
        return iter(self._latest)

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            self._read()

    def _read(self) -> None:
        """Takes a reading; if that fails there are none, and the first failure in a row is logged."""
        try:
            self._latest = [family for source in self._sources for family in source()]
        except Exception as error:  # noqa: BLE001 - the thread's boundary
            if not self._failing:
                log.error("gauges of the machine are missing until they can be read: %s", error)
            self._latest, self._failing = [], True
        else:
            self._failing = False


class CpuGauges:
    """The machine's memory, and how busy its cores have been since the last reading."""

    def __init__(self) -> None:
        self._busy, self._idle = _cpu_seconds()

    def __call__(self) -> Iterator[Metric]:
        """All families."""
        memory = psutil.virtual_memory()
        yield make_family(
            "nv_cpu_utilization", "CPU utilization rate [0.0 - 1.0]", "gauge", [({}, self._utilization())]
        )
        yield make_family("nv_cpu_memory_total_bytes", "CPU total memory, in bytes", "gauge", [({}, memory.total)])
        used = memory.total - memory.available
        yield make_family("nv_cpu_memory_used_bytes", "CPU used memory, in bytes", "gauge", [({}, used)])

    def _utilization(self) -> float:
        """Computed here: psutil counts from the last call by the same thread."""
        busy, idle = _cpu_seconds()
        worked, rested = max(0.0, busy - self._busy), max(0.0, idle - self._idle)
        self._busy, self._idle = busy, idle
        return worked / (worked + rested) if worked else 0.0


class GpuGauges:
    """Whatever each GPU has a sensor for."""

    def __init__(self, gpus: Sequence[Gpu]) -> None:
        self._gpus = gpus

    def __call__(self) -> Iterator[Metric]:
        """All families that have a value."""
        readings = [({"gpu_uuid": gpu.uuid}, gpu.read()) for gpu in self._gpus]
        for name, (text, kind) in GPU_FAMILIES.items():
            values = [(labels, found[name]) for labels, found in readings if name in found]
            if values:
                yield make_family(name, text, kind, values)


def _cpu_seconds() -> tuple[float, float]:
    t = psutil.cpu_times()
    return t.user + t.nice + t.system + t.irq + t.softirq + t.steal, t.idle + t.iowait


def make_family(name: str, text: str, kind: str, values: Iterable[tuple[Labels, float]]) -> Metric:
    """A family with a sample for each of `values`."""
    family = Metric(name, text, kind)
    for labels, value in values:
        family.add_sample(name, labels, value)
    return family
