"""Augmentation: closed forms of each transform, the release's numbers, derivatives, and the controller."""

import math

import pytest
import torch
import torch.nn.functional as F

from gan3d import augmentation
from gan3d.augmentation import Augment, colours, recolour, resize, rotation, turn, warp

OFF = dict(p=1, p_max=1, target=None, speed_kimg=500, every=4, flip=False, rotate90=False, shift=0, scale=0, stretch=0,
           rotate=0, fractional_shift=0, brightness=0, contrast=0, luma_flip=False, hue=0, saturation=0)
GEOMETRY = dict(flip=True, rotate90=True, shift=0.125, scale=0.2, stretch=0.2, rotate=180, fractional_shift=0.125)
COLOURS = dict(brightness=0.2, contrast=0.5, luma_flip=True, hue=180, saturation=1)
EYE = torch.eye(2)[None]
ROUNDING = 2e-5  # of float32 through two filters of 12 taps and a bilinear one, for values of up to 4


def augment(**changes):
    return Augment(**{**OFF, **changes})


def noise(b=4, c=3, side=16, seed=0):
    return torch.randn(b, c, side, side, generator=torch.Generator().manual_seed(seed))


def positions(side):
    """x and y of the pixels, from the centre."""
    steps = torch.arange(side) - (side - 1) / 2
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([x, y])


@pytest.fixture
def script(monkeypatch):
    """Hands out these values, one list a transform in the paper's order, in the place of what is drawn."""
    def say(*values):
        queue = [torch.tensor(value, dtype=torch.float32) for value in values]
        monkeypatch.setattr(augmentation, "sometimes", lambda drawn, p: queue.pop(0).expand(drawn.shape).to(drawn))
    return say


# When, and how often


@pytest.mark.smoke
def test_at_probability_zero_pictures_come_back_untouched_and_nothing_is_drawn():
    images, raw = noise(), noise(side=8)
    before = torch.get_rng_state()
    pair = augment(p=0, **GEOMETRY, **COLOURS).pair(images, raw)
    assert augment(p=0, **GEOMETRY, **COLOURS)(images) is images and pair[0] is images and pair[1] is raw
    assert torch.equal(torch.get_rng_state(), before)


def test_with_every_strength_at_zero_pictures_stay_what_they_are():
    torch.testing.assert_close(augment()(noise()), noise(), atol=1e-6, rtol=0)  # the colour matrix is 1 up to rounding


@pytest.mark.parametrize("p", [0.2, 0.7, 1.0])
def test_each_transform_happens_with_probability_p(p):
    """Shares of 4000 pictures within four standard deviations. Flips and quarter turns may also draw "as it was"."""
    b = 4000
    tolerance = 4 * math.sqrt(p * (1 - p) / b) + 1e-9

    def geometry(**strength):
        linear, offset = augment(**strength).draw_warp(b, 64, p)
        return (linear != torch.eye(2)).flatten(1).any(1) | (offset != 0).any(1)

    def colour(**strength):
        matrix, offset = augment(**strength).draw_colours(b, p)
        return ((matrix - torch.eye(3)).abs().flatten(1).amax(1) > 1e-6) | (offset != 0)

    torch.manual_seed(1)
    changed = [geometry(scale=0.2), geometry(stretch=0.2), geometry(rotate=180), geometry(fractional_shift=0.1),
               colour(brightness=0.2), colour(contrast=0.5), colour(hue=180), colour(saturation=1)]
    for happened in changed:
        assert happened.float().mean().item() == pytest.approx(p, abs=tolerance)
    flips, quarters = augment(flip=True, rotate90=True).draw_turns(b, p)
    luma = augment(luma_flip=True).draw_colours(b, p)[0].sum((1, 2)) < 0
    for happened, share in ((flips == 1, p / 2), (luma, p / 2), *((quarters == k, p / 4) for k in (1, 2, 3))):
        assert happened.float().mean().item() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / b))


