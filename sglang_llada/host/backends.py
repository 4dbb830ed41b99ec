"""Names of backends. Imports nothing of the host, which may be half imported when it asks for a platform."""

ATTENTION_BACKEND = "llada_rows"
# Attention backends that know diffusion rows, read the KV of a row's earlier blocks from the pool, are not causal for
# ENCODER_ONLY layers, and leave writing to the model where it asks for that.
ATTENTION_BACKENDS = ("flashinfer", "triton", "torch_native", ATTENTION_BACKEND)
RUN_ON_CPU = ("triton", "torch_native", ATTENTION_BACKEND)  # Triton's in its interpreter

CPU_ADAPTERS = "llada_rows"  # what multiplies by adapters (LoRA) there
# Of layers that may have an adapter, the host's names where they are not the checkpoint's.
HOST_NAMES = {"query_key_value": "qkv_proj", "dense": "o_proj"}
# Layers of feed-forward parts by the host's names, of which it takes adapters of routed experts for both or for none.
FEED_FORWARD = ("gate_up_proj", "down_proj")
