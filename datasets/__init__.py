"""Pictures and cameras in: collections, the training stream, the embedded cars, preparation of published sets."""
