"""A small trainer that learns by trying: answers of a running server, a reward, a gradient step, new weights."""
