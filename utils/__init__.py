"""Parts of the framework that know nothing of models or data."""
