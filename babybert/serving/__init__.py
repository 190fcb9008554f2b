"""Serving a checkpoint: request schema, predictor, TorchServe archive and process, checkpoint watcher."""
