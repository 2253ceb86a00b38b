"""A line per method: what makes it so small that a step takes a blink. Adding a method adds its line here."""

TINY = {
    "graf": ["model.generator.width=16", "model.generator.samples_per_ray=5", "model.discriminator.channels=4"],
    "pigan": ["model.generator.width=16", "model.generator.samples_per_ray=3", "model.generator.fine_samples=2",
              "model.discriminator.channels=[4,8,8,8,8]"],
}
COMMON = ["data=cars", "scale=mini", "data.resolution=32", "model.batch_size=2"]
