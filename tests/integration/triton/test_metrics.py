"""Metrics: Triton's names, our own, what moves them; that documents, dashboard and alerts speak of the same ones."""

import queue
import re
import time
from collections.abc import Callable

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from server.frontend.gauges import GPU_FAMILIES
from tests.conftest import MODEL, ROOT
from tests.integration.process import PATIENCE, ServerProcess, wait_for
from tests.integration.triton.conftest import bytes_tensor, pending, some_bytes, under_way

Start = Callable[..., ServerProcess]
NAME = re.compile(r"\b(?:zserve|nv)_[a-z_]+\b")
DASHBOARD = ROOT / "deploy" / "grafana-dashboard.json"
RULES = ROOT / "deploy" / "prometheus-rules.yml"
STAGES = ("queue", "encode", "denoise", "decode", "image_encode")
PARTS = re.compile(r"_(bucket|sum|count)$")  # of histograms and summaries


def exported(server: ServerProcess) -> set[str]:
    """The families that `server` exports; those of GPUs too, which this machine may not have."""
    return set(re.findall(r"^# TYPE (\S+)", server.metrics(), re.MULTILINE)) | set(GPU_FAMILIES)


def test_the_dashboard_asks_only_for_what_is_exported(triton_server: ServerProcess) -> None:
    known = exported(triton_server)
    asked = set(NAME.findall(DASHBOARD.read_text()))
    assert len(asked) > 15
    assert {name for name in asked if name not in known and PARTS.sub("", name) not in known} == set()


def test_the_dashboard_names_series_by_labels_that_they_have(triton_server: ServerProcess) -> None:
    text = triton_server.metrics()
    known = {"gpu_uuid", *re.findall(r'[{,](\w+)="', text)}
    asked = set(re.findall(r"{{(\w+)}}", DASHBOARD.read_text()))
    assert {"worker", "priority"} <= asked <= known
    assert not known & {"instance", "job"}  # Prometheus' own, and ours would be renamed


def test_the_dashboard_leaves_the_windows_of_its_rates_to_grafana() -> None:
    """A window as short as the scrape interval has one sample, and no rate."""
    assert set(re.findall(r"\[(\S+?)\]\)", DASHBOARD.read_text())) == {"$__rate_interval"}


def test_the_alerts_ask_only_for_what_is_exported(triton_server: ServerProcess) -> None:
    rules = RULES.read_text()
    alerts, expressions = re.findall(r"- alert: (\w+)", rules), re.findall(r"^ +expr: (.+)", rules, re.MULTILINE)
    assert len(alerts) == len(expressions) > 3
    asked = [NAME.findall(expression) for expression in expressions]
    assert all(asked)
    assert {name for names in asked for name in names} <= exported(triton_server)
    assert set(re.findall(r"\$labels\.(\w+)", rules)) <= set(re.findall(r'[{,](\w+)="', triton_server.metrics()))


