# Sourced by what runs containers: sets ENGINE to docker if its daemon answers, else to podman. Fails if neither is there.
if docker info > /dev/null 2>&1; then
  ENGINE=docker
elif command -v podman > /dev/null; then
  ENGINE=podman
  # Without systemd (in a container, say) podman's defaults do not work: runc with plain cgroups does, within this shell's own limits.
  if [ ! -d /run/systemd/system ] && [ -z "${CONTAINERS_CONF:-}" ]; then
    CONTAINERS_CONF=${TMPDIR:-/tmp}/babybert-$(id -u)-containers.conf
    printf '[containers]\ndefault_ulimits = ["nofile=%s:%s", "nproc=32768:32768"]\n' "$(ulimit -Hn)" "$(ulimit -Hn)" > "$CONTAINERS_CONF"
    printf '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n' >> "$CONTAINERS_CONF"
    export CONTAINERS_CONF
  fi
else
  echo "no container engine: install docker or podman (Debian: apt-get install podman buildah runc catatonit)" >&2
  return 1
fi
