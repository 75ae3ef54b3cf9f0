"""An inference server whose network changes nothing, for benches to kill: ``python -m bench.kserve HOST:PORT``.

It speaks the Open Inference Protocol over gRPC, keeps no state and is up within a second or so. The card stands in its
model's configuration, as `emstream export` writes it.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MODEL = "identity"
_CARD = {
    "name": "identity", "architecture": "none", "parameters": 0, "field_of_view_px": 1, "multiple_px": 1,
    "bias_free": True, "dose_range": [0, 255], "sampling_pm": 1.0, "psnr_db": 0.0, "ssim": 0.0, "trained": "not at all",
    "commit": "none",
}  # fmt: skip
_LARGEST_BATCH = 8


class Server:
    """One in a process of its own, at a port of this machine that it keeps."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{free.getsockname()[1]}"
        self.start()

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "bench.kserve", self.host]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        if not self.process.stdout.readline():
            raise RuntimeError(
                f"no inference server came up at {self.host}; it needs: pip install 'emstream[remote]'"
            )

    def kill(self) -> None:
        """At once."""
        self.process.kill()
        self.process.communicate()


def main(host: str) -> None:
    import grpc
    from tritonclient.grpc import service_pb2 as pb
    from tritonclient.grpc.service_pb2_grpc import (
        GRPCInferenceServiceServicer,
        add_GRPCInferenceServiceServicer_to_server,
    )

    frames = {"datatype": "FP32", "shape": [-1, -1, -1]}

    class Identity(GRPCInferenceServiceServicer):  # type: ignore[misc]
        def ServerMetadata(self, request: Any, context: Any) -> Any:
            return pb.ServerMetadataResponse(name="identity server", version="1")

        def ModelMetadata(self, request: Any, context: Any) -> Any:
            answer = pb.ModelMetadataResponse(name=MODEL, versions=["1"])
            answer.inputs.add(name="counts", **frames)
            answer.outputs.add(name="expected_counts", **frames)
            return answer

        def ModelConfig(self, request: Any, context: Any) -> Any:
            answer = pb.ModelConfigResponse()
            answer.config.name, answer.config.max_batch_size = MODEL, _LARGEST_BATCH
            text = json.dumps({"sha256": "0" * 64, "version": 1, **_CARD})
            answer.config.parameters["emstream"].string_value = text
            return answer

        def ModelInfer(self, request: Any, context: Any) -> Any:
            answer = pb.ModelInferResponse(model_name=MODEL, model_version="1")
            answer.outputs.add(name="expected_counts", datatype="FP32", shape=request.inputs[0].shape)
            answer.raw_output_contents.append(request.raw_input_contents[0])
            return answer

    server = grpc.server(ThreadPoolExecutor(4))
    add_GRPCInferenceServiceServicer_to_server(Identity(), server)
    if not server.add_insecure_port(host):
        raise SystemExit(f"{host} is taken")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main(sys.argv[1])
