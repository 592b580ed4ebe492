"""The registry, the batcher and the text of the metrics, without a server."""

import asyncio
import re
import socket
import urllib.request
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from server.backends import registry
from server.backends.base import ModelFile, ModelFolder, VersionPolicy
from server.backends.batcher import Batcher
from server.backends.identity import IdentityModel
from server.config import read_model_config
from server.errors import ConfigError, QueueFullError, QueueTimeoutError
from server.frontend.exposition import decimal, render, serve
from server.frontend.statistics import Statistics
from server.queue_policy import LevelPolicy, QueuePolicy, TimeoutAction
from server.rpc.triton import images
from server.rpc.triton.model_config import complete_config, parse_model_file
from server.tensors import DataType, InferRequest, ModelSpec, Tensor, TensorSpec, join_strings, split_strings
from tests.conftest import ROOT

PATIENCE = 300.0  # seconds that nothing here takes
SPEC = ModelSpec("m", "1", "identity", (TensorSpec("A", DataType.UINT8, (-1,)),), (), max_batch_size=4)


def a_request(rows: int = 1, name: str = "", priority: int = 0, width: int = 1) -> InferRequest:
    tensor = Tensor("A", DataType.UINT8, (rows, width), b"\0" * rows * width)
    return InferRequest(SPEC, name, {"A": tensor}, priority=priority)


class Runs:
    """Remembers the batches, and holds each of them until it is let go."""

    def __init__(self, policy: QueuePolicy, rows: int = 1) -> None:
        self.batches: list[list[str]] = []
        self.go = asyncio.Event()
        self.statistics = Statistics()
        self.batcher = Batcher(self.execute, self.statistics, policy=policy, max_batch_size=rows, instances=1)

    async def execute(self, requests: list[InferRequest]) -> None:
        self.batches.append([r.id for r in requests])
        await self.go.wait()

    def start(self, *requests: InferRequest) -> list["asyncio.Task[object]"]:
        return [asyncio.ensure_future(self.batcher.run(r)) for r in requests]


async def test_what_waits_together_runs_together_up_to_the_limit() -> None:
    runs = Runs(QueuePolicy(), rows=4)
    tasks = runs.start(*(a_request(name=str(n)) for n in range(6)))
    await asyncio.sleep(0)
    runs.go.set()
    await asyncio.gather(*tasks)
    assert runs.batches == [["0"], ["1", "2", "3", "4"], ["5"]]
    assert sorted(runs.statistics.batches) == [1, 4]


async def test_rows_of_different_shapes_do_not_share_a_batch() -> None:
    runs = Runs(QueuePolicy(max_delay=0.001), rows=4)
    runs.go.set()
    await asyncio.gather(*runs.start(a_request(name="a"), a_request(name="b", width=2), a_request(name="c", width=2)))
    assert runs.batches == [["a"], ["b", "c"]]


async def test_priority_goes_first_then_arrival() -> None:
    runs = Runs(QueuePolicy(levels=3, default_level=2))
    tasks = runs.start(*(a_request(name=n, priority=p) for n, p in (("x", 0), ("low", 3), ("none", 0), ("high", 1))))
    await asyncio.sleep(0)
    runs.go.set()
    await asyncio.gather(*tasks)
    assert [b[0] for b in runs.batches] == ["x", "high", "none", "low"]


async def test_the_highest_priority_goes_first_where_no_levels_are_configured() -> None:
    """And a level that there is not, however large, is the default one: as in Triton."""
    runs = Runs(parse_model_file("", "m").queue)
    wanted = (("x", 0), ("none", 0), ("beyond", 2**40), ("high", 1))
    tasks = runs.start(*(a_request(name=n, priority=p) for n, p in wanted))
    await asyncio.sleep(0)
    runs.go.set()
    await asyncio.gather(*tasks)
    assert [b[0] for b in runs.batches] == ["x", "high", "none", "beyond"]


