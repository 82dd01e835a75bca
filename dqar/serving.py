"""A queue of requests on one pipeline: those with equal settings are drawn together, and each gets its own image."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch

from dqar.attention import apply_dqar
from dqar.checks import check, check_count, is_number
from dqar.forecast.ladder import PlanLadder
from dqar.forecast.plan import ForecastPlan
from dqar.plan import ReusePlan

ROWS = ("prompt", "negative_prompt", "class_labels")
"""Arguments of pipelines of which each image has its own; requests that are drawn together have all others alike."""
Plan = ReusePlan | ForecastPlan | PlanLadder


@dataclass
class _Request:
    """What was submitted, and where its image goes."""

    seed: int
    rows: dict[str, Any]
    settings: dict[str, Any]
    image: Future[Any] = field(default_factory=Future)

    def joins(self, other: _Request) -> bool:
        """Whether both can be drawn in one call; arrays are alike if they are the same object."""
        try:
            return self.rows.keys() == other.rows.keys() and bool(self.settings == other.settings)
        except (ValueError, RuntimeError):  # other arrays are equal in many places or none
            return False


class RequestQueue:
    """Draws requests in batches, in a thread of its own; a context manager, which draws all before it ends.

    Each image has a generator of its own, so that it is the one that its request would get alone, but for rounding:
    kernels sum in another order in other batches. A ``DQARConfig`` that gates decides for a whole batch, so that an
    image would depend on its neighbours; it isn't taken here. A ``PlanLadder`` decides image by image.

    Args:
        pipe: a pipeline; nobody else may use it meanwhile.
        batch_size: requests that are drawn together, at most.
        plans: by number of steps: what DQAR is applied with. Other numbers are then refused. ``None``: DQAR isn't
            applied, and every number that the scheduler knows is accepted.
        wait: seconds that a request waits for others of its settings, where fewer than ``batch_size`` are there.
        shared: arguments of all calls, such as ``output_type="pt"``.

    Raises:
        ValueError: names the argument, its value and what is accepted.
    """

    def __init__(
        self,
        pipe: Any,
        batch_size: int,
        plans: Mapping[int, Plan] | None = None,
        wait: float = 0.0,
        **shared: Any,
    ):
        check_count("batch_size", batch_size, 1)
        check("wait", wait, is_number(wait), "seconds, 0 or more")
        check("plans", plans, plans is None or isinstance(plans, Mapping), "plans by their number of steps")
        for name in ("num_inference_steps", "generator"):
            check(name, shared.get(name), name not in shared, "`submit` takes the number of steps, and a seed")
        for steps, plan in (plans or {}).items():
            kinds = "ReusePlan, ForecastPlan or PlanLadder: a gate decides for a whole batch"
            check("plans", type(plan).__name__, isinstance(plan, Plan), kinds)
            first = plan.plans[0] if isinstance(plan, PlanLadder) else plan
            # A run that begins late, as of an image to be changed, takes fewer steps than are asked for.
            made_for = first.provenance.get("num_inference_steps", first.num_inference_steps)
            check("plans", f"{{{steps}: ...}}", steps == made_for, f"this plan was made for {made_for} steps")
        self.pipe, self.batch_size, self.plans, self.wait = pipe, batch_size, plans, wait
        self.batches: list[int] = []
        """How many requests were drawn together, batch by batch."""
        self._shared = shared
        self._waiting: list[_Request] = []
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="dqar-requests", daemon=True)
        self._worker.start()

    def submit(self, seed: int, num_inference_steps: int = 50, **call: Any) -> Future[Any]:
        """Asks for one image.

        Args:
            seed: of its noise: ``torch.Generator().manual_seed(seed)``.
            num_inference_steps: of its run.
            call: the pipeline's other arguments. ``prompt``, ``negative_prompt`` and ``class_labels`` are one image's,
                as in ``class_labels=207``.

        Returns:
            The image, once it is drawn: an element of the pipeline's first output. Or the error: of a batch that fails,
            each request is tried alone.

        Raises:
            ValueError: a number of steps that can't be drawn, a seed that is none, or a generator.
            RuntimeError: the queue is closed.
        """
        numbers = None if self.plans is None else sorted(self.plans)
        most = getattr(self.pipe.scheduler.config, "num_train_timesteps", 1000)
        check_count("num_inference_steps", num_inference_steps, 1)
        check("seed", seed, isinstance(seed, Integral), "an int")
        check("generator", call.get("generator"), "generator" not in call, "the seed makes each image's own")
        accepted = f"up to the scheduler's {most}" if numbers is None else f"there are plans for {numbers}"
        possible = num_inference_steps <= most if numbers is None else num_inference_steps in numbers
        check("num_inference_steps", num_inference_steps, possible, accepted)
        rows = {name: value for name in ROWS if (value := call.pop(name, None)) is not None}
        request = _Request(seed, rows, {**self._shared, **call, "num_inference_steps": num_inference_steps})
        with self._changed:
            if self._closed:
                raise RuntimeError("the queue is closed: nothing more is drawn")
            self._waiting.append(request)
            self._changed.notify()
        return request.image

    def close(self) -> None:
        """Waits until all is drawn that was submitted. Nothing more is accepted."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    def __enter__(self) -> RequestQueue:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- the worker --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while batch := self._next_batch():
            running = [request for request in batch if request.image.set_running_or_notify_cancel()]
            if running:
                self._draw(running)

    def _next_batch(self) -> list[_Request]:
        """The oldest request, and the next ones that can be drawn with it; empty when the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            until = time.monotonic() + self.wait
            while True:
                batch = [request for request in self._waiting if request.joins(self._waiting[0])][: self.batch_size]
                left = until - time.monotonic()
                if len(batch) == self.batch_size or self._closed or left <= 0:
                    break
                self._changed.wait(left)
            self._waiting = [request for request in self._waiting if all(request is not other for other in batch)]
            return batch

    def _draw(self, batch: list[_Request]) -> None:
        """Gives each request its image, or its error."""
        try:
            images = self._images(batch)
        except BaseException as error:  # whatever it is, somebody waits for it
            if len(batch) == 1:
                batch[0].image.set_exception(error)
                return
            for request in batch:
                self._draw([request])
            return
        self.batches.append(len(batch))
        for request, image in zip(batch, images, strict=True):
            request.image.set_result(image)

    def _images(self, batch: list[_Request]) -> Any:
        settings = batch[0].settings
        rows = {name: [request.rows[name] for request in batch] for name in batch[0].rows}
        generators = [torch.Generator().manual_seed(request.seed) for request in batch]
        plan = None if self.plans is None else self.plans[settings["num_inference_steps"]]
        with contextlib.nullcontext() if plan is None else apply_dqar(self.pipe, plan):
            images = self.pipe(**rows, **settings, generator=generators)[0]
        if len(images) != len(batch):
            raise ValueError(f"the pipeline drew {len(images)} images of {len(batch)} requests: ask for one each")
        return images
