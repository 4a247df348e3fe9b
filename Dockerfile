# lora-merge on CPUs: docs/install.md says how to build and run it.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY lora_merge lora_merge
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
# The builds of torch for CPUs: a tenth of the size of those with CUDA, which PyPI has.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=build /wheels /wheels
COPY constraints.txt /wheels/
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" --constraint /wheels/constraints.txt /wheels/*.whl
RUN useradd --create-home merge
USER merge
WORKDIR /work
ENV HF_HUB_OFFLINE=1
ENTRYPOINT ["lora-merge"]
CMD ["--help"]
