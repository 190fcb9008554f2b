"""A web page to look into a model: what it expects, why, and how it came to that."""
