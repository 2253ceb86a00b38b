"""python eval.py checkpoint=runs/NAME: the distribution metrics of a trained generator, added to its metrics.json."""

from gan3d import launch


def evaluate(cfg):
    from hydra.utils import instantiate

    from gan3d.training.evaluation import sampler
    from metrics.results import Recorder

    run = launch.load_run(cfg.checkpoint, cfg, with_data=True)
    run.generator.to(launch.device(cfg.device))
    data = instantiate(run.config["data"]["dataset"], _convert_="all")
    if hasattr(run.poses, "cameras") and run.poses.cameras is None:
        run.poses.observe(data.cameras)
    metric = instantiate(cfg.metrics, _convert_="all")
    prior = str(run.poses) if cfg.truncation_psi == 1 else f"{run.poses} psi {cfg.truncation_psi:g}"
    generate = sampler(run.generator, run.poses, data.resolution, cfg.truncation_psi)
    measurements = metric(generate, data, prior, cfg.seed)
    record = Recorder(run.folder / "metrics.json", model=run.config["choices"]["model"], data=data.name, seed=cfg.seed)
    record(measurements, run.step, run.seconds)
    for measurement in measurements:
        print(f"{measurement.metric} {measurement.value:.3f}   {measurement.protocol}")
    print(f"added to {run.folder / 'metrics.json'}")


if __name__ == "__main__":
    launch.main(evaluate, "eval")
