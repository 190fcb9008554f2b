# The training image: `docker run IMAGE` pretrains on the demo, `docker run --gpus all IMAGE pretrain ...` the real thing.
#
#   docker build -t babybert-train .                                                  CUDA
#   docker build -t babybert-train:cpu --build-arg TORCH=cpu --build-arg BASE=docker.io/library/debian:bookworm-slim .
#
# BASE is any Debian or Ubuntu with a Python from 3.11 on (TORCH=cpu: 3.11, which its lock is for). PyTorch's wheels bring
# CUDA's libraries along, and the machine its driver, so the base needs none of CUDA but what declares the driver it asks for.
# Pin BASE by digest in your own registry. docker/build-images.sh builds both images, with a base of its own if need be.
ARG BASE=docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04

# What both stages have: a Python, an init for signals and orphans, certificates for S3, OpenMP for numba's threads.
# hadolint ignore=DL3006
FROM ${BASE} AS python
ARG TORCH=cuda
ENV DEBIAN_FRONTEND=noninteractive
# Triton compiles a small C file when a GPU's kernel is first loaded: with CUDA, a C compiler stays in the image.
# Debian's and Ubuntu's versions are those of the base, which is what is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 tini ca-certificates libgomp1 \
 && if [ "$TORCH" = cuda ]; then apt-get install -y --no-install-recommends gcc libc6-dev libpython3-dev; fi \
 && rm -rf /var/lib/apt/lists/* /var/cache/debconf/* /var/log/apt /var/log/dpkg.log /usr/share/doc /usr/share/man

FROM python AS builder
ARG TORCH=cuda
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY docker/requirements-*.txt /locks/
RUN python3 -m venv /opt/venv && python3 -m venv /opt/build \
 && /opt/build/bin/pip install --require-hashes --no-deps -r /locks/requirements-build.txt
RUN if [ "$TORCH" = cpu ] && [ -n "$TORCH_CPU_INDEX" ]; then export PIP_EXTRA_INDEX_URL="$TORCH_CPU_INDEX"; fi \
 && /opt/venv/bin/pip install --require-hashes --no-deps -r "/locks/requirements-torch-$TORCH.txt"
RUN /opt/venv/bin/pip install --require-hashes --no-deps -r /locks/requirements-train.txt
COPY docker/trim.sh /usr/local/bin/trim
RUN trim /opt/venv
COPY pyproject.toml README.md LICENSE /source/
COPY babybert /source/babybert
COPY handler /source/handler
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --no-index -w /dist /source \
 && /opt/build/bin/pip --python /opt/venv/bin/python install --no-deps --no-index /dist/*.whl

FROM python
COPY --from=builder /opt/venv /opt/venv
COPY docker/train-entrypoint.sh /usr/local/bin/train-entrypoint
# Volumes for data and runs lie below the working folder, where the commands' defaults point. Whoever --user names may write there.
RUN mkdir -p /babybert/data /babybert/runs && chmod 0777 /babybert/data /babybert/runs
WORKDIR /babybert
VOLUME ["/babybert/data", "/babybert/runs"]
# The root can be read-only: what is compiled for this machine's processor or GPU goes to /tmp. The user has no entry in
# passwd, so its name and home are told. Variables win over a configuration file: only one that a container always needs is set.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp USER=babybert TMPDIR=/tmp NUMBA_CACHE_DIR=/tmp/numba TRITON_CACHE_DIR=/tmp/triton \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    BABYBERT_PRETRAIN_METRICS_HOST=0.0.0.0
USER 10001:10001
EXPOSE 9109
# No HEALTHCHECK: a job is not healthy or unhealthy, it ends.
# Last, as they differ in each build: the layers above are kept.
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="babybert-train" \
      org.opencontainers.image.description="Pretrains a small BERT (MLM and NSP) from raw text" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# As process 1 a Python without a handler ignores SIGTERM (preparing data has none): tini is process 1, passes it on,
# and ends with the command's exit code.
ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/train-entrypoint"]
