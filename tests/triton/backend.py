"""What Triton runs the tests' models with, in a process of Triton's: an ONNX network, on the CPU.

A model.plan, for which there is no GPU, is told apart: its "network" halves the counts.
"""

import json
import os
import sys
from pathlib import Path

sys.path += os.environ["PATH_OF_THE_TESTS"].split(os.pathsep)  # Triton's Python has none of its own

import numpy as np
import openvino as ov
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.output = config["output"][0]["name"]
        self.input = config["input"][0]["name"]
        folder = Path(args["model_repository"]) / args["model_version"]
        self.network = None
        if (folder / "model.onnx").exists():
            settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
            self.network = ov.Core().compile_model(folder / "model.onnx", "CPU", settings)

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        # By DLPack, not as_numpy() and Tensor(name, array): those were compiled for the arrays of NumPy 1.
        given = np.from_dlpack(triton.get_input_tensor_by_name(request, self.input))
        if given.size and given.flat[0] == 99:
            return triton.InferenceResponse([], triton.TritonError("the network cannot"))
        if self.network is not None:
            made = next(iter(self.network(given).values()))
        else:
            made = given.view(f"<u{given.shape[-1]}")[..., 0].astype(np.float32) / 2
        return triton.InferenceResponse([triton.Tensor.from_dlpack(self.output, np.array(made))])
