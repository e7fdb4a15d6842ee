"""The alternating step of a GAN, its optimisers, and everything a resume needs."""
