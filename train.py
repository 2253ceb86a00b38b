"""python train.py [model=…] [data=…] [scale=…]: model × data → fit, with the metric before and after. See --help."""

from gan3d import launch


def train(cfg):
    from hydra.utils import instantiate

    composed = launch.configuration(cfg)
    config = launch.plain(composed)
    settings = config["trainer"]
    data = instantiate(config["data"]["dataset"], _convert_="all")  # first of all: nothing else is of use without it

    import pytorch_lightning as pl
    import torch

    from datasets.stream import ImageStream
    from gan3d.training.dashboard import Dashboard
    from gan3d.training.evaluation import Evaluation
    from gan3d.training.keeping import Keep
    from gan3d.training.loggers import build_loggers
    from gan3d.training.progress import Progress
    from metrics.results import Recorder

    launch.set_threads(settings["threads"])
    metric = instantiate(config["metrics"], _convert_="all")
    torch.manual_seed(config["seed"])
    module = instantiate(config["model"], _convert_="all")
    module.config = config
    module.observe(data.cameras)

    folder = launch.folder(composed)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    begun = launch.progress(checkpoint)
    record = Recorder(folder / "metrics.json", model=config["choices"]["model"], data=data.name, seed=config["seed"],
                      since_step=begun["step"])
    evaluation = Evaluation(metric=metric, data=data, record=record, every_steps=settings["evaluate_every"])
    trainer = pl.Trainer(
        accelerator=settings["accelerator"], devices=settings["devices"], strategy=launch.strategy(settings),
        precision=settings["precision"], max_epochs=-1, use_distributed_sampler=False, num_sanity_val_steps=0,
        logger=build_loggers(config, folder), log_every_n_steps=settings["log_every"], default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, inference_mode=False,
        callbacks=[evaluation, Progress(evaluation), Keep(folder=checkpoint.parent, **settings["checkpoint"]),
                   Dashboard(folder=folder, every_minutes=settings["show_every_minutes"])],
    )
    stream = ImageStream(data, batch_size=module.batch_size, seed=config["seed"], flip=config["data"]["flip"],
                         start_step=begun["step"], workers=settings["workers"],
                         rank=trainer.global_rank, world_size=trainer.world_size)
    trainer.fit(module, stream, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True)
    if trainer.is_global_zero:
        print(launch.farewell(folder, evaluation.history, module))


if __name__ == "__main__":
    launch.main(train, "train")
