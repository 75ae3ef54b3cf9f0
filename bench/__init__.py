"""Measurements, each a command: ``python -m bench.NAME --help``.

throughput.py   the transport against a bare pyzmq relay
engines.py      the same network in OpenVINO, ONNX Runtime and PyTorch
quality.py      the picture against the truth, and against a tuned blur
latency.py      scheduled send to a subscriber's receipt, stage by stage, at several loads
record.py       frames per second onto the disk, and what a killed recorder loses
cameras.py      a detector's frames into their slots, against the decompressing library alone
interop.py      cameras that others wrote, whole and killed in mid-series
fuzz.py         damaged messages for every decoder of a detector's stream
chaos.py        kills, full disks, garbage and standstills at random, and whether the ledger stays exact
soak.py         left running at full rate: memory, open files, latency, first minute against last
flood.py        a million malformed messages on each socket of a running service
knock.py        ten thousand clients without the right key
swap.py         a hundred other engines while frames come
trust.py        the estimate of the picture's quality against the truth
viewers.py      what viewers of the live page cost
gpu/            all of it on an NVIDIA GPU, in one script: right, how fast, how far from the floor
malformed.py    messages that are surely none
messages.py     what cameras send
program.py      a service as a program of its own, and what it takes of the machine
rig.py          the processes around a service under test
readme.py       tables from results/ into the README
report.py       tables and files in results/
"""
