"""The parts of tools/prepare_lra.py: generators, the official file formats, the token cache, a run of the tool."""
