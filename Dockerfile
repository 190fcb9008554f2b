# The training image. `docker run IMAGE` pretrains on the demo; `docker run --gpus all IMAGE pretrain ...` uses GPUs.
#
#   docker build -t babybert-train .                                                  CUDA
#   docker build -t babybert-train:cpu --build-arg TORCH=cpu --build-arg BASE=docker.io/library/debian:bookworm-slim .
#
# --build-arg RAY=1 adds Ray, for `prepare --engine ray` and the pods of k8s/prepare-rayjob.yaml (babybert-ray).
#
# BASE is any Debian or Ubuntu with Python 3.11 or later (TORCH=cpu: exactly 3.11, as in its requirements file).
# PyTorch's wheels contain the CUDA libraries and the host has the driver, so the base only has to declare the driver
# that it requires.
# Pin BASE by digest in your own registry. docker/build-images.sh builds both images.
ARG BASE=docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04

# For both stages: Python, tini as init process, certificates for S3, OpenMP for numba's threads.
# hadolint ignore=DL3006
FROM ${BASE} AS python
ARG TORCH=cuda
ENV DEBIAN_FRONTEND=noninteractive
# Triton compiles a small C file when it first loads a GPU kernel, so the CUDA image keeps a C compiler.
# Package versions are not pinned here: the base image fixes them.
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
ARG RAY=0
RUN if [ "$RAY" = 1 ]; then /opt/venv/bin/pip install --require-hashes --no-deps -r /locks/requirements-ray.txt; fi
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
# The volumes lie below the working folder, where the defaults of the commands point. Any --user may write to them.
RUN mkdir -p /babybert/data /babybert/runs && chmod 0777 /babybert/data /babybert/runs
WORKDIR /babybert
VOLUME ["/babybert/data", "/babybert/runs"]
# The root can be read-only, so kernels compiled for this machine go to /tmp. The user has no entry in passwd, so USER
# and HOME are set. Variables override a configuration file, so only the one that every container needs is set.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp USER=babybert TMPDIR=/tmp NUMBA_CACHE_DIR=/tmp/numba TRITON_CACHE_DIR=/tmp/triton \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    BABYBERT_PRETRAIN_METRICS_HOST=0.0.0.0
USER 10001:10001
EXPOSE 9109
# No HEALTHCHECK: a job runs to its end.
# The labels come last because they differ in each build; the layers above stay cached.
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="babybert-train" \
      org.opencontainers.image.description="Pretrains a small BERT (MLM and NSP) from raw text" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# As process 1, Python would ignore SIGTERM where no handler is set, as in `prepare`. tini is process 1 instead: it
# forwards signals and exits with the exit code of the command.
ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/train-entrypoint"]
