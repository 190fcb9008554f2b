# The serving image: TorchServe with a model that BABYBERT_MODEL_URI names (a .mar, a run's folder, s3://bucket/prefix).
#
#   docker build -t babybert-serve -f docker/serve.Dockerfile .
#
# A CPU is enough for a model this small. BASE is any Debian or Ubuntu with Python 3.11, as in the requirements file.
ARG BASE=docker.io/library/debian:bookworm-slim

# hadolint ignore=DL3006
FROM ${BASE} AS python
ENV DEBIAN_FRONTEND=noninteractive
# Package versions are not pinned here: the base image fixes them.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 tini ca-certificates \
 && rm -rf /var/lib/apt/lists/* /var/cache/debconf/* /var/log/apt /var/log/dpkg.log /usr/share/doc /usr/share/man

FROM python AS builder
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY docker/requirements-*.txt /locks/
RUN python3 -m venv /opt/venv && python3 -m venv /opt/build \
 && /opt/build/bin/pip install --require-hashes --no-deps -r /locks/requirements-build.txt
RUN if [ -n "$TORCH_CPU_INDEX" ]; then export PIP_EXTRA_INDEX_URL="$TORCH_CPU_INDEX"; fi \
 && /opt/venv/bin/pip install --require-hashes --no-deps -r /locks/requirements-torch-cpu.txt
RUN /opt/venv/bin/pip install --require-hashes --no-deps -r /locks/requirements-serve.txt
COPY docker/trim.sh /usr/local/bin/trim
RUN trim /opt/venv
COPY pyproject.toml README.md LICENSE /source/
COPY babybert /source/babybert
COPY handler /source/handler
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --no-index -w /dist /source \
 && /opt/build/bin/pip --python /opt/venv/bin/python install --no-deps --no-index /dist/*.whl

FROM python
COPY --from=builder /opt/venv /opt/venv
COPY docker/serve-entrypoint.sh /usr/local/bin/serve-entrypoint
COPY docker/ready.py /usr/local/bin/ready
# The root can be read-only, so the model and TorchServe's temporary files go to /tmp. The user has no entry in passwd,
# so USER and HOME are set.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=babybert TMPDIR=/tmp \
    BABYBERT_SERVE_HOST=0.0.0.0
WORKDIR /tmp
USER 10001:10001
# Predictions and metrics. The management API listens on the container's loopback only.
EXPOSE 8080 8082
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["/usr/local/bin/ready"]
# The labels come last because they differ in each build; the layers above stay cached.
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="babybert-serve" \
      org.opencontainers.image.description="Answers fill-mask and next-sentence questions over HTTP with TorchServe" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# tini is process 1: it forwards SIGTERM and reaps the worker processes that Java leaves behind.
ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/serve-entrypoint"]
