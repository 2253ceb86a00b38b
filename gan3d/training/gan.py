"""One Lightning module trains every GAN of the suite: what differs between papers is handed in as objects and numbers.

A step is one discriminator update on real and fake images and one generator update on fresh latents and cameras.
`step` counts generator updates; it and `images_seen` are kept in the checkpoint (Lightning's global_step counts both
optimisers). All randomness of a step is a function of (seed, step, rank): nothing of it has to be saved, pictures and
metrics in between cannot disturb it, and a run that was killed goes on to the numbers it would have had.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gan3d.augmentation import Augment
from gan3d.cameras import Camera, Number
from gan3d.gans import Images, Verdict
from gan3d.losses import R1, PathLength, TopK, discriminator_loss, generator_loss
from gan3d.nn.convolution import gaussian_blur, resize
from gan3d.poses import PosePrior
from gan3d.ramps import Growth, Ramp
from gan3d.rays import Patch, PatchSampler
from gan3d.training.ema import EMA
from gan3d.training.schedule import Steps


class Fakes(NamedTuple):
    images: Images
    z: Tensor
    camera: Camera
    ws: Tensor  # [b l d]
    ready: Any  # what the generator's `prepare` made of ws


class GANModule(pl.LightningModule):
    """Generator × discriminator × poses × losses × schedule.

    Args:
        generator, discriminator: see the protocols in `gan3d.gans`.
        poses: the prior from which cameras are drawn.
        resolution, batch_size, lr_g, lr_d: a number, or a schedule {step: value}; batch_size counts all processes;
            resolution may also be a `Growth`.
        fade_steps: how long a new resolution is blended into the discriminator (0: not at all).
        optimizer_g, optimizer_d: partials that take the parameters (their lr is set by the schedule).
        ema: averages of the generator, [{decay, warmup}, …]; the first is the one that is evaluated and shown.
        patch: draw K×K pixel grids instead of whole images (GRAF).
        pose_weight, latent_weight: weights of the discriminator's pose head (radians²) and latent head, on fakes.
        real_pose_weight: of the pose head on photographs, whose cameras must then be known (GRAM).
        lr_multipliers: {submodule of the generator: factor on lr_g}; the others have factor 1.
        dual: the discriminator also sees images before the upsampler: of photographs, shrunk to that size (EG3D).
        blur: standard deviation in pixels of a Gaussian over what the discriminator sees, but for the raw images of
            fakes; while it fades, only the coarse is learnt (StyleGAN3, EG3D).
        style_mixing: probability that a batch of fakes has the styles of two latents each, one up to some layer and
            the other from there on (StyleGAN, sec. 3.1); for generators whose ws are `[b l d]`.
        path_length: regulariser of the generator on a part of a batch of its own (StyleGAN2).
        augment: of everything the discriminator sees, after the blur; it follows the logits of photographs (ADA).
        top_k: keep only the best-judged fakes in the generator's loss.
        clip_grad_norm: largest norm of either network's gradient.
        clip_grad_norm_d: of the discriminator's, where it differs.
        splits: generate and back-propagate the batch in so many parts (same gradient, less memory).
        downsample: how photographs reach a lower stage: "area", or "nearest" as π-GAN's code has it.
        seed: of everything random in training.
        total_steps, budget_minutes: training ends at whichever comes first.
    """

    def __init__(
        self,
        *,
        generator: nn.Module,
        discriminator: nn.Module,
        poses: PosePrior,
        resolution: int | Mapping[int, int] | Growth,
        batch_size: int | Mapping[int, int],
        lr_g: Number | Mapping[int, Number],
        lr_d: Number | Mapping[int, Number],
        optimizer_g: Callable[..., torch.optim.Optimizer],
        optimizer_d: Callable[..., torch.optim.Optimizer],
        r1: R1,
        ema: Sequence[Mapping[str, Any]],
        total_steps: int,
        budget_minutes: Number | None = None,
        patch: PatchSampler | None = None,
        fade_steps: int = 0,
        pose_weight: Number = 0.0,
        latent_weight: Number = 0.0,
        real_pose_weight: Number = 0.0,
        lr_multipliers: Mapping[str, Number] | None = None,
        dual: bool = False,
        blur: Ramp | None = None,
        style_mixing: Number = 0.0,
        path_length: PathLength | None = None,
        augment: Augment | None = None,
        top_k: TopK | None = None,
        clip_grad_norm: Number | None = None,
        clip_grad_norm_d: Number | None = None,
        splits: int | Mapping[int, int] = 1,
        downsample: str = "area",
        seed: int = 0,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator, self.poses = generator, discriminator, poses
        self.resolution = resolution if isinstance(resolution, Growth) else Steps(resolution)
        self.batch_size, self.splits = Steps(batch_size), Steps(splits)
        self.lr_g, self.lr_d = Steps(lr_g), Steps(lr_d)
        self.optimizer_g, self.optimizer_d = optimizer_g, optimizer_d
        self.averages = nn.ModuleList(EMA(generator, **average) for average in ema)
        if not self.averages:
            raise ValueError("ema needs at least one average: it is the generator that is evaluated")
        self.patch, self.r1, self.top_k, self.fade_steps = patch, r1, top_k, fade_steps
        self.pose_weight, self.latent_weight, self.real_pose_weight = pose_weight, latent_weight, real_pose_weight
        self.lr_multipliers = dict(lr_multipliers or {})
        for name in self.lr_multipliers:
            if not isinstance(getattr(generator, name, None), nn.Module):
                parts = ", ".join(part for part, _ in generator.named_children())
                raise ValueError(f"lr_multipliers: {name!r} is no part of {type(generator).__name__}; it has {parts}")
        self.dual, self.blur, self.augment = dual, blur, augment
        self.style_mixing, self.path_length = style_mixing, path_length
        self.clip_grad_norm, self.downsample, self.seed = clip_grad_norm, downsample, seed
        self.clip_grad_norm_d = clip_grad_norm if clip_grad_norm_d is None else clip_grad_norm_d
        self.total_steps, self.budget_minutes = total_steps, budget_minutes
        self.step, self.images_seen, self.seconds = 0, 0, 0.0
        self.config: dict[str, Any] = {}  # as composed; the verb sets it, so that a checkpoint rebuilds its generator
        self.last: dict[str, Tensor] = {}  # of the latest step, for the dashboard

    def observe(self, cameras: Camera | None) -> None:
        """Hand over the photographs' cameras, before any work. Raises: ValueError if they are needed and absent."""
        if cameras is None and self.real_pose_weight:
            raise ValueError(
                f"model.real_pose_weight={self.real_pose_weight:g} teaches the discriminator the camera of every "
                "photograph, and this data set has none. docs/data.md tells how to give it some: python prepare.py … "
                "cameras=… or poses=…; or train without: model.real_pose_weight=0")
        if cameras is None and getattr(self.discriminator, "needs_camera", False):
            raise ValueError(
                f"{type(self.discriminator).__name__} must know the camera of every photograph, and this data set has "
                "none. docs/data.md tells how to give it some: python prepare.py … cameras=… or poses=…; or choose a "
                "model that needs no cameras (graf, pigan)")
        self.poses.observe(cameras)

    # What Lightning asks for

    def configure_optimizers(self):  # type: ignore[override]
        apart = {name: list(self.generator.get_submodule(name).parameters()) for name in self.lr_multipliers}
        taken = {id(p) for parameters in apart.values() for p in parameters}
        groups = [{"params": [p for p in self.generator.parameters() if id(p) not in taken], "factor": 1.0}]
        groups += [{"params": apart[name], "factor": factor} for name, factor in self.lr_multipliers.items()]
        return (self.optimizer_g(groups, lr=self.lr_g(0)),
                self.optimizer_d(self.discriminator.parameters(), lr=self.lr_d(0)))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        cameras = getattr(self.poses, "cameras", None)
        checkpoint["config"] = self.config
        checkpoint["cameras"] = None if cameras is None else list(cameras)
        checkpoint["progress"] = {"step": self.step, "images_seen": self.images_seen, "seconds": self.seconds}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        for name, value in checkpoint["progress"].items():
            setattr(self, name, value)

    def on_train_start(self) -> None:
        if self.trainer.precision == "16-mixed":
            raise ValueError("trainer.precision=16-mixed: R1's squared gradients leave the range of float16, and the "
                             "sines' arguments its precision. Use bf16-mixed, or 32-true.")

    def training_step(self, batch, batch_index: int) -> None:
        if self.step >= self.total_steps:  # a finished run was resumed: nothing is left to do
            self.trainer.should_stop = True
            return
        started = time.perf_counter()
        self.before_step()
        optimizer_g, optimizer_d = self.optimizers()  # type: ignore[attr-defined]
        self.update_discriminator(optimizer_d, batch)
        self.update_generator(optimizer_g, len(batch.images))
        self.step += 1
        self.images_seen += len(batch.images) * self.trainer.world_size
        self.seconds += time.perf_counter() - started
        out_of_time = self.budget_minutes is not None and self.seconds >= 60 * self.budget_minutes
        if self.step >= self.total_steps or self.trainer.strategy.reduce_boolean_decision(out_of_time, all=False):
            self.trainer.should_stop = True

    # The step, readable from top to bottom

    def before_step(self) -> None:
        """Schedules, and this step's own randomness."""
        for optimizer, lr in zip(self.optimizers(), (self.lr_g, self.lr_d), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr(self.step) * group.get("factor", 1.0)
        self.generator.before_step(self.step)

    def update_discriminator(self, optimizer, batch) -> None:
        self.discriminator.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        draws = self.draw(len(batch.images), "d")
        real = self.real_images(batch.images, draws)
        with torch.no_grad():
            parts = [self.generate(part) for part in draws.split(self.splits(self.step))]
        raw = self.shrunk(real, parts[0].images.raw.shape[-1]) if self.dual else None
        due = self.r1.due(self.step)
        looked_at = [real] if raw is None else [real, raw]
        for image in looked_at:
            image.requires_grad_(due)
        on_real = self.judge(real, raw, batch.camera)
        with self.exactly():
            penalty = self.r1(looked_at, on_real.logit) if due else real.new_zeros(())
        fakes = [(self.judge(part.images.rgb, part.images.raw, part.camera), part) for part in parts]
        logit_fake = torch.cat([verdict.logit for verdict, _ in fakes])
        heads = torch.stack([self.head_losses(verdict, part) for verdict, part in fakes]).mean()
        if self.real_pose_weight:
            heads = heads + self.real_pose_weight * F.mse_loss(on_real.pose, self.poses.angles(batch.camera).to(real))
        loss = discriminator_loss(on_real.logit, logit_fake)
        self.propagate(loss + penalty + heads)
        self.take_step(optimizer, self.discriminator)
        self.last.update(logit_real=on_real.logit.detach(), logit_fake=logit_fake.detach())
        self.log_dict({"train/loss_d": loss.detach(), "train/logit_real": on_real.logit.mean().detach(),
                       "train/logit_fake": logit_fake.mean().detach()})
        if due:
            self.log("train/reg_r1", penalty.detach())
        if self.augment is not None:
            self.augment.observe(self.all_gather(on_real.logit.detach()).flatten(), self.step)
            self.log("train/augment_p", self.augment.p.clone())

    def update_generator(self, optimizer, batch: int) -> None:
        self.discriminator.requires_grad_(False)  # its gradients are not needed, so they are not computed
        optimizer.zero_grad(set_to_none=True)
        parts = self.draw(batch, "g").split(self.splits(self.step))
        total = torch.zeros((), device=self.device)
        for part in parts:
            fakes = self.generate(part)
            verdict = self.judge(fakes.images.rgb, fakes.images.raw, fakes.camera)
            losses = generator_loss(verdict.logit)
            if self.top_k is not None:
                losses = losses.topk(self.top_k.kept(len(losses), self.step), largest=False).values
            regularizers = self.generator.regularizers(fakes.ready, fakes.camera, fakes.images, self.step)
            loss = losses.mean() + self.head_losses(verdict, fakes)
            self.propagate((loss + sum(regularizers.values())) / len(parts))
            total = total + losses.mean().detach() / len(parts)
            for name, value in {**regularizers, **getattr(fakes.images, "scalars", {})}.items():
                self.log(f"train/{name}", value.detach())
        if self.path_length is not None and self.path_length.due(self.step):
            fakes = self.generate(self.draw(batch, "path").select(slice(0, self.path_length.share(batch))))
            with self.exactly():
                penalty = self.path_length(fakes.images.rgb, fakes.ws)
            self.propagate(penalty)
            self.log("train/reg_path", penalty.detach())
        self.take_step(optimizer, self.generator)
        for average in self.averages:
            average.update(self.generator)
        self.log("train/loss_g", total)

    def exactly(self):
        """Out of autocast, which Lightning puts around a step: a backward pass follows the types of the forward's."""
        return torch.autocast(self.device.type, enabled=False)

    def propagate(self, loss: Tensor) -> None:
        with self.exactly():
            self.manual_backward(loss)

    def take_step(self, optimizer, network: nn.Module) -> None:
        for parameter in network.parameters():
            if parameter.grad is not None:  # a single bad number must not end a run of weeks (as StyleGAN2's trainer)
                torch.nan_to_num(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        largest = self.clip_grad_norm_d if network is self.discriminator else self.clip_grad_norm
        if largest is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), largest)
        optimizer.step()

    # Its pieces

    def draw(self, batch: int, phase: str) -> "Draws":
        """Latents, cameras and patches of this process's share of the batch.

        They are drawn for all processes alike and each keeps its own, so a run does not depend on their number; what
        is random inside the generator (jitter, density noise) then differs between them.
        """
        world, rank = self.trainer.world_size, self.global_rank
        self.reseed(phase)
        z = torch.randn(batch * world, self.generator.z_dim)
        camera = self.poses.sample(batch * world)
        patches = [self.patch and self.patch.sample(batch * world, self.step) for _ in range(2)]
        share = slice(rank * batch, (rank + 1) * batch)
        drawn = Draws(z, camera, *patches).select(share)
        self.reseed(phase, rank)
        return drawn.to(self.device)

    def reseed(self, *key: Any) -> None:
        digest = hashlib.sha256(repr((self.seed, self.step, *key)).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:4], "little"))

    def generate(self, draws: "Draws") -> Fakes:
        with self.exactly():  # ws decide everything and cost nothing
            ws = self.generator.mapping(draws.z, draws.camera)
            if self.style_mixing and torch.rand(()) < self.style_mixing:
                cut = int(torch.randint(1, ws.shape[1], ()))
                other = self.generator.mapping(torch.randn_like(draws.z), draws.camera)
                ws = torch.cat([ws[:, :cut], other[:, cut:]], dim=1)
        ready = self.generator.prepare(ws)
        images = self.generator.synthesis(ready, draws.camera, self.resolution_now(), draws.patch)
        return Fakes(images, draws.z, draws.camera, ws, ready)

    def real_images(self, photographs: Tensor, draws: "Draws") -> Tensor:
        """uint8 photographs `[b 3 h w]` at the data's resolution → the stage's resolution or patch, in [−1, 1]."""
        images = photographs.to(self.device).float() / 127.5 - 1
        size = self.resolution_now()
        if size > images.shape[-1]:
            raise ValueError(f"training wants {size}² images but the data has {images.shape[-1]}²: raise "
                             "data.resolution or lower model.resolution")
        if size < images.shape[-1]:
            images = F.interpolate(images, size=(size, size), mode=self.downsample)
        return images if draws.real_patch is None else draws.real_patch.crop(images)

    def shrunk(self, images: Tensor, size: int) -> Tensor:
        """Photographs as the generator's raw images would be: of their size, and blurred as much as the rest."""
        return gaussian_blur(resize(images, size), self.blur_now())

    def judge(self, images: Tensor, raw: Tensor | None, camera: Camera | None) -> Verdict:
        images = gaussian_blur(images.float(), self.blur_now())
        raw = raw.float() if self.dual and raw is not None else None
        if self.augment is not None:
            images, raw = self.augment.pair(images, raw)
        return self.discriminator(images, fade=self.fade_now(), camera=camera, raw=raw)

    def head_losses(self, verdict: Verdict, fakes: Fakes) -> Tensor:
        loss = verdict.logit.new_zeros(())
        if self.pose_weight and verdict.pose is not None:
            loss = loss + self.pose_weight * F.mse_loss(verdict.pose, self.poses.angles(fakes.camera))
        if self.latent_weight and verdict.latent is not None:
            loss = loss + self.latent_weight * F.mse_loss(verdict.latent, fakes.z)
        return loss

    def resolution_now(self) -> int:
        return self.resolution(self.step)

    def fade_now(self) -> float:
        """1 once the present resolution is fully in; also runs from 0 in the first stage, as in π-GAN's code."""
        if self.fade_steps == 0:
            return 1.0
        return min(1.0, (self.step - self.resolution.stage_start(self.step)) / self.fade_steps)

    def blur_now(self) -> Number:
        return 0.0 if self.blur is None else self.blur(self.step)

    @property
    def generator_ema(self) -> nn.Module:
        return self.averages[0].average  # type: ignore[return-value]


class Draws(NamedTuple):
    """What is drawn for one update: `patch` of the fakes and `real_patch` of the photographs are independent (GRAF)."""

    z: Tensor  # [b z_dim]
    camera: Camera
    patch: Patch | None
    real_patch: Patch | None

    def to(self, device) -> "Draws":
        def move(patch):
            return patch and Patch(patch.scale.to(device), patch.offset.to(device), patch.size)

        return Draws(self.z.to(device), self.camera.to(device), move(self.patch), move(self.real_patch))

    def split(self, parts: int) -> list["Draws"]:
        """`parts` nearly equal parts of the batch."""
        cuts = torch.arange(len(self.z)).tensor_split(min(parts, len(self.z)))

        return [self.select(cut) for cut in cuts]

    def select(self, index) -> "Draws":
        def cut(patch):
            return patch and Patch(patch.scale[index], patch.offset[index], patch.size)

        return Draws(self.z[index], self.camera[index], cut(self.patch), cut(self.real_patch))
