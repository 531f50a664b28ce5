"""The GPU backend: the doors of ``reference.py`` in Triton. Imported when the first CUDA tensor arrives."""
