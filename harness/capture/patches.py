"""What the plugin changes in vLLM: one table, checked against the installed vLLM before anything is changed.

Each entry names its target, why no official extension point does, and when it can go. A target is wrapped only if its
signature is the pinned one; otherwise `install` raises and nothing of vLLM is changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SUPPORTED = ("0.32", "0.33")
"""Releases of vLLM (major.minor) whose source was read and on which the suites ran."""

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class UnsupportedVLLMError(RuntimeError):
    """The installed vLLM is not one that the plugin knows."""


@dataclass(frozen=True)
class Patch:
    """One function of vLLM that the plugin wraps.

    Attributes:
        module: that defines the target; also the file upstream, `module.replace(".", "/") + ".py"`.
        name: of the target in it, `Class.method`.
        parameters: names of the target's parameters, in order, as in every supported release.
        wrap: makes the replacement from the original.
        why: what it is for, and why an extension point of vLLM does not do.
        remove_when: what upstream would have to offer.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    wrap: Wrap
    why: str
    remove_when: str


def vllm_version() -> str:
    """Version of the installed vLLM, from vLLM itself (its distribution has several names).

    Raises:
        UnsupportedVLLMError: not one of SUPPORTED.
    """
    version = str(importlib.import_module("vllm.version").__version__)
    if not any(version == known or version.startswith(known + ".") for known in SUPPORTED):
        raise UnsupportedVLLMError(
            f"vllm-mm-embedding supports vLLM {' and '.join(SUPPORTED)} and found {version}: install one of them, "
            "uninstall vllm-mm-embedding, or leave it out with VLLM_PLUGINS."
        )
    return version


def install(patches: Iterable[Patch]) -> None:
    """Wraps every target that is not wrapped yet; all of them or, on an error, none.

    Raises:
        UnsupportedVLLMError: a target is missing or has another signature.
    """
    found = [(patch, *_resolve(patch)) for patch in patches]
    for patch, owner, original in found:
        if _patch_of(original) is not None:
            continue
        function = original.__func__ if isinstance(original, classmethod | staticmethod) else original
        replacement = patch.wrap(function)
        replacement.__mm_embedding_patch__ = patch  # type: ignore[attr-defined]
        kind = type(original) if isinstance(original, classmethod | staticmethod) else (lambda f: f)
        setattr(owner, patch.name.rpartition(".")[2], kind(replacement))


def _patch_of(target: Any) -> Patch | None:
    return getattr(getattr(target, "__func__", target), "__mm_embedding_patch__", None)


def _resolve(patch: Patch) -> tuple[Any, Any]:
    """The owner of the target and the target as it stands in the owner's namespace, its signature checked."""
    owner: Any = importlib.import_module(patch.module)
    *path, attribute = patch.name.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    target = inspect.getattr_static(owner, attribute, None)
    if target is None:
        raise UnsupportedVLLMError(_changed(patch, "is gone"))
    if _patch_of(target) is None:
        parameters = tuple(inspect.signature(getattr(target, "__func__", target)).parameters)
        if parameters != patch.parameters:
            raise UnsupportedVLLMError(_changed(patch, f"takes {parameters} and not {patch.parameters}"))
    return owner, target


def _changed(patch: Patch, how: str) -> str:
    return (
        f"{patch.module}.{patch.name} of the installed vLLM {how}: install a vLLM release that vllm-mm-embedding "
        f"supports ({', '.join(SUPPORTED)}), unmodified."
    )


def when_imported(module: str, callback: Callable[[], None]) -> None:
    """Calls `callback` right after `module` is imported, or now if it is.

    For what must be there before vLLM's general plugins are loaded: `LLM(...)` binds its keyword arguments before that.
    """
    loaded = sys.modules.get(module)
    if loaded is None:
        sys.meta_path.insert(0, _Finder(module, callback))
    elif getattr(loaded.__spec__, "_initializing", False):
        _watch(loaded.__spec__, callback)  # its own imports brought us here
    else:
        callback()


class _WatchedSpec(ModuleSpec):
    """Tells when the import of its module is over: importlib then sets `_initializing` to False."""

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            callbacks = self.__dict__.pop("_mm_embedding_callbacks")
            if self.name in sys.modules:  # otherwise the import failed
                for callback in callbacks:
                    callback()


def _watch(spec: ModuleSpec | None, callback: Callable[[], None]) -> None:
    assert spec is not None
    spec.__dict__.setdefault("_mm_embedding_callbacks", []).append(callback)
    spec.__class__ = _WatchedSpec


class _Finder(MetaPathFinder):
    """Finds one module by the other finders, once, and watches its import."""

    def __init__(self, module: str, callback: Callable[[], None]) -> None:
        self._module = module
        self._callback = callback

    def find_spec(self, fullname: str, _path: Any, _target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        _watch(spec, self._callback)
        return spec
