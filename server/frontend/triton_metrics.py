"""Metrics under Triton's names, read from the models' statistics at the moment of each scrape."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from server.backends.base import Model
from server.frontend.gauges import Labels, make_family
from server.settings import Latencies, MetricsConfig
from server.statistics import FIRST_RESPONSE_MS, STAGES, Statistics, Summary

COUNTS: dict[str, tuple[str, Callable[[Statistics], float]]] = {
    "nv_inference_request_success": ("Number of successful inference requests", lambda s: s.success.count),
    "nv_inference_count": ("Number of inferences performed", lambda s: s.inference_count),
    "nv_inference_exec_count": ("Number of model executions performed", lambda s: s.execution_count),
}
CACHE: dict[str, tuple[str, Callable[[Statistics], Summary]]] = {
    "hit": ("hits", lambda s: s.cache_hit),
    "miss": ("misses", lambda s: s.cache_miss),
}
DURATIONS: dict[str, Callable[[Statistics], Summary]] = {
    "request": lambda s: s.success,
    **{stage: lambda s, stage=stage: s.stages[stage] for stage in STAGES},  # type: ignore[misc]
}


class TritonCollector(Collector):
    """Triton's `nv_` metrics of all loaded models, and one of ours that applies to any model."""

    def __init__(self, models: Callable[[], Iterable[Model]], config: MetricsConfig) -> None:
        self._models, self._config = models, config

    def collect(self) -> Iterator[Metric]:
        """All families."""
        models = [({"model": m.spec.name, "version": m.spec.version}, m) for m in self._models()]
        figures = [(labels, model.statistics) for labels, model in models]
        for name, (text, read) in COUNTS.items():
            yield make_family(name, text, "counter", [(labels, read(s)) for labels, s in figures])
        yield _failures(figures)
        yield make_family(
            "nv_inference_pending_request_count",
            "Number of requests awaiting execution",
            "gauge",
            [(labels, s.pending) for labels, s in figures],
        )
        yield make_family(
            "zserve_requests_under_way",
            "Requests that wait, are executed or are being answered",
            "gauge",
            [(labels, s.under_way) for labels, s in figures],
        )
        yield make_family(
            "nv_model_load_duration_secs",
            "Model load time",
            "gauge",
            [(labels, s.load_seconds) for labels, s in figures],
        )
        yield from self._latencies(figures)
        yield from self._cache(figures)
        if Latencies.HISTOGRAM in self._config.latencies:
            yield _first_responses([(labels, m.statistics) for labels, m in models if m.spec.decoupled])

    def _latencies(self, figures: list[tuple[Labels, Statistics]]) -> Iterator[Metric]:
        for stage, read in DURATIONS.items():
            durations = [(labels, read(s)) for labels, s in figures]
            if Latencies.COUNTER in self._config.latencies:
                values = [(labels, d.ns // 1000) for labels, d in durations]
                yield make_family(f"nv_inference_{stage}_duration_us", f"Cumulative {stage} time", "counter", values)
            if Latencies.SUMMARY in self._config.latencies:
                yield _summary(f"nv_inference_{stage}_summary_us", durations, self._config.quantiles)

    def _cache(self, figures: list[tuple[Labels, Statistics]]) -> Iterator[Metric]:
        """Response cache metrics; all zero for models that have it off."""
        for kind, (plural, read) in CACHE.items():
            durations = [(labels, read(s)) for labels, s in figures]
            counts = [(labels, d.count) for labels, d in durations]
            yield make_family(
                f"nv_cache_num_{plural}_per_model", f"Number of cache {plural} per model", "counter", counts
            )
            if Latencies.COUNTER in self._config.latencies:
                values = [(labels, d.ns // 1000) for labels, d in durations]
                text = f"Total cache {kind} duration per model, in microseconds"
                yield make_family(f"nv_cache_{kind}_duration_per_model", text, "counter", values)
            if Latencies.SUMMARY in self._config.latencies:
                yield _summary(f"nv_cache_{kind}_summary_per_model", durations, self._config.quantiles)


def _failures(figures: list[tuple[Labels, Statistics]]) -> Metric:
    values = [({**labels, "reason": r}, count) for labels, s in figures for r, count in s.failures.items()]
    return make_family("nv_inference_request_failure", "Number of failed inference requests", "counter", values)


def _summary(name: str, durations: list[tuple[Labels, Summary]], quantiles: tuple[float, ...]) -> Metric:
    """Quantiles of the latest requests; sum and count of all."""
    family = Metric(name, "Summary of recent requests", "summary")
    for labels, duration in durations:
        ordered = sorted(duration.recent)
        for q in quantiles:
            value = ordered[min(len(ordered) - 1, int(q * len(ordered)))] / 1000 if ordered else float("nan")
            family.add_sample(name, {**labels, "quantile": str(q)}, value)
        family.add_sample(f"{name}_count", labels, duration.count)
        family.add_sample(f"{name}_sum", labels, duration.ns / 1000)
    return family


def _first_responses(figures: list[tuple[Labels, Statistics]]) -> Metric:
    name = "nv_inference_first_response_histogram_ms"
    family = Metric(name, "Duration from request to first response in milliseconds", "histogram")
    for labels, statistics in figures:
        histogram, below = statistics.first_responses, 0
        for bound, count in zip((*FIRST_RESPONSE_MS, "+Inf"), histogram.counts, strict=True):
            below += count
            family.add_sample(f"{name}_bucket", {**labels, "le": str(bound)}, below)
        family.add_sample(f"{name}_count", labels, below)
        family.add_sample(f"{name}_sum", labels, histogram.total_ms)
    return family
