import json
import math
import struct
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import trimesh
from torch import nn

from gan3d import manifolds, views
from gan3d.cameras import Camera, intrinsics_from_fov, look_at
from gan3d.gans.gram import GRAM
from gan3d.poses import Gaussian, Spherical, Uniform
from gan3d.rays import Bounds, camera_rays, full_grid
from gan3d.volume import accumulate, composite

FRONTAL = Spherical(radius=1, azimuth=Gaussian(90, 17), polar=Gaussian(90, 9), fov_degrees=12, up="y")
AROUND = Spherical(radius=2, azimuth=Uniform(0, 360), polar=Uniform(20, 100), fov_degrees=40, up="z")


class Cone(nn.Module):
    """s = 10·|scale·x − center|, as GRAM's predictor is meant to begin."""

    def __init__(self, scale, center):
        super().__init__()
        self.scale, self.center = scale, nn.Parameter(torch.tensor(center))

    def forward(self, points):
        return 10 * (self.scale * points - self.center).norm(dim=-1)


class Onion(nn.Module):
    """Concentric spheres (and a plane) whose crossings are known, with colours and density that are functions of the
    place."""

    pixel_grid = "corner"

    def __init__(self, *, levels, center, scale, bounds, plane, delta_alpha, detail):
        super().__init__()
        self.manifolds, self.bounds, self.plane, self.detail = Cone(scale, center), bounds, plane, detail
        self.register_buffer("levels", torch.tensor(levels))
        self.delta_alpha, self.delta_final = delta_alpha, 1e10 if plane is not None else delta_alpha

    def field(self, ws):
        def ask(points, directions):
            mix = torch.tensor([[1.0, 0.2, 0.1], [0.3, 1.0, 0.5], [0.2, 0.1, 1.0]])
            wave = torch.sin(self.detail * points @ mix + torch.tensor([0.0, 1.0, 2.0]))
            return 4 * wave.prod(-1) + 2 * ws[:, :1, None], (0.5 + 0.45 * wave + 0.05 * directions).clamp(0, 1)

        return ask

    def crossings(self, camera, resolution):
        size = (resolution, resolution)
        rays = camera_rays(camera, full_grid(*size), self.bounds, size, self.pixel_grid)
        middle = rays.origins - self.manifolds.center / self.manifolds.scale
        along, radius = (middle * rays.directions).sum(-1, keepdim=True), self.levels / 10 / self.manifolds.scale
        inside = along**2 - (middle * middle).sum(-1, keepdim=True) + radius**2
        t = -along - inside.clamp_min(0).sqrt()
        valid = (inside > 0) & (rays.near[..., None] <= t) & (t <= rays.far[..., None])
        if self.plane is not None:
            behind = (self.plane - rays.origins[..., 2:]) / rays.directions[..., 2:]
            t, valid = torch.cat([t, behind], -1), torch.cat([valid, torch.ones_like(behind, dtype=torch.bool)], -1)
        order = t.argsort(-1)
        t = t.gather(-1, order)
        return SimpleNamespace(points=rays.origins[..., None, :] + t[..., None] * rays.directions[..., None, :], t=t,
                               valid=valid.gather(-1, order), surface=order)

    def composite(self, seen, raw_density, rgb):
        delta = torch.where(seen.surface == len(self.levels), self.delta_final, self.delta_alpha)
        weights = composite(nn.functional.softplus(raw_density) * seen.valid, delta)
        return accumulate(weights, rgb, seen.t, self.bounds.background)


def frontal_onion(detail=100.0) -> Onion:
    return Onion(levels=[22.0, 18.0, 14.0, 10.0], center=[0.0, 0.0, -1.5], scale=2 / 0.24, bounds=Bounds(0.88, 1.12),
                 plane=-0.12, delta_alpha=0.4, detail=detail)


def round_onion(detail=10.0) -> Onion:
    return Onion(levels=[8.0, 6.0, 4.0], center=[0.1, 0.0, 0.3], scale=1.0, plane=None, delta_alpha=0.4, detail=detail,
                 bounds=Bounds(1.0, 3.0, background=[1.0, 1.0, 1.0]))


def boxed_onion() -> Onion:
    """Cut off by a box on five sides."""
    onion = round_onion()
    onion.bounds = Bounds(1.0, 3.0, aabb=[[-0.55, -0.6, -0.2], [0.7, 0.6, 0.8]], background=[1.0, 1.0, 1.0])
    return onion


CASES = {"frontal": (frontal_onion, FRONTAL, "y"), "around": (round_onion, AROUND, "z"),
         "boxed": (boxed_onion, AROUND, "z")}


@cache
def found(case: str, cells: int = 32):
    make, poses, up = CASES[case]
    onion = make()
    return onion, poses, up, manifolds.find_surfaces(onion, poses.sample(256, torch.Generator().manual_seed(0)), cells,
                                                     up)