async def test_a_late_request_may_be_put_behind_the_others_of_its_level_instead() -> None:
    late = LevelPolicy(on_timeout=TimeoutAction.DELAY, request_may_set_timeout=True)
    runs = Runs(QueuePolicy(levels=2, default_level=1, default=late))
    requests = [a_request(name="x"), a_request(name="late"), a_request(name="next"), a_request(name="low", priority=2)]
    requests[1] = replace(requests[1], queue_timeout=0.001)
    tasks = runs.start(*requests)
    await asyncio.sleep(0)  # they wait now, and timers go off in the order of their times
    await asyncio.sleep(0.001)
    runs.go.set()
    await asyncio.gather(*tasks)
    assert [b[0] for b in runs.batches] == ["x", "next", "late", "low"]


async def test_every_level_has_a_queue_of_its_own() -> None:
    runs = Runs(QueuePolicy(levels=2, default_level=1, by_level={2: LevelPolicy(max_size=1)}))
    tasks = runs.start(a_request(), a_request(priority=2), *(a_request(priority=1) for _ in range(3)))
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="max_queue_size 1 of"):
        await runs.batcher.run(a_request(priority=2))
    assert runs.statistics.pending == 4
    runs.go.set()
    await asyncio.gather(*tasks)
    assert runs.statistics.pending == 0


async def test_without_a_bound_any_number_waits() -> None:
    runs = Runs(parse_model_file("", "m").queue)
    tasks = runs.start(*(a_request() for _ in range(300)))
    await asyncio.sleep(0)
    assert runs.statistics.pending == 299
    runs.go.set()
    await asyncio.gather(*tasks)


async def test_a_preferred_size_is_not_waited_beyond() -> None:
    runs = Runs(QueuePolicy(max_delay=PATIENCE, preferred_batch_sizes=(2,)), rows=4)
    runs.go.set()
    await asyncio.gather(*runs.start(*(a_request(name=str(n)) for n in range(4))))
    assert runs.batches == [["0", "1"], ["2", "3"]]


@pytest.mark.parametrize(
    "misfit", [a_request(rows=2, name="c"), a_request(name="c", width=2)], ids=["too many rows", "another shape"]
)
async def test_a_batch_is_not_held_when_what_is_next_does_not_fit(misfit: InferRequest) -> None:
    runs = Runs(QueuePolicy(max_delay=PATIENCE), rows=4)
    runs.go.set()
    *fitting, waiting = runs.start(a_request(rows=2, name="a"), a_request(name="b"), misfit)
    await asyncio.gather(*fitting)
    assert runs.batches == [["a", "b"]]
    waiting.cancel()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dynamic_batching { preserve_ordering: true }", "preserve_ordering.* not supported"),
        ("sequence_batching { }", "sequence_batching not supported; dynamic_batching is"),
        ("dynamic_batching { priority_levels: 2 default_priority_level: 3 }", "priority level 3 is not accepted"),
    ],
)
def test_scheduling_that_no_backend_serves_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_model_file(text, "m")


@pytest.mark.parametrize("field", ["response_cache { enable: true }", "optimization { }", "model_warmup { name: 'x' }"])
def test_what_neither_the_server_nor_a_backend_reads_is_refused_with_what_is_accepted(field: str) -> None:
    name = field.partition(" ")[0]
    with pytest.raises(ConfigError, match=rf"model 'm': \['{name}'\] not supported; \['backend', 'dynamic_batching', "):
        parse_model_file(f"backend: 'identity' {field}", "m")


def test_the_image_models_own_fields_are_left_to_it() -> None:
    assert parse_model_file("response_cache { enable: true } model_warmup { name: '64x64' }", "m").backend == "z_image"


