"""What a model has learned: scores next to baselines, a linear probe, looks into the model, and worked examples."""
