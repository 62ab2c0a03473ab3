"""Expert placement for Mixture-of-Experts models: routing traces in, placement plans out.

The offline half of ExFlow. It needs numpy, scipy, networkx, safetensors and tqdm, never torch,
and starts in a blink on a login node: `python -m placement --help`.
"""
