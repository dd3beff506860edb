"""The parts of tools/report.py: reading run folders, charts, the classes' results, example images, the page."""
