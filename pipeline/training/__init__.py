"""The machinery of the training loop in `pipeline.train`."""
