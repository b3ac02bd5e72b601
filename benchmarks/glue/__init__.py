"""The GLUE report: train, select, export, serve on the real Triton, write down what it gave."""
