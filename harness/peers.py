"""Other ways to get at the embeddings, as arms of the benchmarks: vLLM's own, and what one would write first.

None of them returns what capture returns: the stock connectors keep the encoder's output for other engines, in files or
in memory that clients cannot find; a second pass encodes everything again; the in-band prototype blocks the engine and
sends the rows through its sockets as bytes.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from harness import load
from harness.engine_process import Server
from harness.reference import Reference

SECOND_PASS = f"{__name__}:mark_second_pass"
"""Setup (EngineSpec) of the engine whose requests are encoded again."""

PEERS: dict[str, dict[str, Any]] = {
    "ECExampleConnector": {"ec_connector": "ECExampleConnector"},
    "ECCPUConnector": {"ec_connector": "ECCPUConnector", "ec_connector_extra_config": {"ec_cpu_bytes": 4 << 30}},
    "in-band prototype": {"ec_connector": "InBandConnector", "ec_connector_module_path": "harness.in_band"},
    "second pass": {},
}
"""Arguments of ECTransferConfig beside its role, by the peer's name; none for an engine with the setup SECOND_PASS."""


def mark_second_pass() -> None:
    """Does nothing: vLLM itself stays as it is."""


async def run(server: Server) -> load.Sample:
    """As load.run, with the second pass where the engine is marked for it."""
    sample = await load.run(server)
    if server.spec.setup != SECOND_PASS:
        return sample
    encode = _second_pass(server)
    began = time.perf_counter()
    rows = [encode(request) for request in load.prepared(server).requests]
    return dataclasses.replace(
        sample, seconds=sample.seconds + time.perf_counter() - began, rows=sum(len(each) for each in rows)
    )


def _second_pass(server: Server) -> Any:
    """Encodes a request's images with Hugging Face's processor and encoder, on the GPU if there is one."""
    reference: Reference | None = server.__dict__.get("reference")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reference is None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        reference = server.__dict__["reference"] = Reference(Path(server.spec.model), dtype, device=device)

    def encode(request: Any) -> torch.Tensor:
        images = request.prompt["multi_modal_data"]["image"]
        inputs = reference.processor.image_processor(images=images, return_tensors="pt")
        return reference.encode("image", inputs).rows

    return encode
