"""How an answer came, step by step: asked of a server, kept in a file, shown as a page or as a picture."""
