"""Evaluation of a model on a benchmark: `python eval.py --config=configs/eval.py:videomme ...`."""
