#!/bin/sh
# Serve the model that BABYBERT_MODEL_URI names, or else the run that pretraining stores at BABYBERT_PRETRAIN_STORE.
# `babybert serve` reports all other errors.
set -eu
model=${BABYBERT_MODEL_URI:-${BABYBERT_PRETRAIN_STORE:-}}
if [ -z "$model" ]; then
  echo "babybert serve: error: no model: set BABYBERT_MODEL_URI to a .mar, a folder with one, a run's folder" \
    "or s3://bucket/prefix" >&2
  exit 2
fi
exec babybert serve "$model" "$@"
