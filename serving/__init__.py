"""Serving: the embedded Triton and the Python-based `onnxruntime` backend that it runs models with."""
