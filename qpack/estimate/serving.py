"""Memory to serve a packed model with vLLM.

Sources: vLLM 0.32 (``config/cache.py``, ``v1/kv_cache_interface.py``); bitsandbytes 0.50
(``autograd/_functions.py``); multi-head latent attention, arXiv 2405.04434, section 2.1.
"""

from qpack.estimate.model import Model
from qpack.estimate.need import ALLOWANCE, Need

SERVING_SHARE = 0.92
"""Of a GPU that the engine takes: vLLM's default ``gpu_memory_utilization``."""

STEP_TOKENS = 2048
"""In one forward pass of the engine: vLLM's default ``max_num_batched_tokens``."""


def serving(model: Model, *, length: int | None = None, batch: int = 1, slots: int = 0, rank: int = 0) -> Need:
    """To serve ``batch`` sequences of ``length`` tokens (the model's longest by default, 8192 at most) on one GPU.

    - KV cache: ``cached * layers`` values of 2 bytes a token (``AttentionSpec``: 2 * kv_heads * head_dim a layer).
    - engine: the largest weight dequantized to 16 bits (`MatMul4Bit` for more than one row), one step's tokens through
      one layer in 16 bits, the logits of one token a sequence in f32, and the allowance.
    - adapter slots: both factors of every linear weight and of the output embedding, of ``rank`` and in 16 bits, for
      each of the ``slots`` (``vllm/lora/layers``).
    """
    length = min(model.max_length, 8192) if length is None else length
    step = min(STEP_TOKENS, length * batch)
    activations = 2 * step * (2 * model.hidden_size + model.in_layer(lambda rows, columns: rows + columns))
    parts = {
        "weights": model.bytes(),
        "KV cache": 2 * model.cached * model.layers * length * batch,
        "engine": ALLOWANCE + 2 * model.largest + activations + 4 * batch * model.vocab_size,
    }
    if slots:
        inside = sum(rows + columns for rows, columns in model.linears.values() if rows != model.vocab_size)
        parts["adapter slots"] = 2 * slots * rank * (inside + model.vocab_size + model.hidden_size)
    return Need(f"serve {batch} x {length} tokens", parts, share=SERVING_SHARE)