WS = torch.tensor([[0.5]])


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES)
def test_the_surfaces_of_a_cone_are_spheres_from_the_innermost_outwards(case):
    onion, _, _, surfaces = found(case)
    if onion.plane is not None:
        plane, *surfaces = surfaces
        assert plane.opaque and (plane.points[..., 2] == onion.plane).all()
    radii = [(surface.points - manifolds.centre(onion)).norm(dim=-1) for surface in surfaces]
    assert len(radii) == len(onion.levels) and not any(surface.opaque for surface in surfaces)
    for radius, level in zip(radii, onion.levels.flip(0), strict=True):
        exact = float(level) / 10 / onion.manifolds.scale
        # a chart ray's step of at most 0.05 is halved 16 times; float32 adds as much
        assert (radius - exact).abs().max() < 2e-6


@pytest.mark.parametrize("case", CASES)
def test_triangles_face_outwards_and_textures_are_not_mirrored(case):
    onion, _, up, surfaces = found(case)
    for layer in manifolds.paint(onion, WS, surfaces, 16):
        a, b, c = layer.vertices[layer.faces].unbind(1)
        normal, out = torch.linalg.cross(b - a, c - a), a - manifolds.centre(onion)
        if layer.opaque:
            out = torch.tensor([0.0, 0.0, 1.0]).expand_as(a)
        assert ((normal * out).sum(-1) > -1e-7).all() and (normal * out).sum() > 0  # at a pole triangles are lines
        right = torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0] if up == "y" else [0.0, 0.0, 1.0]).expand_as(a), out)
        u, v = layer.uv[layer.faces].unbind(-1)  # from a to b and to c
        moved = torch.stack([b - a, c - a], 1)
        to_the_right = (moved * right[:, None]).sum(-1)
        assert (to_the_right * (u[:, 1:] - u[:, :1]) > -1e-6).all() and (to_the_right != 0).any()
        down = -moved[..., 1 if up == "y" else 2]
        assert (down * (v[:, 1:] - v[:, :1]) > -1e-6).all()


@pytest.mark.parametrize("case", CASES)
def test_new_views_of_the_meshes_are_the_network_s(case, tmp_path):
    # outlines of meshes lie up to cell²/8 inside the sphere's: with so many cells, at 1/500 of a pixel of 48²
    onion, poses, up, surfaces = found(case, 96 if case == "frontal" else 256)
    file = manifolds.write_glb(tmp_path / "a.glb", manifolds.paint(onion, WS, surfaces, 512), views.frontal(poses)[0],
                               onion.bounds, up)
    cameras = poses.sample(3, torch.Generator().manual_seed(1))
    assert manifolds.picture(onion, WS, cameras[0], 48).std() > 0.2
    # an error 46 dB down adds less than 0.1 dB to another one at 30 dB; a single pixel on the wrong side of an outline,
    # of which a box cuts many, is off by a third and costs 45 dB in a picture of 48², two of them 42
    dB = manifolds.fidelity(onion, WS, manifolds.read_glb(file), cameras, 48)
    assert min(dB) > (41 if case == "boxed" else 46) and max(dB) > 46


def test_finer_meshes_and_textures_come_closer():
    onion, poses, _, coarse = found("frontal", 4)
    fine = found("frontal", 96)[-1]
    camera = poses.sample(1, torch.Generator().manual_seed(1))[0]
    network = manifolds.picture(onion, WS, camera, 48)
    dB = [manifolds.psnr(manifolds.render(manifolds.paint(onion, WS, surfaces, texels), camera, 48, onion.bounds,
                                          onion.pixel_grid), network)
          for surfaces, texels in ((coarse, 512), (fine, 64), (fine, 128), (fine, 512))]
    assert dB[0] < dB[3] - 6
    assert dB[1] < dB[2] - 9 < dB[3] - 18  # bilinear: twice the texels, a quarter of the error, 12 dB


def test_what_no_camera_sees_is_not_drawn():
    onion, _, _, surfaces = found("frontal")
    for layer in manifolds.paint(onion, WS, surfaces, 32)[1:]:
        assert layer.vertices[:, 2].min() > -0.2  # the spheres reach down to −0.3 and more, the slab to −0.12
    narrow = Spherical(radius=2, azimuth=Uniform(0, 10), polar=Uniform(80, 100), fov_degrees=4, up="z")
    onion = round_onion()
    small = manifolds.find_surfaces(onion, narrow.sample(16, torch.Generator().manual_seed(0)), 32, "z")
    vertices = manifolds.paint(onion, WS, small, 32)[-1].vertices - manifolds.centre(onion)
    # from azimuths within ±5° cameras see 2.4° to each side, up to 0.12 on the far side, 2.8 away, moved by 0.07 more;
    # two cells of the search around it, of 5.6° at radius 0.8, are 0.16 more; the centre is 0.3 above the target
    assert vertices[:, 1].abs().max() < 0.45 and vertices[:, 2].abs().max() < 0.75


