"""A line per method: what makes it so small that a step takes a blink. Adding a method adds its line here."""

TINY = {
    "graf": ["model.generator.width=16", "model.generator.samples_per_ray=5", "model.discriminator.channels=4"],
    "pigan": ["model.generator.width=16", "model.generator.samples_per_ray=3", "model.generator.fine_samples=2",
              "model.discriminator.channels=[4,8,8,8,8]"],
    "gof": ["model.generator.width=16", "model.generator.coarse_samples=4", "model.generator.surface_samples=3",
            "model.generator.fine_samples=2", "model.generator.surface_from_step=0",
            "model.discriminator.channels=[4,8,8,8,8]"],
    "gram": ["model.generator.width=16", "model.generator.num_manifolds=4", "model.generator.search_samples=6",
             "model.generator.predictor.width=8", "model.resolution=32", "model.discriminator.channels=[4,8,8,8,8]"],
    "eg3d": ["model.generator.channel_base=64", "model.generator.channel_max=8", "model.generator.samples_per_ray=4",
             "model.generator.fine_samples=2", "model.discriminator.channel_base=64",
             "model.discriminator.channel_max=8", "model.generator.camera_conditioning=true"],
    "stylenerf": ["model.generator.width=8", "model.generator.features=8", "model.generator.samples_per_ray=4",
                  "model.generator.fine_samples=2", "model.generator.channel_max=8", "model.resolution=32",
                  "model.discriminator.channel_base=64", "model.discriminator.channel_max=8",
                  "+model.path_length._target_=gan3d.losses.PathLength", "+model.path_length.weight=2",
                  "+model.path_length.every=4", "model.style_mixing=0.9"],
    "giraffe": ["model.generator.objects.width=8", "model.generator.background.width=8", "model.generator.features=8",
                "model.generator.samples_per_ray=12", "model.discriminator.channels=8"],
    "voxgraf": ["model.generator.dense_resolution=8", "model.generator.channel_base=64",
                "model.generator.channel_max=8", "model.generator.channel_min=4", "model.generator.views=3",
                "model.generator.coverage_weight=1", "model.generator.least_foreground=0.9",
                "model.generator.depth_variance_weight=0.01", "model.generator.total_variation_weight=0.01",
                "model.generator.background={_target_: gan3d.gans.voxgraf.Background, w_dim: 64, resolution: 32,"
                " channel_base: 64, channel_max: 8, channel_min: 4, clamp: 256}",
                "model.generator.refinement={_target_: gan3d.nn.stylegan3.Refinement, w_dim: 64, width: 4, depth: 3}",
                "model.discriminator.channel_base=64", "model.discriminator.channel_max=8"],
}
COMMON = ["data=cars", "scale=mini", "data.resolution=32", "model.batch_size=2"]
SIDE = 32
ONE_SIZE = {"eg3d", "stylenerf", "giraffe"}  # draw SIDE² pictures only: their upsampler ends there
