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
    crop: side of the centred square cut out of each picture first.
    radius, fov_degrees: of the cameras that are made from head angles; EG3D's for faces and cats.
    """

    title: str
    page: str
    by_hand: str
    urls: tuple[str, ...] = ()
    subset: str | None = None
    resolution: int | None = None
    crop: int | None = None
    radius: float = 2.7
    fov_degrees: float = 13.374  # focal length 4.2647 picture widths


EMBEDDED = ("cars", "parking")  # rendered here, from meshes that come with the project


def _of_giraffe(archive: str, title: str, resolution: int | None = None) -> Source:
    """One of the archives that GIRAFFE's authors offer."""
    return Source(
        title=title, page="https://github.com/autonomousvision/giraffe", subset="images", resolution=resolution,
        by_hand=f"download {archive}.zip (its scripts/download_dataset.sh), then source={archive}.zip",
        urls=(f"https://s3.eu-central-1.amazonaws.com/avg-projects/giraffe/data/{archive}.zip",))



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
                "CelebA-HQ is a set of its own (celebahq)",
    ),
    "celebahq": Source(
        title="CelebA-HQ, 30,000 faces, 1024² (non-commercial research)",
        page="https://github.com/tkarras/progressive_growing_of_gans",
        by_hand="make the 1024² pictures as described there, then source=the folder (png, or .npy as GRAF and GIRAFFE "
                "keep them)",
        resolution=256,
        crop=650,
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
    "compcars": _of_giraffe("comprehensive_cars", "CompCars, 136,726 photographs of cars (non-commercial research), "
                            "GIRAFFE's archive", resolution=256),
    "churches": Source(
        title="LSUN churches, 126,227 photographs, the shorter side 256",
        page="https://github.com/fyu/lsun",
        by_hand="with its scripts: python download.py -c church_outdoor, unzip church_outdoor_train_lmdb.zip, python "
                "data.py export church_outdoor_train_lmdb --out_dir church_outdoor --flat; then source=church_outdoor",
        resolution=256,
    ),
    "chairs": _of_giraffe("chairs", "renders of Photoshape chairs, GIRAFFE's archive"),
    "clevr2": _of_giraffe("clevr2", "CLEVR with two objects a picture, rendered by the authors of GIRAFFE"),
    "clevr2345": _of_giraffe(
        "clevr2345", "CLEVR with two to five objects a picture, rendered by the authors of GIRAFFE"),
    "bfm": Source(
        title="synthetic faces of the Basel Face Model, as GOF trains on them",
        page="https://github.com/elliottwu/unsup3d",
        by_hand="download synface.zip (its data/download_synface.sh), then source=synface.zip",
        urls=("https://www.robots.ox.ac.uk/~vgg/research/unsup3d/data/synface.zip",),
        subset="train/image",
    ),
    "cars": Source(
        title="the embedded cars, rendered here from CC0 meshes",
        page="datasets/cars/README.md",
        by_hand="nothing: they are also rendered when a run first needs them",
        resolution=64,
    ),
    "parking": Source(
        title="two to five of the embedded cars in each picture, rendered here",
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
    given = "" if SOURCES[name].urls or name in EMBEDDED else " source=WHAT_YOU_DOWNLOADED"
    return f"python prepare.py {name}{given} out={out}"
