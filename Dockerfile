# The command tune-vl for NVIDIA GPUs: docker build -t torchtune-vl .
# Checkpoint, data and output_dir are mounted: see docs/clusters.md.
FROM python:3.11-slim-bookworm

# gcc, libc6-dev: torch.compile builds with them when a run starts
# ibverbs-providers: without it, NCCL leaves InfiniBand and RoCE for TCP and does not say so
# tini: as process 1, Python would not end on a SIGTERM that comes before it has a handler
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc ibverbs-providers libc6-dev tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/torchtune-vl
COPY LICENSE README.md constraints.txt pyproject.toml ./
COPY torchtune_vl torchtune_vl
# PyPI's torch for Linux is the one for CUDA, with its libraries
RUN pip install --no-cache-dir --constraint constraints.txt .

# Any user can run it (docker run --user), also one that has no name and no home
ENV HOME=/tmp LOGNAME=tune-vl NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /workspace
ENTRYPOINT ["tini", "--"]
CMD ["tune-vl", "--help"]
