"""The CUDA sources, executed: compiled by the C++ compiler with a stand-in for cuda.cuh that runs the threads of a
kernel one after the other, and compared with the CPU ops. What this cannot show is a GPU's memory and scheduling.
"""

import shutil
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gan3d import ops
from gan3d.ops import extension

pytestmark = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> list[torch.library.Library]:
    """Loads the CUDA sources as `torch.ops.gan3d_emulated`, under the schemas of `torch.ops.gan3d`."""
    from torch.utils import cpp_extension

    folder = tmp_path_factory.mktemp("emulated")
    for path in [*extension.CSRC.glob("*.h"), *extension.CSRC.glob("*.cuh")]:
        shutil.copy(path, folder)
    shutil.copy(Path(__file__).with_name("emulated_cuda.cuh"), folder / "cuda.cuh")
    (folder / "emulated.cpp").write_text((extension.CSRC / "ops.cu").read_text())
    library = torch.library.Library("gan3d_emulated", "DEF")
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("gan3d::"):
            library.define(str(schema).removeprefix("gan3d::"))
    cpp_extension.load("emulated", [str(folder / "emulated.cpp")], extra_cflags=["-O1", "-ffp-contract=off"],
                       build_directory=str(folder), is_python_module=False)
    return [library]


class Both(TorchDispatchMode):
    """Runs every compiled op a second time, through its CUDA source, and compares."""

    def __init__(self, tolerance: float) -> None:
        super().__init__()
        self.tolerance = tolerance
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func.namespace != "gan3d":
            return func(*args, **kwargs)
        twin = getattr(torch.ops.gan3d_emulated, func._schema.name.split("::")[1]).default
        copies = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (args, kwargs))
        out, again = func(*args, **kwargs), twin(*copies[0], **copies[1])
        self.seen.add(func._schema.name)
        for a, b in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
            largest = float(a.abs().max()) if a.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=self.tolerance * max(1.0, largest))
        return out


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pull(*outputs: torch.Tensor) -> None:
    """A backward pass through random gradients."""
    torch.autograd.backward(outputs, [random(*o.shape, seed=i) for i, o in enumerate(outputs)])


def call_sh() -> None:
    pull(ops.sh(random(33, 3).requires_grad_(True), 4))


@pytest.mark.parametrize("call, names", [
    (call_sh, {"sh", "sh_backward"}),
])
def test_cuda_source_computes_what_the_cpu_op_does(emulated: list, call, names: set[str]) -> None:
    with Both(1e-12) as both:  # sums of a few hundred terms in another order
        call()
    assert {f"gan3d::{name}" for name in names} <= both.seen
