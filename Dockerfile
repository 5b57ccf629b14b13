# The environment of a run in a container: docker build -t coatnet . (or podman, buildah)
# The code in it is what `coatnet train` runs; jobs of `coatnet submit` run the copy in their run folder instead.
FROM python:3.11-slim-bookworm

# A compiler for torch.compile and for DeepSpeed's operators, libaio for offload to NVMe; git names the commit.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ ninja-build libaio-dev git \
    && rm -rf /var/lib/apt/lists/*

# The versions of the tests; torch brings CUDA's libraries along, the driver is the host's.
COPY requirements.lock /opt/coatnet/
RUN DS_BUILD_OPS=0 pip install --no-cache-dir --no-deps -r /opt/coatnet/requirements.lock

COPY pyproject.toml README.md LICENSE /opt/coatnet/
COPY configs /opt/coatnet/configs
COPY models /opt/coatnet/models
COPY data_pipeline /opt/coatnet/data_pipeline
COPY trainer /opt/coatnet/trainer
COPY slurm /opt/coatnet/slurm
RUN pip install --no-cache-dir --no-deps -e /opt/coatnet && coatnet models > /dev/null

WORKDIR /workspace
ENTRYPOINT ["coatnet"]
