"""Weights and activations of one mind in the other: single Units, sets, the smallest of them, and repair."""
