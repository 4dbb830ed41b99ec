"""CUDA graphs without CUDA, for tests."""
