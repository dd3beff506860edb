"""Long Range Arena as a whole: run.sh trains and evaluates, table.py writes docs/lra.md from what it left."""
