"""Hides AVX-512 and AMX from vLLM, in every Python that has this folder on its PYTHONPATH.

vLLM asks torch.cpu which of its libraries the CPU can run, and torch asks the CPU itself: the variables of ATen and
oneDNN change neither, and leave vLLM with a library that asks oneDNN for what it was told not to do.
"""

import torch.cpu

for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
    setattr(torch.cpu, name, lambda: False)
