"""The command that makes an engine again; its options are the flags of `export.cli`."""

import shlex
from pathlib import Path

from export.manifest import Backend, EngineRecord, Manifest, PlanWeights, Target, Verbosity


def rebuild_command(manifest: Manifest, model: Path, record: EngineRecord, here: Target) -> str:
    """The shell command that makes the engines of a version of `model` again: for `here`, if they can be built for it.

    The folder's name counts: it may be another than the one it was exported to.
    """
    options = {
        "--checkpoint": manifest.checkpoint.path,
        "--repository": model.parent,
        "--name": model.name,
        "--backend": record.backend,
        "--precision": manifest.precision,
        "--max-batch": manifest.max_batch,
        "--max-size": manifest.max_size,
        "--default-size": manifest.default_size,
        **_target_options(record, here),
    }
    plan = record.plan
    if plan is not None and plan.verbosity is not Verbosity.LAYER_NAMES:
        options["--profiling-verbosity"] = plan.verbosity
    stripped = ["--strip-weights"] if plan is not None and plan.weights is PlanWeights.STRIPPED else []
    words = (str(word) for option in options.items() for word in option)
    return shlex.join(["zserve", "export", *words, *stripped, "--force"])


def _target_options(record: EngineRecord, here: Target) -> dict[str, str]:
    """What tells an export which devices to build for; nothing where it can only be the GPU that it runs on."""
    targets = record.built_for if here in record.built_for else (here,)
    match record.backend:
        case Backend.TENSORRT_RTX:
            plans_for = [t for t in targets if t.device == "cuda"] or record.built_for  # there are none for a CPU
            return {"--target": ",".join(map(target_name, plans_for))}
        case Backend.AOTINDUCTOR if targets == (Target("cpu"),):
            return {"--device": "cpu"}
        case _:
            return {}


def target_name(target: Target) -> str:
    """A CUDA target as `--target` takes it: sm89."""
    return f"sm{(target.compute_capability or '').replace('.', '')}"
