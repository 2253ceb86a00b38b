"""python render.py checkpoint=runs/NAME [what=[samples,orbit,mesh,…]]: pictures, videos and solids of a generator.

Scenes of objects (GIRAFFE) are edited as well: what=[rotate,move,add,swap_shape,separation,…].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gan3d import launch

STILLS = ("samples", "raw", "depth", "normals", "opacity")
FILMS = ("rotate", "move", "scale", "add", "remove")  # of scenes of objects, as are
TABLES = ("swap_shape", "swap_appearance", "swap_background", "separation")
PARTS = (*STILLS, "orbit", "circle", "interpolation", "mixing", "truncation", "mesh", "volume", "manifolds", *FILMS,
         *TABLES)


@dataclass
class Job:
    """What all parts share."""

    run: launch.Run
    cfg: Any
    what: list[str]
    seeds: list[int]
    z: Any
    frontal: Any  # the camera that the mapping network sees, whatever is drawn: a seed is one object everywhere
    resolution: int
    out: Path

    def ws(self, z):
        from gan3d import views

        return views.map_latents(self.run.generator, z, self.frontal, self.cfg.truncation_psi)

    def video(self, name: str, frames: Iterator, total: int) -> Path:
        from tqdm import tqdm

        from gan3d import pictures

        shown = iter(tqdm(frames, name, total, leave=False, disable=None))
        return pictures.write_video(self.out / f"{name}.mp4", shown, self.cfg.fps)


def render(cfg):
    what = [cfg.what] if isinstance(cfg.what, str) else list(cfg.what)
    if cfg.checkpoint is None:
        raise launch.Stop("render.py needs a model: python render.py checkpoint=runs/NAME (see --help)")
    for part in what:
        if part not in PARTS:
            raise launch.Stop(f"what={part}: {launch.nearest(part, list(PARTS))}Can draw {', '.join(PARTS)}.")
    from gan3d import views

    seeds = views.parse_seeds(launch.plain(cfg)["seeds"])
    run = launch.load_run(cfg.checkpoint, cfg)
    edited = [part for part in what if part in FILMS + TABLES]
    if edited and not hasattr(run.generator, "scene"):
        raise launch.Stop(f"what={edited[0]} needs a model that composes scenes of objects, as model=giraffe does; "
                          f"{run.name} draws its pictures as a whole.")
    run.generator.to(launch.device(cfg.device))
    job = Job(run, cfg, what, seeds, views.draw_latents(run.generator, seeds), views.frontal(run.poses),
              cfg.resolution or run.resolution, Path(cfg.out or run.folder / "renders"))
    for draw in (stills, truncation, orbit, interpolation, mixing, solids, layers, edits):
        for path in draw(job):
            print(path, flush=True)


def stills(job: Job) -> Iterator[Path]:
    """The same objects through the same cameras; what is smaller than the picture is enlarged to it."""
    from gan3d import pictures, views

    if not set(STILLS) & set(job.what):
        return
    seen, cameras = views.samples(job.run.generator, job.run.poses, job.z, job.resolution,
                                  truncation_psi=job.cfg.truncation_psi, camera_seed=job.cfg.camera_seed,
                                  camera_condition=job.frontal)
    draw = {
        "samples": lambda: pictures.to_uint8(seen.rgb),
        "raw": lambda: pictures.to_uint8(seen.raw),
        "depth": lambda: pictures.colour_depth(seen.depth, seen.opacity),
        "normals": lambda: pictures.colour_normals(views.normals(seen, cameras), seen.opacity),
        "opacity": lambda: pictures.grey(seen.opacity),
    }
    for part in STILLS:
        if part in job.what:
            shown = pictures.fit(draw[part](), seen.rgb.shape[-2])
            yield pictures.write_png(job.out / f"{part}.png", pictures.grid(shown), 512)


def truncation(job: Job) -> Iterator[Path]:
    """Rows are seeds, columns truncations."""
    from gan3d import pictures, views

    if "truncation" in job.what:
        psis = list(job.cfg.psis)
        seen = views.truncation(job.run.generator, job.z, psis, job.frontal, job.resolution)
        table = pictures.labelled_grid(pictures.to_uint8(seen.flatten(0, 1)), [f"psi {psi:g}" for psi in psis],
                                       [f"seed {seed}" for seed in job.seeds])
        yield pictures.write_png(job.out / "truncation.png", table)


def orbit(job: Job) -> Iterator[Path]:
    """The cameras of the prior's path, and those that go all around, where the prior does not."""
    from gan3d import views

    for part, path in (("orbit", job.run.poses.path), ("circle", partial(views.circle, job.run.poses))):
        if part in job.what:
            frames = views.orbit(job.run.generator, job.ws(job.z[: job.cfg.orbit_latents]), path(job.cfg.frames),
                                 job.resolution, depth="depth" in job.what)
            yield job.video(part, frames, job.cfg.frames)


def interpolation(job: Job) -> Iterator[Path]:
    """One object turns into the next, before a camera that stands still or goes along the orbit."""
    from gan3d import views

    if "interpolation" not in job.what:
        return
    for key, choices in (("interpolation_camera", ("fixed", "orbit")), ("space", ("z", "w"))):
        if job.cfg[key] not in choices:
            raise launch.Stop(f"{key}={job.cfg[key]}: it is {' or '.join(choices)}")
    total = job.cfg.interpolation_frames * len(job.z)
    moving = job.cfg.interpolation_camera == "orbit"
    cameras = views.turns(job.run.poses, total, job.cfg.frames) if moving else job.frontal
    frames = views.interpolate(job.run.generator, job.z, total, cameras, job.resolution, space=job.cfg.space,
                               truncation_psi=job.cfg.truncation_psi, camera_condition=job.frontal)
    yield job.video("interpolation", frames, total)


