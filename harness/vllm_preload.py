"""Imported by the server that in-process engines are forked from: what they would each import for seconds."""

import vllm.entrypoints.llm
import vllm.v1.engine.core
import vllm.v1.engine.llm_engine
import vllm.v1.executor.uniproc_executor  # noqa: F401
from vllm.platforms import current_platform

current_platform.import_kernels()
