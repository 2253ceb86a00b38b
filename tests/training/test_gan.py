import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import ToyStream, toy_module, toy_trainer

from gan3d.augmentation import Augment
from gan3d.losses import PathLength, TopK
from gan3d.poses import Spherical, Uniform
from gan3d.ramps import Growth
from gan3d.rays import PatchSampler
from gan3d.training.keeping import Keep
from gan3d.training.schedule import Steps

HERE = Path(__file__).parent


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.smoke
def test_a_killed_run_goes_on_to_the_numbers_it_would_have_had(tmp_path):
    whole = toy_module(9, noise=0.1)
    toy_trainer().fit(whole, ToyStream(4))

    first = toy_module(5, noise=0.1)
    toy_trainer(Keep(folder=tmp_path, every_minutes=1e9)).fit(first, ToyStream(4))
    torch.manual_seed(12345)  # whatever happened in between
    second = toy_module(9, noise=0.1)
    torch.rand(17)
    toy_trainer().fit(second, ToyStream(4, start=5), ckpt_path=tmp_path / "last.ckpt", weights_only=True)

    assert (second.step, second.images_seen) == (whole.step, whole.images_seen) == (9, 36)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


def test_every_trained_parameter_gets_a_gradient_and_moves():
    module = toy_module(1)
    before = weights(module)
    toy_trainer().fit(module, ToyStream(4))
    after = weights(module)
    for name in before:
        moved = not torch.equal(before[name], after[name])
        assert moved == ("unused" not in name), name


def test_evaluation_in_between_does_not_change_the_run():
    plain, disturbed = toy_module(4, noise=0.1), toy_module(4, noise=0.1)
    toy_trainer().fit(plain, ToyStream(4))

    class Disturb(__import__("pytorch_lightning").Callback):
        def on_train_batch_start(self, *_):
            torch.rand(3)

    toy_trainer(Disturb()).fit(disturbed, ToyStream(4))
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(disturbed)[name]), name


def test_schedules_hold_from_their_step_on():
    schedule = Steps({0: 32, 10_000: 64, 55_000: 128})
    assert [schedule(s) for s in (0, 9_999, 10_000, 54_999, 55_000, 10**7)] == [32, 32, 64, 64, 128, 128]
    assert schedule.stage_start(54_999) == 10_000
    with pytest.raises(ValueError, match="step 0"):
        Steps({5: 1})


def test_learning_rate_resolution_and_fade_follow_the_step():
    module = toy_module(5)
    seen = []

    class Watch(__import__("pytorch_lightning").Callback):
        def on_train_batch_end(self, trainer, module, *_):
            rates = [group["lr"] for o in module.optimizers() for group in o.param_groups]
            seen.append((rates[0], module.resolution(module.step - 1)))

    toy_trainer(Watch()).fit(module, ToyStream(4))
    assert seen == [(1e-2, 4), (1e-2, 4), (1e-2, 4), (1e-2, 8), (5e-3, 8)]
    module.step = 3
    assert module.fade_now() == 0.0
    module.step = 4
    assert module.fade_now() == 0.5


