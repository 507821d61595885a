"""The models that are trained, and what computes them: loading, sharding, packing, log-probs.

Like the losses and optimisers, they import neither Ray nor Hydra, omegaconf or tensordict: batches are mappings of
tensors.
"""
