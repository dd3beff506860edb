"""What happens during a run: the loop, evaluation, saving and what is watched. main.py alone imports it."""
