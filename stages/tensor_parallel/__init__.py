"""A stage shared by several ranks: what each of them holds, and how they add up what they compute.

A stage of one rank knows none of it, and only where there are more is megatron-core imported.
"""
