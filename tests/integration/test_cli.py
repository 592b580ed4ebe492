"""The commands as a person runs them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from export.checkpoint import open_checkpoint
from export.errors import BuildError, ParityError, ResourcesError
from export.manifest import Backend, Manifest
from export.parity import Checker, ParityCheck
from export.repository import versions
from export.spec import Component, Precision, ShapePoint
from server.frontend.workers import COMMAND
from tests.conftest import CHECKPOINT, MODEL, ROOT, run_export
from tests.integration.process import PATIENCE, ServerProcess, wait_for


def zserve(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zserve", *arguments]
    return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, check=False, timeout=PATIENCE)


def test_generate_writes_the_file_it_was_told(server: ServerProcess, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "circle.png"
    options = ("-o", str(out), "--seed", "7", "--size", "128x64", "--steps", "2", "--previews", "1")
    done = zserve("generate", "a red circle on a white background", *options, "--url", server.url)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as image, Image.open(out.with_suffix(".step01.jpg")) as preview:
        assert (image.size, preview.size) == ((128, 64), (16, 8))
    assert "seed 7" in done.stderr


def test_generate_takes_prompts_from_standard_input_and_names_files_after_them(
    server: ServerProcess, tmp_path: Path
) -> None:
    prompts = "a red circle\n\n红色圆形\na red circle\n"
    options = ("--file", "-", "-o", str(tmp_path), "--steps", "1", "--format", "jpeg", "--size", "64x64")
    done = zserve("generate", *options, "--url", server.url, stdin=prompts)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-red-circle-2.jpg", "a-red-circle.jpg", "红色圆形.jpg"]


def test_generate_tells_what_failed_and_draws_the_rest(server: ServerProcess, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n" + "very " * 600 + "long\n")
    done = zserve(
        "generate", "--file", str(prompts), "-o", str(tmp_path / "out"), "--size", "64x64", "--steps", "1",
        "--url", server.url,
    )  # fmt: skip
    assert done.returncode == 1
    assert "INVALID_ARGUMENT: prompt:" in done.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a-red-circle.png"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["generate"], 2, "no prompt; give one"),
        (["generate", "a cat", ""], 2, "an empty prompt is not accepted"),
        (["generate", "a cat", "--concurrency", "0"], 2, "a whole number above 0 is accepted"),
        (["generate", "x", "--size", "big"], 2, "WIDTHxHEIGHT is accepted"),
        (["generate", "x", "--url", "127.0.0.1:9"], 1, "UNAVAILABLE"),
        (["serve", "--grpc-port", "70000"], 2, "a port from 0 to 65535"),
        (["export", "--checkpoint", "/nowhere", "--name", "m"], 1, "no checkpoint folder at /nowhere"),
        (["export", "--checkpoint", "x", "--name", "../m"], 2, "letters, digits"),
        (["paint"], 2, "no command 'paint'; there are export, serve, generate"),
    ],
)
def test_a_wrong_command_line_says_what_is_accepted(
    tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    repository = ["--repository", str(tmp_path)] if arguments[0] == "export" else []
    done = zserve(*arguments, *repository)
    assert done.returncode == status
    assert message in done.stderr


def test_every_command_has_help() -> None:
    assert "zserve generate" in zserve("--help").stdout
    for command in ("export", "serve", "generate"):
        assert f"usage: zserve {command}" in zserve(command, "--help").stdout


def test_an_export_reuses_what_is_valid_and_builds_only_what_is_not(repository: Path, tmp_path: Path) -> None:
    model = tmp_path / MODEL
    newest = versions(repository / MODEL)[-1]
    shutil.copytree(repository / MODEL / str(newest), model / "1")
    options = ("--backend", "onnxruntime", "--default-size", "256x256")
    arguments = ("--repository", str(tmp_path), "--name", MODEL, *options)
    again = run_export(*arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("reused") == 3
    assert versions(model) == [1]

    (model / "1" / "prompt_encoder.onnx").write_bytes(b"damaged")
    repaired = run_export(*arguments)
    assert repaired.returncode == 0, repaired.stderr
    assert "is damaged" in repaired.stderr
    assert (repaired.stdout.count("reused"), repaired.stdout.count("built")) == (2, 1)
    assert versions(model) == [1, 2]
    manifest = Manifest.read(model / "2")
    assert {e.component for e in manifest.engines} == set(Component)
    assert all(e.parity.relative_error < 1e-3 for e in manifest.engines)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_export_leaves_no_version(tmp_path: Path, how: signal.Signals) -> None:
    export = ("export", "--checkpoint", str(CHECKPOINT), "--repository", str(tmp_path), "--name", MODEL)
    command = [sys.executable, "-m", "zserve", *export, "--backend", "onnxruntime"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob(f"{MODEL}/.incomplete*")))
    process.send_signal(how)
    assert process.wait(PATIENCE) != 0
    assert versions(tmp_path / MODEL) == []
    assert not (tmp_path / MODEL / "config.pbtxt").exists()


def check_of(component: Component, backend: Backend, file: Path) -> ParityCheck:
    dimensions = open_checkpoint(CHECKPOINT).dimensions
    points = (ShapePoint(1, 32, 64, 80),)
    return ParityCheck(CHECKPOINT, component, backend, file, Precision.FP32, "cpu", dimensions, points)


@pytest.mark.parametrize(
    ("end", "kind", "message"),
    [
        (r"printf 'no library caf\351.so' >&2; exit 1", BuildError, r"denoiser does not load and run.*caf.\.so$"),
        ("kill -SEGV $$", BuildError, r"denoiser killed the process that loaded it \(SIGSEGV\).*CXX=/usr/bin/g\+\+"),
        (
            "kill -KILL $$",
            ResourcesError,
            r"denoiser is not published: .* \(SIGKILL\), probably for want of memory; end other programs",
        ),
        (
            """while true; do echo '{"no_memory": "12 GB wanted"}'; read check; done""",
            ResourcesError,
            r"denoiser is not published: cpu has too little memory to check it \(12 GB wanted\); end what else",
        ),
    ],
)
def test_an_engine_that_kills_its_process_is_named_and_not_published(
    end: str, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Python that dies at its second engine as AOTInductor packages, and want of memory, have made it die."""
    deadly = tmp_path / "python"
    good = '{"relative_error": 0, "cosine": 1, "points": 3}'
    deadly.write_text(f"#!/bin/sh\nread check; echo '{good}'; read check; {end}\n")
    deadly.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(deadly))
    first, second = (check_of(c, Backend.AOTINDUCTOR, tmp_path / f"{c}.pt2") for c in list(Component)[:2])
    with Checker() as checker:
        assert checker.check(first, 1e-5).relative_error == 0
        for _ in range(2):
            with pytest.raises(kind, match=f"(?s){message}"):
                checker.check(second, 1e-5)


