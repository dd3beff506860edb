"""Accuracy: runs of main.py that are compared with each other, and the pages that say what came out."""
