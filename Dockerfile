# For the CPU: docker build -t olvae .
# For CUDA:    docker build -t olvae --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 --build-arg TORCH=cu128 .
# To use it:   docker run --rm --gpus all --shm-size 4g --user "$(id -u):$(id -g)" -v "$PWD:/work" olvae train --base demo
ARG BASE=debian:13-slim
FROM ${BASE}
ARG TORCH=cpu

# g++ and Python's headers are for torch.compile.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/olvae \
    && useradd --uid 1001 --create-home --home-dir /work olvae
ENV PATH=/opt/olvae/bin:$PATH

WORKDIR /src
# pyproject.toml has the versions.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir torch torchvision --index-url "https://download.pytorch.org/whl/${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY olvae olvae
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[train]'

# Downloaded weights are cached in /work too; any user may be named with --user.
ENV HOME=/work USER=olvae
USER 1001
WORKDIR /work
ENTRYPOINT ["olvae"]