def test_strengths_are_limits_and_standard_deviations():
    """Of 4000 draws; a standard deviation is then known to 1.1 %, and 5 % is more than four times that."""
    torch.manual_seed(2)
    b, side = 4000, 64
    scale = augment(scale=0.2).draw_warp(b, side, 1.0)[0]
    assert (-scale[:, 0, 0].log2()).std().item() == pytest.approx(0.2, rel=0.05)
    assert torch.equal(scale[:, 0, 0], scale[:, 1, 1])
    stretch = augment(stretch=0.3).draw_warp(b, side, 1.0)[0]
    assert (-stretch[:, 0, 0].log2()).std().item() == pytest.approx(0.3, rel=0.05)
    torch.testing.assert_close(stretch[:, 0, 0] * stretch[:, 1, 1], torch.ones(b))
    fraction = augment(fractional_shift=0.125).draw_warp(b, side, 1.0)[1]
    assert fraction.std(0).tolist() == pytest.approx([8, 8], rel=0.05)
    whole = augment(shift=0.125).draw_warp(b, side, 1.0)[1]
    assert torch.equal(whole, whole.round()) and whole.abs().amax(0).tolist() == [8, 8]
    brightness = augment(brightness=0.2).draw_colours(b, 1.0)[1]
    assert brightness.std().item() == pytest.approx(0.2, rel=0.05)
    contrast = augment(contrast=0.5).draw_colours(b, 1.0)[0]
    assert contrast[:, 0, 0].log2().std().item() == pytest.approx(0.5, rel=0.05)
    saturation = augment(saturation=1).draw_colours(b, 1.0)[0]
    assert (saturation[:, 0, 0] - saturation[:, 0, 1]).log2().std().item() == pytest.approx(1, rel=0.05)
    hue = augment(hue=30).draw_colours(b, 1.0)[0]
    angle = torch.acos(((hue.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1)).rad2deg()
    assert 29.5 < angle.max().item() < 30.01 and angle.mean().item() == pytest.approx(15, rel=0.05)


# Each transform alone


@pytest.mark.smoke
def test_a_flip_is_a_flip_and_a_quarter_turn_a_quarter_turn_to_the_bit():
    images = noise(b=4)
    assert torch.equal(turn(images, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 3])), torch.stack(
        [images[0], images[1].flip(-1), images[2].rot90(1, (1, 2)), images[3].flip(-1).rot90(3, (1, 2))]))


def test_a_quarter_turn_is_the_rotation_by_ninety_degrees():
    """The two paths agree on the centre and the sense, up to the filter's lopsidedness: a tenth of a pixel."""
    x, y = positions(32)
    smooth = torch.sin(0.2 * x + 0.1 * y)[None, None]
    turned = warp(smooth, rotation(torch.tensor([90.0])), torch.zeros(1, 2))
    slope = math.hypot(0.2, 0.1)
    torch.testing.assert_close(turned[..., 4:-4, 4:-4], smooth.rot90(1, (2, 3))[..., 4:-4, 4:-4], atol=0.1 * slope,
                               rtol=0)
    assert (turned - smooth.rot90(3, (2, 3))).abs().max() > 1


