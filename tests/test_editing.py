"""Edits of scenes: what they change, that they leave the rest alone, that films close, that objects keep apart."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from marbles import Marbles, marble_poses

from gan3d import editing, pictures, views
from gan3d.cameras import Camera, intrinsics_from_fov, look_at
from gan3d.poses import Spherical, Uniform
from gan3d.rays import Bounds

PHASES = [i / 40 for i in range(40)]


def stage(generator=None, **changes):
    generator = generator or Marbles()
    return editing.Stage(**{
        "generator": generator, "ws_of": lambda seeds: views.draw_latents(generator, seeds), "seeds": [0, 3],
        "camera": views.frontal(marble_poses()), "resolution": 32, "frames": 8, "side_by_side": 4, "sources": [5, 6, 7],
        "object": 1, "objects": None, "factor": 2.0, **changes})


@pytest.fixture
def scene():
    return stage().scenes([0], edited=False)[0]


def others_alone(one, other, *keys):
    """All but the named tensors are equal; of these, all objects but number 1."""
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name not in keys:
            assert torch.equal(a, b), field.name
        else:
            assert torch.equal(a[:, 0], b[:, 0]) and not torch.equal(a[:, 1], b[:, 1])


EDITS = {"rotation": partial(editing.rotate, object=1, layout=Marbles().layout),
         "translation": partial(editing.move, object=1, layout=Marbles().layout),
         "scale": partial(editing.grow, object=1, factor=2.0)}


@pytest.mark.parametrize("key", EDITS)
@pytest.mark.smoke
def test_an_edit_changes_one_tensor_of_one_object_and_closes_its_loop(scene, key):
    edit = EDITS[key]
    for field in dataclasses.fields(scene):
        assert torch.equal(getattr(edit(scene, 0.0), field.name), getattr(scene, field.name))
    others_alone(scene, edit(scene, 0.3), key)
    path = torch.stack([getattr(edit(scene, phase), key)[0, 1].reshape(-1) for phase in (*PHASES, 0.0)])
    steps = (path[1:] - path[:-1]).norm(dim=-1)
    assert steps.max() < 3 * steps.mean()  # no jump, at the end neither; a swing's fastest step is π/2 times the mean


def test_rotation_and_movement_go_to_the_ends_of_their_laws_and_no_further(scene):
    angles = torch.cat([EDITS["rotation"](scene, phase).rotation[:, 1] for phase in PHASES])
    assert angles.min() >= math.radians(-40) - 1e-5 and angles.max() <= math.radians(80) + 1e-5
    # 40 steps of a sine come within 1 − cos(π/40) = 0.3 % of half the range of its ends
    assert angles.min() < math.radians(-39.8) and angles.max() > math.radians(79.8)
    places = torch.cat([EDITS["translation"](scene, phase).translation[:, 1] for phase in PHASES])
    assert (places[:, :2].abs() <= 0.5 + 1e-6).all() and (places[:, 2] == 0).all()
    assert (places[:, :2].amax(0) > 0.49).all() and (places[:, :2].amin(0) < -0.49).all()
    assert torch.equal(places[:20, 1], scene.translation[0, 1, 1].expand(20))  # away and back first, then sideways


def test_where_the_data_turns_all_around_or_not_at_all_the_object_turns_once_around(scene):
    for limits in ([0, 360], [30, 30]):
        layout = dataclasses.make_dataclass("Layout", ["rotation"])(limits)
        turned = editing.rotate(scene, 0.25, object=1, layout=layout)
        assert torch.allclose(turned.rotation[:, 1] - scene.rotation[:, 1], torch.tensor([math.pi / 2]))


def test_where_the_data_never_moves_the_object_moves_by_its_half_side(scene):
    layout = dataclasses.make_dataclass("Layout", ["translation"])([[0.3, 0, 0], [0.3, 0, 0]])
    offsets = torch.cat([editing.move(scene, phase, object=1, layout=layout).translation[:, 1]
                         - scene.translation[:, 1] for phase in PHASES])
    assert torch.allclose(offsets.amax(0)[:2], torch.tensor([0.12, 0.12]), atol=1e-3)
    assert torch.allclose(offsets.amin(0)[:2], torch.tensor([-0.12, -0.12]), atol=1e-3)


def test_an_object_grows_to_the_factor_and_shrinks_to_its_inverse(scene):
    sizes = torch.stack([EDITS["scale"](scene, phase).scale[0, 1] / scene.scale[0, 1] for phase in PHASES])
    assert torch.allclose(sizes[10], torch.full((3,), 2.0)) and torch.allclose(sizes[30], torch.full((3,), 0.5))
    assert sizes.max() <= 2.001 and sizes.min() >= 0.499


def test_objects_come_one_by_one_and_go_the_other_way(scene):
    hidden = editing.changed(scene, "presence", (slice(None), slice(1, None)), 0)
    more = editing.join(hidden, [editing.select(hidden, slice(1, 2))] * 2)  # one present, three hidden
    there = torch.cat([editing.appear(more, phase).presence for phase in PHASES])
    assert (there[:, 0] == 1).all() and (there[0, 1:] == 0).all() and (there[20] == 1).all()
    assert (there[:, 1:-1] >= there[:, 2:]).all()  # nobody before the one before
    assert (there[1:21] >= there[:20]).all() and torch.allclose(there[21:], there[1:20].flip(0), atol=1e-6)
    gone = torch.cat([editing.vanish(scene, phase).presence for phase in PHASES])
    assert (gone[0] == 1).all() and (gone[20] == 0).all() and (gone[:, 0] >= gone[:, 1]).all()


@pytest.mark.parametrize("scale", [0.05, 0.12, 0.2, 0.5])
def test_added_objects_touch_nothing_and_are_in_sight(scale):
    """Circles around the boxes: they cannot touch however they are turned. Larger ones do not fit where training puts
    objects, so places around it are used; the largest do not fit at all before they are made smaller."""
    show = stage(Marbles(scale), objects=6)
    for seed in range(8):
        (before,) = show.scenes([seed], edited=False)
        after = show.crowded(before, seed)
        assert after.presence.tolist() == [[1, 1, 0, 0, 0, 0]]
        assert torch.equal(after.translation[:, :2], before.translation)
        size = float(after.scale[0, 0, 0].detach()) / scale
        assert torch.allclose(after.scale, torch.full((1, 6, 3), size * scale)) and (size < 0.9) == (scale == 0.5)
        apart = torch.cdist(after.translation[0, :, :2], after.translation[0, :, :2])[:, 2:]
        apart = apart[apart > 0]
        assert apart.min() >= 2 * size * scale * math.sqrt(2) - 1e-6
        local = (after.translation[0] - show.camera.position) @ show.camera.camera_to_world[0, :3, :3]
        image = local @ show.camera.intrinsics[0].T
        assert ((image[2:, :2] / image[2:, 2:]) - 0.5).abs().max() < 0.5
        assert torch.equal(show.crowded(before, seed).translation, after.translation)  # a seed is always the same scene
    colours = show.crowded(before, seed).appearance[0, 2:]
    for more, colour in enumerate(colours, 1):  # the first object of the seeds 1000, 2000, … further on
        donor = show.generator.scene(views.draw_latents(show.generator, [seed + 1000 * more]))
        assert torch.equal(colour, donor.appearance[0, 0])


def test_too_many_objects_and_too_few_are_refused():
    show = stage()
    show.generator.bounds = Bounds(8.0, 9.0)
    with pytest.raises(ValueError, match="objects=5: even at 23% of their size there is no free place in sight"):
        next(show.film("add"))
    with pytest.raises(ValueError, match="objects=2: the scene of seed 0 has 2 already"):
        next(stage(objects=2).film("add"))


def test_a_place_is_in_sight_between_near_and_far_inside_the_box_and_in_the_picture():
    camera = Camera(look_at(torch.tensor([[2.0, 0, 0]]), torch.zeros(3)), intrinsics_from_fov(90)[None])
    places = torch.tensor([[0.0, 0, 0], [0.95, 0, 0], [-0.95, 0, 0], [0, 1.3, 0], [0, 1.5, 0], [3.0, 0, 0]])
    sees = partial(editing.in_sight, camera, centres=places, reach=torch.tensor([0.2]))
    # nearer than 1 + 0.2; farther than 3 − 0.2; beyond 70 % of the half width, which is 2; behind the camera
    assert sees(bounds=Bounds(1.0, 3.0)).tolist() == [True, False, False, True, False, False]
    boxed = Bounds(0.1, 9.0, aabb=[[-1, -2, -1], [1, 2, 1]])
    assert sees(bounds=boxed).tolist() == [True, False, False, True, False, False]


def test_objects_that_are_not_there_have_no_place_and_no_number():
    show = stage(Marbles(present=(0, 1)))
    (scene,) = show.scenes([0], edited=False)
    whole = show.generator.scene(views.draw_latents(show.generator, [0]))
    assert torch.equal(scene.appearance, whole.appearance[:, 1:]) and scene.presence.tolist() == [[1]]
    with pytest.raises(ValueError, match="object=1: the scene of seed 0 has 1, numbered from 0"):
        next(show.film("rotate"))


def test_the_first_frame_of_a_film_is_the_scenes_side_by_side():
    show = stage()
    seen = [show.generator.synthesis(views.draw_latents(show.generator, [seed]), show.camera, 32).rgb.detach()
            for seed in show.seeds]
    expected = pictures.grid(pictures.to_uint8(torch.cat(seen)), 2)
    for what in ("rotate", "move", "scale", "add", "remove"):
        frames = list(show.film(what))
        assert len(frames) == 8 and torch.equal(frames[0], expected), what
        assert what == "rotate" or any(not torch.equal(frame, expected) for frame in frames[1:])  # marbles are round


def test_a_swap_takes_one_code_of_one_object_or_the_whole_background(scene):
    donor = stage().scenes([5], edited=False)[0]
    for code in ("shape", "appearance"):
        mixed = editing.swap(scene, donor, code, 1)
        others_alone(scene, mixed, code)
        assert torch.equal(getattr(mixed, code)[:, 1], getattr(donor, code)[:, 1])
    mixed = editing.swap(scene, donor, "background", 1)
    assert all(torch.equal(getattr(mixed, key), getattr(scene, key)) for key in editing.OF_OBJECTS)
    assert all(torch.equal(getattr(mixed, key), getattr(donor, key)) for key in editing.OF_BACKGROUND)


def test_the_table_of_swaps_has_sources_above_scenes_beside_and_their_mixtures(monkeypatch):
    show, kept = stage(), []
    monkeypatch.setattr(pictures, "labelled_grid",
                        lambda *table: kept.append(table) or torch.zeros(1, 1, 3, dtype=torch.uint8))
    show.table("swap_background")
    shown, columns, rows = kept[0]
    assert columns == ["", *(f"background of {seed}" for seed in (5, 6, 7))] and rows == ["", "seed 0", "seed 3"]
    assert (shown[0] == 255).all() and len(shown) == 12
    table = shown.unflatten(0, (3, 4))
    # Where neither the source nor the scene has an object, the mixture is the source; elsewhere see `swap`
    clear = stage().generator
    for row, seed in enumerate((0, 3), 1):
        covered = clear.synthesis(views.draw_latents(clear, [seed]), show.camera, 32).object_opacity[0] > 0
        for column, source in enumerate((5, 6, 7), 1):
            of_source = clear.synthesis(views.draw_latents(clear, [source]), show.camera, 32).object_opacity[0] > 0
            free = ~(covered | of_source)
            assert free.float().mean() > 0.4
            assert torch.equal(table[row, column][:, free], table[0, column][:, free])
            assert torch.equal(table[row, column][:, covered], table[row, 0][:, covered])


def test_separation_shows_objects_without_background_and_background_without_objects():
    show = stage()
    (scene,) = show.scenes([0], edited=False)
    whole, cut, opacity, behind = show.separation(scene)
    covered = show.generator.synthesis(scene, show.camera, 32).object_opacity[0] > 0
    assert 0.02 < covered.float().mean() < 0.5
    assert torch.equal(cut[:, covered], whole[:, covered]) and (cut[:, ~covered] == 255).all()
    assert (opacity[:, covered] == 255).all() and (opacity[:, ~covered] == 0).all()
    assert torch.equal(behind[:, ~covered], whole[:, ~covered]) and behind.flatten(1).unique(dim=1).shape[1] == 1


@pytest.mark.parametrize("poses", [marble_poses(), Spherical(2.0, Uniform(60, 120), Uniform(70, 90), 30, up="y",
                                                             target=(0.1, 0.2, 0.3))])
def test_a_circle_goes_around_the_target_at_one_height(poses):
    cameras = views.circle(poses, 12)
    up = {"y": 1, "z": 2}[poses.up]
    away = cameras.position - torch.tensor(poses.target)
    flat = away.clone()
    flat[:, up] = 0
    assert torch.allclose(cameras.camera_to_world[0], views.frontal(poses).camera_to_world[0], atol=1e-5)
    assert torch.allclose(away.norm(dim=-1), torch.full((12,), float(poses.radius)), atol=1e-5)
    assert torch.allclose(away[:, up], away[:1, up].expand(12), atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(flat, flat.roll(-1, 0))
    assert torch.allclose(cosine, torch.full((12,), math.cos(math.pi / 6)), atol=1e-5)  # equal steps of 30 degrees
    centre = torch.nn.functional.normalize(-away, dim=-1)
    assert torch.allclose(cameras.camera_to_world[:, :3, 2], centre, atol=1e-5)
