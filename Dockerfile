# Two images from one file: `--target api` (API, sweeper, migrations, Flower; no torch) and `--target worker` (torch).
# Python 3.11 is what the pins in constraints.txt were tested with. Nothing is installed whose sha256 does not stand in
# requirements/, for x86-64 and arm64; another build of torch (CPU, ROCm) needs a file of its own there: docs/security.md.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG WORKER_REQUIREMENTS=requirements/worker.txt

# ---- what both images need, compiled into one virtual environment ---------------------------------------------------
FROM ${PYTHON_IMAGE} AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/farm/bin:$PATH
WORKDIR /src
RUN ["python3", "-m", "venv", "/opt/farm"]
# Requirements alone first: a change of code does not install them again. Among them hatchling, which builds our wheel
# further down, and Flower, the one embedded server that has no image of its own here.
COPY requirements/ requirements/
RUN ["pip", "install", "--require-hashes", "--requirement", "requirements/api.txt"]

FROM dependencies AS api-build
COPY pyproject.toml README.md LICENSE ./
COPY migrations/ migrations/
COPY farm/ farm/
COPY workers/ workers/
COPY api/ api/
RUN pip install --no-deps --no-build-isolation .

FROM dependencies AS worker-build
ARG WORKER_REQUIREMENTS
RUN pip install --require-hashes --requirement "$WORKER_REQUIREMENTS"
COPY pyproject.toml README.md LICENSE ./
COPY migrations/ migrations/
COPY farm/ farm/
COPY workers/ workers/
COPY api/ api/
RUN pip install --no-deps --no-build-isolation .

# ---- what runs: not root, no compiler, writable only where it has to be ---------------------------------------------
FROM ${PYTHON_IMAGE} AS runtime
# The ids are numbers so that an orchestrator can check "not root" without the image's user list.
RUN groupadd --gid 10001 farm \
 && useradd --uid 10001 --gid farm --home-dir /var/lib/farm --create-home --shell /usr/sbin/nologin farm \
 && install -d -o farm -g farm /var/lib/farm/spool /var/lib/farm/cache
ENV PATH=/opt/farm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FARM_SPOOL_DIR=/var/lib/farm/spool \
    FARM_CACHE_DIR=/var/lib/farm/cache
WORKDIR /var/lib/farm
USER 10001:10001

FROM runtime AS worker
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=worker-build /opt/farm /opt/farm
# Loading a first checkpoint may take minutes; until then a worker is starting, not ill.
HEALTHCHECK --interval=15s --timeout=10s --start-period=10m --retries=4 CMD ["python", "-m", "farm.health", "worker"]
CMD ["farm", "worker"]

FROM runtime AS api
ENV FARM_API_HOST=0.0.0.0
COPY --from=api-build /opt/farm /opt/farm
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-m", "farm.health", "api"]
CMD ["farm", "api"]
