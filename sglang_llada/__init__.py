"""SGLang plugin that serves LLaDA2 block-diffusion language models."""

__version__ = "0.1.0"
