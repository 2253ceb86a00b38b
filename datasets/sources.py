"""Where the published image sets come from, and what each becomes. Imports nothing, so that `--help` is instant."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One image set.

    title: what it is, with its licence.
    page: where a person finds it.
    urls: files that can be fetched without an account; empty if none can.
    by_hand: what to download otherwise, and what to pass as `source`.
    subset: the part of the archive that is used, as a path in it.
    resolution: of the pictures written; None keeps the files as they are.
    radius, fov_degrees: of the cameras that are made from head angles; EG3D's for faces and cats.
    """

    title: str
    page: str
    by_hand: str
    urls: tuple[str, ...] = ()
    subset: str | None = None
    resolution: int | None = None
    radius: float = 2.7
    fov_degrees: float = 13.374  # focal length 4.2647 picture widths


SOURCES = {
    "ffhq": Source(
        title="FFHQ, 70,000 faces, 1024² (CC BY-NC-SA 4.0)",
        page="https://github.com/NVlabs/ffhq-dataset",
        by_hand="run its download_ffhq.py --images (89 GB), or --thumbs for 128² (2 GB), then source=images1024x1024",
        resolution=256,
    ),
    "afhq": Source(
        title="AFHQ v2, 5,065 training cats of 15,803 animals, 512² (CC BY-NC 4.0)",
        page="https://github.com/clovaai/stargan-v2",
        by_hand="download afhq_v2.zip with its download.sh afhq-v2-dataset, then source=afhq_v2.zip "
                "(subset=train/dog, train/wild for the others)",
        urls=("https://www.dropbox.com/s/vkzjokiwof5h8w6/afhq_v2.zip?dl=1",),
        subset="train/cat",
        resolution=256,
    ),
    "shapenet_cars": Source(
        title="SRN's renders of ShapeNet cars with poses: 2,458 cars from 50 sides, 128² (ShapeNet's terms)",
        page="https://github.com/vsitzmann/scene-representation-networks",
        by_hand="download cars_train.zip from the Google Drive linked there, then source=cars_train.zip, or read it as "
                "it is: data.root=cars_train.zip",
    ),
    "carla": Source(
        title="GRAF's CARLA cars, 10,000 renders of 18 models with poses",
        page="https://github.com/autonomousvision/graf",
        by_hand="download carla.zip and carla_poses.zip (its data/download_carla*.sh), "
                "then source=carla.zip,carla_poses.zip",
        urls=("https://s3.eu-central-1.amazonaws.com/avg-projects/graf/data/carla.zip",
              "https://s3.eu-central-1.amazonaws.com/avg-projects/graf/data/carla_poses.zip"),
    ),
    "celeba": Source(
        title="CelebA, 202,599 faces, 178x218 (non-commercial research)",
        page="https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        by_hand="download img_align_celeba.zip from the Google Drive linked there, then source=img_align_celeba.zip; "
                "CelebA-HQ as a folder of .npy (GRAF's convention) is read as well, with crop=650",
    ),
    "cats": Source(
        title="CAT, about 10,000 cats with nine landmarks (Zhang et al., 2008), cropped by the eyes",
        page="https://archive.org/details/CAT_DATASET",
        by_hand="download CAT_DATASET_01.zip and _02.zip, then source=CAT_DATASET_01.zip,CAT_DATASET_02.zip, "
                "or source=the folder that holds CAT_00 … CAT_06",
        urls=("https://archive.org/download/CAT_DATASET/CAT_DATASET_01.zip",
              "https://archive.org/download/CAT_DATASET/CAT_DATASET_02.zip"),
        resolution=128,
    ),
    "cars": Source(
        title="the embedded cars, rendered here from CC0 meshes",
        page="datasets/cars/README.md",
        by_hand="nothing: they are also rendered when a run first needs them",
        resolution=64,
    ),
    "folder": Source(
        title="pictures of your own",
        page="docs/data.md tells what is read, and how pictures without cameras get them",
        by_hand="source=your folder or zip; data=folder data.root=… reads them without this step, too",
    ),
}


def command(name: str, out: object) -> str:
    """The command line that makes the set."""
    if name not in SOURCES:
        return f"python prepare.py folder source=YOUR_IMAGES out={out}"
    given = "" if SOURCES[name].urls or name == "cars" else " source=WHAT_YOU_DOWNLOADED"
    return f"python prepare.py {name}{given} out={out}"
