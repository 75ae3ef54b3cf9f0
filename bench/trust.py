"""Is the picture as good as the service says, without knowing the truth?

Streams of the simulated specimen, one that holds still and one that drifts and hops, are denoised; the
estimate from each denoised frame and the raw one after it (`emstream.trust`) is held against the error that
the truth shows. Coverage: how often the 95 % interval contains the true PSNR of the very frames it is about.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from bench import report
from emstream import load_engine
from emstream.inference import Engine
from emstream.sources.specimen import MovingSpecimen
from emstream.trust import Trust

SCENES: dict[str, dict[str, Any]] = {
    "still": {"drift_pm": 0.0, "frames_per_hop": 10**6},
    "drifting and hopping": {},
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = report.parser("trust", __doc__)
    parser.add_argument("--engine", help="[default: the one that ships]")
    parser.add_argument("--streams", type=int, default=20, help="of each kind (default: %(default)s)")
    parser.add_argument(
        "--pairs", type=int, default=600, help="of frames, in each stream (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=256, help="of a frame [px] (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.streams, arguments.pairs, arguments.size = 2, 200, 64
    engine = load_engine(arguments.engine)
    results: dict[str, Any] = {
        **report.stamp("trust", argv),
        "engine": engine.identity,
        "pairs": arguments.pairs,
        "size_px": arguments.size,
        "scenes": {},
    }
    with report.progress("trust", len(SCENES) * arguments.streams) as show:
        for n, (name, options) in enumerate(SCENES.items()):
            streams = []
            for seed in range(arguments.streams):
                specimen = MovingSpecimen(
                    seed=100 + seed, dose=0.45, height=arguments.size, width=arguments.size, **options
                )
                streams.append(stream(engine, specimen, arguments.pairs))
                show(n * arguments.streams + seed + 1, name)
            results["scenes"][name] = summary(streams)
    report.write("trust", "Trust", results, _markdown(results), arguments)
    return results


def stream(engine: Engine, specimen: MovingSpecimen, pairs: int) -> dict[str, Any]:
    """One stream's estimate beside the truth."""
    trust, errors = Trust(None), []
    for n in range(pairs):
        number = 2 * n
        denoised = engine.denoise(specimen.counts(number))
        errors.append(np.mean(np.square(denoised - specimen.intensity(number)), dtype=np.float64))
        trust.pair(denoised, specimen.counts(number + 1))
    return {"true_db": -10 * math.log10(np.mean(errors)), **trust.report()}


def summary(streams: list[dict[str, Any]]) -> dict[str, Any]:
    """How near the estimates of several streams came to the truth; those that gave none are counted apart."""
    told = [(each["true_db"], each["psnr_db"]) for each in streams if isinstance(each["psnr_db"], dict)]
    scored: dict[str, Any] = {"streams": len(streams), "told": len(told)}
    if told:
        off = [estimate["value"] - true for true, estimate in told]
        scored |= {
            "true_db": round(float(np.mean([true for true, _ in told])), 2),
            "estimate_db": round(float(np.mean([estimate["value"] for _, estimate in told])), 2),
            "off_db": round(float(np.mean(off)), 2),
            "off_sd_db": round(float(np.std(off)), 2),
            "interval_db": round(float(np.mean([e["high"] - e["low"] for _, e in told])), 2),
            "covered": round(float(np.mean([e["low"] <= true <= e["high"] for true, e in told])), 3),
        }
    return scored


def _markdown(results: dict[str, Any]) -> str:
    keys = ("streams", "told", "true_db", "estimate_db", "off_db", "off_sd_db", "interval_db", "covered")
    columns = (
        "scene", "streams", "gave a figure", "true PSNR [dB]", "estimate [dB]", "off by [dB]", "sd [dB]",
        "interval [dB]", "covers the truth",
    )  # fmt: skip
    rows = [(name, *(each.get(key) for key in keys)) for name, each in results["scenes"].items()]
    return (
        f"{results['pairs']} pairs of frames of {results['size_px']}x{results['size_px']} px at 0.45 electrons per "
        f"pixel in each stream; engine {results['engine']['name']}. PSNR of the mean square error, peak 1 electron.\n\n"
        + report.table(columns, rows)
    )


if __name__ == "__main__":
    main()
