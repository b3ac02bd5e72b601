"""The Python-based `onnxruntime` backend: it serves the configs of Triton's C++ ONNX Runtime backend, unchanged.

Triton runs `model.py` where a backend directory has no shared library. What the C++ backend does with a config
is taken from its sources (triton-inference-server/backend and triton-inference-server/onnxruntime_backend).
"""
