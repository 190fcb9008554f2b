#!/usr/bin/env bash
# Build both images with docker or podman, and print their sizes and what is in them.
#
#   docker/build-images.sh [train] [serve]     TORCH=cpu (default here) or cuda; TAG=dev
#
# The base is BASE if set; else the Dockerfiles' own if a registry answers; else one that debootstrap makes (Debian, as root).
# pip's configuration on this machine (indexes, certificates, folders of wheels) is mounted for the build and stays out of the layers.
set -euo pipefail
cd "$(dirname "$0")/.."
. docker/engine.sh
[ "$#" -gt 0 ] || set -- train serve
TORCH=${TORCH:-cpu} TAG=${TAG:-dev} DEBIAN=docker.io/library/debian:bookworm-slim OWN_BASE=localhost/babybert-base:bookworm

make_base() {
  "$ENGINE" image inspect "$OWN_BASE" > /dev/null 2>&1 && return
  echo "no registry answers: making a base with debootstrap" >&2
  local root
  root=$(mktemp -d)
  debootstrap --variant=minbase bookworm "$root" http://deb.debian.org/debian > "$root.log" || { tail -5 "$root.log" >&2; return 1; }
  rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  tar -C "$root" -c . | "$ENGINE" import - "$OWN_BASE" > /dev/null
  rm -rf "$root" "$root.log"
}

# Flags that give the build this machine's pip configuration, read-only, below /run/pip.
pip_flags() {
  local settings path
  settings=$(python3 -m pip config list 2> /dev/null | sed -nE "s/^(global|:env:)\.(cert|find-links|index-url|extra-index-url)='(.*)'$/\2 = \3/p" | sort -u)
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
  BASE=$OWN_BASE
fi
if [ -n "${BASE:-}" ]; then
  flags+=(--build-arg "BASE=$BASE")
elif [ "$TORCH" = cpu ]; then
  flags+=(--build-arg "BASE=$DEBIAN")
fi
if [ "$ENGINE" = podman ]; then
  flags+=(--format docker --network host) # HEALTHCHECK is not in podman's own format
  mapfile -t mounts < <(pip_flags)
  flags+=("${mounts[@]}")
fi
# A folder with the CPU's PyTorch takes the place of its index.
if [ -z "${TORCH_CPU_INDEX+set}" ] && python3 -m pip config list 2> /dev/null | sed -nE "s/^.*find-links='(.*)'$/\\1/p" | tr ' ' '\n' \
  | while read -r folder; do compgen -G "${folder#file://}/torch-*+cpu-*.whl"; done | grep -q .; then
  TORCH_CPU_INDEX=
fi
[ -z "${TORCH_CPU_INDEX+set}" ] || flags+=(--build-arg "TORCH_CPU_INDEX=$TORCH_CPU_INDEX")
version=$(sed -nE 's/^__version__ = "(.*)"/\1/p' babybert/__init__.py)
flags+=(--build-arg "VERSION=$version" --build-arg "REVISION=$(git rev-parse HEAD 2> /dev/null || echo unknown)")

for image in "$@"; do
  case $image in
    train) file=Dockerfile extra=(--build-arg "TORCH=$TORCH") name=babybert-train:$TAG ;;
    serve) file=docker/serve.Dockerfile extra=() name=babybert-serve:$TAG ;;
    *) echo "$0: no image '$image'; choose train or serve" >&2; exit 2 ;;
  esac
  "$ENGINE" build "${flags[@]}" "${extra[@]}" -f "$file" -t "$name" .
  echo "== $name: $("$ENGINE" image inspect --format '{{.Size}}' "$name" | awk '{printf "%.0f MB", $1 / 1e6}'), of it, in MB:"
  "$ENGINE" run --rm --no-healthcheck --network none --entrypoint sh "$name" -c \
    'du -xsm /usr /opt/venv/lib/python3*/site-packages/* 2> /dev/null | sort -rn | head -12 | sed "s#/opt/venv/lib/python3.*/site-packages/#  #"'
done
