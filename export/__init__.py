"""From branch files to a model repository: packed trunk segments and folded heads as ONNX. Needs the extra `export`."""