def test_splitting_the_batch_gives_the_same_gradient():
    """Only noise inside the generator may differ, and there is none here; 1e-6: float32 sums in another order."""
    one, two = toy_module(1, r1=toy_module(1).r1), toy_module(1, splits=2)
    toy_trainer().fit(one, ToyStream(4))
    toy_trainer().fit(two, ToyStream(4))
    for p, q in zip(one.generator.colour.parameters(), two.generator.colour.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


def test_patches_of_photographs_and_fakes_are_drawn_independently():
    module = toy_module(1, resolution=8, patch=PatchSampler(size=4, min_scale=0.25, annealing=0.0025))
    toy_trainer().fit(module, ToyStream(4))
    draws = module.draw(4, "d")
    assert draws.patch is not None and not torch.equal(draws.patch.scale, draws.real_patch.scale)


def test_a_finished_run_takes_no_further_step(tmp_path):
    toy_trainer(Keep(folder=tmp_path, every_minutes=1e9)).fit(toy_module(2), ToyStream(4))
    again = toy_module(2)
    toy_trainer().fit(again, ToyStream(4, start=2), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.step == 2


def test_half_precision_is_refused_with_the_remedy():
    module = toy_module(1)
    module._trainer = type("Trainer", (), {"precision": "16-mixed"})()
    with pytest.raises(ValueError, match="bf16-mixed"):
        module.on_train_start()


def test_too_small_photographs_are_refused():
    with pytest.raises(ValueError, match="data.resolution"):
        toy_trainer().fit(toy_module(1, resolution=16), ToyStream(4))


def test_top_k_keeps_the_share_the_schedule_says():
    top_k = TopK(interval=2000, floor=0.6)
    assert top_k.kept(10, 0) == 10
    assert top_k.kept(10, 2000) == 10  # 9.9, rounded up
    assert top_k.kept(100, 20_000) == 91  # 0.99^10 = 0.904
    assert top_k.kept(10, 10**6) == 6


def test_path_length_pulls_towards_its_running_mean():
    """Pictures linear in ws: the length is that of the noise seen through the map, which the same seed repeats."""
    torch.manual_seed(0)
    matrix, ws = torch.randn(5, 3 * 4 * 4), torch.randn(2, 3, 5, requires_grad=True)
    images = (ws.sum(1) @ matrix).reshape(2, 3, 4, 4)
    regularizer = PathLength(weight=2.0, every=4, decay=0.25)
    torch.manual_seed(1)
    penalty = regularizer(images, ws)
    torch.manual_seed(1)
    noise = torch.randn(2, 3, 4, 4) / 4
    lengths = (noise.flatten(1) @ matrix.T).norm(dim=1)  # the same for each of the three ws
    mean = 0.25 * lengths.mean()
    torch.testing.assert_close(regularizer.mean, mean)
    torch.testing.assert_close(penalty, 8 * (lengths - mean).square().mean())
    assert (regularizer.share(8), regularizer.share(1)) == (4, 1)


def test_path_length_and_style_mixing_train_and_resume(tmp_path):
    class Styled(torch.nn.Module):
        """ws with an axis of layers, pictures from all of them."""

        def __init__(self):
            super().__init__()
            self.toy = toy_module(1).generator
            self.z_dim, self.mixed = 4, 0

        def mapping(self, z, camera_condition=None, truncation_psi=1.0):
            return (z * self.toy.colour.weight.square().mean())[:, None].expand(-1, 6, -1)

        def prepare(self, ws):
            self.mixed += int(not torch.equal(ws[:, 0], ws[:, -1]))
            return ws

        def synthesis(self, ws, camera, resolution, patch=None):
            return self.toy.synthesis(ws.square().sum(1), camera, resolution)

        def regularizers(self, ready, camera, images, step):
            return {}

        def before_step(self, step):
            pass

    def module(steps):
        torch.manual_seed(0)
        return toy_module(steps, generator=Styled(), style_mixing=0.7, path_length=PathLength(weight=1, every=2))

    whole = module(6)
    toy_trainer().fit(whole, ToyStream(4))
    assert 0 < whole.generator.mixed < 15  # of 12 batches and 3 for path lengths
    assert whole.path_length.mean > 0
    toy_trainer(Keep(folder=tmp_path, every_minutes=1e9)).fit(module(3), ToyStream(4))
    resumed = module(6)
    toy_trainer().fit(resumed, ToyStream(4, start=3), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_augmentation_follows_the_discriminator_and_resumes(tmp_path):
    def module(steps):
        augment = Augment(p=0.5, p_max=1, target=0.6, speed_kimg=0.1, every=2, flip=True, rotate90=True, shift=0.1,
                          scale=0.2, stretch=0.2, rotate=180, fractional_shift=0.1, brightness=0.2, contrast=0.5,
                          luma_flip=True, hue=180, saturation=1)
        return toy_module(steps, augment=augment, resolution=8)

    whole = module(6)
    toy_trainer().fit(whole, ToyStream(4))
    assert float(whole.augment.p) in [pytest.approx(0.5 + 0.08 * moves) for moves in (-3, -1, 1, 3)]  # 8 of 100 a move
    toy_trainer(Keep(folder=tmp_path, every_minutes=1e9)).fit(module(3), ToyStream(4))
    resumed = module(6)
    toy_trainer().fit(resumed, ToyStream(4, start=3), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_growth_doubles_the_picture_as_alpha_rises():
    growth = Growth(first=32, last=256, begin=100, end=400)
    assert [growth(s) for s in (0, 100, 101, 199, 200, 300, 399, 400, 10**6)] == [32, 32, 64, 64, 128, *[256] * 4]
    assert [growth.alpha(s) for s in (50, 175, 400)] == [0, 0.25, 1]
    assert Growth(32, 32, 0, 0)(0) == 32
    module = toy_module(6, resolution=Growth(first=4, last=8, begin=2, end=5), fade_steps=0)
    toy_trainer().fit(module, ToyStream(4))
    assert (module.step, module.resolution_now(), module.fade_now()) == (6, 8, 1.0)


def test_two_processes_give_the_gradients_of_one(tmp_path):
    """1e-6: the same sums, in another order."""
    single = toy_module(1, clip_grad_norm=None)
    toy_trainer().fit(single, ToyStream(4))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent.parent}"}
    environment.pop("LOCAL_RANK", None)
    script = f"""
import torch
from toy import *
module = toy_module(1, clip_grad_norm=None)
trainer = toy_trainer(devices=2, strategy="ddp_find_unused_parameters_true")
trainer.fit(module, ToyStream(4, rank=trainer.global_rank, world=2))
grads = {{n: p.grad for n, p in module.named_parameters() if p.grad is not None}}
torch.save(grads, f"{tmp_path}/rank{{trainer.global_rank}}.pt")
"""
    (tmp_path / "two.py").write_text(script)
    done = subprocess.run([sys.executable, str(tmp_path / "two.py")], env=environment, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    compared = 0
    for name, parameter in single.named_parameters():
        if parameter.grad is None or "unused" in name:
            continue
        for rank in ranks:
            torch.testing.assert_close(rank[name], parameter.grad, rtol=1e-5, atol=1e-6)
            compared += 1
    assert compared >= 2 * (2 + 4)


def test_a_part_of_the_generator_may_learn_at_a_rate_of_its_own():
    module = toy_module(5, lr_multipliers={"unused": 0.1})
    toy_trainer().fit(module, ToyStream(4))
    rates = [group["lr"] for group in module.optimizers()[0].param_groups]
    assert rates == pytest.approx([5e-3, 5e-4])  # lr_g of step 4, and a tenth of it
    sizes = [sum(p.numel() for p in group["params"]) for group in module.optimizers()[0].param_groups]
    assert sizes == [7 * 3 + 3, 2 * 2 + 2]


def test_a_factor_for_a_part_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match="'manifolds' is no part of ToyGenerator; it has colour, unused"):
        toy_module(1, lr_multipliers={"manifolds": 0.1})


def test_cameras_of_photographs_are_learnt_where_the_paper_does_so():
    """Only the pose head hears of them: a discriminator's step with their loss alone moves its two outputs."""
    poses = Spherical(1.0, Uniform(0, 360), Uniform(30, 60), 30.0)

    class Posed(ToyStream):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch._replace(camera=poses.sample(len(batch.images), torch.Generator().manual_seed(0)))

    judges = []
    for weight in (0.0, 3.0):
        module = toy_module(1, real_pose_weight=weight, clip_grad_norm=None, optimizer_d=torch.optim.SGD)
        module.observe(poses.sample(1))
        toy_trainer().fit(module, Posed(4))
        judges.append(module.discriminator.body[2].bias.detach())
    assert judges[0][0] == judges[1][0] and (judges[0][1:] != judges[1][1:]).all()
    with pytest.raises(ValueError, match="model.real_pose_weight=0"):
        toy_module(1, real_pose_weight=3.0).observe(None)
