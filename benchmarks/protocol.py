"""What the protocol costs: perf_analyzer against zserve, and against NVIDIA's own Triton on the same machine.

Question: how many requests a second, and at what latency, does the server itself manage?
Method: the real perf_analyzer (--perf-analyzer: the wheel of tritonclient 2.50.0 carries it) over gRPC. First an
identity model with one tensor of 8 KiB and the same dynamic batching (up to 64 rows, no delay) on zserve and, where
--pytriton names a Python that has nvidia-pytriton 0.7.0, on Triton with an equal Python model: 1, 8 and 32 clients,
both servers in turn, several rounds, so that a drift of the machine's speed affects both. The figures are medians over
the rounds, with the lowest and highest throughput beside them; `unstable` counts measurements whose windows did not
agree, which are left out. Then the ways perf_analyzer can call a server, each of which has to end with status 0;
their figures are only a rough guide.
Units: requests a second; latency in microseconds.

What it needs, in build/tools (nvidia-pytriton runs under Debian 12's own Python 3.11, not under a newer 3.11):
    apt-get install libb64-0d unzip
    pip download --no-deps --only-binary :all: --platform manylinux1_x86_64 tritonclient==2.50.0 -d build/tools
    unzip -q build/tools/tritonclient-2.50.0-*.whl -d build/tools/client
    ANALYZER=build/tools/client/tritonclient-2.50.0.data/data/bin/perf_analyzer; chmod +x $ANALYZER
    pip install --no-deps --target build/tools/cudart nvidia-cuda-runtime-cu12
    /usr/bin/python3.11 -m venv build/tools/pytriton; build/tools/pytriton/bin/pip install nvidia-pytriton==0.7.0
    export LD_LIBRARY_PATH=$PWD/build/tools/cudart/nvidia/cuda_runtime/lib
    make export bench-protocol PERF_ANALYZER=$ANALYZER PYTRITON=build/tools/pytriton/bin/python
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import tritonclient.grpc as triton

from benchmarks.choice import positive
from benchmarks.record import Row, print_table, row
from benchmarks.serving import wait_until
from export.repository import versions

GRPC, METRICS = 9801, 9802
PYTRITON = 9811
TENSOR = ("--shape", "INPUT0:8192")
CLIENTS = (1, 8, 32)
# One measurement: windows of two seconds until three agree within 20 % in throughput and p50.
WINDOWS = ("-p", "2000", "-r", "10", "-s", "20", "--percentile", "50")
IDENTITY = """backend: "identity"
input {{ name: "INPUT0" data_type: TYPE_UINT8 dims: [ -1 ] }}
output {{ name: "OUTPUT0" data_type: TYPE_UINT8 dims: [ -1 ] }}
{extra}
"""
IDENTITIES = {
    "identity": "",
    "identity_decoupled": "model_transaction_policy { decoupled: true }",
    "identity_batched": "max_batch_size: 64 dynamic_batching { }",
}
PYTRITON_MODEL = """
import sys
import numpy as np
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig, TritonSecurityConfig

def identity(requests):
    return [{"OUTPUT0": r["INPUT0"]} for r in requests]

port = int(sys.argv[1])
config = TritonConfig(grpc_port=port, http_port=port + 1, metrics_port=port + 2, log_verbose=0)
with Triton(config=config, security_config=TritonSecurityConfig(access_token="token")) as server:
    tensor = lambda name: Tensor(name=name, dtype=np.uint8, shape=(-1,))
    batching = ModelConfig(max_batch_size=64, batcher=DynamicBatcher(max_queue_delay_microseconds=0))
    server.bind("identity_batched", identity, [tensor("INPUT0")], [tensor("OUTPUT0")], config=batching)
    server.serve()
"""
TOKEN = ("-H", "triton-grpc-protocol-triton-access-token:token")
Server = tuple[int, tuple[str, ...]]  # its port, and further arguments for perf_analyzer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's options."""
    parser.add_argument("--perf-analyzer", type=program, required=True)
    parser.add_argument("--pytriton", type=program, help="python of an environment with nvidia-pytriton")
    parser.add_argument("--rounds", type=positive, default=5, help="measurements of each server and number of clients")
    parser.add_argument("--model", type=image_model, default="models/z-image-demo", help="default: %(default)s")


