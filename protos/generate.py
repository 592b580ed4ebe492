"""Generates the protobuf code beside its .proto file; with --check, says whether what is committed is fresh."""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROTO = Path("protos/zserve/v1/image_generation.proto")
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(out: Path) -> dict[str, bytes]:
    """Writes the generated files under `out`; returns their contents by name."""
    import grpc_tools
    from grpc_tools import protoc

    bin_folder = Path(sys.executable).parent
    arguments = [
        "protoc",
        f"-I{ROOT}",
        f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
        f"--plugin=protoc-gen-mypy={bin_folder / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={bin_folder / 'protoc-gen-mypy_grpc'}",
        *(f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
        str(PROTO),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed")
    folder = out / PROTO.parent
    return {name: (folder / name).read_bytes() for name in (PROTO.stem + suffix for suffix in SUFFIXES)}


def main() -> int:
    """Returns 1 when --check finds a stale file."""
    with tempfile.TemporaryDirectory() as out:
        fresh = generate(Path(out))
    target = ROOT / PROTO.parent
    stale = [n for n, data in fresh.items() if not (target / n).is_file() or (target / n).read_bytes() != data]
    if "--check" in sys.argv:
        if stale:
            sys.stderr.write(f"stale generated code: {', '.join(stale)}; run `make protos`\n")
        return 1 if stale else 0
    for name in stale:
        (target / name).write_bytes(fresh[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
