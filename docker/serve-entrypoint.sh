#!/bin/sh
# Serve the model that BABYBERT_MODEL_URI names. `babybert serve` reports all other errors.
set -eu
if [ -z "${BABYBERT_MODEL_URI:-}" ]; then
  echo "babybert serve: error: no model: set BABYBERT_MODEL_URI to a .mar, a folder with one, a run's folder" \
    "or s3://bucket/prefix" >&2
  exit 2
fi
exec babybert serve "$BABYBERT_MODEL_URI" "$@"
