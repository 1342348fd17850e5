"""Commands of analyze.py that join several rooms; each has add_arguments and run."""
