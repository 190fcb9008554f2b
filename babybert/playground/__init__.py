"""A web page for exploring a model: its predictions, its tokens and attention, and its training history."""
