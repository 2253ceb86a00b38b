import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from ball import Ball, ball_poses
from omegaconf import OmegaConf
from PIL import Image

import render
from gan3d import launch, pictures, views

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
    files = draw(what=["normals", "interpolation"], seeds=[0, 1], frames=6, out=str(tmp_path / "figures"))
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
    ({"what": ["samples", "mesh"]}, "mesh"),
])
def test_what_cannot_be_drawn_is_said(draw, values, words):
    with pytest.raises(SystemExit, match=words):
        draw(**values)


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
