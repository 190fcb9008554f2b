"""From a checkpoint to answers: the predictor, the TorchServe archive, the server."""
