"""The network, its two objectives, and the folder it is saved in."""
