"""Notebook 04: in how few bits a cache can be kept (slide 6)."""

from __future__ import annotations

import dataclasses

import pandas as pd

from dqar.measure.results import Run
from dqar.measure.sampling import OPEN, sample
from dqar.models.pipelines import cached_pipeline
from dqar.quantizer import quantize
from dqar.studies.compare import FULL, Method, compare, draw, summarize


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
    """Images drawn with the cache in 16, 8, 4 and 2 bits, every second step reused: ``compare.summarize``.

    ``psnr`` is to full compute and holds the error of the reuse too; ``psnr_cache`` is to the same reuse with an
    unquantized cache, and holds the error of the bits alone.
    """

    def measure() -> pd.DataFrame:
        number = max(4, run.profile.num_samples // 2)
        reference = draw(FULL, run.profile, run.seed, num_samples=number)
        rows = []
        for target in ("kv", "output"):
            base = dataclasses.replace(OPEN, schedule="static", reuse_target=target, quantize_bits=16)
            methods = [Method(f"{target} 16 bit", config=base)]
            for bits in (8, 4, 2):
                for mode in ("per_tensor", "per_channel", "per_token"):
                    config = dataclasses.replace(base, quantize_bits=bits, quantize_mode=mode)
                    methods.append(Method(f"{target} INT{bits} {mode}", config=config))
            if target == "kv":
                mixed = dataclasses.replace(base, quantize_bits=8, mixed_precision=True)
                methods.append(Method("kv K-FP16 V-INT8", config=mixed))
            unquantized = {"cache": methods[0].draw(run.profile, run.seed, num_samples=number).images}
            rows += [compare(method, reference, run.profile, run.seed, beside=unquantized) for method in methods]
        return summarize(pd.concat(rows, ignore_index=True))

    return run.table("quantization_quality", measure)
