"""A real NVIDIA Triton Inference Server on this machine: that of the package nvidia-pytriton.

Its engine room has only Python in it, and so the networks of a repository are run by
`backend.py`, which Triton takes for the backend that their configuration asks for. All
else is Triton: the repository, its configuration, versions, batches, and the protocol.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

BACKENDS = ("onnxruntime", "openvino", "tensorrt")
_START_S = 60.0


class Triton:
    """A server of the models in `repository`; `start` again after `stop` listens on the same port."""

    def __init__(self, repository: Path, folder: Path) -> None:
        pytest.importorskip("tritonclient", reason="emstream[remote] is not installed")
        found = importlib.util.find_spec("pytriton")
        if found is None or found.origin is None:
            pytest.skip("no Triton: pip install --no-deps nvidia-pytriton")
        self._package = Path(found.origin).parent
        self._folder = folder / "triton"
        self._repository = repository
        self._lay_out()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._shared = f"emstream-tests-{self.port}-"
        self._process: subprocess.Popen[bytes] | None = None
        self.log = self._folder / "log"
        self.options: list[str] = []
        self.certificate: Path | None = None
        """Of an encrypted server."""

    def _lay_out(self) -> None:
        server = self._package / "tritonserver"
        stub = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub_path = server / "python_backend_stubs" / stub / "triton_python_backend_stub"
        if not stub_path.exists():
            pytest.skip(f"nvidia-pytriton has no Python {stub}")
        python = self._folder / "backends" / "python"
        shutil.copytree(server / "backends" / "python", python)
        shutil.copy2(stub_path, python)
        for name in BACKENDS:
            (self._folder / "backends" / name).mkdir()
            shutil.copy2(
                Path(__file__).with_name("backend.py"), self._folder / "backends" / name / "model.py"
            )

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, model: str) -> str:
        return f"grpc://{self.host}/{model}"

    def start(self) -> Triton:
        """Returns when it is ready."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.stop(signal.SIGKILL)
                pytest.fail(self.log.read_text())
            time.sleep(0.1)
        return self

    def _command(self) -> list[str | Path]:
        return [
            self._package / "tritonserver" / "bin" / "tritonserver",
            f"--model-repository={self._repository}",
            f"--backend-directory={self._folder / 'backends'}",
            f"--grpc-port={self.port}",
            "--grpc-address=127.0.0.1",
            "--allow-http=false",
            "--allow-metrics=false",
            "--model-control-mode=poll",
            "--repository-poll-secs=1",
            "--exit-on-error=false",
            "--exit-timeout-secs=3",
            f"--backend-config=python,shm-region-prefix-name={self._shared}",
            *self.options,
        ]

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "LD_LIBRARY_PATH": str(self._package.parent / "nvidia_pytriton.libs"),
            "PATH_OF_THE_TESTS": os.pathsep.join(path for path in sys.path if path),
        }

    def _answers(self) -> bool:
        from tritonclient import grpc

        options = (
            {} if self.certificate is None else {"ssl": True, "root_certificates": str(self.certificate)}
        )
        host = self.host if self.certificate is None else f"localhost:{self.port}"
        with grpc.InferenceServerClient(host, **options) as client:
            try:
                return bool(client.is_server_ready(client_timeout=5))
            except grpc.InferenceServerException:
                return False

    def stop(self, number: int = signal.SIGTERM) -> None:
        if not self._process:
            return
        self._process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        # What a Triton that was killed leaves behind: its Python, and the memory that they shared.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        for each in Path("/dev/shm").glob(f"{self._shared}*"):
            each.unlink()