def test_alpha_and_colour_of_a_texel_are_the_field_s():
    onion, _, _, surfaces = found("around")
    layer = manifolds.paint(onion, WS, surfaces, 64)[-1]
    chart = surfaces[-1].points
    corners = chart[0, 0], chart[0, -1], chart[-1, 0], chart[-1, -1]
    texels = layer.rgba[0, 0], layer.rgba[0, -1], layer.rgba[-1, 0], layer.rgba[-1, -1]
    for place, texel in zip(corners, texels, strict=True):
        if texel.any():
            towards = nn.functional.normalize(manifolds.centre(onion) - place, dim=-1)
            raw_density, rgb = onion.field(WS)(place.view(1, 1, 1, 3), towards.view(1, 1, 1, 3))
            alpha = 1 - torch.exp(-onion.delta_alpha * torch.log1p(raw_density.exp()))
            exact = 255 * torch.cat([rgb.flatten(), alpha.flatten()])
            assert (texel - exact).abs().max() <= 0.51  # rounded
    assert any(texel.any() for texel in texels)


def square(z: float, rgba: list[int], opaque: bool = False) -> manifolds.Layer:
    vertices = torch.tensor([[-1.0, -1.0, z], [1.0, -1.0, z], [1.0, 1.0, z], [-1.0, 1.0, z]])
    uv = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    return manifolds.Layer(vertices, torch.tensor([[0, 1, 2], [0, 2, 3]]), uv,
                           torch.tensor(rgba, dtype=torch.uint8).expand(2, 2, 4), opaque)


def test_layers_are_blended_in_their_order_and_hidden_behind_opaque_ones():
    camera = Camera(look_at(torch.tensor([0.0, 0.0, 2.0]), torch.zeros(3), "y"), intrinsics_from_fov(20))
    white, blue, red = Bounds(1.0, 3.0, background=[1, 1, 1]), [0, 0, 255, 51], [255, 0, 0, 102]

    def shown(*layers, bounds=white):
        image = manifolds.render(layers, camera, 4, bounds, "centre")
        assert torch.allclose(image, image[:, :1, :1].expand_as(image), atol=1e-6)
        return ((image[:, 0, 0] + 1) / 2).tolist()

    # blue over white: (.8, .8, 1); red over that: .4·(1, 0, 0) + .6·(.8, .8, 1)
    assert shown(square(0.0, blue), square(0.5, red)) == pytest.approx([0.88, 0.48, 0.6], abs=1e-6)
    assert shown(square(0.5, red), square(0.0, blue)) == pytest.approx([0.8, 0.48, 0.68], abs=1e-6)  # as they are given
    wall = square(0.2, [0, 255, 0, 0], opaque=True)
    assert shown(square(0.0, blue), square(0.5, red), wall) == pytest.approx([0.4, 0.6, 0.0], abs=1e-6)
    assert shown(square(0.5, red), bounds=Bounds(1.6, 3.0)) == [0, 0, 0]  # 1.5 away: nearer than the network looks
    assert shown(wall, bounds=Bounds(2.0, 3.0)) == [0, 1, 0]  # a plane is seen at any distance
    assert shown() == [1, 1, 1]


def test_a_background_plane_covers_the_picture():
    onion, poses, _, surfaces = found("frontal")
    plane = manifolds.paint(onion, WS, surfaces[:1], 16)
    assert plane[0].opaque and len(plane[0].faces) == 2 and (plane[0].rgba[..., 3] == 255).all()
    for camera in range(4):
        image = manifolds.render(plane, poses.sample(64, torch.Generator().manual_seed(0))[camera], 16, onion.bounds,
                                 "corner")
        assert (image.amax(0) > -1).all()  # nowhere the black behind it


