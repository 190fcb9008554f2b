"""What a model has learned, in full: measured beside baselines, probed, looked into, and explained example by example."""