def test_the_documents_name_every_metric_of_ours_and_no_other(triton_server: ServerProcess) -> None:
    table = re.findall(r"^\| (`zserve_.*?) \|", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    documented = {name for row in table for name in NAME.findall(row)}
    assert documented == {name for name in exported(triton_server) if name.startswith("zserve_")}


def test_an_image_moves_the_metrics_of_its_steps(
    triton_server: ServerProcess, triton_client: triton.InferenceServerClient
) -> None:
    def figures() -> dict[str, float]:
        names = ("zserve_step_duration_seconds_count", "zserve_batch_size_count", "zserve_batch_size_sum")
        found = {name: triton_server.metric(name, model=MODEL) for name in names}
        found["seconds"] = triton_server.metric("zserve_step_duration_seconds_sum", model=MODEL)
        found["images"] = triton_server.metric("zserve_images_total", model=MODEL)
        for result in ("hit", "miss"):
            found[result] = triton_server.metric("zserve_prompt_cache_lookups_total", model=MODEL, result=result)
        for stage in STAGES:
            found[stage] = triton_server.metric("zserve_stage_duration_seconds_count", model=MODEL, stage=stage)
        found["requests"] = triton_server.metric("zserve_request_duration_seconds_count", model=MODEL)
        return found

    before = figures()
    wanted = {"num_inference_steps": 3, "num_images": 2, "width": 64, "height": 64}
    triton_client.infer(MODEL, [bytes_tensor("PROMPT", "a metric")], parameters=wanted)
    change = {name: value - before[name] for name, value in figures().items()}
    steps = change["zserve_step_duration_seconds_count"]
    assert 3 <= steps <= 6  # as many as its images did not share
    assert (change["zserve_batch_size_count"], change["zserve_batch_size_sum"]) == (steps, 6)
    assert change["seconds"] > 0
    assert (change["images"], change["hit"], change["miss"]) == (2, 0, 1)
    assert [change[name] for name in (*STAGES, "requests")] == [1] * (len(STAGES) + 1)


def test_the_queue_is_told_by_priority(triton_server: ServerProcess) -> None:
    waiting = re.findall(
        rf'^zserve_queue_depth{{model="{MODEL}",priority="(\d)",version="\d+"}} 0$', triton_server.metrics(), re.M
    )
    assert waiting == list("12345678")


def test_metrics_in_tritons_names(triton_server: ServerProcess, triton_client: triton.InferenceServerClient) -> None:
    before = triton_server.metric("nv_inference_request_success", model="identity", version="1")
    triton_client.infer("identity", [some_bytes()])
    assert triton_server.metric("nv_inference_request_success", model="identity", version="1") == before + 1
    text = triton_server.metrics()
    for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER"):
        assert f'nv_inference_request_failure{{model="two",reason="{reason}",version="1"}} ' in text
    for name in (
        "nv_inference_count",
        "nv_inference_exec_count",
        "nv_inference_request_duration_us",
        "nv_inference_queue_duration_us",
        "nv_inference_compute_input_duration_us",
        "nv_inference_compute_infer_duration_us",
        "nv_inference_compute_output_duration_us",
        "nv_inference_pending_request_count",
        "nv_model_load_duration_secs",
        "nv_cache_num_hits_per_model",
        "nv_cache_num_misses_per_model",
        "nv_cache_hit_duration_per_model",
        "nv_cache_miss_duration_per_model",
    ):
        assert f'\n{name}{{model="identity",version="1"}} ' in text, name
    assert re.search(r"^nv_cpu_memory_total_bytes \d{9,}$", text, re.MULTILINE)
    assert not re.search(r"\d[eE][+-]?\d", re.sub(r"^#.*|\{.*\}", "", text, flags=re.MULTILINE))


def test_gauges_of_the_machine_can_be_left_out(identity_server: Start) -> None:
    text = identity_server("--allow-cpu-metrics=false", "--allow-gpu-metrics=false").metrics()
    assert "nv_inference_count" in text
    assert not re.search("nv_(cpu|gpu|energy)", text)


def test_gauges_of_the_machine_are_read_at_the_interval(identity_server: Start) -> None:
    """A core that is kept busy shows; of hours at a time, nothing more after the first reading."""
    rare, often = identity_server("--metrics-interval-ms=3600000"), identity_server("--metrics-interval-ms", "50")

    def gauges(server: ServerProcess) -> list[float]:
        """Utilization, and the memory in use: where all cores are busy the first stays 1."""
        found = re.findall(r"^nv_cpu_(?:utilization|memory_used_bytes) (\S+)$", server.metrics(), re.MULTILINE)
        assert len(found) == 2
        return [float(value) for value in found]

    first = gauges(rare)
    assert 0 < wait_for(lambda: gauges(often)[0]) <= 1
    assert len({tuple(gauges(often)) for _ in range(20) if not time.sleep(0.06)}) > 1
    assert gauges(rare) == first


def test_an_image_is_pending_until_a_worker_begins_with_it(
    triton_server: ServerProcess, triton_client: triton.InferenceServerClient
) -> None:
    ends: queue.Queue[InferenceServerException | None] = queue.Queue()
    prompt, small = [bytes_tensor("PROMPT", "a gauge")], {"num_inference_steps": 1, "width": 64, "height": 64}
    with triton_server.standing_still():
        triton_client.async_infer(MODEL, prompt, lambda result, error: ends.put(error), parameters=small)
        wait_for(lambda: under_way(triton_server, MODEL) == 1)
        assert pending(triton_server, MODEL) == 1
    assert ends.get(timeout=PATIENCE) is None
    assert pending(triton_server, MODEL) == 0


def test_summaries_and_histograms_on_request(identity_server: Start) -> None:
    wanted = ("summary_latencies=true", "counter_latencies=false", "summary_quantiles=0.5:0.05,0.9:0.01")
    server = identity_server(*(part for setting in wanted for part in ("--metrics-config", setting)))
    with triton.InferenceServerClient(server.url) as client:
        client.infer("identity", [some_bytes()])
    assert server.metric("nv_inference_request_summary_us", model="identity", quantile="0.9") > 0
    assert server.metric("nv_inference_request_summary_us_count", model="identity") == 1
    assert "nv_inference_request_duration_us" not in server.metrics()
