"""Parts that know nothing of models or data; only run_state.py and keeper.py stand above the engine."""
