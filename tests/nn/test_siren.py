"""FiLM-SIREN against reference numbers of the released pi-GAN, and the blocked sine stack against its equation."""

import math

import pytest
import torch

from gan3d.nn import parallel, siren
from gan3d.nn.siren import FiLMSiren, MappingNetwork, sine_stack, sine_stack_reference
from gan3d.official.pigan import OFFICIAL_ORDER, official_generator

CELEBA = [(0.5040391, 0.5079233, 0.5023923, 0.0131401), (0.5185838, 0.5078750, 0.5081204, 0.0141987)]
CARLA = [(0.5257360, 0.5150365, 0.5023942, 0.0345425), (0.5056621, 0.5056921, 0.5140482, 0.0068301)]


def pattern(n: int, j: int) -> torch.Tensor:
    """A reproducible fill: 2·frac(43758.5453·sin(12.9898·i + 78.233·j)) − 1."""
    wave = 43758.5453 * torch.sin(12.9898 * torch.arange(n, dtype=torch.float64) + 78.233 * j)
    return 2 * (wave - wave.floor()) - 1


def released_weights() -> dict[str, torch.Tensor]:
    """The released generator's tensors, filled by the pattern."""
    width, shapes = 256, {}
    for name in OFFICIAL_ORDER:
        rows = {"final_layer": 1, "color_layer_linear": 3}.get(name.split(".")[1], width)
        rows = 4608 if ".network.6." in name and "mapping" in name else rows
        columns = {"siren.network.0.layer": 3, "siren.color_layer_sine.layer": 259}.get(name.rpartition(".")[0], width)
        shapes[name] = (rows,) if name.endswith("bias") else (rows, columns)
    filled = {}
    for j, (name, shape) in enumerate(shapes.items()):
        scale = 0.05 if name.endswith("bias") else 0.1 / shape[-1] ** 0.5
        scale = 0.3 if name == "siren.network.0.layer.weight" else scale
        scale = 1 / shape[-1] ** 0.5 if "mapping" in name and name.endswith("weight") else scale
        filled[name] = scale * pattern(math.prod(shape), j).view(shape)
    return filled