def test_what_is_told_of_an_image_model_can_be_sent_back(tmp_path: Path) -> None:
    """As clients do that change one setting of a model and load it again."""
    file = parse_model_file("parameters { key: 'max_num_images' value { string_value: '2' } }", "m")
    told = complete_config(file, images.model_spec(ModelFolder(tmp_path, "1", file)))
    again = ModelFolder(tmp_path, "1", parse_model_file(str(told), "m"))
    assert images.model_spec(again).inputs == images.INPUTS
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").write_text(str(told))
    assert read_model_config(tmp_path / "m").max_num_images == 2
    told.output[0].dims[2] = 4
    with pytest.raises(ConfigError, match="an image model has inputs and outputs of its own"):
        images.model_spec(replace(again, file=parse_model_file(str(told), "m")))


@pytest.mark.parametrize("delay", ["nan", "-1", "3600001", "soon"])
async def test_a_delay_that_no_request_could_have_is_refused_with_the_model(delay: str) -> None:
    file = parse_model_file(
        f"backend: 'identity' parameters {{ key: 'execute_delay_ms' value {{ string_value: '{delay}' }} }}", "m"
    )
    host: Any = None
    with pytest.raises(ConfigError, match=f"execute_delay_ms: '{delay}' is not accepted; a number from 0 to 3.6e"):
        await IdentityModel(ModelFolder(Path("m"), "1", file), host).load()


TENSOR = "{kind} {{ name: 'A' data_type: TYPE_UINT8 dims: [ {dims} ] }}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size: -3", "max_batch_size -3 is not accepted; 0 or more is"),
        ("instance_group { count: 2 } instance_group { count: -2 }", "instance_group count -2 is not accepted; 0 or"),
        (TENSOR.format(kind="input", dims="-1, -5"), "dims of 'A': -5 is not accepted; a size from 1 on is, or -1"),
        (TENSOR.format(kind="output", dims="0"), "dims of 'A': 0 is not accepted; a size from 1 on is, or -1"),
        (TENSOR.format(kind="output", dims="-2"), "dims of 'A': -2 is not accepted"),
        (2 * TENSOR.format(kind="input", dims="1"), "2 inputs are named 'A'; each needs a name of its own"),
        (2 * TENSOR.format(kind="output", dims="1"), "2 outputs are named 'A'"),
    ],
)
def test_what_means_nothing_in_a_config_is_refused_with_what_is_accepted(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"model 'm': {message}"):
        parse_model_file(text, "m")


def test_a_config_may_leave_numbers_at_what_they_are_without_it() -> None:
    tensors = "".join(TENSOR.format(kind=kind, dims="-1, 3") for kind in ("input", "output"))
    file = parse_model_file(f"max_batch_size: 0 instance_group {{ count: 0 }} {tensors}", "m")
    assert (file.max_batch_size, file.instances, file.inputs) == (0, 1, file.outputs)


def test_the_queue_of_a_config() -> None:
    text = """
    max_batch_size: 4
    dynamic_batching {
      max_queue_delay_microseconds: 500
      priority_levels: 3
      default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 2000000 }
      priority_queue_policy { key: 3 value { max_queue_size: 5 } }
    }
    """
    file = parse_model_file(text, "m")
    assert file.rows_together == 4
    assert file.queue == QueuePolicy(
        levels=3,
        default_level=2,
        default=LevelPolicy(0, 2.0, TimeoutAction.DELAY),
        by_level={3: LevelPolicy(5)},
        max_delay=0.0005,
    )
    assert parse_model_file("max_batch_size: 4", "m").rows_together == 1


async def test_a_full_queue_refuses() -> None:
    runs = Runs(QueuePolicy(default=LevelPolicy(max_size=1)))
    started = runs.start(a_request(), a_request())
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError):
        await runs.batcher.run(a_request())
    runs.go.set()
    await asyncio.gather(*started)


async def test_a_late_request_is_refused() -> None:
    runs = Runs(QueuePolicy(default=LevelPolicy(timeout=0.001)))
    running, waiting = runs.start(a_request(), a_request())
    with pytest.raises(QueueTimeoutError, match=r"^Request timeout expired$"):
        await waiting
    runs.go.set()
    await running


