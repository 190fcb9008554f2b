#!/usr/bin/env bash
# Build the images with docker or podman, and print their sizes and largest packages.
#
#   docker/build-images.sh [train] [serve] [ray]     TORCH=cpu (the default) or cuda; TAG=dev
#
# Without a name, train and serve are built. ray is the training image with Ray, for k8s/prepare-rayjob.yaml.
#
# The base image is BASE if that is set. Otherwise it is the default of the Dockerfile, or, if no registry can be
# reached, an image that debootstrap makes (on Debian, as root). The pip configuration of this machine (indexes,
# certificates, folders of wheels) is mounted during the build and does not become part of a layer.
set -euo pipefail
cd "$(dirname "$0")/.."
. docker/engine.sh
[ "$#" -gt 0 ] || set -- train serve
TORCH=${TORCH:-cpu}
TAG=${TAG:-dev}
DEBIAN=docker.io/library/debian:bookworm-slim
LOCAL_BASE=localhost/babybert-base:bookworm

make_base() {
  "$ENGINE" image inspect "$LOCAL_BASE" > /dev/null 2>&1 && return
  echo "no registry can be reached: making a base image with debootstrap" >&2
  local root
  root=$(mktemp -d)
  if ! debootstrap --variant=minbase bookworm "$root" http://deb.debian.org/debian > "$root.log"; then
    tail -5 "$root.log" >&2
    return 1
  fi
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  tar -C "$root" -c . | "$ENGINE" import - "$LOCAL_BASE" > /dev/null
  rm -rf "$root" "$root.log"
}

# The build flags that mount the pip configuration of this machine, read-only, below /run/pip.
pip_flags() {
  local settings path
  settings=$(python3 -m pip config list 2> /dev/null \
    | sed -nE "s/^(global|:env:)\.(cert|find-links|index-url|extra-index-url)='(.*)'$/\2 = \3/p" | sort -u)
  [ -n "$settings" ] || return 0
  for path in $(printf '%s' "$settings" | sed -E 's/^[^=]*= //; s#file://##g'); do
    path=${path%/simple}
    [ ! -e "$path" ] || printf -- '-v\n%s:/run/pip%s:ro\n' "$path" "$path"
  done
  printf '[global]\n%s\n' "$settings" | sed -E 's#(= |file://| )(/)#\1/run/pip\2#g' > "$WORK/pip.conf"
  printf -- '-v\n%s:/etc/pip.conf:ro\n' "$WORK/pip.conf"
}

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
flags=()
if [ -z "${BASE:-}" ] && ! timeout 60 "$ENGINE" pull --quiet "$DEBIAN" > /dev/null 2>&1; then
  make_base
  BASE=$LOCAL_BASE
fi
if [ -n "${BASE:-}" ]; then
  flags+=(--build-arg "BASE=$BASE")
elif [ "$TORCH" = cpu ]; then
  flags+=(--build-arg "BASE=$DEBIAN")
fi
if [ "$ENGINE" = podman ]; then
  flags+=(--format docker --network host) # podman's default format has no HEALTHCHECK
  mapfile -t mounts < <(pip_flags)
  flags+=("${mounts[@]}")
fi
# If a folder of wheels has the CPU build of PyTorch, its index is not needed.
if [ -z "${TORCH_CPU_INDEX+set}" ] \
  && python3 -m pip config list 2> /dev/null | sed -nE "s/^.*find-links='(.*)'$/\\1/p" | tr ' ' '\n' \
  | while read -r folder; do compgen -G "${folder#file://}/torch-*+cpu-*.whl"; done | grep -q .; then
  TORCH_CPU_INDEX=
fi
[ -z "${TORCH_CPU_INDEX+set}" ] || flags+=(--build-arg "TORCH_CPU_INDEX=$TORCH_CPU_INDEX")
version=$(sed -nE 's/^__version__ = "(.*)"/\1/p' babybert/__init__.py)
flags+=(--build-arg "VERSION=$version" --build-arg "REVISION=$(git rev-parse HEAD 2> /dev/null || echo unknown)")

for image in "$@"; do
  case $image in
    train) file=Dockerfile extra=(--build-arg "TORCH=$TORCH") name=babybert-train:$TAG ;;
    ray) file=Dockerfile extra=(--build-arg "TORCH=$TORCH" --build-arg RAY=1) name=babybert-ray:$TAG ;;
    serve) file=docker/serve.Dockerfile extra=() name=babybert-serve:$TAG ;;
    *) echo "$0: no image '$image'; choose train, serve or ray" >&2; exit 2 ;;
  esac
  "$ENGINE" build "${flags[@]}" "${extra[@]}" -f "$file" -t "$name" .
  size=$("$ENGINE" image inspect --format '{{.Size}}' "$name" | awk '{printf "%.0f MB", $1 / 1e6}')
  echo "== $name: $size, of which, in MB:"
  "$ENGINE" run --rm --no-healthcheck --network none --entrypoint sh "$name" -c \
    'du -xsm /usr /opt/venv/lib/python3*/site-packages/* 2> /dev/null | sort -rn | head -12 \
      | sed "s#/opt/venv/lib/python3.*/site-packages/#  #"'
done
