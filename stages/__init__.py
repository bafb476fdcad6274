"""The model cut into stages: plain modules, their KV cache, attention, sampling and weights.

Knows torch and nothing of the engine, of processes or of links. Imports only `pipeserve.errors`.
"""
