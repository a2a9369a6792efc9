"""The verifier: a grading service on math-verify that cannot be hung by what it grades. Start with `service.py`."""
