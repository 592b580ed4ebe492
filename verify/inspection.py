"""`zserve inspect`: what a version holds, and what of it can be used on this machine."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from export.devices import checked_device, current_target
from export.errors import ExportError, StaleEngineError
from export.manifest import Backend, EngineRecord, Manifest, Target
from export.rebuild import rebuild_command
from export.spec import ComponentSpec, TensorSpec, component_specs
from export.validity import check_checkpoint, check_engine
from verify.layers import layers
from verify.version import Version, add_arguments, open_version

STATUSES = """exit status: 0 told, also of what cannot be used here; 1 there is no such version, or no such device;
2 bad arguments"""
SHOWN = 6  # kinds of layers; --json has all


def main(argv: Sequence[str]) -> int:
    """Prints the version; returns the exit status."""
    parser = argparse.ArgumentParser(prog="zserve inspect", description=__doc__, epilog=STATUSES)
    add_arguments(parser)
    parser.add_argument("--device", help="device to compare with (default: cuda where there is one)")
    arguments = parser.parse_args(argv)
    try:
        version = open_version(arguments)
        here = current_target(checked_device(arguments.device))
    except ExportError as error:
        print(f"zserve inspect: {error}", file=sys.stderr)
        return 1
    described = describe(version, here)
    print(json.dumps(described, indent=2) if arguments.json else as_table(described))
    return 0


def describe(version: Version, here: Target) -> dict[str, Any]:
    """Everything about the version, ready for JSON."""
    manifest = version.manifest
    specs = component_specs(manifest.checkpoint.dimensions)
    return {
        "model": manifest.name,
        "version": version.folder.name,
        "created": manifest.created,
        "precision": manifest.precision,
        "checkpoint": {**asdict(manifest.checkpoint), "problem": _checkpoint_problem(manifest)},
        "default_size": manifest.default_size,
        "max_size": manifest.max_size,
        "max_batch": manifest.max_batch,
        "this_machine": str(here),
        "components": [
            {
                "component": component,
                "inputs": [_tensor(t) for t in spec.inputs],
                "output": _tensor(spec.output),
                "engine": _engine(version, spec, here),
            }
            for component, spec in specs.items()
        ],
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.dims)}


def _engine(version: Version, spec: ComponentSpec, here: Target) -> dict[str, Any]:
    record = version.manifest.engine(spec.component)
    if record is None:
        return {"backend": Backend.EAGER, "usable_here": True}
    problem = _problem(version, record, here)
    return {
        **asdict(record),
        "bytes": record.bytes,
        "tolerance": spec.tolerance[version.manifest.precision],
        "layers": layers(version.folder, record),
        "usable_here": not problem,
        "problem": problem,
    }


def _checkpoint_problem(manifest: Manifest) -> str:
    """Why a server would refuse the version with all its engines; empty if it would not."""
    try:
        check_checkpoint(manifest)
    except ExportError as error:
        return str(error)
    return ""


def _problem(version: Version, record: EngineRecord, here: Target) -> str:
    rebuild = rebuild_command(version.manifest, version.folder.parent, record, here)
    try:
        check_engine(record, version.folder, here, rebuild)
    except StaleEngineError as error:
        return str(error)
    return ""


def as_table(described: dict[str, Any]) -> str:
    """The same for people, in lines of ordinary width except for paths."""
    checkpoint = described["checkpoint"]
    lines = [
        f"{described['model']} version {described['version']}, {described['precision']}, made {described['created']}",
        f"  from {checkpoint['path']}",
        *([f"  cannot be served: {checkpoint['problem']}"] if checkpoint["problem"] else []),
        f"  default size {described['default_size']}, up to {described['max_size']} pixels a side and "
        f"{described['max_batch']} images a batch",
    ]
    for component in described["components"]:
        lines += ["", *_component_lines(component, described["this_machine"])]
    return "\n".join(lines)


def _component_lines(component: dict[str, Any], here: str) -> list[str]:
    engine = component["engine"]
    tensors = [_tensor_text(t) for t in component["inputs"]]
    lines = [f"{component['component']}: {engine['backend']}"]
    lines.append(f"  takes      {', '.join(tensors)}")
    lines.append(f"  gives      {_tensor_text(component['output'])}")
    if engine["backend"] is not Backend.EAGER:
        lines += _engine_lines(engine)
    lines.append(f"  here       {f'usable on {here}' if engine['usable_here'] else engine['problem']}")
    return lines


def _engine_lines(engine: dict[str, Any]) -> list[str]:
    names = ", ".join(f["name"] for f in engine["files"])
    lines = [
        f"  files      {names} ({engine['bytes'] / 1e6:.1f} MB)",
        f"  built for  {', '.join(str(Target(**t)) for t in engine['built_for'])}",
        f"  built with {', '.join(f'{name} {version}' for name, version in engine['built_with'].items())}",
        f"  parity     {_parity_text(engine)}",
    ]
    if engine["layers"]:
        lines.append(f"  layers     {', '.join(f'{count} {what}' for what, count in _first(engine['layers']))}")
    if engine["plan"] is not None:
        lines += _plan_lines(engine["plan"])
    return lines


def _first(counted: dict[str, int]) -> list[tuple[str, int]]:
    """The most frequent kinds, and the rest as one."""
    most, rest = list(counted.items())[:SHOWN], list(counted.values())[SHOWN:]
    return [*most, ("others", sum(rest))] if rest else most


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    lines = [
        f"  attention  {plan['fused_attention']} fused, {plan['decomposed_attention']} decomposed",
        f"  weights    {plan['weights']}, layers told: {plan['verbosity']}",
    ]
    for profile in plan["profiles"]:
        low, high = profile["minimum"], profile["maximum"]
        lines.append(
            f"  profile    batch {low['batch']}-{high['batch']}, caption {low['caption']}-{high['caption']}, "
            f"{low['width']}x{low['height']} to {high['width']}x{high['height']}"
        )
    return lines


def _parity_text(engine: dict[str, Any]) -> str:
    parity = engine["parity"]
    if parity is None:
        return "never run: the machine that built it has none of these GPUs"
    return (
        f"relative error {parity['relative_error']:.1e} (tolerance {engine['tolerance']:.0e}), "
        f"cosine {parity['cosine']:.7f}, over {parity['points']} shapes"
    )


def _tensor_text(tensor: dict[str, Any]) -> str:
    return f"{tensor['name']} {tensor['dtype']} [{', '.join(map(str, tensor['shape']))}]"
