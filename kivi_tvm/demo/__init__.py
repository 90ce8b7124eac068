"""What `kivi-tvm demo` does: weights, prompt, generation and the table at its end."""
