"""Which decode setting suits whose prompts: put to a running server at several settings, counted, compared, drawn."""
