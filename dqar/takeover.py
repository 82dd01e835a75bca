"""Takes over a module's calls and watches a scheduler's, without disturbing other hooks on them.

Offloading, other caches and compilers replace a module's ``forward`` and later restore what they found, in any order.
So ``forward`` stays as it is. Instead the module's class is replaced, as PyTorch's parametrizations do it: by a derived
class of the same name whose ``__call__`` runs first. Copies and pickles are of the original class and hold no reference
to the session.
"""

from __future__ import annotations

import copyreg
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import SchedulerMixin

HANDLER = "_dqar_handler"
Handler = Callable[..., Any]
"""Called as ``handler(original, *args, **kwargs)``; ``original`` is the module's call as it was."""

_PICKLE: dict[str, Any] = vars(copyreg)


class _TakenOver(torch.nn.Module):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handler = self.__dict__.get(HANDLER)
        if handler is None:
            return super().__call__(*args, **kwargs)
        return handler(super().__call__, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        taken, original = type(self), type(self).__bases__[1]
        if make is _PICKLE["__newobj__"]:  # which checks that the class is the object's own
            make, arguments = _PICKLE["_reconstructor"], (taken, object, None)
        arguments = tuple(original if argument is taken else argument for argument in arguments)
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != HANDLER}
        return (original if make is taken else make, arguments, *rest)


@functools.cache
def _taken_over(cls: type) -> type:
    # The compiler works around the handler. Used as a decorator, this would import the compiler at once.
    call = torch.compiler.disable(_TakenOver.__call__)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "__call__": call}
    return type(cls.__name__, (_TakenOver, cls), names)


def take_over(module: torch.nn.Module, handler: Handler) -> None:
    """Sends ``module``'s calls to ``handler`` until ``give_back``.

    Raises:
        ValueError: the module is taken over already.
    """
    if handler_of(module) is not None:
        raise ValueError(f"this {type(module).__name__} is taken over by DQAR already")
    if not isinstance(module, _TakenOver):
        # Wrappers such as torch.compile's hand attributes on to the module inside: this one is their own.
        object.__setattr__(module, "__class__", _taken_over(original_class(module)))
    vars(module)[HANDLER] = handler


def give_back(module: torch.nn.Module) -> None:
    """Ends ``take_over``; does nothing if the module wasn't taken over."""
    vars(module).pop(HANDLER, None)
    if type(module).__bases__[0] is _TakenOver:  # else somebody derived another class from it meanwhile
        object.__setattr__(module, "__class__", type(module).__bases__[1])


@contextmanager
def taken_over(handlers: Mapping[torch.nn.Module, Handler]) -> Iterator[None]:
    """These modules' calls answered by handlers, until the block ends."""
    with ExitStack() as stack:
        for module, handler in handlers.items():
            take_over(module, handler)
            stack.callback(give_back, module)
        yield


def handler_of(module: torch.nn.Module) -> Handler | None:
    """The handler of a module that is taken over; else ``None``."""
    return vars(module).get(HANDLER) if isinstance(module, _TakenOver) else None


def original_class(module: torch.nn.Module) -> type:
    """The module's own class, whether or not it is taken over."""
    return type(module).__bases__[1] if type(module).__bases__[0] is _TakenOver else type(module)


class SchedulerWatch:
    """Tells its listeners of every ``set_timesteps`` and ``step`` of every diffusers scheduler.

    A transformer may serve several pipelines, and each may get another scheduler or a copy for each request. A
    scheduler itself must not change: neither its attributes, nor the signature of ``step`` that pipelines inspect, nor
    its copies and pickles. So the methods of the classes are wrapped while anybody listens. A ``step`` that somebody
    has set on a single scheduler is wrapped there.

    A listener has ``timesteps_set(scheduler)``, ``before_step(scheduler, given)``, with the arguments of ``step`` by
    name, and ``after_step(scheduler)``, called in the thread that steps the scheduler.
    """

    def __init__(self) -> None:
        self._listeners: weakref.WeakSet[Any] = weakref.WeakSet()
        # Owner, method name, original, wrapper, and the listener if the owner is a single scheduler.
        self._wrapped: list[tuple[Any, str, Any, Any, Any]] = []
        self._lock = threading.RLock()
        self._inside = threading.local()

    def listen(self, listener: Any, scheduler: Any = None) -> None:
        """Adds a listener, and watches ``scheduler``'s class too, even if it isn't from diffusers."""
        with self._lock:
            self._listeners.add(listener)
            self.look_around(listener, scheduler)

    def look_around(self, listener: Any, scheduler: Any = None) -> None:
        """Also watches scheduler classes, and a ``step`` of ``scheduler``, that have appeared since."""
        with self._lock:
            classes = (*_subclasses(SchedulerMixin), *(type(scheduler).__mro__ if scheduler is not None else ()))
            for owner in (*classes, *(() if scheduler is None else (scheduler,))):
                for name in ("set_timesteps", "step"):
                    method = vars(owner).get(name)
                    if callable(method) and not any(method is entry[3] for entry in self._wrapped):
                        self._wrap(owner, name, method, listener if owner is scheduler else None)

    def leave(self, listener: Any) -> None:
        """Removes a listener; after the last one every class is as before."""
        with self._lock:
            self._listeners.discard(listener)
            for entry in tuple(self._wrapped):
                owner, name, original, wrapper, for_whom = entry
                if for_whom is listener or (for_whom is None and not self._listeners):
                    self._wrapped.remove(entry)
                    if vars(owner).get(name) is wrapper:  # else another's is on top: this one is idle below it
                        setattr(owner, name, original)

    def _wrap(self, owner: Any, name: str, original: Callable[..., Any], for_whom: Any) -> None:
        inside = self._inside
        bound = owner if for_whom is not None else None

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if getattr(inside, "call", False) or not self._listeners:  # a class that calls its base's method
                return original(*args, **kwargs)
            scheduler, given = (args[0], args[1:]) if bound is None else (bound, args)
            listeners = tuple(self._listeners)
            inside.call = True
            try:
                if name == "step":
                    named = dict(zip(("model_output", "timestep", "sample"), given, strict=False)) | kwargs
                    for listener in listeners:
                        listener.before_step(scheduler, named)
                result = original(*args, **kwargs)
                for listener in listeners:
                    (listener.after_step if name == "step" else listener.timesteps_set)(scheduler)
            finally:
                inside.call = False
            return result

        self._wrapped.append((owner, name, original, wrapper, for_whom))
        setattr(owner, name, wrapper)


def _subclasses(cls: type) -> Iterator[type]:
    derived: type
    for derived in cls.__subclasses__():
        yield derived
        yield from _subclasses(derived)


WATCH = SchedulerWatch()