def test_one_process_checks_engines_until_one_does_not_load(repository: Path, tmp_path: Path) -> None:
    folder = repository / MODEL / str(versions(repository / MODEL)[-1])
    good = check_of(Component.PROMPT_ENCODER, Backend.ONNXRUNTIME, folder / "prompt_encoder.onnx")
    bad = check_of(Component.DENOISER, Backend.ONNXRUNTIME, tmp_path / "denoiser.onnx")
    bad.file.write_bytes(b"not a graph")
    with Checker() as checker:
        assert checker.check(good, 1e-5).cosine > 0.9999
        with pytest.raises(ParityError, match=r"prompt_encoder differs from eager"):
            checker.check(good, 0.0)
        with pytest.raises(BuildError, match=r"(?s)denoiser does not load and run.*denoiser\.onnx"):
            checker.check(bad, 1e-5)


def test_what_lies_in_the_callers_folder_is_not_taken_for_modules(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = repository / MODEL / str(versions(repository / MODEL)[-1])
    check = check_of(Component.PROMPT_ENCODER, Backend.ONNXRUNTIME, folder / "prompt_encoder.onnx")
    for name in ("export.py", "server.py", "types.py"):
        (tmp_path / name).write_text("raise SystemExit('executed')")
    monkeypatch.chdir(tmp_path)
    with Checker() as checker:
        assert checker.check(check, 1e-5).cosine > 0.9999
    worker = subprocess.run(COMMAND, capture_output=True, text=True, check=False)
    assert "executed" not in worker.stderr
    assert "a worker takes its settings as one JSON argument" in worker.stderr, "it is this one that was started"


@pytest.fixture(scope="module")
def client_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client and what it may import, and nothing else of the project."""
    folder = tmp_path_factory.mktemp("client")
    for name in ("client", "protos"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "zserve.py", folder)
    return folder


def test_the_client_works_without_the_server_and_torch(
    server: ServerProcess, client_only: Path, tmp_path: Path
) -> None:
    """With every heavy package made unimportable."""
    blocked = ["torch", "numpy", "transformers", "diffusers", "tritonclient", "onnxruntime", "grpc_health"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}));"
        f"sys.argv = ['zserve', 'generate', 'a star', '-o', {str(tmp_path / 'star.png')!r}, '--steps', '1',"
        f" '--size', '64x64', '--url', {server.url!r}];"
        "import zserve; sys.exit(zserve.main())"
    )
    environment = {**os.environ, "PYTHONPATH": str(client_only)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=client_only, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "star.png").stat().st_size > 0


def test_the_manifest_says_where_every_engine_came_from(repository: Path) -> None:
    folder = repository / MODEL / str(versions(repository / MODEL)[-1])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["checkpoint"]["path"] == str(CHECKPOINT)
    for engine in manifest["engines"]:
        assert set(engine["built_with"]) >= {"onnxruntime", "torch"}
        assert all(f["bytes"] == (folder / f["name"]).stat().st_size for f in engine["files"])
        assert 0 <= engine["parity"]["relative_error"] < 1e-3
