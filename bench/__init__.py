"""Measurements, each a command: ``python -m bench.NAME --help``.

throughput.py   the transport against a bare pyzmq relay
engines.py      the same network in OpenVINO, ONNX Runtime and PyTorch
quality.py      the picture against the truth, and against a tuned blur
latency.py      scheduled send to a subscriber's receipt, stage by stage, at several loads
record.py       frames per second onto the disk, and what a killed recorder loses
cameras.py      a detector's frames into their slots, against the decompressing library alone
interop.py      cameras that others wrote, whole and killed in mid-series
fuzz.py         damaged messages for every decoder of a detector's stream
gpu/            all of it on an NVIDIA GPU, in one script: right, how fast, how far from the floor
rig.py          the processes around a service under test
readme.py       tables from results/ into the README
report.py       tables and files in results/
"""
