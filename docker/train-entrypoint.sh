#!/bin/sh
# `docker run IMAGE COMMAND ...` runs `babybert COMMAND ...`. Without a command, prepare the demo and train on it.
set -eu
if [ "$#" -gt 0 ]; then
  exec babybert "$@"
fi
[ -f data/demo/dataset.json ] || babybert prepare
echo "training on the demo; its checkpoints go to $PWD/runs/demo (mount a volume at $PWD/runs to keep them)" >&2
exec babybert pretrain
