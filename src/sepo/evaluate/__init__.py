"""Evaluation: accuracy, gold rewards, generation, fidelity of token rewards, the frontier; answers, judges, scores."""
