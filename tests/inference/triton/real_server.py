"""A real Triton server without a container: the one inside NVIDIA's pip package, in an environment of its own that
TRITON_ENV names.

    python3 -m venv /some/env && /some/env/bin/pip install nvidia-pytriton==0.7.0 'numpy<2' onnxruntime
    TRITON_ENV=/some/env python -m pytest -m triton

It has no ONNX Runtime backend of its own; one written in Python takes its name and its place, so that it serves what
`export --to triton` wrote, unchanged.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

BACKEND = '''"""ONNX Runtime as a backend in Python; a model's parameter delay_ms makes it slow."""
import json
import time
from pathlib import Path

import numpy
import onnxruntime
import triton_python_backend_utils as pb

if int(numpy.__version__.split(".")[0]) >= 2:
    raise RuntimeError("this server hands zeros in the place of pixels to numpy 2")


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.delay_s = int(config["parameters"].get("delay_ms", {"string_value": "0"})["string_value"]) / 1000
        self.outputs = [output["name"] for output in config["output"]]
        path = Path(args["model_repository"]) / args["model_version"] / config["default_model_filename"]
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def execute(self, requests):
        time.sleep(self.delay_s)
        return [self.answer(pb.get_input_tensor_by_name(request, "pixels").as_numpy()) for request in requests]

    def answer(self, pixels):
        found = self.session.run(self.outputs, {"pixels": pixels})
        return pb.InferenceResponse([pb.Tensor(name, value) for name, value in zip(self.outputs, found)])
'''

PROGRAM = """#!/bin/sh
PATH={env}/bin:$PATH LD_LIBRARY_PATH={libraries} exec {server}/bin/tritonserver \\
  --backend-directory={backends} --allow-gpu-metrics=false "$@"
"""


def environment() -> Path:
    """The environment with the server; the test is skipped where it is not there."""
    named = os.environ.get("TRITON_ENV", "")
    if not named or not (Path(named) / "bin/python").exists():
        pytest.skip(
            "TRITON_ENV names no environment with nvidia-pytriton: tests/inference/triton/real_server.py "
            "says how one is made"
        )
    return Path(named).absolute()


def real_program(folder: Path) -> Path:
    """A `tritonserver` that runs with its own Python and libraries, written into a new folder."""
    env = environment()
    ask = (
        "import sys, sysconfig; "
        "print(sysconfig.get_path('purelib'), sysconfig.get_config_var('LIBDIR'), '%d.%d' % sys.version_info[:2])"
    )
    site, libdir, version = subprocess.run(
        [env / "bin/python", "-c", ask], capture_output=True, text=True, check=True
    ).stdout.split()
    server, backends = Path(site) / "pytriton" / "tritonserver", folder / "backends"
    shutil.copytree(server / "backends/python", backends / "python")
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    (backends / "onnxruntime").mkdir()
    (backends / "onnxruntime" / "model.py").write_text(BACKEND)
    libraries = f"{libdir}:{site}/nvidia_pytriton.libs"
    program = folder / "tritonserver"
    program.write_text(PROGRAM.format(env=env, libraries=libraries, server=server, backends=backends))
    program.chmod(0o755)
    return program