def program(text: str) -> Path:
    """A program from the command line, by its path or by a name that the shell would find."""
    found = shutil.which(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no program that can be run")
    return Path(found)


def image_model(text: str) -> Path:
    """An exported model's folder from the command line."""
    model = Path(text)
    if not (model / "config.pbtxt").is_file() or not versions(model):
        raise argparse.ArgumentTypeError(f"{text} is no exported model; `make export` makes models/z-image-demo")
    return model


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything and prints the tables."""
    settings = {"load_before": os.getloadavg()[0], "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as scratch, _zserve(Path(scratch), options.model):
        with _pytriton(options.pytriton) as others:
            compared = _compare(options.perf_analyzer, {"zserve": (GRPC, ()), **others}, options.rounds)
        ran = _runs(options.perf_analyzer, options.model.name, _prompts(Path(scratch)))
    print_table(("identity, 8 KiB", "clients", "requests/s", "p50 us", "p99 us"), map(_line, compared))
    print_table(("perf_analyzer", "status", "requests/s", "p50 us"), map(_line, ran))
    failed = [r["case"]["perf_analyzer"] for r in ran if r["status"]]
    return {"settings": settings, "rows": [*compared, *ran], "failed": failed}


@contextmanager
def _zserve(scratch: Path, model: Path) -> Iterator[None]:
    """A server of the image model, as it is and decoupled, and of the identity models."""
    for name, extra in IDENTITIES.items():
        (scratch / name / "1").mkdir(parents=True)
        (scratch / name / "config.pbtxt").write_text(IDENTITY.format(extra=extra))
    (scratch / model.name).symlink_to(model.resolve())
    twin = scratch / "image_decoupled"
    twin.mkdir()
    for version in model.resolve().iterdir():
        if version.name.isdecimal():
            (twin / version.name).symlink_to(version)
    text = re.sub(r"(?m)^name:.*\n", "", (model / "config.pbtxt").read_text())
    (twin / "config.pbtxt").write_text(text + "\nmodel_transaction_policy { decoupled: true }\n")
    ports = ("--grpc-port", str(GRPC), "--metrics-port", str(METRICS), "--allow-client-shm")
    command = [sys.executable, "-P", "-m", "zserve", "serve", "--model-repository", str(scratch), *ports]
    with _process(command) as process:
        client = triton.InferenceServerClient(f"127.0.0.1:{GRPC}")
        wait_until(client.is_server_ready, process)
        yield


@contextmanager
def _pytriton(python: Path | None) -> Iterator[dict[str, Server]]:
    if python is None:
        yield {}
        return
    with _process([str(python), "-c", PYTRITON_MODEL, str(PYTRITON)]) as process:
        channel = grpc.insecure_channel(f"127.0.0.1:{PYTRITON}")
        ready: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelReady")
        request = triton.service_pb2.ModelReadyRequest(name="identity_batched").SerializeToString()
        headers = ((TOKEN[1].partition(":")[0], "token"),)
        wait_until(lambda: ready(request, metadata=headers) == b"\x08\x01", process)
        yield {"pytriton": (PYTRITON, TOKEN)}


@contextmanager
def _process(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def _compare(analyzer: Path, servers: dict[str, Server], rounds: int) -> list[Row]:
    """A row per server and number of clients: throughput and latency."""
    rows = []
    for clients in CLIENTS:
        arguments = ("-m", "identity_batched", *TENSOR, "--async", "--concurrency-range", str(clients), *WINDOWS)
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
        for _ in range(rounds):
            for name, (port, more) in servers.items():
                measured[name].append(_figures(_analyze(analyzer, port, *arguments, *more).stdout))
        rows += [row({"server": name, "clients": clients}, **_summary(measured[name])) for name in servers]
    return rows


def _summary(measured: list[dict[str, float]]) -> dict[str, float]:
    """Medians, and the range of the throughput."""
    stable = [m for m in measured if m]
    if not stable:
        return {"unstable": len(measured)}
    speeds = [m["per_second"] for m in stable]
    medians = {name: statistics.median(m[name] for m in stable) for name in stable[0]}
    unstable = len(measured) - len(stable)
    return {**medians, "lowest_per_second": min(speeds), "highest_per_second": max(speeds), "unstable": unstable}


def _prompts(scratch: Path) -> Path:
    """The file of what perf_analyzer sends: --string-data would fill the optional texts too."""
    file = scratch / ".prompts.json"
    file.write_text(json.dumps({"data": [{"PROMPT": ["a red circle on a white background"]}]}))
    return file


def _runs(analyzer: Path, image: str, prompts: Path) -> list[Row]:
    """Every way of calling, on both models; a status other than 0 is a failure."""
    prompt = ("--input-data", str(prompts), "--request-parameter", "num_inference_steps:2:int")
    few = ("--measurement-mode", "count_windows", "--measurement-request-count", "4")
    ways: dict[str, tuple[str, ...]] = {
        "identity sync": ("-m", "identity", *TENSOR, "--sync"),
        "identity async": ("-m", "identity", *TENSOR, "--async", "--concurrency-range", "4"),
        "identity streaming": ("-m", "identity", *TENSOR, "--async", "--streaming"),
        "identity decoupled streaming": ("-m", "identity_decoupled", *TENSOR, "--async", "--streaming"),
        "identity system shared memory": (
            *("-m", "identity", *TENSOR, "--shared-memory", "system", "--output-shared-memory-size", "8192"),
        ),
        "identity request rate": ("-m", "identity", *TENSOR, "--async", "--request-rate-range", "100:300:100"),
        "identity concurrency sweep": ("-m", "identity", *TENSOR, "--async", "--concurrency-range", "1:4:1"),
        "identity gzip": ("-m", "identity", *TENSOR, "--grpc-compression-algorithm", "gzip"),
        "identity metrics": (
            *("-m", "identity", *TENSOR, "--collect-metrics", "--metrics-url", f"localhost:{METRICS}/metrics"),
        ),
        "image sync": ("-m", image, *prompt, "--sync", *few),
        "image async": ("-m", image, *prompt, "--async", "--concurrency-range", "2", *few),
        "image decoupled streaming": ("-m", "image_decoupled", *prompt, "--async", "--streaming", *few),
        "image request rate": ("-m", image, *prompt, "--async", "--request-rate-range", "2", *few),
        "image metrics": (
            *("-m", image, *prompt, *few, "--collect-metrics", "--metrics-url", f"localhost:{METRICS}/metrics"),
        ),
    }
    return [row({"perf_analyzer": name}, **_run(analyzer, arguments)) for name, arguments in ways.items()]


def _run(analyzer: Path, arguments: tuple[str, ...]) -> dict[str, Any]:
    # Windows that agree within 80 % are enough: what counts here is the exit status.
    done = _analyze(analyzer, GRPC, *arguments, "-p", "1500", "-r", "8", "-s", "80", "--percentile", "50")
    return {"status": done.returncode, **_figures(done.stdout)}


def _analyze(analyzer: Path, port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(analyzer), "-i", "grpc", "-u", f"127.0.0.1:{port}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    print(f"status {done.returncode}: {' '.join(arguments)}", file=sys.stderr)
    return done


def _figures(output: str) -> dict[str, float]:
    """The figures of a sweep's last step."""
    found = {
        "per_second": re.findall(r"Throughput: ([\d.]+) infer/sec", output),
        "p50_us": re.findall(r"p50 latency: (\d+) usec", output),
        "p99_us": re.findall(r"p99 latency: (\d+) usec", output),
    }
    return {name: float(values[-1]) for name, values in found.items() if values}


def _line(r: Row) -> list[object]:
    figures = ("status", "per_second", "p50_us") if "status" in r else ("per_second", "p50_us", "p99_us")
    return [*r["case"].values(), *(r.get(name) for name in figures)]
