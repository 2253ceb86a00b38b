"""Every method of the suite, from its config: builds, steps, saves, resumes to the same numbers, renders, counts."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny import COMMON, ONE_SIZE, SIDE, TINY

from gan3d import launch
from gan3d.cameras import Camera, intrinsics_from_fov, look_at
from gan3d.poses import Spherical, Uniform
from gan3d.training.keeping import Keep

CONFIGS = str(Path(__file__).parent.parent / "configs")
METHODS = sorted(p.stem for p in Path(CONFIGS, "model").glob("*.yaml"))
DATA = sorted(p.stem for p in Path(CONFIGS, "data").glob("*.yaml"))


def composed(*overrides: str, config_name: str = "train") -> dict:
    """The config as the verb sees it, resolved."""
    with initialize_config_dir(CONFIGS, version_base=None):
        cfg = compose(config_name, list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        return launch.plain(cfg)


def tiny_module(method: str, total_steps: int):
    config = composed(f"model={method}", *COMMON, *TINY[method], f"model.total_steps={total_steps}")
    torch.manual_seed(0)
    module = instantiate(config["model"], _convert_="all")
    module.config = config
    return module


class Photographs:
    """Random pictures and cameras; step k's are a function of k."""

    def __init__(self, start: int = 0):
        self.start = start

    def __len__(self):
        return 2**31

    def __iter__(self):
        from datasets.images import ImageBatch

        step = self.start
        while True:
            rng = torch.Generator().manual_seed(step)
            eye = torch.nn.functional.normalize(torch.randn(2, 3, generator=rng), dim=-1) * 2.35
            camera = Camera(look_at(eye, torch.zeros(3)), intrinsics_from_fov(30).expand(2, 3, 3))
            yield ImageBatch(torch.randint(0, 256, (2, 3, SIDE, SIDE), generator=rng, dtype=torch.uint8), camera)
            step += 1

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def trainer(*callbacks, precision="32-true"):
    import pytorch_lightning as pl

    return pl.Trainer(accelerator="cpu", devices=1, max_epochs=-1, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
                      precision=precision)


def test_every_method_has_its_line_in_tiny():
    assert sorted(TINY) == METHODS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.smoke
def test_a_step_reaches_every_trained_parameter(method):
    module = tiny_module(method, 1)
    seen: dict[str, float] = {}

    class Losses(__import__("pytorch_lightning").Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.update({k: float(v) for k, v in trainer.callback_metrics.items()})

    trainer(Losses()).fit(module, Photographs())
    assert {"train/loss_g", "train/loss_d"} <= set(seen)
    assert all(torch.isfinite(torch.tensor(value)) for value in seen.values()), seen
    idle = [n for n, p in module.generator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # EG3D's super-resolution runs without noise; it has the noise's strengths because the release has them
    assert [n for n in idle if not (n.startswith("superresolution.") and n.endswith("noise_strength"))] == []
    unused = [n for n, p in module.discriminator.named_parameters() if p.grad is None]
    assert all(n.startswith("adapters.") for n in unused), unused  # adapters of resolutions that are not trained yet


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_takes_the_same_step_up_to_its_rounding(method):
    """8 bits of mantissa through some twenty layers: a few percent of the losses."""
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        one = trainer(precision=precision)
        module = tiny_module(method, 1)
        one.fit(module, Photographs())
        assert all(p.dtype == torch.float32 for p in module.parameters())
        losses[precision] = [float(one.callback_metrics[f"train/loss_{n}"]) for n in "gd"]
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_saves_resumes_to_the_same_numbers_and_renders(method, tmp_path):
    whole = tiny_module(method, 3)
    trainer().fit(whole, Photographs())
    trainer(Keep(folder=tmp_path / "checkpoints", every_minutes=1e9)).fit(tiny_module(method, 2), Photographs())
    torch.rand(5)
    resumed = tiny_module(method, 3)
    last = tmp_path / "checkpoints" / "last.ckpt"
    trainer().fit(resumed, Photographs(start=2), ckpt_path=last, weights_only=True)
    state = resumed.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, state[name]), name

    run = launch.load_run(last)
    assert run.step == 2 and not run.generator.training
    with torch.no_grad():
        rng = torch.Generator().manual_seed(0)
        camera = run.poses.sample(2, rng)
        ws = run.generator.mapping(torch.randn(2, run.generator.z_dim, generator=rng), camera, 0.7)
        side = SIDE if method in ONE_SIZE else 24
        images = run.generator.synthesis(ws, camera, side)
        again = run.generator.synthesis(run.generator.prepare(ws), camera, side)
    assert images.rgb.shape == (2, 3, side, side) and images.depth.shape[1:] == images.raw.shape[2:]
    if method not in ("stylenerf", "voxgraf"):  # whose rgb is linear, or has no upper limit
        assert images.raw.abs().max() <= 1.01  # sums of weights round, EG3D's sigmoids are a little wider than [0, 1]
    assert torch.equal(images.rgb, again.rgb)
    assert (images.opacity >= -1e-6).all() and (images.opacity <= 1 + 1e-5).all()


@pytest.mark.parametrize("method", METHODS)
def test_cost_is_counted(method):
    if method in ONE_SIZE:
        cost = tiny_module(method, 1).generator.cost(SIDE)
        assert 0 < cost.rays < SIDE**2 and cost.flops_per_sample > 100 and cost.flops_fixed > 0
        return
    small, large = (tiny_module(method, 1).generator.cost(side) for side in (16, 32))
    assert large.rays == 4 * small.rays == 1024
    assert large.samples_per_ray >= 1 and large.flops_per_sample > 100
    assert large.flops > 3 * small.flops - 3 * small.flops_fixed


@pytest.mark.parametrize("scale", ["paper", "mini"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("method", METHODS)
def test_every_pair_composes_and_its_schedules_fit_the_data(method, data, scale):
    config = composed(f"model={method}", f"data={data}", f"scale={scale}", "data.root=somewhere")
    poses = instantiate(config["model"]["poses"], _convert_="all")
    poses.observe(Spherical(2, Uniform(0, 360), Uniform(60, 90), 30).sample(5))  # what a data set would do
    assert poses.sample(3, torch.Generator().manual_seed(0)).camera_to_world.shape == (3, 4, 4)
    instantiate(config["model"]["generator"]["bounds"], _convert_="all")
    resolution = config["model"]["resolution"]
    if isinstance(resolution, dict) and "_target_" in resolution:  # Growth
        stages = [resolution["first"], resolution["last"]]
    else:
        stages = list(resolution.values()) if isinstance(resolution, dict) else [resolution]
    assert max(stages) <= config["data"]["resolution"]
    assert all(low <= high for low, high in pairwise(stages))
    batch, splits = config["model"]["batch_size"], config["model"].get("splits", 1)
    assert isinstance(batch, dict | int) and isinstance(splits, dict | int)


@pytest.mark.parametrize("name", ["eval", "render"])
def test_the_other_verbs_compose(name):
    assert composed("checkpoint=runs/x", config_name=name)["checkpoint"] == "runs/x"
