"""Distributed decode: ranks, weights, experts, dispatcher, KV cache, scheduler, engine."""
