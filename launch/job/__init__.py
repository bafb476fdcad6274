"""A job of one command a machine: each process that its launcher starts finds its place and starts
the keepers of its ranks, and the first one runs the pipeline that they form.
"""
