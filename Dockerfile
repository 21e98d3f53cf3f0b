# docker build -t fastgen .                                                        with CUDA, as PyTorch's wheels bring it
# docker build -t fastgen --build-arg TORCH_INDEX_URL=URL .                        another index, such as PyTorch's for CPUs
# docker run --rm -v "$PWD:/work" fastgen train                                    the quick start, into runs/
# docker run --rm --gpus all -v "$PWD:/work" fastgen train --config my.yaml        a run of your own
FROM python:3.11-slim

ARG TORCH_INDEX_URL=
ARG EXTRAS=eval,demo

RUN useradd --create-home --uid 1000 user && mkdir /work && chown user /work
WORKDIR /opt/fastgen
COPY pyproject.toml README.md LICENSE ./
COPY fastgen fastgen
COPY assets assets
COPY configs configs
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch torchvision \
    && pip install --no-cache-dir ".[$EXTRAS]"

USER user
WORKDIR /work
ENTRYPOINT ["fastgen"]
CMD ["--help"]
