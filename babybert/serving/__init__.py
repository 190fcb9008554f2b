"""Serving a checkpoint: predictor, request schema, TorchServe archive and process, watcher."""
