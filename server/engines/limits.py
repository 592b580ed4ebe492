"""The shapes an engine with dynamic dimensions was built for."""

from dataclasses import dataclass

from export.manifest import Manifest
from export.spec import PIXELS_PER_LATENT, ComponentSpec, Dim
from server.engines.base import Shapes


@dataclass(frozen=True)
class ShapeLimits:
    """The largest batch and image a version's engines take."""

    spec: ComponentSpec
    max_rows: int
    max_latent: int

    @classmethod
    def of(cls, spec: ComponentSpec, manifest: Manifest) -> "ShapeLimits":
        """The limits that `manifest`'s engines were exported with; guidance doubles the rows of a batch."""
        return cls(spec, 2 * manifest.max_batch, manifest.max_size // PIXELS_PER_LATENT)

    def fit(self, shapes: Shapes) -> bool:
        """Whether inputs of these shapes are within the limits."""
        largest = {
            Dim.BATCH: self.max_rows,
            Dim.LATENT_HEIGHT: self.max_latent,
            Dim.LATENT_WIDTH: self.max_latent,
        }
        return all(
            size <= largest.get(dim, size) if isinstance(dim, Dim) else size == dim
            for tensor in self.spec.inputs
            for dim, size in zip(tensor.dims, shapes[tensor.name], strict=True)
        )
