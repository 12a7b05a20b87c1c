"""The contract of capture: what a user may rely on, one sentence a clause. Tests name the clauses that they show."""

from __future__ import annotations

CLAUSES: dict[str, str] = {
    "C1": "`LLM`, `AsyncLLM`, `MultiModalConfig` and `vllm serve` all switch it on, and nothing else about the engine "
    "changes: same tokens, same logprobs, `enable_mm_embeds` as the user set it.",
    "C2": "A finished completion of a multimodal request carries `mm_embedding`: a contiguous CPU tensor of shape "
    "(num_features, hidden_size) in the engine's dtype, owned by the receiver.",
    "C3": "Rows are the request's items in prompt order, as many as their placeholders have embeddings; "
    "`mm_embedding_items` tells modality, start row, number of rows and identifier.",
    "C4": "A text-only request gets `None`; with capture off the attribute exists and is `None`.",
    "C5": "While streaming it is `None` until `finish_reason` is set, and the tensor on the final output, also when "
    "outputs merge for a slow consumer.",
    "C6": "Every way to finish carries it: length, `max_tokens=1`, EOS, stop token and stop string.",
    "C7": "Never lost and never partial: prefix-cache and encoder-cache hits, repeats, eviction, chunked prefill, "
    "a small encoder budget, preemption, n>1.",
    "C8": "Rows are cut to hidden_size; deepstack levels come on request as `mm_embedding_levels`.",
    "C9": "Precomputed `image_embeds` are returned as the language model got them; `prompt_embeds` are not part of it.",
    "C10": 'A request opts out with `extra_args={"return_mm_embedding": False}`, and nothing is copied for it.',
    "C11": "Everything is released on completion and on abort at any moment.",
    "C12": "What cannot work says so at start-up in one sentence that names the option; never a silent `None`.",
    "C13": "The HTTP API's JSON is unchanged unless a request asks for the embedding.",
    "C14": "Capture on costs nothing that a user can measure; installed but off it costs nothing at all.",
    "C15": "vLLM's own metrics show what is held and how often requests wait: `/metrics` and `LLM.get_metrics()`.",
}
"""Clause id to what it promises, in the order of the contract."""
