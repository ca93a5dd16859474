# The server without torch: docker build -t image-classifier:0.1.0 .
#   docker run --rm --init --read-only --tmpfs /tmp --cap-drop ALL -p 127.0.0.1:8080:8080 -v "$PWD/models:/models:ro" image-classifier:0.1.0 --checkpoint_name NAME
# More: docs/deployment.md. To pin the base image, add the @sha256:… that `docker buildx imagetools inspect` prints.
ARG PYTHON_IMAGE=python:3.13-slim-trixie

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
WORKDIR /src
# Everything is pinned by hash: first the build tools, then the wheels of the server (one dependency is source only).
COPY deploy/requirements-build.txt deploy/requirements-serve.txt deploy/
RUN python -m venv /opt/build \
 && /opt/build/bin/pip install --require-hashes --only-binary=:all: -r deploy/requirements-build.txt \
 && /opt/build/bin/pip wheel --require-hashes --no-build-isolation --wheel-dir /wheels -r deploy/requirements-serve.txt
COPY pyproject.toml README.md LICENSE commands.py ./
COPY conf conf
COPY image_classifier image_classifier
# The environment of the server has no pip, and is checked before it is copied.
RUN /opt/build/bin/pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /wheels . \
 && python -m venv --without-pip /opt/venv \
 && /opt/build/bin/pip --python /opt/venv/bin/python install --no-deps --no-index --compile /wheels/*.whl \
 && /opt/build/bin/pip --python /opt/venv/bin/python check \
 && /opt/venv/bin/python -c "from importlib.util import find_spec as f; assert not any(map(f, ('torch', 'pip', 'mlflow'))), 'too much inside'" \
 && /opt/venv/bin/image-classifier --version

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="image-classifier" \
      org.opencontainers.image.description="HTTP server of image_classifier: serves a bundle, without torch" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.authors="The image_classifier authors"
# This stage installs no packages. The log of drift.enabled=true needs a volume there; a new one takes the folder's owner.
RUN python -m pip uninstall --yes pip \
 && python -c "import pathlib, shutil, sysconfig; shutil.rmtree(pathlib.Path(sysconfig.get_path('stdlib')) / 'ensurepip')" \
 && install -d -o 10001 -g 10001 /runs/serve
COPY --from=build /opt/venv /opt/venv
# ONNX Runtime sends usage data of each process to Microsoft unless this is set.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
WORKDIR /
# A number, so that Kubernetes sees that it is not root. It writes only to /tmp, and to /runs/serve with drift.enabled=true.
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --start-interval=2s --retries=3 \
  CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8080, timeout=4); c.request('GET', '/readyz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["image-classifier", "serve", "--host", "0.0.0.0", "--port", "8080", "--models_dir", "/models"]
