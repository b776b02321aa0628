"""Measuring a run: gold rewards, generation, preference accuracy and the fidelity of token rewards."""
