import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import trimesh
from ball import Ball, ball_poses
from marbles import Marbles, marble_poses
from omegaconf import OmegaConf
from PIL import Image

import render
from gan3d import launch, pictures, views
from gan3d.gans import Images
from gan3d.poses import Uniform

ROOT = Path(render.__file__).parent


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draws a ball with the given values of configs/render.yaml; returns the files by name."""
    ball = Ball().eval()
    run = SimpleNamespace(generator=ball, poses=ball_poses(), config={}, resolution=16, step=3, name="ball",
                          folder=tmp_path)
    monkeypatch.setattr(launch, "load_run", lambda checkpoint, cfg=None: run)

    def drawn(**values):
        cfg = OmegaConf.load(ROOT / "configs" / "render.yaml")
        for key in ("defaults", "hydra", "choices"):
            del cfg[key]
        render.render(OmegaConf.merge(cfg, {"checkpoint": "runs/ball", "frames": 4, "device": "cpu"}, values))
        return {path.name: path for path in tmp_path.rglob("*.*")}

    drawn.run = run
    return drawn


def test_stills_and_orbit_are_drawn_into_the_run_folder(draw, capsys):
    files = draw(seeds="0-3")
    assert sorted(files) == ["depth.png", "orbit.mp4", "samples.png"]
    assert all(path.parent == draw.run.folder / "renders" for path in files.values())
    told = capsys.readouterr().out
    assert all(str(path) in told for path in files.values())
    assert Image.open(files["samples.png"]).size == (14 * 38, 14 * 38)  # 2 · 18 + 2, enlarged to 512 or more
    frames = iio.imread(files["orbit.mp4"], plugin="pyav")
    assert len(frames) == 4 and frames.shape[2] > 1.8 * frames.shape[1]  # four side by side, two rows


def test_seeds_and_resolution_are_those_asked_for(draw):
    file = draw(what="samples", seeds="5+7", resolution=8, truncation_psi=0.5)["samples.png"]
    run = draw.run
    z = views.draw_latents(run.generator, [5, 7])
    seen, _ = views.samples(run.generator, run.poses, z, 8, truncation_psi=0.5)
    drawn = pictures.grid(pictures.to_uint8(seen.rgb)).numpy()
    factor = -(-512 // min(drawn.shape[:2]))
    assert np.array_equal(np.array(Image.open(file)), drawn.repeat(factor, 0).repeat(factor, 1))


def test_normals_and_interpolation_go_where_told(draw, tmp_path):
    files = draw(what=["normals", "interpolation"], seeds=[0, 1], interpolation_frames=3, out=str(tmp_path / "figures"))
    assert sorted(files) == ["interpolation.mp4", "normals.png"]
    assert files["normals.png"].parent.name == "figures"
    assert len(iio.imread(files["interpolation.mp4"], plugin="pyav")) == 6


def test_orbit_alone_has_no_depth(draw):
    frames = iio.imread(draw(what="orbit", seeds="0-3")["orbit.mp4"], plugin="pyav")
    assert frames.shape[2] > 3.5 * frames.shape[1]  # four side by side, one row


def test_random_state_is_left_alone(draw):
    before = torch.get_rng_state()
    draw(seeds=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("values, words", [
    ({"checkpoint": None}, "needs a model"),
    ({"what": ["samples", "mehs"]}, "what=mehs: Did you mean mesh"),
    ({"what": "interpolation", "interpolation_camera": "orbits"}, "fixed or orbit"),
    ({"what": "interpolation", "space": "W"}, "space=W: it is z or w"),
])
def test_what_cannot_be_drawn_is_said(draw, values, words):
    with pytest.raises(SystemExit, match=words):
        draw(**values)


def test_smaller_parts_are_enlarged_to_the_picture(draw):
    ball = draw.run.generator
    whole = ball.synthesis

    def upsampled(ws, camera, resolution, patch=None):
        seen = whole(ws, camera, resolution // 2)
        return Images(seen.rgb.repeat_interleave(2, -1).repeat_interleave(2, -2), seen.raw, seen.depth, seen.opacity)

    ball.synthesis = upsampled
    files = draw(what=["samples", "raw", "depth", "normals", "opacity"], seeds="0-3")
    assert {Image.open(path).size for path in files.values()} == {(14 * 38, 14 * 38)}
    assert np.array_equal(np.array(Image.open(files["raw.png"])), np.array(Image.open(files["samples.png"])))
    opacity = np.array(Image.open(files["opacity.png"]))
    assert opacity[14 * 10, 14 * 10, 0] == 255 and opacity[14 * 3, 14 * 3, 0] == 0  # the ball's middle, and a corner


def test_the_truncation_table_has_a_row_a_seed_and_a_column_a_psi(draw):
    file = draw(what="truncation", seeds=[3, 8], psis=[1.0, 0.5, 0.0])["truncation.png"]
    width, height = Image.open(file).size
    side = 16 * 8 + 2  # 16 pixels, enlarged to 128 at least, and the space between
    assert 3 * side < width < 3 * side + 100 and 2 * side < height < 2 * side + 40


def test_mixing_is_refused_where_there_are_no_styles(draw):
    with pytest.raises(ValueError, match="none to exchange"):
        draw(what="mixing")


def test_mixing_writes_the_table_and_its_turn(draw):
    draw.run.generator.mapping = lambda z, camera=None, psi=1.0: z[:, None].expand(-1, 4, -1)
    draw.run.generator.prepare = lambda ws: ws.mean(1)
    files = draw(what="mixing", mixing_rows="0-1", mixing_columns="5-7")
    assert sorted(files) == ["mixing.mp4", "mixing.png"]
    assert Image.open(files["mixing.png"]).size == (10 * (4 * 18 + 2), 10 * (3 * 18 + 2))
    assert len(iio.imread(files["mixing.mp4"], plugin="pyav")) == 4


def test_scenes_are_edited_from_one_command_each(draw):
    draw.run.generator, draw.run.poses = Marbles().eval(), marble_poses()
    draw.run.generator.requires_grad_(False)
    files = draw(what=[*render.FILMS, *render.TABLES], seeds="0-4", orbit_latents=2, object=1, swap_from="5-6")
    assert sorted(files) == sorted([f"{part}.mp4" for part in render.FILMS] + [f"{part}.png" for part in render.TABLES])
    for part in render.FILMS:
        frames = iio.imread(files[f"{part}.mp4"], plugin="pyav")
        assert len(frames) == 4 and frames.shape[2] > 1.8 * frames.shape[1]  # two scenes side by side
        assert part == "rotate" or np.abs(frames[1:].astype(int) - frames[0]).mean() > 0.1  # marbles are round
    side = 16 * 8 + 2  # 16 pixels, enlarged to 128 at least, and the space between
    for part, rows, columns in (("swap_shape", 6, 3), ("swap_background", 6, 3), ("separation", 5, 4)):
        width, height = Image.open(files[f"{part}.png"]).size
        assert columns * side < width < columns * side + 140 and rows * side < height < rows * side + 40


@pytest.mark.parametrize("part", render.FILMS + render.TABLES)
def test_a_generator_without_scenes_says_so_before_anything_is_drawn(draw, part, tmp_path):
    with pytest.raises(SystemExit, match=f"what={part} needs a model that composes scenes of objects"):
        draw(what=["samples", part])
    assert not list(tmp_path.rglob("*.png"))


def test_a_circle_shows_all_sides_also_where_the_prior_knows_one(draw, monkeypatch):
    kept = []
    monkeypatch.setattr(pictures, "write_video", lambda path, frames, fps: kept.append(list(frames)))
    seen, photograph = [], views.photograph
    monkeypatch.setattr(views, "photograph", lambda g, ws, cameras, *rest: seen.append(cameras) or photograph(
        g, ws, cameras, *rest))
    draw.run.poses.azimuth = Uniform(-20, 20)
    draw(what="circle", seeds="0-1")
    positions = torch.cat([camera.position for camera in seen])
    assert len(kept[0]) == 4 and torch.allclose(positions[:, 0], torch.tensor([1.0, 0, -1, 0]) * positions[0, 0],
                                                atol=0.2)


def test_interpolation_may_turn_the_camera(draw, monkeypatch):
    film, kept = {}, []
    monkeypatch.setattr(pictures, "write_video", lambda path, frames, fps: kept.append(torch.stack(list(frames))))
    for camera in ("fixed", "orbit"):
        draw.run.generator.mapping = lambda z, *_: torch.zeros_like(z)  # all objects are one: only the camera moves
        draw.run.poses.polar = Uniform(30, 90)
        draw.run.poses.azimuth = Uniform(-60, 60)
        draw.run.poses.target = (0.3, 0.0, 0.0)
        draw(what="interpolation", seeds=[0, 1], interpolation_frames=2, interpolation_camera=camera)
        film[camera] = kept.pop().float()
    assert len(film["fixed"]) == 4 and torch.equal(film["fixed"][0], film["fixed"][1])
    assert (film["orbit"][0] - film["orbit"][1]).abs().mean() > 5


def test_solids_are_written_for_every_seed_and_counted(draw, capsys):
    files = draw(what=["mesh", "volume"], seeds=[0, 4], mesh_resolution=24)
    assert sorted(files) == ["mesh_0.ply", "mesh_4.ply", "volume_0.mrc", "volume_0.npy", "volume_4.mrc", "volume_4.npy"]
    volume, mesh = np.load(files["volume_4.npy"]), trimesh.load(files["mesh_4.ply"])
    assert volume.shape == (24, 24, 24)
    assert mesh.is_watertight and 0.4 < np.linalg.norm(mesh.vertices, axis=1).max() <= 0.5  # a ball of radius 0.5
    told = capsys.readouterr().out
    assert f"{len(mesh.vertices):,} vertices, {len(mesh.faces):,} faces" in told and "24×24×24 voxels" in told


def test_the_mesh_has_the_box_and_the_level_asked_for(draw):
    box = [[-0.6, -0.6, 0.0], [0.6, 0.6, 0.6]]  # the upper half
    file = draw(what="mesh", seeds=0, mesh_resolution=32, mesh_box=box, mesh_level=20.0)["mesh_0.ply"]
    mesh = trimesh.load(file)
    radius = 0.5 - 20 / 200
    assert np.allclose(mesh.bounds, [[-radius, -radius, 0], [radius, radius, radius]], atol=1.2 / 32)  # a voxel


def test_a_level_that_is_never_reached_names_what_there_is(draw):
    with pytest.raises(ValueError, match="raw densities of this object go from"):
        draw(what="mesh", seeds=0, mesh_resolution=8, mesh_level=1000.0)


@pytest.mark.smoke
def test_help_explains_every_key_without_importing_torch(tmp_path):
    code = ("import runpy, sys; sys.argv = ['render.py', '--help']\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "finally:\n    print('torch' in sys.modules, file=sys.stderr)")
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    took = time.perf_counter() - started
    assert done.stderr.split()[-1] == "False", done.stderr
    cfg = OmegaConf.load(ROOT / "configs" / "render.yaml")
    for key in set(cfg) - {"defaults", "hydra", "choices", "trainer", "budget_minutes", "seed"}:
        assert key in done.stdout, key
    assert took < 10  # 0.6 s on a free core; more means that something heavy is imported again


def test_the_verb_leaves_no_files_of_its_own():
    before = set(ROOT.iterdir())
    done = subprocess.run([sys.executable, "render.py", "checkpoint=nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "nowhere" in done.stderr and "Traceback" not in done.stderr
    assert not [path for path in set(ROOT.iterdir()) - before if path.suffix == ".log" or path.name == "outputs"]
