"""3×3 convolutions: the direct sums in float64, derivatives, layouts, threads."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gan3d import ops
from gan3d.ops import extension
from gan3d.ops.conv3x3 import conv3x3, upconv3x3
from gan3d.ops.reference.conv3x3 import upconv3x3 as direct_upconv3x3

# odd sides, a single row, several pictures, one and several blocks of tiles, panels one by one and all at once
SIZES = [(1, 64, 128, 8, 8), (2, 128, 64, 7, 9), (3, 64, 64, 1, 31), (1, 64, 64, 33, 2), (1, 64, 64, 47, 46),
         (2, 128, 128, 40, 39), (1, 64, 64, 3, 300)]
needs_compiler = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")


def pictures(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def whole(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def transposed(x: Tensor, weight: Tensor) -> Tensor:
    return conv3x3(x, weight, True)


CODES: dict[str, tuple[Callable, Callable]] = {
    "conv3x3": (conv3x3, lambda x, weight: F.conv2d(x, weight, padding=1)),
    "transposed": (transposed, lambda x, weight: F.conv_transpose2d(x, weight, padding=1)),
    "upconv3x3": (upconv3x3, direct_upconv3x3)}


def arguments(name: str, b: int, c: int, o: int, h: int, w: int, make: Callable = pictures) -> tuple[Tensor, Tensor]:
    return make(b, o if name == "transposed" else c, h, w), make(o, c, 3, 3, seed=1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CODES)
def test_is_as_exact_as_the_direct_sum(name: str, size: tuple) -> None:
    """The error against float64 may be 3 times that of PyTorch's float32, root mean square.

    It measures 0.6 to 2.4 times: most where PyTorch has few channels and adds them up in several sums.
    """
    code, plain = CODES[name]
    x, weight = arguments(name, *size)
    exact = plain(x.double(), weight.double())
    result = code(x, weight)
    assert result.shape == exact.shape
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    error, usual = ((y.double() - exact).square().mean().sqrt() for y in (result, plain(x, weight)))
    assert error <= 3 * usual


@pytest.mark.parametrize("name", CODES)
def test_whole_numbers_come_out_exactly(name: str) -> None:
    """Sums stay below 2^24, and 16 times a weight is not halved or filtered into fractions: no rounding at all."""
    code, plain = CODES[name]
    x, weight = arguments(name, 2, 64, 128, 21, 20, whole)
    assert torch.equal(code(x, 16 * weight), plain(x.double(), 16 * weight.double()).float())


def test_upconvolution_is_an_upsampling_followed_by_a_true_convolution() -> None:
    """Away from the edges, where zeros come in at different places."""
    x, weight = whole(1, 64, 9, 8).double(), whole(64, 64, 3, 3, seed=1).double()
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 4
    up = F.conv_transpose2d(x, (taps[:, None] * taps).expand(64, 1, 4, 4), stride=2, padding=1, groups=64)
    turned = F.conv2d(up, weight.flip(2, 3), padding=1)
    result = upconv3x3(x.float(), weight.float()).double()
    assert torch.equal(result[..., 2:-2, 2:-2], turned[..., 2:-2, 2:-2])


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("size", [(2, 64, 128, 9, 10), (1, 64, 64, 40, 41)])
def test_derivatives_are_those_of_the_direct_sum(name: str, size: tuple) -> None:
    """First and second, by x and weight. Tolerances: some roundings of sums of up to 3,000 numbers near 1."""
    code, plain = CODES[name]

    def derivatives(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        x, weight = (t.to(dtype).requires_grad_(True) for t in arguments(name, *size))
        y = function(x, weight / 24)
        first = torch.autograd.grad(y, [x, weight], torch.ones_like(y) + y.detach(), create_graph=True)
        second = torch.autograd.grad(sum(g.square().mean() for g in first), [x, weight])
        return [t.detach() for t in (y, *first, *second)]

    for ours, theirs in zip(derivatives(code, torch.float32), derivatives(plain, torch.float64), strict=True):
        scale = theirs.square().mean().sqrt()
        torch.testing.assert_close((ours / scale).double(), theirs / scale, atol=2e-5, rtol=0)


@needs_compiler
@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("size", [(2, 64, 128, 9, 10), (1, 64, 128, 50, 51)])
def test_bits_do_not_depend_on_threads_layout_or_the_rest_of_the_batch(name: str, size: tuple) -> None:
    code, _ = CODES[name]
    x, weight = arguments(name, *size)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(code(x, weight))
    finally:
        torch.set_num_threads(threads)
    results.append(code(x.contiguous(), weight.contiguous()))
    results.append(code(torch.cat([x, x]), weight)[-len(x):])
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("name", CODES)
def test_other_types_sizes_and_empty_batches_work(name: str) -> None:
    code, plain = CODES[name]
    for size in [(1, 3, 5, 6, 7), (1, 64, 64, 2, 2), (1, 64, 32, 16, 16), (1, 65, 64, 16, 16)]:
        x, weight = arguments(name, *size)
        torch.testing.assert_close(code(x, weight), plain(x, weight), atol=1e-4, rtol=0)  # sums of 600 numbers near 1
    x, weight = arguments(name, 1, 64, 64, 8, 8)
    assert torch.equal(code(x.double(), weight.double()), plain(x.double(), weight.double()))
    empty, weight = arguments(name, 0, 64, 64, 8, 8)
    assert code(empty, weight).shape == plain(empty, weight).shape


def test_mixed_precision_is_pytorchs() -> None:
    x, weight = pictures(1, 64, 8, 8), pictures(64, 64, 3, 3, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(x, weight).dtype == upconv3x3(x.bfloat16(), weight).dtype == torch.bfloat16


@needs_compiler
def test_ops_are_well_behaved() -> None:
    x, weight = (t.requires_grad_(True) for t in arguments("conv3x3", 1, 64, 64, 8, 8))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for op, extra in ((torch.ops.gan3d.conv3x3, (False,)), (torch.ops.gan3d.conv3x3, (True,)),
                      (torch.ops.gan3d.upconv3x3, ())):
        # autograd must meet float32's noise: sums of 576 numbers near 1
        torch.library.opcheck(op, (x, weight, *extra), test_utils=checks, atol=2e-4, rtol=1e-4)


GRAPH = """
import torch
from gan3d.ops.conv3x3 import conv3x3, upconv3x3

