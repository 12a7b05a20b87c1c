"""The vLLM plugin that returns the multimodal encoder's embeddings with each completion.

vLLM calls the two functions below through entry points, in every one of its processes and possibly several times.
Neither is called where `VLLM_PLUGINS` leaves the plugin out. Nothing is checked at import: vLLM passes over a plugin's
import error with a line in the log, and "on" would silently mean "off".
"""

from __future__ import annotations

import functools


def _is_native() -> bool:
    """Whether the installed vLLM has the feature itself."""
    import dataclasses

    from vllm.config.multimodal import MultiModalConfig

    return any(field.name == "enable_return_mm_embedding" for field in dataclasses.fields(MultiModalConfig))


def register_arguments() -> None:
    """Entry point of the group `vllm.platform_plugins`: the options, early.

    `LLM(...)` binds its keyword arguments before it loads general plugins; this group is loaded during
    `import vllm.config`. Returns None, which tells vLLM that this is no platform.
    """
    from harness.capture import arguments
    from harness.capture.patches import when_imported

    def unless_native(install: object) -> None:
        if not _is_native():
            install()  # type: ignore[operator]

    when_imported("vllm.config.multimodal", lambda: unless_native(arguments.install_options_on_multimodal_config))
    when_imported("vllm.engine.arg_utils", lambda: unless_native(arguments.install_options_on_engine_args))


def register() -> None:
    """Entry point of the group `vllm.general_plugins`: the whole plugin.

    Raises:
        UnsupportedVLLMError: the installed vLLM is not one that the plugin knows; nothing was changed.
    """
    if _is_native():
        return
    from harness.capture import patches

    patches.vllm_version()  # the other modules import what only known versions have
    from harness.capture import arguments, engine_core, frontend, http

    arguments.install_options_on_multimodal_config()
    arguments.install_options_on_engine_args()
    patches.install((*engine_core.PATCHES, *frontend.PATCHES))
    engine_core.install_stats()
    for patch in (*frontend.OFFLINE_PATCHES, *http.PATCHES):  # of modules that not every process imports
        patches.when_imported(patch.module, functools.partial(patches.install, [patch]))
    frontend.install_fields()
