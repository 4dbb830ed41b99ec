"""The host on a machine without an accelerator."""
