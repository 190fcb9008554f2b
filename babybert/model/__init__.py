"""The network, its two objectives, and the operations that have several implementations."""