def test_whole_pixels_move_exactly_and_bring_the_reflection_in():
    images = noise(b=3)
    moved = warp(images, EYE.expand(3, 2, 2), torch.tensor([[2.0, -3.0], [0.0, 5.0], [-7.0, 0.0]]))
    framed = F.pad(images, [15] * 4, mode="reflect")
    wanted = [framed[i, :, 15 + dy:31 + dy, 15 + dx:31 + dx] for i, (dx, dy) in enumerate([(2, -3), (0, 5), (-7, 0)])]
    torch.testing.assert_close(moved, torch.stack(wanted), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("side", [33, 64])
@pytest.mark.parametrize(("degrees", "scale", "shift"), [(0, 1, (0.3, -1.6)), (30, 1, (0.0, 0.0)),
                                                         (0, 1.3, (0.0, 0.0)), (0, 0.7, (0.0, 0.0)),
                                                         (-110, 0.8, (1.2, 0.4))])
def test_a_smooth_wave_moves_as_its_equation_says(side, degrees, scale, shift):
    """Where no reflection is seen. The filter's centre of mass lies 0.049 pixels beside its middle, so the doubled
    picture lies so much aside, and what is halved goes back as much. What remains is the bilinear sampling of a wave
    half as short: |k|²/32."""
    k = torch.tensor([0.3, -0.2])
    linear, offset = rotation(torch.tensor([float(degrees)])) / scale, torch.tensor([shift])
    source = torch.einsum("ij,jyx->iyx", linear[0], positions(side)) + offset[0][:, None, None]
    wave = torch.sin(torch.einsum("i,iyx->yx", k, positions(side)))
    moved = warp(wave[None, None].expand(1, 3, -1, -1), linear, offset)[0]
    inside = (source.abs() < side / 2 - 7).all(0)
    assert inside.sum() > 100
    taps = torch.tensor(augmentation.TAPS)
    aside = ((taps * torch.arange(12)).sum() / taps.sum() - 5) / 2
    source = source + ((linear[0] - torch.eye(2)).sum(1) * aside)[:, None, None]
    wanted = torch.sin(torch.einsum("i,iyx->yx", k, source))[inside]
    torch.testing.assert_close(moved[:, inside], wanted.expand(3, -1), atol=k.square().sum().item() / 32 + 1e-4, rtol=0)


@pytest.mark.parametrize(("degrees", "scale"), [(0, 0.5), (0, 2.0), (45, 0.7), (45, 1.0)])
def test_an_even_picture_stays_even(degrees, scale):
    """Reflections reach as far as a shrunk and turned picture shows: no zeros come in (two pixels less: 2e-4)."""
    images = torch.full((1, 3, 32, 32), 0.7)
    moved = warp(images, rotation(torch.tensor([float(degrees)])) / scale, torch.zeros(1, 2))
    torch.testing.assert_close(moved, images, atol=2e-6, rtol=0)


def test_what_a_shrunk_picture_cannot_show_is_filtered_out():
    """Stripes of 2.2 pixels at half the size would be seen as false stripes of 11; plain sampling shows them."""
    stripes = torch.sin(2 * math.pi / 2.2 * positions(64)[0] + 0.4)[None, None]
    linear, offset = 2 * EYE, torch.full((1, 2), 0.5)  # the half puts every sample on a pixel
    grid = F.affine_grid(torch.cat([linear, offset[..., None] / 32], -1), [1, 1, 64, 64], align_corners=False)
    middle = (slice(None), slice(None), slice(20, 44), slice(20, 44))
    assert F.grid_sample(stripes, grid, align_corners=False)[middle].std() > 0.6
    assert warp(stripes.expand(1, 3, -1, -1), linear, offset)[middle].std() < 0.06


def test_brightness_adds_and_contrast_multiplies_about_zero():
    torch.manual_seed(3)
    images = noise(b=16)
    added = augment(brightness=0.2)(images) - images
    torch.testing.assert_close(added, added[:, :1, :1, :1].expand_as(added), atol=1e-6, rtol=0)
    assert added[:, 0, 0, 0].unique().numel() == 16
    factor = augment(contrast=0.5)(images) / images
    torch.testing.assert_close(factor, factor.flatten(1).median(1).values[:, None, None, None].expand_as(factor),
                               atol=0, rtol=1e-3)  # the other channels' rounding weighs where a channel is near zero
    assert factor.min() > 0


def test_luma_flip_changes_the_sign_of_luma_and_keeps_chroma():
    images = noise(b=32)
    torch.manual_seed(4)
    out = augment(luma_flip=True)(images)
    luma, chroma = images.mean(1, keepdim=True), images - images.mean(1, keepdim=True)
    sign = (out.mean(1, keepdim=True) / luma).flatten(1).median(1).values.round()
    torch.testing.assert_close(out, sign[:, None, None, None] * luma + chroma, atol=1e-6, rtol=1e-6)
    assert set(sign.tolist()) == {-1.0, 1.0}


def test_hue_keeps_luma_and_length_and_a_third_of_a_turn_swaps_channels():
    torch.manual_seed(5)
    images = noise(b=8)
    out = augment(hue=180)(images)
    torch.testing.assert_close(out.mean(1), images.mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.norm(dim=1), images.norm(dim=1), atol=1e-5, rtol=0)
    assert (out - images).abs().flatten(1).amax(1).min() > 0.01
    one = torch.ones(1)
    third = recolour(images[:1], colours(one, one, one * 2 * math.pi / 3), torch.zeros(1))
    torch.testing.assert_close(third, images[:1].roll(1, 1), atol=1e-6, rtol=0)


def test_saturation_scales_the_distance_from_grey():
    images = noise(b=8)
    grey = images.mean(1, keepdim=True)
    one = torch.ones(8)
    for factor in (0.0, 0.5, 3.0):
        out = recolour(images, colours(one, factor * one, 0 * one), 0 * one)
        torch.testing.assert_close(out, grey + factor * (images - grey), atol=1e-5, rtol=0)


# All together


def test_geometry_is_the_inverse_of_the_transforms_in_the_papers_order(script):
    """Homogeneous matrices, first to last: whole shift, scale, rotation, stretch, rotation, fractional shift."""
    def matrix(linear, offset=(0, 0)):
        return torch.cat([torch.cat([torch.as_tensor(linear), torch.tensor(offset)[:, None]], 1),
                          torch.tensor([[0.0, 0, 1]])])

    def turned(degrees):
        return matrix(rotation(torch.tensor([-float(degrees)]))[0])

    side, scale, stretch = 64, 2**(0.2 * 1.5), 2**(0.2 * -0.7)
    script([[0.5, -0.25]], [1.5], [0.4], [-0.7], [-0.1], [[0.3, -0.9]])
    linear, offset = augment(**GEOMETRY).draw_warp(1, side, 0.5)
    forward = torch.eye(3)
    for step in (matrix(torch.eye(2), (4.0, -2.0)), matrix(scale * torch.eye(2)), turned(0.4 * 180),
                 matrix(torch.diag(torch.tensor([stretch, 1 / stretch]))), turned(-0.1 * 180),
                 matrix(torch.eye(2), (0.3 * 8, -0.9 * 8))):
        forward = step @ forward
    torch.testing.assert_close(matrix(linear[0], offset[0].tolist()), torch.linalg.inv(forward), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("q", "wanted", "mean"), [
    (0.3, [0.281428, 0.229648, 0.264952, -0.858085, 0.333083, -0.069605, 0.229025, -0.071234, -1.186999, 0.267222,
           -0.132802, -1.061825], -0.138939),
    (0.7, [-1.590783, 0.800126, 1.428055, 1.389673, -1.096267, -1.079998, 1.103529, -1.406016, 0.094325, 0.35221,
           1.072671, -0.106082], -0.127395)])
def test_fixed_transforms_give_the_numbers_of_the_released_pipe(script, q, wanted, mean):
    """Run with debug_percentile q, all of bgc but flips and quarter turns; it draws erfinv(2q − 1) for a normal number
    and leaves out the second rotation."""
    even, normal = 2 * q - 1, torch.erfinv(torch.tensor(2 * q - 1)).item()
    script([0], [0], [[even, even]], [normal], [even], [normal], [0], [[normal, normal]],
           [normal], [normal], [math.floor(2 * q)], [even], [normal])
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    images = torch.stack([torch.sin(0.3 * (c + 1) * x + 0.2 * y) for c in range(3)])[None]
    out = augment(**GEOMETRY, **COLOURS)(images)
    seen = out[0][:, [0, 5, 8, 15], [0, 3, 9, 14]].T.flatten()
    torch.testing.assert_close(seen, torch.tensor(wanted), atol=ROUNDING, rtol=0)
    assert out.mean().item() == pytest.approx(mean, abs=2e-6)


@pytest.mark.parametrize("side", [8, 9, 31, 64])
def test_any_square_size_is_augmented_alike_for_the_same_seed(side):
    images = noise(b=6, side=side)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(p=0.6, **GEOMETRY, **COLOURS)(images))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert results[0].shape == images.shape and results[0].isfinite().all()