def both(x, weight):
    return upconv3x3(conv3x3(x, weight), weight).square().sum()

random = torch.Generator().manual_seed(0)
x, weight = (torch.randn(*shape, generator=random).requires_grad_() for shape in ((1, 64, 8, 8), (64, 64, 3, 3)))
compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
for a, b in zip(*(torch.autograd.grad(f(x, weight), (x, weight)) for f in (both, compiled)), strict=True):
    assert torch.equal(a, b)
"""


@needs_compiler
def test_compiles_as_one_graph() -> None:
    # By itself: the tracer does not follow the checks of shapes that these tests switch on.
    done = subprocess.run([sys.executable, "-c", GRAPH], cwd=extension.CSRC.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_flops_are_those_of_the_direct_sum() -> None:
    for name, (code, plain) in CODES.items():
        x, weight = arguments(name, 2, 64, 128, 8, 10)
        counts = []
        for function in (code, plain):
            with FlopCounterMode(display=False) as counter:
                function(x, weight)
            counts.append(counter.get_total_flops())
        if name == "upconv3x3":  # PyTorch filters the 17 × 21 places the transposed convolution makes into 16 × 20
            assert counts[0] == pytest.approx(counts[1], rel=1e-12)
        else:
            assert counts[0] == counts[1]


@pytest.mark.parametrize("code", [conv3x3, upconv3x3])
def test_bad_arguments_are_refused(code: Callable) -> None:
    x = pictures(1, 64, 8, 8)
    with pytest.raises((ValueError, TypeError), match="takes|weight"):  # TypeError: where jaxtyping checks first
        code(x, pictures(64, 128, 3, 3))
    with pytest.raises(TypeError, match="float64"):
        code(x, pictures(64, 64, 3, 3).double())
    with pytest.raises((ValueError, TypeError), match="weight"):
        code(x, pictures(64, 64, 1, 1))


@needs_compiler
def test_the_op_itself_names_what_is_wrong() -> None:
    x, weight = pictures(1, 64, 8, 8), pictures(64, 64, 3, 3)
    with pytest.raises((ValueError, RuntimeError), match="x must have four axes, channels-last"):
        torch.ops.gan3d.conv3x3(x.contiguous(), weight, False)
    with pytest.raises((ValueError, RuntimeError), match="weight must be .* multiples of 64"):
        torch.ops.gan3d.upconv3x3(x, pictures(32, 64, 3, 3))
    with pytest.raises((ValueError, RuntimeError), match="x must have 128 channels, got 64"):
        torch.ops.gan3d.conv3x3(x, pictures(64, 128, 3, 3), False)
    with pytest.raises((TypeError, RuntimeError), match="x must be .*[Ff]loat"):
        torch.ops.gan3d.conv3x3(x.double(), weight, False)