def mixing(job: Job) -> Iterator[Path]:
    """The table from the front, and turning. Its objects are made ready once for both."""
    from gan3d import pictures, views

    if "mixing" not in job.what:
        return
    keys, generator = launch.plain(job.cfg), job.run.generator
    coarse, fine = (job.ws(views.draw_latents(generator, views.parse_seeds(keys[key])))
                    for key in ("mixing_rows", "mixing_columns"))
    cameras = views.join(job.frontal, job.run.poses.path(job.cfg.frames))
    frames = views.mixing(generator, coarse, fine, job.cfg.mixing_layer, cameras, job.resolution)
    yield pictures.write_png(job.out / "mixing.png", next(frames), 512)
    yield job.video("mixing", frames, job.cfg.frames)


def solids(job: Job) -> Iterator[Path]:
    """The density grid of each seed, and the surface in it."""
    if not {"mesh", "volume"} & set(job.what):
        return
    import dataclasses
    from importlib.util import find_spec

    import numpy as np
    import torch

    from gan3d import meshes, pictures, views

    if "mesh" in job.what and find_spec("skimage") is None:
        raise launch.Stop("what=mesh needs scikit-image: pip install scikit-image")
    generator, poses, cfg = job.run.generator, job.run.poses, job.cfg
    cameras = poses.sample(64, torch.Generator().manual_seed(job.cfg.camera_seed))
    box = torch.tensor(launch.plain(cfg)["mesh_box"] or meshes.sampled_box(generator, cameras).tolist()).float()
    for seed, ws in zip(job.seeds, job.ws(job.z).split(1), strict=True):
        (ready,) = views.prepare(generator, ws)
        grid = meshes.density_grid(generator, ready, box, cfg.mesh_resolution, cameras)
        size = "×".join(map(str, grid.raw_density.shape))
        print(f"seed {seed}: {size} voxels of {grid.voxel:.4g}, raw density {grid.raw_density.min():.4g} to "
              f"{grid.raw_density.max():.4g}; {grid.unseen:.0%} are seen by no camera and count as empty", flush=True)
        if "volume" in job.what:
            with pictures.replacing(job.out / f"volume_{seed}.npy") as part:
                np.save(part, grid.raw_density.numpy())
            yield job.out / f"volume_{seed}.npy"
            yield meshes.write_mrc(job.out / f"volume_{seed}.mrc", grid)
        if "mesh" in job.what:
            level = cfg.mesh_level
            if level is None:
                level = meshes.surface_level(generator, ready, poses.path(4), job.resolution)
            mesh = meshes.extract(grid, level)
            reach = float((box[1] - box[0]).max()) / 16
            mesh = dataclasses.replace(mesh, rgb=meshes.vertex_colours(generator, ready, mesh, level, reach))
            print(f"seed {seed}: surface at raw density {level:.4g}, {len(mesh.vertices):,} vertices, "
                  f"{len(mesh.faces):,} faces, roughness {meshes.roughness(mesh):.1f}°", flush=True)
            yield meshes.write_ply(job.out / f"mesh_{seed}.ply", mesh)


def edits(job: Job) -> Iterator[Path]:
    """Scenes of objects, changed one by one: videos side by side, or tables."""
    from gan3d import editing, pictures, views

    keys, generator = launch.plain(job.cfg), job.run.generator
    stage = editing.Stage(
        generator, lambda seeds: job.ws(views.draw_latents(generator, seeds)), job.seeds, job.frontal, job.resolution,
        frames=keys["frames"], side_by_side=keys["orbit_latents"], sources=views.parse_seeds(keys["swap_from"]),
        object=keys["object"], objects=keys["objects"], factor=keys["grow"])
    for part in FILMS:
        if part in job.what:
            yield job.video(part, stage.film(part), job.cfg.frames)
    for part in TABLES:
        if part in job.what:
            yield pictures.write_png(job.out / f"{part}.png", stage.table(part))


def layers(job: Job) -> Iterator[Path]:
    """The manifolds of each seed as textured meshes; says how near their pictures come to the network's."""
    if "manifolds" not in job.what:
        return
    import torch

    from gan3d import manifolds, views

    generator, poses, cfg = job.run.generator, job.run.poses, job.cfg
    if not hasattr(generator, "manifolds"):
        raise launch.Stop("what=manifolds: only gram has manifolds; what=mesh draws a surface of any generator")
    cameras, views_of_it = (poses.sample(n, torch.Generator().manual_seed(cfg.camera_seed + i))
                            for i, n in enumerate((256, 3)))
    surfaces = manifolds.find_surfaces(generator, cameras, cfg.manifold_cells, poses.up)
    for seed, ws in zip(job.seeds, job.ws(job.z).split(1), strict=True):
        (ready,) = views.prepare(generator, ws)
        painted = manifolds.paint(generator, ready, surfaces, cfg.manifold_texels or max(4 * job.resolution, 512))
        path = manifolds.write_glb(job.out / f"manifolds_{seed}.glb", painted, job.frontal[0], generator.bounds,
                                   poses.up)
        dB = manifolds.fidelity(generator, ready, manifolds.read_glb(path), views_of_it, job.resolution)
        print(f"seed {seed}: {len(painted)} layers, {sum(len(layer.faces) for layer in painted):,} triangles; against "
              f"the network from three cameras {', '.join(f'{x:.1f}' for x in dB)} dB", flush=True)
        yield path


if __name__ == "__main__":
    launch.main(render, "render")