def test_a_picture_and_its_raw_image_are_changed_alike():
    """Exactly where they are of one size. Else the raw image is what the picture becomes, made smaller; this picture
    is so smooth that making it larger in between costs 0.12 at most, where another geometry would be 0.7 off."""
    images = resize(noise(b=6, side=3), 48)
    everything = augment(**GEOMETRY, **COLOURS)
    torch.manual_seed(7)
    out, out_raw = everything.pair(images, images)
    assert torch.equal(out, out_raw) and (out - images).abs().flatten(1).amax(1).min() > 0.2
    torch.manual_seed(7)
    alone, nothing = everything.pair(images, None)
    torch.testing.assert_close(alone, out, atol=ROUNDING, rtol=0)
    assert nothing is None
    out, out_raw = augment(**GEOMETRY).pair(images, resize(images, 24))
    assert out_raw.shape == (6, 3, 24, 24)
    torch.testing.assert_close(out_raw, resize(out, 24), atol=0.2, rtol=0)


# Derivatives


@pytest.mark.smoke
def test_first_and_second_derivatives_are_right():
    module = augment(**GEOMETRY, **COLOURS)

    def f(images):
        torch.manual_seed(8)
        return module(images)

    images = noise(b=2, side=8).double().requires_grad_()
    assert torch.autograd.gradcheck(f, images, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: f(x).square(), images, fast_mode=True)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_gradient_penalty_reaches_the_discriminator_through_it(autocast):
    """D = w·sum(a(x)²) with a affine: doubling w doubles ∂D/∂x, so that ∂penalty/∂w = 2·penalty/w. Augmentation itself
    stays in float32 where the rest is bfloat16."""
    w = torch.tensor(0.7, requires_grad=True)
    images = noise(b=2, side=16).requires_grad_()
    torch.manual_seed(9)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = augment(**GEOMETRY)(images)
        assert out.dtype == torch.float32
        gradient, = torch.autograd.grad((w * out.square()).sum(), images, create_graph=True)
        penalty = gradient.square().sum()
        penalty.backward()
    assert w.grad.item() == pytest.approx(2 * penalty.item() / 0.7, rel=1e-5)
    torch.manual_seed(9)
    torch.testing.assert_close(out, augment(**GEOMETRY)(images.detach()), atol=ROUNDING, rtol=0)


