"""`zserve export`: compile a checkpoint into engines in a model repository."""

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import ArgumentsError, ExportError, ResourcesError, UnsupportedError
from export.hubs import Hub, is_disk_full
from export.interruption import Interruption
from export.manifest import Backend, EngineRecord, Target, Verbosity
from export.repository import ServingDefaults, kept_settings
from export.spec import MIN_SIZE, SIZE_MULTIPLE, SMALLEST_MAX_SIZE, Precision

if TYPE_CHECKING:
    from export.request import ExportRequest
    from export.reuse import Exported

DEFAULTS = ServingDefaults()
NOT_POSSIBLE = 3  # this machine cannot run it; the engines may be fine
BAD_ARGUMENTS = 2  # also argparse's own
STATUSES = f"""exit status: 0 published, or nothing to do; 1 it failed, or an engine is not right;
{BAD_ARGUMENTS} bad arguments; {NOT_POSSIBLE} not possible on this machine, for want of a GPU, a library, disk or
memory; 130 interrupted"""


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are those of the dataclasses."""
    p = argparse.ArgumentParser(prog="zserve export", description=__doc__, epilog=STATUSES)
    _add_source_arguments(p)
    p.add_argument("--repository", type=Path, default=Path("models"), help="model repository (default: %(default)s)")
    p.add_argument("--name", type=_name, required=True, help="the model's name in the repository")
    p.add_argument(
        "--backend",
        type=Backend,
        choices=list(Backend),
        help="kind of engine (default: aotinductor on CUDA, onnxruntime on the CPU)",
    )
    p.add_argument(
        "--precision",
        type=_precision,
        choices=list(Precision),
        help="default: bf16 on CUDA and for TensorRT, else fp32; fp8: bf16 with the denoiser's matrix products in FP8, "
        "for aotinductor on GPUs from compute capability 8.9 on: faster, less exact, and with more memory",
    )
    p.add_argument(
        "--device",
        help="device to build for: cpu, cuda, cuda:1 ... (default: cuda where there is one; cpu for onnxruntime)",
    )
    _add_serving_arguments(p)
    p.add_argument("--version", type=_whole(1, 999_999_999), help="version number to write (default: the next one)")
    p.add_argument(
        "--force", action="store_true", help="build again what is already there and valid; replace the version given"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="say what would be downloaded and built and what it needs; build nothing"
    )
    _add_tensorrt_arguments(p)
    return p


def _add_serving_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--default-size",
        type=image_size,
        default=DEFAULTS.default_size,
        help=f"WIDTHxHEIGHT, each side from {MIN_SIZE} to --max-size (default: %(default)s)",
    )
    p.add_argument(
        "--warmup-size",
        type=image_size,
        action="append",
        default=[],
        help="another size to run before the server says it is ready; may be repeated",
    )
    p.add_argument(
        "--max-batch",
        type=_whole(1, 32),
        default=DEFAULTS.max_batch,
        help="images that may share a step (default: %(default)s)",
    )
    p.add_argument(
        "--max-size",
        type=_whole(SMALLEST_MAX_SIZE, 4096, SIZE_MULTIPLE),
        default=DEFAULTS.max_size,
        help=f"longest side in pixels, {SMALLEST_MAX_SIZE} to 4096 (default: %(default)s)",
    )


def _add_source_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--checkpoint", required=True, help="folder of a diffusers ZImagePipeline, or owner/name on the hub of --source"
    )
    p.add_argument(
        "--source",
        type=Hub,
        choices=list(Hub),
        default=Hub.LOCAL,
        help="where the checkpoint is (default: %(default)s)",
    )
    p.add_argument("--revision", help="branch, tag or commit on the hub (default: its main branch)")
    p.add_argument("--cache-dir", type=Path, help="cache of both hubs (default: HF_HOME and MODELSCOPE_CACHE)")
    p.add_argument("--offline", action="store_true", help="take the checkpoint from the cache, or fail")


def _add_tensorrt_arguments(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("TensorRT")
    group.add_argument(
        "--target",
        type=_targets,
        help="GPUs to build TensorRT-RTX plans for, from sm80 on, such as sm89,sm120 (default: the one here)",
    )
    group.add_argument(
        "--strip-weights",
        action="store_true",
        help="keep the weights beside the plan and put them in when it is loaded, so that fine-tunes share the plan",
    )
    group.add_argument(
        "--profiling-verbosity",
        type=Verbosity,
        choices=list(Verbosity),
        default=Verbosity.LAYER_NAMES,
        help="how much a plan tells of its layers (default: %(default)s)",
    )


def main(argv: Sequence[str]) -> int:
    """Runs the export; returns the exit status."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        _run(arguments, Interruption())
    except ExportError as error:
        print(f"zserve export: {error}", file=sys.stderr)
        return _status(error)
    except BrokenPipeError:
        raise  # of what reads the output, and has stopped: nothing of the export failed
    except OSError as error:
        where = "" if error.filename else f" (while writing {arguments.repository / arguments.name})"
        print(f"zserve export: {error}{where}", file=sys.stderr)
        return NOT_POSSIBLE if is_disk_full(error) else 1
    except KeyboardInterrupt:
        print("zserve export: interrupted; the same command resumes at the component it was at", file=sys.stderr)
        return 130
    return 0


