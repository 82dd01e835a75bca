"""Notebook 04: in how few bits a cache can be kept (slide 6)."""

from __future__ import annotations

import dataclasses

import pandas as pd

from dqar.measure.results import Run
from dqar.measure.sampling import OPEN, sample
from dqar.models.pipelines import cached_pipeline
from dqar.quantizer import quantize
from dqar.studies.compare import compare


def quantization_error(run: Run) -> pd.DataFrame:
    """Relative error of this model's own K, V and attention outputs in few bits: tensor, bits, mode, layer, step."""

    def measure() -> pd.DataFrame:
        pipe, rows = cached_pipeline(run.profile), []
        every = max(1, run.profile.num_inference_steps // 5)
        calls = 0

        def look(tensor: str, layer: int):
            def hook(_module, _args, x):
                nonlocal calls
                calls += tensor == "K" and layer == 0
                if (calls - 1) % every:
                    return
                for bits in (8, 4, 2):
                    for mode in ("per_tensor", "per_channel", "per_token"):
                        kept = quantize(x, bits, mode, batch_dims=1)
                        error = ((kept.dequantize() - x).norm() / x.norm()).item()
                        row = {"tensor": tensor, "bits": bits, "mode": mode, "layer": layer, "step": calls - 1}
                        rows.append({**row, "relative_error": error, "bytes_per_value": kept.nbytes / x.numel()})

            return hook

        handles = []
        for layer, block in enumerate(pipe.transformer.transformer_blocks):
            for tensor, module in (("K", block.attn1.to_k), ("V", block.attn1.to_v), ("output", block.attn1)):
                handles.append(module.register_forward_hook(look(tensor, layer)))
        try:
            sample(pipe, run.profile, run.seed, num_samples=1, description="quantization error")
        finally:
            for handle in handles:
                handle.remove()
        return pd.DataFrame(rows)

    return run.table("quantization_error", measure)


def quantization_quality(run: Run) -> pd.DataFrame:
    """Images drawn with the cache in 16, 8, 4 and 2 bits, every second step reused; ``bits``, ``mode``, ``target``.

    ``psnr`` is to full compute and holds the error of the reuse too; ``psnr_cache`` is to the same reuse with an
    unquantized cache, and holds the error of the bits alone.
    """

    def measure() -> pd.DataFrame:
        tables = []
        for target in ("kv", "output"):
            base = dataclasses.replace(OPEN, schedule="static", reuse_target=target, quantize_bits=16)
            configs = {f"{target} 16 bit": base}
            for bits in (8, 4, 2):
                for mode in ("per_tensor", "per_channel", "per_token"):
                    configs[f"{target} INT{bits} {mode}"] = dataclasses.replace(
                        base, quantize_bits=bits, quantize_mode=mode
                    )
            if target == "kv":
                configs["kv K-FP16 V-INT8"] = dataclasses.replace(base, quantize_bits=8, mixed_precision=True)
            table = compare(run, configs, same_as=f"{target} 16 bit", num_samples=max(4, run.profile.num_samples // 2))
            tables.append(
                table.assign(
                    target=target,
                    bits=[c.quantize_bits for c in configs.values()],
                    mode=["mixed" if c.mixed_precision else c.quantize_mode for c in configs.values()],
                )
            )
        return pd.concat(tables)

    return run.table("quantization_quality", measure)
