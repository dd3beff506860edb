"""The checkpoint files of a run folder as bytes: named, written, rotated, found."""
