"""Evaluation: accuracy, gold rewards, generation, fidelity of token rewards, the reward-KL frontier; answers to benchmarks,
judges and win rates.
"""
