"""python prepare.py NAME [source=…] [out=…] [resolution=…]: a published image set into the project's layout."""

import argparse
import difflib
from functools import partial
from pathlib import Path

from datasets.sources import EMBEDDED, SOURCES

SETTINGS = {
    "source": "what you have: a folder or zip; several with commas between them (default: download)",
    "out": "where to put it: a folder, or a .zip (default: data/NAME, where configs/data/NAME.yaml looks)",
    "resolution": "side of the pictures in pixels (default: see above)",
    "crop": "side of the centred square cut out first, in pixels of the file (celebahq: 650)",
    "subset": "the part of the archive to use, as a path in it (afhq: train/cat)",
    "limit": "only the first so many pictures",
    "downloads": "where archives are kept (default: data/downloads)",
    "checksum": "sha256:… or md5:… that the downloaded file must have",
    "cameras": "EG3D's dataset.json, or a folder or zip with it; or a .csv with columns name, yaw, pitch, roll",
    "poses": "or an estimator of poses, package.module:function (built in: datasets.head_pose:estimate, for faces)",
    "weights": "the estimator's weights",
    "radius": "distance of cameras made from angles (default: 2.7)",
    "fov": "their horizontal field of view in degrees (default: 13.374)",
    "mirror": "true: also write mirrored pictures, with mirrored cameras",
    "images": "cars, parking: how many to render (default: 2000)",
}
NUMBERS = ("resolution", "crop", "limit", "images")
MEASURES = ("radius", "fov")


def arguments() -> tuple[str, dict[str, str]]:
    sets = "\n".join(f"  {name:14}{known.title}\n          {known.page}\n          "
                     f"{'downloads itself; or ' if known.urls else ''}{known.by_hand}"
                     f"{f' (default resolution {known.resolution})' if known.resolution else ''}"
                     for name, known in SOURCES.items())
    settings = "\n".join(f"  {key + '=':12}{text}" for key, text in SETTINGS.items())
    parser = argparse.ArgumentParser(
        usage="python prepare.py NAME [key=value …]", description=__doc__,
        epilog=f"sets:\n{sets}\n\nsettings:\n{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", choices=SOURCES)
    parser.add_argument("settings", metavar="key=value", nargs="*")
    given = parser.parse_args()
    pairs = dict(setting.partition("=")[::2] for setting in given.settings)
    for key, value in pairs.items():
        if key in NUMBERS and not value.isdecimal():
            parser.error(f"{key}= needs a number, got {value!r}")
        if key in MEASURES and not positive(value):
            parser.error(f"{key}= needs a positive number, got {value!r}")
        if key == "mirror" and value not in ("true", "false"):
            parser.error(f"mirror= must be true or false, got {value!r}")
        if key not in SETTINGS:
            near = difflib.get_close_matches(key, SETTINGS, 1)
            parser.error(f"unknown setting {key!r}" + (f"; did you mean {near[0]}=?" if near else ""))
    return given.name, pairs


def positive(value: str) -> bool:
    try:
        return 0 < float(value) < float("inf")
    except ValueError:
        return False


def main() -> None:
    name, settings = arguments()
    number = {key: int(settings[key]) for key in NUMBERS if key in settings}
    out = Path(settings.get("out", f"data/{name}"))
    if name in EMBEDDED:
        from datasets import synthetic

        resolution = number.get("resolution", SOURCES[name].resolution)
        of_set = {"cars": synthetic.EmbeddedCars, "parking": partial(synthetic.ParkedCars, cars=(2, 5))}[name]
        made = of_set(resolution=resolution, images=number.get("images", 2000), seed=0, cache=out)
        print(f"{len(made)} pictures in {made.root}")
        return

    from datasets.download import DownloadFailed
    from datasets.posing import Views
    from datasets.prepare import prepare

    path = {key: Path(settings[key]) for key in ("cameras", "weights") if key in settings}
    measure = {key: float(settings[key]) for key in MEASURES if key in settings}
    views = Views(cameras=path.get("cameras"), poses=settings.get("poses"), weights=path.get("weights"),
                  radius=measure.get("radius"), fov_degrees=measure.get("fov"), mirror=settings.get("mirror") == "true")
    sources = [Path(part) for part in settings["source"].split(",")] if "source" in settings else []
    try:
        print(prepare(
            name, out=out, sources=sources,
            resolution=number.get("resolution"), crop=number.get("crop"), subset=settings.get("subset"),
            limit=number.get("limit"), downloads=Path(settings.get("downloads", "data/downloads")),
            checksum=settings.get("checksum"), views=views))
    except (DownloadFailed, OSError, ValueError) as error:
        raise SystemExit(f"\n{error}\n") from None


if __name__ == "__main__":
    main()