def test_a_file_is_read_as_it_was_written_and_opens_elsewhere(tmp_path):
    onion, poses, up, surfaces = found("around", 8)
    layers = manifolds.paint(onion, WS, surfaces, 32)
    camera = views.frontal(poses)[0]
    path = manifolds.write_glb(tmp_path / "a.glb", layers, camera, onion.bounds, up)
    for written, read in zip(layers, manifolds.read_glb(path), strict=True):
        for name in ("vertices", "faces", "uv", "rgba"):
            assert torch.equal(getattr(written, name), getattr(read, name)), name
        assert written.opaque == read.opaque
    scene = trimesh.load_scene(path, process=False)
    assert len(scene.geometry) == len(layers)
    for mesh, layer in zip(scene.geometry.values(), layers, strict=True):
        assert torch.equal(torch.from_numpy(mesh.vertices.copy()).float(), layer.vertices)
        assert torch.equal(torch.from_numpy(mesh.faces.copy()).long(), layer.faces)
        assert mesh.visual.material.alphaMode == "BLEND"
        assert mesh.visual.material.baseColorTexture.size == (layer.rgba.shape[1], layer.rgba.shape[0])
        upright = torch.stack([layer.uv[:, 0], 1 - layer.uv[:, 1]], -1)  # trimesh counts v upwards
        assert torch.allclose(torch.from_numpy(mesh.visual.uv.copy()).float(), upright, atol=1e-6)
    to_world = torch.tensor(scene.graph.get(scene.graph.nodes_geometry[0])[0].tolist())
    assert torch.equal(to_world[:3, :3] @ torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 0.0]))  # z is up there


def test_the_file_s_camera_looks_as_ours_does(tmp_path):
    camera = Camera(look_at(torch.tensor([3.0, 1.0, 2.0]), torch.zeros(3), "z"), intrinsics_from_fov(40))
    path = manifolds.write_glb(tmp_path / "a.glb", [square(0.0, [1, 2, 3, 4])], camera, Bounds(1.0, 3.0), "z")
    file = path.read_bytes()
    magic, version, total, length, kind = struct.unpack_from("<4sIII4s", file)
    assert (magic, version, total, kind, length % 4, total % 4) == (b"glTF", 2, len(file), b"JSON", 0, 0)
    document = json.loads(file[20:20 + length])
    assert document["cameras"][0]["perspective"]["yfov"] == pytest.approx(math.radians(40))
    world, eye = (torch.tensor(document["nodes"][i]["matrix"]).float().view(4, 4).T for i in (0, 2))
    pose = world @ eye  # glTF's cameras look along −z, with y up
    assert torch.allclose(pose[:3, 3], torch.tensor([3.0, 2.0, -1.0]))
    assert torch.allclose(-pose[:3, 2], torch.tensor([-3.0, -2.0, 1.0]) / 14**0.5, atol=1e-6)
    assert pose[1, 1] > 0 and pose[1, 0].abs() < 1e-6  # upright
    with pytest.raises(ValueError, match="not a glTF"):
        (tmp_path / "b.glb").write_bytes(b"solid ball of nothing")
        manifolds.read_glb(tmp_path / "b.glb")


def test_manifolds_that_are_never_met_are_refused():
    onion = round_onion()
    onion.levels = torch.tensor([400.0, 300.0])
    with pytest.raises(ValueError, match="levels, 400 to 300"):
        manifolds.find_surfaces(onion, AROUND.sample(4, torch.Generator().manual_seed(0)), 8, "z")


def gram(lock: bool) -> GRAM:
    torch.manual_seed(0)
    return GRAM(bounds=Bounds(0.88, 1.12), z_dim=8, width=16, depth=3, point_scale=2 / 0.24, mapping_width=16,
                mapping_depth=1, num_manifolds=6, first_level=22, last_level=10, plane=-0.12, search_samples=64,
                predictor=dict(width=32, depth=3, scale=2 / 0.24, center=[0, 0, -1.5], radius=0), delta_alpha=0.04,
                delta_final=1e10, pixel_grid="corner", density_gain=200.0, lock_view_dependence=lock).eval()


def test_the_picture_to_compare_with_is_the_locked_network_s():
    cameras = FRONTAL.sample(2, torch.Generator().manual_seed(0))
    locked, free, z = gram(True), gram(False), torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    ws = views.map_latents(locked, z)
    for i in range(2):
        own = views.photograph(locked, ws, cameras[i:i + 1], 12).rgb[0]
        assert torch.allclose(manifolds.picture(locked, ws, cameras[i], 12), own, atol=1e-5)  # float32
        assert torch.allclose(manifolds.picture(free, ws, cameras[i], 12), own, atol=1e-5)
    assert not torch.allclose(views.photograph(free, ws, cameras[1:], 12).rgb[0], own, atol=1e-3)


def test_gram_s_own_manifolds_are_shown_as_the_network_shows_them():
    generator, cameras = gram(True), FRONTAL.sample(32, torch.Generator().manual_seed(0))
    surfaces = manifolds.find_surfaces(generator, cameras, 32, "y")
    ws = views.map_latents(generator, torch.randn(1, 8, generator=torch.Generator().manual_seed(0)))
    layers = manifolds.paint(generator, ws, surfaces, 192)
    camera = FRONTAL.sample(1, torch.Generator().manual_seed(1))[0]
    network = manifolds.picture(generator, ws, camera, 32)
    assert network.std() > 0.01
    assert manifolds.psnr(manifolds.render(layers, camera, 32, generator.bounds, "corner"), network) > 46
