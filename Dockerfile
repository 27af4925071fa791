# For the CPU:  docker build -t olvae .
# For CUDA 13:  docker build -t olvae --build-arg TORCH=cu132 .
# To use it:    docker run --rm --gpus all --shm-size 4g --user "$(id -u):$(id -g)" -v "$PWD:/work" olvae train --base demo
FROM debian:13-slim
# A folder of download.pytorch.org/whl. torch comes from there alone: a build that is not there ends this one.
ARG TORCH=cpu

# g++ and Python's headers are for torch.compile. Any user may be named with --user, so anyone may write to /work.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/olvae \
    && useradd --uid 1001 --create-home --home-dir /work olvae \
    && chmod 777 /work
ENV PATH=/opt/olvae/bin:$PATH

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
RUN sed -nE 's/^ *"(torch(vision)?[<>=].*)",$/\1/p' pyproject.toml > torch.txt \
    && pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${TORCH}" --requirement torch.txt
COPY olvae olvae
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[train]'

# Downloaded weights are cached in /work too.
ENV HOME=/work USER=olvae
USER 1001
WORKDIR /work
ENTRYPOINT ["olvae"]
