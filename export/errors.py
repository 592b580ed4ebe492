"""The errors of the export stage, one tree. Every message says what was wrong, what is accepted, what to do.

ExportError
├── UnsupportedError      what was asked for cannot be built, here or at all
│   └── ArgumentsError    ... on any machine, as its arguments do not fit each other
├── ResourcesError        too little disk or memory for what was asked
├── SourceError           a hub does not have the checkpoint, or cannot be reached
├── CheckpointError       the folder is not a whole, supported ZImagePipeline
│   └── DamagedFileError  one of its files is missing, cut short or unreadable
├── ManifestError         a version's manifest is missing, unreadable or of another format
│   └── StaleEngineError  an engine was built from, with or for something else than what is here
├── BuildError            a backend could not build or check an engine
│   ├── PlanError         a TensorRT plan cannot be loaded or run
│   └── ParityError       an engine's output differs from eager by more than its tolerance
└── VersionExistsError    the version to be written is already there
"""

from pathlib import Path


class ExportError(Exception):
    """Base of everything the export stage raises on purpose."""


class UnsupportedError(ExportError):
    """What was asked for cannot be built, here or at all; the message says what can."""


class ArgumentsError(UnsupportedError):
    """The arguments do not fit each other, or the checkpoint, whatever the machine; the message says what does."""


class ResourcesError(ExportError):
    """Too little disk or memory for what was asked; the message has the figures."""


class SourceError(ExportError):
    """A hub does not have the checkpoint, or cannot be reached."""


class CheckpointError(ExportError):
    """The checkpoint folder is not a whole, supported ZImagePipeline."""


class DamagedFileError(CheckpointError):
    """A file of the checkpoint is missing, cut short or unreadable."""

    def __init__(self, path: Path, problem: str, remedy: str = "download this file again") -> None:
        super().__init__(f"{path} {problem}; {remedy}")
        self.path, self.problem = path, problem


class ManifestError(ExportError):
    """A version's manifest is missing, unreadable or of another format."""


class StaleEngineError(ManifestError):
    """An engine was built from, with or for something else than what is here; the message names the rebuild."""


class BuildError(ExportError):
    """A backend could not build or check an engine."""


class PlanError(BuildError):
    """A TensorRT plan cannot be loaded or run; the message has TensorRT's own words."""


class ParityError(BuildError):
    """An engine's output differs from eager by more than its tolerance."""


class VersionExistsError(ExportError):
    """The version to be written is already in the repository."""
