import torch

from benchmarks.cases import Case
from gan3d import ops
from gan3d.ops import reference


def cases() -> list[Case]:
    n = 1 << 18

    def inputs() -> tuple:
        d = torch.nn.functional.normalize(torch.randn(n, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
        return d.requires_grad_(True), 3

    # 3 numbers in, 16 out; and back
    return [Case("sh", "2^18 directions, degree 3", ops.sh, reference.sh, inputs, n * 19 * 4, n * 22 * 4)]
