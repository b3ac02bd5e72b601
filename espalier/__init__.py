"""Espalier: many NLP tasks on one frozen BERT trunk, served as one Triton ensemble.

This package is the vocabulary that every other one imports: task specs, the encoder, branch files and the
model-repository contract. Importing it needs none of the extras.
"""

__version__ = "0.1.0"
