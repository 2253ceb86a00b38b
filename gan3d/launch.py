"""What every verb does around its work: check the command line, compose the config, name the run, load a checkpoint.

Imports nothing heavy at the top, so that `--help` answers at once.
"""

import difflib
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EMBEDDED = ("cars", "parking")  # the data sets that ship with the project


class Stop(SystemExit):
    """Ends a verb with a message for the user instead of a traceback."""

    def __init__(self, message: object):
        super().__init__(f"\n{message}\n")


def main(run: Callable[[Any], None], config_name: str) -> None:
    """Run a verb under Hydra: wrong keys stop at once and name the nearest right one; known failures read as text."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    sys.argv[1:] = with_default_scale(sys.argv[1:])
    looking = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--version", "--shell-completion", "-sc"}
    if not looking & set(sys.argv[1:]):
        check(config_name, [a for a in sys.argv[1:] if not a.startswith("-")])

    def guarded(cfg: Any) -> None:
        quiet()
        try:
            run(cfg)
        except (FileNotFoundError, ValueError, HydraException, OmegaConfBaseException) as error:
            if os.environ.get("GAN3D_TRACEBACK"):
                raise
            cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
            raise Stop(f"{cause}\n(GAN3D_TRACEBACK=1 shows where)") from None

    guarded.__module__ = run.__module__
    hydra.main(version_base=None, config_path=str(CONFIGS), config_name=config_name)(guarded)()


def quiet() -> None:
    """Lightning's advertisements, and its warnings about what is meant here (averages in evaluation mode)."""
    import logging
    import warnings

    for name in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (".*eval mode at the start of training.*", ".*treespec, LeafSpec.*", ".*does not have many workers.*",
                 ".*`weights_only` was not set.*"):
        warnings.filterwarnings("ignore", text)


def with_default_scale(arguments: list[str]) -> list[str]:
    """Embedded data sets are trained at scale=mini unless the user says otherwise; everything else at scale=paper."""
    given = dict(a.split("=", 1) for a in arguments if "=" in a and not a.startswith("-"))
    if "scale" in given or given.get("data", "cars") not in EMBEDDED or "resume" in given or "checkpoint" in given:
        return arguments
    return [*arguments, "scale=mini"] if Path(sys.argv[0]).name in ("train.py", "") else arguments


def check(config_name: str, overrides: list[str]) -> None:
    """Compose once with the overrides; a failure becomes one sentence with the nearest right key or choice."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    first = [re.sub(r"^([^=]+)=([^,\[\]{}()]+),.*$", r"\1=\2", o) for o in overrides]  # of a sweep, its first job
    with initialize_config_dir(str(CONFIGS), version_base=None):
        try:
            compose(config_name, first)
        except (HydraException, OmegaConfBaseException) as error:
            raise Stop(explain(error, config_name, first, compose)) from None


def explain(error: Exception, config_name: str, overrides: list[str], compose: Callable) -> str:
    """The error in the user's terms, with a suggestion."""
    from omegaconf import OmegaConf

    text = str(error)
    groups = sorted(p.name for p in CONFIGS.iterdir() if p.is_dir() and any(p.glob("*.yaml")))
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~")
        if key in groups and not (CONFIGS / key / f"{value}.yaml").exists():
            choices = sorted(p.stem for p in (CONFIGS / key).glob("*.yaml"))
            return f"{key}={value}: no such {key}. {nearest(value, choices)}Choices: {', '.join(choices)}."
    chosen = [o for o in overrides if o.split("=")[0].lstrip("+~") in groups]
    try:
        keys = list(flat_keys(OmegaConf.to_container(compose(config_name, chosen), resolve=False)))
    except Exception:
        return text
    for override in overrides:
        key = override.split("=")[0]
        if not key.startswith(("+", "~")) and key not in groups and key not in keys:
            return f"{key}: no such key. {nearest(key, keys + groups)}`--cfg job` prints every key."
    return text


def nearest(word: str, choices: list[str]) -> str:
    found = difflib.get_close_matches(word, choices, 1, 0.5)
    if not found:  # perhaps only the last part is right: lr_g for model.lr_g
        found = [c for c in choices if c.split(".")[-1] == word.split(".")[-1]][:1]
    return f"Did you mean {found[0]}? " if found else ""


