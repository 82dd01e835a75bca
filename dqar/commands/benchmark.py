"""``dqar benchmark``: times reuse and entropy at DiT-XL/2's size on this device, or the cost of deciding on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

from dqar.checks import check
from dqar.commands.parser import Parser
from dqar.measure.results import slug
from dqar.studies import benchmarks, overhead


def run(arguments: list[str]) -> int:
    """Prints and saves one table, named after the device.

    Raises:
        ValueError: an argument isn't accepted, or there is no such device.
        OSError: the table can't be written.
    """
    parser = Parser("benchmark", "Times reuse and entropy at DiT-XL/2's size, with random weights.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=benchmarks.DTYPES, help="(default: float32)")
    parser.add_argument("--images", type=int, default=1, help="drawn at once, each guided (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats of each timing (default: 5)")
    parser.add_argument("--num-layers", type=int, default=28, metavar="N", help="fewer for a trial (default: 28)")
    deciding = "time what deciding costs on the digits model instead, on a CPU; takes --repeats and --out only"
    parser.add_argument("--overhead", action="store_true", help=deciding)
    parser.add_argument("--out", type=Path, default=benchmarks.FOLDER, help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("images", "repeats", "num_layers"):
        check("--" + name.replace("_", "-"), getattr(options, name), getattr(options, name) >= 1, "1 or more")
    check("--device", options.device, options.device == "cpu" or torch.cuda.is_available(), "there is no CUDA GPU here")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.overhead:
        path = options.out / benchmarks.OVERHEAD
        summaries = [overhead.summary(benchmarks.run_overhead(options.repeats, path))]
    else:
        name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        path = options.out / f"{slug(name)}-{options.dtype}-batch-{options.images}.parquet"
        dtype = benchmarks.DTYPES[options.dtype]
        table = benchmarks.run(options.device, dtype, options.images, options.num_layers, options.repeats, path)
        summaries = [benchmarks.summary(table), benchmarks.targets(table)]
    for summary in summaries:
        print(summary.round(3).to_string(index=False))
    print(f"saved: {path}")
    return 0