def test_half_precision_pictures_become_float32():
    torch.manual_seed(10)
    out = augment(**GEOMETRY, **COLOURS)(noise().bfloat16())
    torch.manual_seed(10)
    torch.testing.assert_close(out, augment(**GEOMETRY, **COLOURS)(noise().bfloat16().float()), atol=0, rtol=0)


# The controller


def test_p_follows_the_sign_every_fourth_step():
    module = augment(p=0.5, target=0.6, speed_kimg=1)
    sure, unsure = torch.tensor([2.0] * 9 + [-1.0]), torch.tensor([2.0] * 7 + [-1.0] * 3)  # mean signs 0.8 and 0.4
    heights = []
    for step in range(12):
        module.observe(sure if step < 6 else unsure, step)  # the middle interval's mean is just the target
        heights.append(round(module.p.item(), 6))
    assert heights == [0.5] * 3 + [0.54] * 8 + [0.5]


def test_p_stays_between_zero_and_its_limit():
    module = augment(p=0.25, p_max=0.3, target=0.6, speed_kimg=0.1, every=1)
    module.observe(torch.ones(10), 0)
    assert module.p.item() == pytest.approx(0.3)
    for step in range(1, 5):
        module.observe(-torch.ones(10), step)
    assert module.p.item() == 0


def test_without_a_target_p_is_fixed():
    module = augment(p=0.3)
    for step in range(8):
        module.observe(torch.ones(8), step)
    assert module.p.item() == pytest.approx(0.3) and module.seen.item() == 0


def test_a_controller_resumed_between_two_moves_goes_on_as_if_it_had_not_stopped():
    torch.manual_seed(11)
    logits = torch.randn(40, 8) + 1
    whole, first = (augment(p=0.2, target=0.6, speed_kimg=1) for _ in range(2))
    path = []
    for step, logit in enumerate(logits):
        whole.observe(logit, step)
        path.append(whole.p.item())
    assert len(set(path)) > 3
    for step in range(18):
        first.observe(logits[step], step)
    resumed = augment(p=0.9, target=0.6, speed_kimg=1)
    resumed.load_state_dict(first.state_dict())
    for step in range(18, 40):
        resumed.observe(logits[step], step)
        assert resumed.p.item() == path[step]
    assert not list(resumed.parameters())


@pytest.mark.parametrize(("changes", "message"), [(dict(p=1.2), "p ≤ p_max"), (dict(p=0.5, p_max=0.4), "p ≤ p_max"),
                                                  (dict(speed_kimg=0), "positive"), (dict(every=0), "positive")])
def test_wrong_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        augment(**changes)


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (2, 3, 4, 4)])
def test_pictures_it_cannot_augment_are_refused(shape):
    with pytest.raises(ValueError, match="square rgb pictures"):
        augment()(torch.zeros(shape))
