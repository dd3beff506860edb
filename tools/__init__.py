"""Small command-line programs over the same parts as main.py."""