def _status(error: ExportError) -> int:
    match error:
        case ArgumentsError():
            return BAD_ARGUMENTS
        case UnsupportedError() | ResourcesError():
            return NOT_POSSIBLE
        case _:
            return 1


def _run(arguments: argparse.Namespace, interruption: Interruption) -> None:
    print("loading PyTorch ...", file=sys.stderr, flush=True)
    from export.devices import use_device
    from export.dry_run import print_dry_run
    from export.exporter import export_model
    from export.progress import progress_bar
    from export.request import resolved_request

    request = resolved_request(arguments)
    use_device(request.device)
    if arguments.dry_run:
        print_dry_run(request)
        return
    with progress_bar() as show:

        def report(stage: str, done: int) -> None:
            interruption.check()
            show(stage, done)

        exported = export_model(request, report)
    _print_result(exported)
    _print_kept_settings(request)


def _print_result(exported: "Exported") -> None:
    print(f"{exported.folder}: {exported.manifest.precision}, from {exported.manifest.checkpoint.path}")
    for engine in exported.manifest.engines:
        state = "reused" if engine.component in exported.reused else "built"
        print(
            f"  {engine.component:<15} {engine.backend:<12} {state:<7} {engine.bytes / 1e6:7.1f} MB  {_checked(engine)}"
        )
        if engine.plan is not None and engine.plan.decomposed_attention:
            print(f"{'':<18}{engine.plan.decomposed_attention} attention layers have no fused kernel and run in parts")
    if not exported.manifest.engines:
        print("  eager only: no engines to build")


def _print_kept_settings(request: "ExportRequest") -> None:
    """An existing config.pbtxt is the operator's; what was asked for on the command line is not in it then."""
    kept = kept_settings(request.model, request.serving)
    if kept:
        file = request.model / "config.pbtxt"
        print(f"  {file} is kept: {'; '.join(kept)}. Edit it, or delete it and export again")


def _checked(engine: EngineRecord) -> str:
    if engine.parity is None:
        return f"built for {', '.join(map(str, engine.built_for))}; not run, as this machine is none of these"
    return f"relative error {engine.parity.relative_error:.1e}, cosine {engine.parity.cosine:.7f}"


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: letters, digits, '.', '_' and '-' are accepted, 128 at most")
    return text


def _precision(text: str) -> Precision:
    if text in ("fp16", "float16", "half"):
        raise argparse.ArgumentTypeError(
            f"{text}: this model's activations exceed what fp16 holds (65504), which draws black images; use bf16"
        )
    try:
        return Precision(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: {', '.join(Precision)} are accepted") from None


def _whole(low: int, high: int, multiple: int = 1) -> Callable[[str], int]:
    """A type of argument: whole numbers from `low` to `high`, multiples of `multiple`."""

    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high or int(text) % multiple:
            what = "a whole number" if multiple == 1 else f"a multiple of {multiple}"
            raise argparse.ArgumentTypeError(f"{text!r}: {what} from {low} to {high} is accepted")
        return int(text)

    return read


def _targets(text: str) -> tuple[Target, ...]:
    targets = []
    for name in text.split(","):
        match = re.fullmatch(r"sm(\d+)(\d)", name.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"{name!r}: compute capabilities such as sm89 or sm120 are accepted")
        targets.append(Target("cuda", f"{match[1]}.{match[2]}"))
    return tuple(sorted(set(targets), key=lambda t: float(t.compute_capability or 0)))  # as given in any order


def image_size(text: str) -> str:
    """WIDTHxHEIGHT, normalised without leading zeros."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or any(int(side) % SIZE_MULTIPLE or not int(side) for side in match.groups()):
        raise argparse.ArgumentTypeError(f"{text!r}: WIDTHxHEIGHT with multiples of {SIZE_MULTIPLE} is accepted")
    return f"{int(match[1])}x{int(match[2])}"
