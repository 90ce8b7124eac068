"""kivi-tvm: a 2-bit KV cache for LLM decoding, compiled with TVM TensorIR."""
