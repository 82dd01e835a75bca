"""Long measurements, made once and committed: ``dqar record --profile digits`` (``make results``).

They take hours on a CPU, so figures read them from ``recorded/``, and a notebook draws a few of the images anew to see
whether they still agree. Each stands beside its question; this is their list.
"""

from __future__ import annotations

from collections.abc import Callable

from dqar.studies import (
    arena,
    batches,
    challenges,
    layers,
    pareto,
    plans,
    policy,
    qat,
    quantized_cache,
    reference,
    results,
    search,
    solvers,
    video,
)
from dqar.studies.recording import Recording

TABLES: dict[str, Callable[[Recording], object]] = {
    "reference": reference.record_reference,
    "labels": policy.record_labels,
    "oracle": policy.record_oracle,
    "policy": policy.record_policies,
    "deciders": policy.record_deciders,
    "overhead": challenges.record_overhead,
    "accumulation": challenges.record_accumulation,
    "sharing": challenges.record_sharing,
    "plans": pareto.record_plans,
    "solvers": solvers.record_solvers,
    "pareto": pareto.record_pareto,
    "arena": arena.record_arena,
    "latents": arena.record_latents,
    "speed": results.record_speed,
    "memory": results.record_memory,
    "samples": results.record_samples,
    "promise": plans.record_promise,
    "rules": plans.record_rules,
    "samplers": plans.record_samplers,
    "history": plans.record_history,
    "formats": quantized_cache.record_formats,
    "bits": quantized_cache.record_bits,
    "classes": plans.record_classes,
    "w8a8": plans.record_w8a8,
    "layers": layers.record_layers,
    "video": video.record_video,
    "batches": batches.record_batches,
    "search": search.record_search,
    "qat": qat.record_qat,
}
"""In the order in which they are recorded. Labels, oracle and policies are recorded where another table needs them;
methods by plans, and what is compared beside them, are left out of the others until plans and pareto are recorded."""
