# Source this to set ENGINE: docker if its daemon answers, else podman. Returns 1 if neither is installed.
if docker info > /dev/null 2>&1; then
  ENGINE=docker
elif command -v podman > /dev/null; then
  ENGINE=podman
  # podman's defaults need systemd. Without it (in a container, for example), runc with plain cgroups works, within the
  # limits of this shell.
  if [ ! -d /run/systemd/system ] && [ -z "${CONTAINERS_CONF:-}" ]; then
    CONTAINERS_CONF=${TMPDIR:-/tmp}/babybert-$(id -u)-containers.conf
    printf '[containers]\ndefault_ulimits = ["nofile=%s:%s", "nproc=32768:32768"]\n' \
      "$(ulimit -Hn)" "$(ulimit -Hn)" > "$CONTAINERS_CONF"
    printf '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n' >> "$CONTAINERS_CONF"
    # Containers of one network find each other by name with netavark only. podman keeps the older CNI if it started
    # with it.
    if [ -x /usr/lib/podman/aardvark-dns ]; then
      printf '[network]\nnetwork_backend = "netavark"\n' >> "$CONTAINERS_CONF"
    fi
    export CONTAINERS_CONF
  fi
else
  echo "no container engine: install docker or podman (Debian: apt-get install podman buildah runc catatonit)" >&2
  return 1
fi
