"""What does emstream do on an NVIDIA GPU: is it right, how fast, and how far from what the GPU can do?

    python -m bench.gpu --out DIR [--stages engine,service] [--minutes 9] [--dry-run]

One script for a machine with a GPU and nothing else prepared: what is missing is said, what can
be measured is. Each stage is one question. It runs in a process of its own with a time limit, so
that a hang, a crash or a CUDA error that sticks costs that stage alone; within a stage each row is
measured in another process for the same reason. DIR/gpu.json and DIR/gpu.md are written after
every row, DIR/gpu.log says when what happened. Run again with the same DIR, stages that are done
are skipped (--again redoes them) and rows that are there are kept. Stages that --minutes leaves no
time for are marked "not measured"; they come in order of importance.

Timed spans:

compute
    The network alone, from counts on the GPU to expected counts on the GPU: launched back to back on one
    stream until half a second is full, the last one waited for. The median of three.
submit to collect
    An engine as the service uses it: counts and results in page-locked memory, as many batches in
    flight as the engine takes, for a second after a warm-up.
schedule to subscriber
    From the moment when a frame was due at the camera to its receipt by a subscriber, in an open loop;
    camera, service and subscriber are three processes, as in `bench.latency`.
received to published
    From the service's receipt of a frame to its handing it to ZeroMQ, by the header's own times.

The floor of a network is its multiplications and additions over the rate at which this GPU
multiplies 8192x8192 matrices in half precision, measured in the same run.
"""