async def test_a_batch_that_nobody_wants_any_more_is_stopped() -> None:
    runs = Runs(QueuePolicy())
    first, second = runs.start(a_request(name="a"), a_request(name="b"))
    await asyncio.sleep(0)
    for task in (first, second):
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0)
    (third,) = runs.start(a_request(name="c"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert runs.batches == [["a"], ["b"], ["c"]]
    runs.go.set()
    await third


async def test_a_cancelled_request_leaves_its_place() -> None:
    runs = Runs(QueuePolicy(default=LevelPolicy(max_size=1)))
    running, waiting = runs.start(a_request(name="a"), a_request(name="b"))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    (third,) = runs.start(a_request(name="c"))
    runs.go.set()
    await asyncio.gather(running, third)
    assert runs.batches == [["a"], ["c"]]


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        (VersionPolicy(), ["10"]),
        (VersionPolicy(latest=2), ["9", "10"]),
        (VersionPolicy(latest=0), ["2", "9", "10"]),
        (VersionPolicy(latest=0, specific=("2", "3")), ["2"]),
    ],
)
def test_version_policies(policy: VersionPolicy, chosen: list[str]) -> None:
    assert policy.choose(["10", "9", "2"]) == chosen


async def test_a_package_can_add_a_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The example of docs/backends.md, as it stands there."""
    text = (ROOT / "docs" / "backends.md").read_text("utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    offer = re.search(r'^(\w+) = "(.*)"$', text, re.MULTILINE)
    assert example and offer
    (tmp_path / "reverse_backend.py").write_text(example[1], "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint(offer[1], offer[2], registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    signature = (TensorSpec("TEXT", DataType.BYTES, (-1,)),)
    folder = ModelFolder(tmp_path, "1", ModelFile("reverse", "reverse", "", inputs=signature))
    model = registry.find_backend("reverse")(folder, None)  # type: ignore[arg-type]
    await model.load()
    tensor = Tensor("TEXT", DataType.BYTES, (2,), join_strings([b"abc", b"de"]))
    (response,) = [r async for r in model.infer(InferRequest(model.spec, "", {"TEXT": tensor}))]
    assert response.outputs[0].strings() == [b"cba", b"ed"]
    assert model.statistics.success.count == 1


@pytest.mark.parametrize("value", ["x", "gone"])
def test_a_backend_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    entry = EntryPoint("gone", "no_such_module:Model", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(ConfigError, match=value):
        registry.find_backend(value)


def test_strings_there_and_back() -> None:
    elements = [b"", b"a\0b", "日本".encode()]
    assert list(split_strings(join_strings(elements))) == elements
    with pytest.raises(ValueError, match="incomplete"):
        list(split_strings(b"\xff\xff\xff\xff"))


NUMBERS = {8589934592.0: "8589934592", 1e30: str(int(1e30)), 0.25: "0.25", 1e-7: "0.0000001", float("inf"): "+Inf"}


@pytest.mark.parametrize(("value", "text"), NUMBERS.items())
def test_numbers_have_no_exponent(value: float, text: str) -> None:
    assert decimal(value) == text


def test_the_exposition() -> None:
    metrics = CollectorRegistry()
    Counter("made", 'with "quotes"', ("b", "a"), registry=metrics).labels('x"y', "1").inc(3)
    Gauge("held", "bytes", registry=metrics).set(2**40)
    assert render(metrics).splitlines() == [
        '# HELP made_total with "quotes"',
        "# TYPE made_total counter",
        r'made_total{a="1",b="x\"y"} 3',
        "# HELP held bytes",
        "# TYPE held gauge",
        "held 1099511627776",
    ]


def test_metrics_are_served_without_asking_dns_for_this_machines_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop would wait for the answer."""

    def ask(name: str = "") -> str:
        raise AssertionError("it was asked for")

    monkeypatch.setattr(socket, "getfqdn", ask)
    metrics = CollectorRegistry()
    Gauge("held", "bytes", registry=metrics).set(1)
    port, stop = serve(metrics, "127.0.0.1", 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert b"held 1" in answer.read()
    stop()