def flat_keys(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield f"{prefix}{key}"
            yield from flat_keys(value, f"{prefix}{key}.")


# Runs


def plain(cfg: Any) -> dict[str, Any]:
    """A config as plain dicts, lists and numbers: what a checkpoint may hold and `weights_only` can read."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else dict(cfg)  # type: ignore


def configuration(cfg: Any) -> Any:
    """The run's configuration: the one composed; to resume, its own with this command line's changes on top.

    References between its values are kept, so that what changes on resuming changes everywhere it is used.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if cfg.resume is None:
        fixed = {"choices": OmegaConf.to_container(cfg.choices, resolve=True), "name": cfg.name}
        return OmegaConf.create({**OmegaConf.to_container(cfg, resolve=False), **fixed})  # type: ignore[dict-item]
    changes = [o for o in HydraConfig.get().overrides.task if not o.startswith("resume=")]
    groups = [o for o in changes if (CONFIGS / o.split("=")[0].lstrip("+~")).is_dir()]
    if groups:
        raise Stop(f"resume goes on with the run's own configuration; {groups[0]} cannot change it")
    saved = OmegaConf.load(run_folder(cfg.resume) / "config.yaml")
    return OmegaConf.merge(saved, OmegaConf.from_dotlist(changes), {"resume": cfg.resume})


def folder(composed: Any) -> Path:
    """The run's folder, with its config.yaml: a new one, or the one that is resumed; the same in all its processes."""
    from omegaconf import OmegaConf

    if "LOCAL_RANK" in os.environ and "GAN3D_RUN" in os.environ:
        return Path(os.environ["GAN3D_RUN"])
    made = run_folder(composed.resume) if composed.resume else new_folder(Path(composed.runs), composed.name)
    part = made / ".config.yaml.part"
    OmegaConf.save(OmegaConf.merge(composed, {"resume": None}), part)
    os.replace(part, made / "config.yaml")
    os.environ["GAN3D_RUN"] = str(made)
    return made


def progress(checkpoint: Path) -> dict[str, Any]:
    """How far a run had come when `checkpoint` was written; nowhere if there is none."""
    import torch

    if not checkpoint.exists():
        return {"step": 0, "images_seen": 0, "seconds": 0.0}
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["progress"]


def strategy(settings: Mapping[str, Any]) -> str:
    """Lightning's strategy. Several devices: a GAN's unused parameters need the DDP that looks for them."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if settings["devices"] in (1, "1"):
        return settings["strategy"]
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise Stop("--multirun with several devices would start a sweep on every one of them. Start one run after "
                   "another (a shell loop over seed=…), or sweep with trainer.devices=1.")
    return "ddp_find_unused_parameters_true" if settings["strategy"] == "auto" else settings["strategy"]


def set_threads(threads: int | None) -> None:
    """PyTorch's threads within an operation; the fields' own coarse threads stay one a core."""
    import torch

    from gan3d.nn import parallel  # noqa: F401  (it notes the number of cores first)

    if threads is not None:
        torch.set_num_threads(min(threads, torch.get_num_threads()))


def device(name: str) -> Any:
    import torch

    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def farewell(folder: Path, history: list[tuple[int, str, float]], module: Any) -> str:
    """The last words of a training run: how the metric moved, and where everything is."""
    minutes = module.seconds / 60
    kimg = module.images_seen / 1000
    lines = [f"\n{module.step} steps, {kimg:.1f} thousand images, {minutes:.1f} minutes of training."]
    for name in dict.fromkeys(metric for _, metric, _ in history):
        values = [value for _, metric, value in history if metric == name]
        lines.append(f"{name}: {values[0]:.2f} before training, {values[-1]:.2f} now.")
    made = [name for name in ("samples.png", "depth.png", "orbit.mp4", "metrics.json") if (folder / name).exists()]
    lines.append(f"Look at {folder}/: {', '.join(made)}.  More: python render.py checkpoint={folder}")
    return "\n".join(lines)


def new_folder(parent: Path, name: str) -> Path:
    """parent/name-0, -1, …: the first that does not exist, made now."""
    for number in range(10_000):
        folder = parent / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise Stop(f"{parent} holds ten thousand runs of {name}")


def run_folder(path: str | Path) -> Path:
    folder = Path(path)
    folder = folder.parent.parent if folder.is_file() else folder
    if not (folder / "config.yaml").exists():
        raise Stop(f"{path} is no run: {folder / 'config.yaml'} does not exist. Runs lie in runs/, one folder each.")
    return folder


@dataclass
class Run:
    """A trained generator, ready to look at: in evaluation mode, its averaged weights, with the poses of its data."""

    generator: Any
    poses: Any
    config: dict[str, Any]
    resolution: int
    step: int
    seconds: float
    folder: Path
    name: str


def load_run(checkpoint: str | Path, cfg: Any = None, with_data: bool = False) -> Run:
    """A run's folder, one of its checkpoints, or an official weight file.

    `cfg` is the verb's composed config. Of our own runs it changes only what the command line names under `data` and
    `model`; for official weights it is the configuration, but for the numbers that a file states itself.
    `with_data`: the caller has the photographs, whose cameras it hands to poses that wait for them. Otherwise the
    poses of the data's config stand in for such poses where a file brings no cameras.
    """
    import torch
    from hydra.utils import instantiate

    from gan3d import checkpoints

    path = Path(checkpoint)
    if path.is_dir() and (path / "checkpoints" / "last.ckpt").exists():
        path = path / "checkpoints" / "last.ckpt"
    if not path.exists():
        raise Stop(f"checkpoint={checkpoint}: no such file or run. Runs lie in runs/, one folder each.{published(cfg)}")
    if checkpoints.is_ours(path):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = with_changes(saved["config"], cfg)
        prefix = "averages.0.average."
        state = {k[len(prefix):]: v for k, v in saved["state_dict"].items() if k.startswith(prefix)}
        progress, cameras, folder, stated = saved["progress"], saved["cameras"], path.parent.parent, False
        trained = progress["step"]
    else:
        official = checkpoints.read_official(path, official_method(path, cfg), ("generator", "generator_ema"))
        config = official_config(path, cfg, official.numbers, official.dataset)
        state = official.weights.get("generator_ema") or official.weights["generator"]
        if "generator_ema" not in official.weights:
            print(f"{path} has no averaged weights, only those of the last step. Where the authors give several files, "
                  f"name their folder.", file=sys.stderr)
        folder = Path(config["runs"]) / f"{path.resolve().stem}-official-{fingerprint(state)}"
        progress, cameras = {"step": 0, "seconds": 0.0}, None
        trained = config["model"]["total_steps"]  # what a method schedules in its generator has come to its end
        stated = bool(official.numbers)
        if stated:  # the sizes are compared with the tensors before memory is asked for
            with torch.device("meta"):
                fill(instantiate(config["model"]["generator"], _convert_="all"), state, path, config, stated)
    generator = instantiate(config["model"]["generator"], _convert_="all")
    fill(generator, state, path, config, stated)
    generator.before_step(trained)
    poses = instantiate(config["model"]["poses"], _convert_="all")
    if cameras is not None:
        from gan3d.cameras import Camera

        poses.observe(Camera(*cameras))
    elif not with_data and getattr(poses, "cameras", poses) is None:
        poses = instantiate(config["data"]["poses"], _convert_="all")
        if getattr(poses, "cameras", poses) is None:
            raise Stop(f"{path} brings no cameras, and those of data={config['choices']['data']} are its photographs'. "
                       "Say where cameras stand, for instance '++data.poses={_target_: gan3d.poses.Spherical, radius: "
                       "1.3, azimuth: {_target_: gan3d.poses.Uniform, _args_: [0, 360]}, polar: {_target_: "
                       "gan3d.poses.UniformArea, _args_: [10, 80]}, fov_degrees: 52, up: z}'")
    choices = config["choices"]
    return Run(generator.eval().requires_grad_(False), poses, config, config["data"]["resolution"], progress["step"],
               progress["seconds"], folder, f"{choices['model']}_{choices['data']}")


def fill(generator: Any, state: Mapping[str, Any], path: Path, config: Mapping[str, Any], stated: bool) -> None:
    """`state` into the generator. One without memory (device meta) only has its names and sizes compared.

    `stated`: the file itself says the generator's numbers.
    """
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*meta parameter.*")
            generator.load_state_dict(state)
    except RuntimeError as error:
        misfits = "\n".join(str(error).splitlines()[1:4])
        choices = config["choices"]
        need = "state their own numbers; which of them does the command line change?" if stated else (
            "need scale=paper, and as model.key=value whatever else they chose")
        raise Stop(f"{path} does not fit model={choices['model']} at scale={choices['scale']} (the authors' weights "
                   f"{need}):\n{misfits}") from None


def published(cfg: Any) -> str:
    """Where the authors' weights of the chosen method are to be had, as words for the end of an error."""
    from importlib import import_module
    from importlib.util import find_spec

    model = None if cfg is None else cfg.choices.model
    known = model is not None and find_spec(f"gan3d.official.{model}") is not None
    files = getattr(import_module(f"gan3d.official.{model}"), "PUBLISHED", None) if known else None
    return "" if files is None else (f"\nThe authors of {model} publish {files}: download the file, put it anywhere, "
                                     "and give its path: checkpoint=/path/to/file.pkl")


def official_method(path: Path, cfg: Any) -> str:
    """The method that the command line names: an official file may not be taken for another method's."""
    missing = [group for group in ("model", "data") if not any(o.startswith(f"{group}=") for o in overrides())]
    if cfg is None or "model" in missing:
        raise Stop(f"{path} is not one of our runs: say {' and '.join(f'{group}=…' for group in missing)} too, for "
                   f"instance model=graf data=carla. (Of pickles in NVIDIA's format, model=eg3d may be enough.)")
    return cfg.choices.model


def official_config(path: Path, cfg: Any, numbers: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """The composed config with the numbers that an official file states; what the command line says is above both.

    How cameras are distributed is the data's business (StyleNeRF's files say it, too). Without data=… on the command
    line, the name of the file's training set decides, if it speaks of one of ours whose cameras this method knows.
    """
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    given = overrides()
    if not any(o.startswith("data=") for o in given):
        data = known_data(dataset, cfg.choices.model)
        if data is None:
            trained = f"its training set {dataset!r} is none of ours" if dataset else "it names no training set"
            raise Stop(f"{path} says nothing about cameras, and {trained}: say data=… too. {cfg.choices.model} has "
                       f"cameras for {', '.join(data_sets(cfg.choices.model))}.")
        print(f"data={data}: {path} was trained on {dataset!r}", file=sys.stderr)
        cfg = compose(HydraConfig.get().job.config_name, [*given, f"data={data}"])
        cfg.choices.data = data
    config = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(cfg, resolve=False)), numbers)
    for key in (o.split("=")[0].lstrip("+") for o in given if numbers):
        if key.startswith(("data.", "model.")):
            OmegaConf.update(config, key, OmegaConf.select(cfg, key), force_add=True)
    return plain(config)


