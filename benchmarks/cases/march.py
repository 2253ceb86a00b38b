import math

import torch
from torch import Tensor

from benchmarks.cases import Case
from gan3d.ops.cells import cell_position
from gan3d.ops.march import march, ray_aabb
from gan3d.ops.occupancy import pack_bits, update_occupancy
from gan3d.ops.reference.march import march as reference_march
from gan3d.ops.reference.occupancy import pack_bits as reference_pack_bits
from gan3d.ops.reference.occupancy import update_occupancy as reference_update_occupancy

RESOLUTION = (128, 128, 128)
CELLS = 128**3
STEP = 2 * math.sqrt(3) / 1024  # 1024 steps along the diagonal of the box


def shell() -> Tensor:
    """5 % of the cells: those nearest to a wavy closed surface, as a trained scene has them."""
    p = (cell_position(torch.arange(CELLS), RESOLUTION) + 0.5) / 64 - 1
    surface = 0.62 + 0.08 * torch.sin(5 * p[:, 0]) * torch.sin(4 * p[:, 1] + 1) * torch.cos(6 * p[:, 2])
    near = -(p.norm(dim=-1) - surface).abs()
    return pack_bits(near, near.kthvalue(CELLS * 95 // 100).values)


def scattered() -> Tensor:
    """5 % of the cells, anywhere: no block is empty."""
    return pack_bits(torch.rand(CELLS, generator=torch.Generator().manual_seed(0)), 0.95)


def rays(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From 64 cameras around the box [−1, 1]³ towards its middle, as a training batch has them."""
    random = torch.Generator().manual_seed(1)
    eyes = 2.5 * torch.nn.functional.normalize(torch.randn(64, 3, generator=random), dim=-1)
    o = eyes.repeat_interleave(n // 64, 0)
    d = torch.nn.functional.normalize(0.5 * torch.randn(n, 3, generator=random) - o, dim=-1)
    near, far = ray_aabb(o, d, torch.tensor([[[-1.0] * 3, [1.0] * 3]]))
    return o, d, near[:, 0], far[:, 0]


def marches(words: Tensor) -> tuple:
    box = torch.tensor([[-1.0] * 3, [1.0] * 3])
    return *rays(1 << 16), words[None], box, RESOLUTION, STEP, 0.0, math.inf, 1024, 0, 0


def native_march(*inputs) -> tuple[Tensor, ...]:
    return march(*inputs[:-2], ("none", "ray", "sample")[inputs[-2]], inputs[-1])


def update_inputs() -> tuple:
    random = torch.Generator().manual_seed(2)
    values = torch.rand(CELLS, generator=random)
    index = torch.randint(CELLS, (CELLS // 2,), generator=random)
    return values, index, torch.rand(CELLS // 2, generator=random), 0.95, True


def cases() -> list[Case]:
    n, found = 1 << 16, []
    for name, words in (("a shell", shell()), ("scattered", scattered())):
        samples = len(native_march(*marches(words)).t)
        # in: 8 numbers a ray, the bits once; out: an offset a ray, 3 numbers a sample; work: t and cell of the samples
        moved, flops = 4 * (9 * n + 3 * samples) + CELLS // 8, 18 * samples
        found.append(Case("march", f"2^16 rays, 128³, 5 % {name}", native_march, reference_march,
                          lambda words=words: marches(words), moved, 0.0, flops, goal=20))
    values = torch.rand(CELLS, generator=torch.Generator().manual_seed(0))
    found.append(Case("pack_bits", "128³", pack_bits, reference_pack_bits, lambda: (values, torch.tensor(0.5)),
                      CELLS * 4 + CELLS / 8))
    # every cell in and out; 8 bytes of index and a new value for each cell asked
    found.append(Case("update_occupancy", "128³, half of it asked", update_occupancy, reference_update_occupancy,
                      update_inputs, CELLS * 8 + CELLS / 2 * 12))
    return found
