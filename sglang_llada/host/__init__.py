"""The only package that imports sglang: seams, platform, model class, executor and scheduler."""