def part(weights: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def weights():
    return official_generator(released_weights())


@pytest.fixture(scope="module")
def mapping(weights):
    network = MappingNetwork(z_dim=256, mapping_width=256, mapping_depth=3, outputs=4608).double()
    network.load_state_dict(part(weights, "mapping_network."))
    return network


@pytest.mark.smoke
def test_mapping_gives_the_released_frequencies_and_phases(mapping):
    ws = mapping(pattern(256, 100)[None])[0]
    assert torch.allclose(ws[:3], torch.tensor([0.0193103, 0.0122959, 0.0215193]).double(), atol=1e-7)  # 7 digits given
    assert torch.allclose(ws[2304:2307], torch.tensor([0.0449124, -0.0317312, -0.0020853]).double(), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("point_scale, expected", [(2 / 0.24, CELEBA), (1.0, CARLA)])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_field_gives_the_released_colours_and_densities(weights, mapping, dtype, point_scale, expected, needs_gradient):
    network = FiLMSiren(width=256, depth=8, point_scale=point_scale).to(dtype)
    network.load_state_dict(part(weights, "siren."))
    points = torch.tensor([[0.03, -0.02, 0.05], [-0.04, 0.06, 0.01]], dtype=dtype)[None, :, None]
    directions = torch.tensor([[0.0, 0.0, -1.0], [0.6, 0.0, -0.8]], dtype=dtype)[None, :, None]
    with torch.set_grad_enabled(needs_gradient):
        raw_density, rgb = network(points, directions, mapping(pattern(256, 100)[None]).detach())
    found = torch.cat([rgb, raw_density[..., None]], -1)[0, :, 0].double()
    tolerance = 1e-7 if dtype == torch.float64 else 1e-6  # seven digits are given; float32 sees arguments near 30
    assert torch.allclose(found, torch.tensor(expected).double(), atol=tolerance)


def test_direction_is_shared_by_the_samples_of_a_ray():
    torch.manual_seed(0)
    network = FiLMSiren(width=16, depth=2, point_scale=1.0)
    points, directions = torch.randn(2, 5, 3, 3), torch.nn.functional.normalize(torch.randn(2, 5, 1, 3), dim=-1)
    ws = torch.randn(2, network.num_modulations)
    together = network(points, directions, ws)
    apart = [network(points[:, :, j:j + 1], directions, ws) for j in range(3)]
    assert torch.allclose(together[0], torch.cat([a[0] for a in apart], 2), atol=1e-6)
    assert torch.allclose(together[1], torch.cat([a[1] for a in apart], 2), atol=1e-6)


def stack_arguments(dtype=torch.float64, b=2, n=5, s=3, w=4, layers=3, scale=1.0):
    torch.manual_seed(0)
    shapes = [(b, w, 3), (b, layers, w, w), (b, layers, w), (b, n, w), (2, 4, w)]
    points = torch.randn(b, n, s, 3, dtype=dtype)
    return [points] + [(scale * torch.randn(shape, dtype=dtype)).requires_grad_() for shape in shapes]


@pytest.mark.smoke
@pytest.mark.parametrize("kept", [0, 0.5, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block, threads", [(1, 1), (4, 3), (7, 1), (1000, 3)])
def test_blocked_stack_and_its_gradients_equal_the_equation(monkeypatch, block, threads, masked, kept):
    arguments, read = stack_arguments(), (1, 3)
    points, width = arguments[0], arguments[2].shape[-1]
    size = points.element_size() * width
    monkeypatch.setitem(parallel.BLOCK_BYTES, "cpu", block * size)
    monkeypatch.setitem(siren.KEPT_BYTES, "cpu", int(kept * points[..., 0].numel() * 4 * size))
    monkeypatch.setattr(parallel, "THREADS", threads)
    active = torch.rand(points.shape[:-1], generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    points.requires_grad_()
    expected = sine_stack_reference(*arguments, read, active)
    found = sine_stack(*arguments, read, active)
    assert torch.allclose(found, expected, atol=1e-13)  # float64: the same sums in another order
    assert torch.allclose(sine_stack(*[a.detach() for a in arguments], read, active), expected, atol=1e-13)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad(value, arguments, weight) for value in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    if masked:
        assert (found[~active] == 0).all() and (gradients[0][0][~active] == 0).all()


def test_points_that_are_not_active_are_not_even_looked_at():
    points, *rest = stack_arguments()
    active = torch.zeros(points.shape[:-1], dtype=torch.bool)
    active[0, 2, 1] = True
    points[~active] = torch.nan
    out = sine_stack(points, *rest, (1, 3), active)
    assert out.isfinite().all() and (out[active] != 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), rest))


def test_what_is_remembered_keeps_to_its_budget(monkeypatch):
    arguments = stack_arguments()
    monkeypatch.setitem(parallel.BLOCK_BYTES, "cpu", 8 * 4 * 2)  # two points a block
    for budget in (0, 1000, 10**9):
        monkeypatch.setitem(siren.KEPT_BYTES, "cpu", budget)
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            sine_stack(*arguments, (1, 3))
        kept = sum(t.numel() * 8 for t in saved[6:])  # after the six arguments
        assert kept <= budget and kept >= min(budget - 256, 30 * 4 * 4 * 8)  # a block of four layers is 256 bytes


def test_stack_passes_gradcheck_and_gradgradcheck():
    points, *rest = stack_arguments(b=1, n=2, s=2, w=3, layers=2, scale=0.5)
    points.requires_grad_()
    active = torch.tensor([[[True, True], [False, True]]])

    def run(*a):
        return sine_stack(*a, (0, 2), active)

    assert torch.autograd.gradcheck(run, (points, *rest))
    assert torch.autograd.gradgradcheck(run, (points, *rest))


def test_float32_blocks_stay_close_to_float64_at_large_arguments():
    torch.manual_seed(0)
    network = FiLMSiren(width=256, depth=8, point_scale=2 / 0.24)
    ws = 0.2 * torch.randn(1, network.num_modulations)
    points = 0.24 * torch.rand(1, 50, 6, 3) - 0.12
    directions = torch.nn.functional.normalize(torch.randn(1, 50, 1, 3), dim=-1)
    with torch.no_grad():
        found = network(points, directions, ws)
        exact = network.double()(points.double(), directions.double(), ws.double())
    for a, b in zip(found, exact, strict=True):  # arguments of tens of radians lose about 1e-6 of a radian each layer
        assert (a - b).abs().max() < 1e-5


def test_stack_without_points_is_empty():
    points, *rest = stack_arguments(n=1)
    rest[3] = rest[3][:, :0]
    out = sine_stack(points[:, :0], *rest, (1, 3))
    assert out.shape == (2, 0, 3, 4)
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), rest[:3]))


def test_autocast_leaves_the_field_in_full_precision():
    torch.manual_seed(0)
    network = FiLMSiren(width=16, depth=2, point_scale=1.0)
    points, directions = torch.randn(1, 4, 2, 3), torch.randn(1, 4, 1, 3)
    ws = torch.randn(1, network.num_modulations)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(points, directions, ws)
    expected = network(points, directions, ws)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_mean_of_the_mapping_is_the_mean_of_its_outputs():
    network = MappingNetwork(z_dim=8, mapping_width=16, mapping_depth=3, outputs=20)
    mean = network.mean(500, torch.Generator().manual_seed(3))
    z = torch.randn(500, 8, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(mean, network(z).mean(0, keepdim=True), atol=1e-6)
    assert torch.equal(mean, network.mean(500, torch.Generator().manual_seed(3)))


def test_initial_spread_is_that_of_the_released_code():
    torch.manual_seed(0)
    network = FiLMSiren(width=256, depth=8, point_scale=1.0)
    bound = (6 / 256) ** 0.5 / 25
    assert network.layers[0].weight.abs().max() <= 1 / 3 and network.layers[0].weight.abs().max() > 0.32
    for layer in (*network.layers[1:], network.density_head, network.colour_head):
        assert 0.95 * bound < layer.weight.abs().max() <= bound
    mapping = MappingNetwork(z_dim=256, mapping_width=256, mapping_depth=3, outputs=network.num_modulations)
    raw = mapping(torch.randn(64, 256))[:, :2304].abs().mean()
    assert 0.22 < raw < 0.34  # the released code: 0.26 to 0.30, by seed
