"""3D-aware GANs, one paper, one file. What they agree on is the `Generator` protocol; no base class."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from gan3d.cameras import Camera
from gan3d.cost import Cost
from gan3d.nn.discriminators import Verdict
from gan3d.rays import Patch
from gan3d.rendering import Field
from gan3d.volume import Rendering


@dataclass(frozen=True)
class Images:
    """What a generator shows. rgb and raw lie in [−1, 1] (StyleNeRF's, which are linear, may leave it a little); raw is
    the image before the upsampler (rgb where none)."""

    rgb: Float[Tensor, "b 3 h w"]
    raw: Float[Tensor, "b 3 hr wr"]
    depth: Float[Tensor, "b hr wr"]  # Σ weight·t along the ray, scene units
    opacity: Float[Tensor, "b hr wr"]


def as_pictures(seen: Rendering, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """rgb, in [−1, 1], depth and opacity of side × side rays, row by row, that saw rgb in [0, 1]."""
    square = (side, side)
    return (2 * seen.features.mT.unflatten(-1, square) - 1, seen.depth.unflatten(-1, square),
            seen.opacity.unflatten(-1, square))


@runtime_checkable
class Generator(Protocol):
    """z → mapping → ws; ws and a camera → synthesis → Images. An nn.Module with these methods."""

    z_dim: int

    def mapping(self, z: Tensor, camera_condition: Camera | None = None, truncation_psi: float = 1.0) -> Tensor:
        """Latents `[b z_dim]` to `ws`; truncation moves them towards their mean."""
        ...

    def field(self, ws: Any) -> Field:
        """The object itself: density and colour anywhere, with the latents bound."""
        ...

    def prepare(self, ws: Tensor) -> Any:
        """All of an identity that does not depend on the camera (planes, voxels; ws itself where there is nothing).

        `field` and `synthesis` take it in the place of ws, so that a second view costs only the rendering.
        """
        ...

    def synthesis(self, ws: Any, camera: Camera, resolution: int, patch: Patch | None = None) -> Images:
        """Pictures of side `resolution`, or of the patch's pixels of such a picture. Random only in training mode."""
        ...

    def regularizers(self, ready: Any, camera: Camera, images: Images, step: int) -> dict[str, Tensor]:
        """Extra losses of this paper, already weighted; usually none. `images` were just drawn from `ready`, which
        `prepare` made, through `camera`."""
        ...

    def before_step(self, step: int) -> None:
        """Set what the paper schedules inside the generator (density noise, sampling interval …)."""
        ...

    def cost(self, resolution: int) -> Cost:
        """H×W × K × L of one frame, counted."""
        ...


@runtime_checkable
class Discriminator(Protocol):
    """Images `[b 3 h w]` in [−1, 1] → Verdict. `fade` in [0, 1] blends a new resolution in.

    `raw`: the image before the upsampler `[b 3 hr wr]`, for those that judge both (EG3D); handed over if model.dual.
    One that must be told the camera of every photograph says so by `needs_camera = True`.
    """

    def __call__(self, images: Tensor, fade: float = 1.0, camera: Camera | None = None, raw: Tensor | None = None
                 ) -> Verdict: ...