def data_sets(model: str) -> list[str]:
    """Those for whose cameras the method has an experiment; not the embedded ones, and no folder of anything."""
    names = [path.stem.removeprefix(f"{model}_") for path in (CONFIGS / "experiment").glob(f"{model}_*.yaml")]
    return sorted(name for name in names if name not in (*EMBEDDED, "folder"))


def known_data(dataset: str, model: str) -> str | None:
    """The one of these data sets that a training set's name speaks of."""
    found = [name for name in data_sets(model) if name in dataset.lower()]
    return found[0] if len(found) == 1 else None


def overrides() -> list[str]:
    """What the command line says, as Hydra's overrides."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def fingerprint(state: Mapping[str, Any]) -> str:
    """Eight hex digits that tell one set of weights from another."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].float().numpy().tobytes())
    return digest.hexdigest()[:8]


def with_changes(config: dict[str, Any], cfg: Any) -> dict[str, Any]:
    """A saved config with what this command line says about `data` and `model` on top."""
    from omegaconf import OmegaConf

    given = overrides()
    if cfg is None or not given:
        return config
    if any(o.startswith("data=") for o in given):
        config = {**config, "data": plain(cfg)["data"], "choices": {**config["choices"], "data": cfg.choices.data}}
    dotted = [o for o in given if o.startswith(("data.", "model."))]
    return plain(OmegaConf.merge(OmegaConf.create(config), OmegaConf.from_dotlist(dotted)))
