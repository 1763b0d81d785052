"""Tails and moments of the normal field on 1e9 draws, beside what independent normals would give: python -m bench.tails

Each count and each moment is compared in units of its own standard deviation (5 of them are the target).
"""

import argparse
import math
from pathlib import Path

import torch

import pyzo
from bench.harness import Recorder, against, table

CHUNK = 1 << 20
SIGMAS = (3, 4, 5, 6)
MOMENTS = {1: 0, 2: 1, 3: 0, 4: 3, 5: 0, 6: 15}
SQUARES = {1: 1, 2: 3, 3: 15, 4: 105, 5: 945, 6: 10395}  # E z^(2k)


def count_draws(
    n: int, *, seed: int, key: int, device: str = "cpu"
) -> tuple[dict[tuple[int, int], int], dict[int, float]]:
    """Counts beyond (sigma, side) and sums of powers of the first `n` elements of a tensor; CHUNK divides n."""
    counts = dict.fromkeys([(sigma, side) for sigma in SIGMAS for side in (-1, 1)], 0)
    sums = dict.fromkeys(MOMENTS, 0.0)
    for offset in range(0, n, CHUNK):
        z = pyzo.noise(CHUNK, seed=seed, key=key, offset=offset, device=device)
        for sigma, side in counts:
            counts[sigma, side] += int((side * z > sigma).sum())
        z = z.double()
        power = torch.ones_like(z)
        for order in sums:
            power *= z
            sums[order] += float(power.sum())
    return counts, sums


def run(recorder: Recorder, n: int, *, seed: int = 1, key: int = 2) -> None:
    """Adds a row for each tail and each moment: deviation from a normal, in standard deviations of the estimate."""
    n = n // CHUNK * CHUNK
    config = {"draws": n, "seed": seed, "key": key}
    counts, sums = count_draws(n, seed=seed, key=key, device=recorder.device)
    for (sigma, side), count in counts.items():
        p = math.erfc(sigma / math.sqrt(2)) / 2
        deviation = (count - n * p) / math.sqrt(n * p * (1 - p))
        name = f"draws {'above' if side > 0 else 'below'} {side * sigma} sigma"
        recorder.add(
            name,
            "pyzo",
            config,
            count=count,
            expected=n * p,
            value=abs(deviation),
            unit="sd",
            **against(5, abs(deviation), at_least=False),
        )
    for order, total in sums.items():
        deviation = (total / n - MOMENTS[order]) / math.sqrt((SQUARES[order] - MOMENTS[order] ** 2) / n)
        recorder.add(
            f"moment {order}",
            "pyzo",
            config,
            moment=total / n,
            expected=MOMENTS[order],
            value=abs(deviation),
            unit="sd",
            **against(5, abs(deviation), at_least=False),
        )


def main(arguments: list[str] | None = None) -> None:
    """Draws, prints, records."""
    parser = argparse.ArgumentParser(prog="python -m bench.tails", description="Tails and moments of the normal field.")
    parser.add_argument("--draws", type=float, default=1e9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dry-run", action="store_true", help="few draws, rows to a temporary folder")
    parser.add_argument(
        "--out", type=Path, help="file of JSON lines to append to, instead of bench/results/<machine>.jsonl"
    )
    options = parser.parse_args(arguments)
    recorder = Recorder("tails", device=options.device, dry_run=options.dry_run, out=options.out)
    run(recorder, 4 * CHUNK if options.dry_run else int(options.draws))
    print(table(recorder.rows))
    print(f"{len(recorder.rows)} rows -> {recorder.write()}")


if __name__ == "__main__":
    main()
