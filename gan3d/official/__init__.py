"""The authors' checkpoints in our terms, one file a method. `gan3d.checkpoints` reads the files and calls these.

A file has `official_generator(tensors)`, and as far as there is something to read `official_discriminator(tensors)`,
`official_ema(list of tensors)`, `official_numbers(generator)`, `official_discriminator_numbers(discriminator)` and
`PUBLISHED`, a sentence on which files there are and where.
"""
