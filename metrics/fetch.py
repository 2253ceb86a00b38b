"""Fetch the weights of an Inception network, once and because you said so.

    python -m metrics.fetch inception     NVIDIA's TorchScript: the FID of StyleGAN, StyleNeRF, EG3D, VoxGRAF
    python -m metrics.fetch fidelity      torch-fidelity's port: the FID of π-GAN, GOF, GRAM
"""

import argparse
import hashlib
import sys
from pathlib import Path
from typing import NamedTuple


class Weights(NamedTuple):
    url: str
    path: str
    sha256: str


WEIGHTS = {
    "inception": Weights(
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "weights/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    ),
    "fidelity": Weights(
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "weights/weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
}  # fmt: skip


def fetch(name: str, path: str | None = None) -> Path:
    """Download one of `WEIGHTS` to `path`, going on where an earlier try stopped; nothing if it is there and right.

    Raises: ValueError if another file is at `path`, which is left alone; datasets.download.DownloadFailed.
    """
    from datasets.download import download

    weights = WEIGHTS[name]
    target = Path(path or weights.path)
    if target.exists():
        found = hashlib.sha256(target.read_bytes()).hexdigest()
        if found != weights.sha256:
            raise ValueError(f"{target} is another file: its sha256 is {found}, not {weights.sha256}. Move it away.")
        return target
    return download(weights.url, target, checksum=f"sha256:{weights.sha256}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m metrics.fetch", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(WEIGHTS))
    parser.add_argument("--path", help="where to put the file (default: weights/)")
    arguments = parser.parse_args()
    try:
        print(f"weights at {fetch(arguments.name, arguments.path)}")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
