# The wiring service: no GPU, no torch. The build context is the repository's root.
FROM python:3.11-slim

COPY . /src
RUN pip install --no-cache-dir --constraint /src/constraints.txt '/src[wire]'
