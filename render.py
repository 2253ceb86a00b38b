"""python render.py checkpoint=runs/NAME [what=[samples,depth,normals,orbit,interpolation]]: pictures of a generator."""

from collections.abc import Iterator
from pathlib import Path

from gan3d import launch

PARTS = ("samples", "depth", "normals", "orbit", "interpolation")


def render(cfg):
    what = [cfg.what] if isinstance(cfg.what, str) else list(cfg.what)
    if cfg.checkpoint is None:
        raise launch.Stop("render.py needs a model: python render.py checkpoint=runs/NAME (see --help)")
    if unknown := [part for part in what if part not in PARTS]:
        raise launch.Stop(f"what={unknown}: can draw {', '.join(PARTS)}")
    from gan3d import views

    seeds = views.parse_seeds(launch.plain(cfg)["seeds"])
    run = launch.load_run(cfg.checkpoint, cfg)
    run.generator.to(launch.device(cfg.device))
    z = views.draw_latents(run.generator, seeds)
    out = Path(cfg.out or run.folder / "renders")
    resolution = cfg.resolution or run.resolution
    for draw in (stills, videos):
        for path in draw(run, z, resolution, cfg, what, out):
            print(path, flush=True)


def stills(run, z, resolution, cfg, what, out) -> Iterator[Path]:
    """Samples, depth and normals: the same objects through the same cameras."""
    from gan3d import pictures, views

    if not {"samples", "depth", "normals"} & set(what):
        return
    seen, cameras = views.samples(run.generator, run.poses, z, resolution, truncation_psi=cfg.truncation_psi,
                                  camera_seed=cfg.camera_seed)
    if "samples" in what:
        yield pictures.write_png(out / "samples.png", pictures.grid(pictures.to_uint8(seen.rgb)), 512)
    if "depth" in what:
        yield pictures.write_png(out / "depth.png", pictures.grid(pictures.colour_depth(seen.depth, seen.opacity)), 512)
    if "normals" in what:
        colours = pictures.colour_normals(views.normals(seen, cameras), seen.opacity)
        yield pictures.write_png(out / "normals.png", pictures.grid(colours), 512)


def videos(run, z, resolution, cfg, what, out) -> Iterator[Path]:
    """The orbit and the interpolation."""
    from gan3d import pictures, views

    if not {"orbit", "interpolation"} & set(what):
        return
    cameras = run.poses.path(cfg.frames)
    if "orbit" in what:
        ws = views.map_latents(run.generator, z[: cfg.orbit_latents], cameras[:1], cfg.truncation_psi)
        frames = views.orbit(run.generator, ws, cameras, resolution, depth="depth" in what)
        yield pictures.write_video(out / "orbit.mp4", frames, cfg.fps)
    if "interpolation" in what:
        frames = views.interpolate(run.generator, z, cfg.frames, cameras[:1], resolution, space=cfg.space,
                                   truncation_psi=cfg.truncation_psi)
        yield pictures.write_video(out / "interpolation.mp4", frames, cfg.fps)


if __name__ == "__main__":
    launch.main(render, "render")
