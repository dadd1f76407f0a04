"""Expert layouts: which rank holds which copy of which expert, the policies that choose it, and what a change moves.

L MoE layers, N ranks of an expert-parallel group, S slots of a rank, E logical experts, G nodes.
"""
