"""Samples on their way to the model: sources, loaders, transforms, and checks of what is on the disk."""
