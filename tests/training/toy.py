"""The smallest GAN that obeys the protocols: a colour that depends on z, the view and noise, and a linear judge."""

from functools import partial
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import nn

from gan3d.gans import Images, Verdict
from gan3d.losses import R1
from gan3d.poses import Spherical, Uniform
from gan3d.training.gan import GANModule


class ToyGenerator(nn.Module):
    z_dim = 4

    def __init__(self, noise: float = 0.0):
        super().__init__()
        self.colour, self.noise = nn.Linear(7, 3), noise
        self.unused = nn.Linear(2, 2)  # DDP must live with parameters that get no gradient

    def mapping(self, z, camera_condition=None, truncation_psi=1.0):
        return truncation_psi * z

    def field(self, ws):
        return lambda points, directions: (points.norm(dim=-1), points.expand_as(points))

    def prepare(self, ws):
        return ws

    def synthesis(self, ws, camera, resolution, patch=None):
        size = resolution if patch is None else patch.size
        rgb = torch.tanh(self.colour(torch.cat([ws, camera.position], -1)))[:, :, None, None]
        rgb = rgb.expand(-1, 3, size, size)
        if self.training and self.noise:
            rgb = rgb + self.noise * torch.randn_like(rgb)
        return Images(rgb, rgb, rgb.mean(1), rgb.mean(1))

    def regularizers(self, ready, camera, images, step):
        return {"reg_colour": 1e-3 * self.colour.weight.square().sum()}

    def before_step(self, step):
        pass


class ToyDiscriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, images, fade=1.0, camera=None, raw=None):
        features = self.body(images).mean((2, 3))
        return Verdict(features[:, 0], pose=features[:, 1:])


class Batch(NamedTuple):
    images: torch.Tensor
    camera: None = None


class ToyStream:
    """Step k's batch is a function of k; knows where to start."""

    def __init__(self, batch: int, start: int = 0, rank: int = 0, world: int = 1):
        self.batch, self.start, self.rank, self.world = batch, start, rank, world

    def __len__(self):
        return 2**31

    def __iter__(self):
        step = self.start
        while True:
            generator = torch.Generator().manual_seed(step)
            images = torch.randint(0, 256, (self.batch, 3, 8, 8), generator=generator, dtype=torch.uint8)
            share = self.batch // self.world
            yield Batch(images[self.rank * share : (self.rank + 1) * share])
            step += 1

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def toy_module(total_steps: int, noise: float = 0.0, **changes) -> GANModule:
    torch.manual_seed(0)
    settings = dict(
        generator=ToyGenerator(noise), discriminator=ToyDiscriminator(),
        poses=Spherical(1.0, Uniform(0, 360), Uniform(30, 60), 30.0),
        resolution={0: 4, 3: 8}, batch_size=4, lr_g={0: 1e-2, 4: 5e-3}, lr_d=1e-2,
        optimizer_g=partial(torch.optim.Adam, betas=(0.0, 0.9)), optimizer_d=partial(torch.optim.RMSprop),
        r1=R1(1.0, every=2), ema=[{"decay": 0.9, "warmup": True}], total_steps=total_steps, pose_weight=1.0,
        fade_steps=2, clip_grad_norm=5.0,
    )
    return GANModule(**(settings | changes))


def toy_trainer(*callbacks, **settings) -> pl.Trainer:
    defaults = dict(accelerator="cpu", devices=1, max_epochs=-1, logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False)
    return pl.Trainer(callbacks=list(callbacks), **(defaults | settings))
